"""Run the data loop on a cluster.

ray job submit --working-dir . -- python jobs/run_autoscale.py run.yaml placement.run_dir=/data/autoscale/runs/first

Choices: the run directory lies on storage that every node mounts; because it is fixed, it is safe to submit again: the
second start joins the driver, or goes on where the run stopped. Leave `--submission-id` out, or give a new one each
time: Ray refuses an id it has seen (`ray job delete` frees it once that job has ended). SIGTERM (`ray job stop`) ends
the run after the round in hand.
"""

import sys

from autoscale_ray.distributed.jobs import run_autoscale

if __name__ == "__main__":
    sys.exit(run_autoscale(sys.argv[1:]))
