"""Run the data loop on a cluster.

ray job submit --working-dir . --submission-id first -- \
    python jobs/run_autoscale.py run.yaml placement.run_dir=/data/autoscale/runs/first

Choices: the run directory lies on storage that every node mounts; submitting again goes on where the run stopped;
SIGTERM (`ray job stop`) ends it after the round in hand.
"""

import sys

from autoscale_ray.distributed.jobs import run_autoscale

if __name__ == "__main__":
    sys.exit(run_autoscale(sys.argv[1:]))
