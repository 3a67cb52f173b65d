"""Train the encoder and embed the pools of a run, without its loop.

ray job submit --working-dir . -- python jobs/embed_pools.py run.yaml placement.run_dir=/data/autoscale/runs/first

Choices: the same configuration as the run, which then finds its embeddings and clusters finished; a killed job goes on
with the row ranges that are missing.
"""

import sys

from autoscale_ray.distributed.jobs import embed_pools

if __name__ == "__main__":
    sys.exit(embed_pools(sys.argv[1:]))
