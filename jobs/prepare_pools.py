"""Open the pools of a run, or draw those of the built-in world, and build their memory-mapped caches.

ray job submit --working-dir . -- python jobs/prepare_pools.py run.yaml placement.run_dir=/data/autoscale/runs/first

Choices: done once before the first run, so that no worker waits for a cache that another one builds.
"""

import sys

from autoscale_ray.distributed.jobs import prepare_pools

if __name__ == "__main__":
    sys.exit(prepare_pools(sys.argv[1:]))
