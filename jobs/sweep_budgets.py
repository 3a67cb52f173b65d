"""Sweep mixture budgets, or any other field, over whole loops.

ray job submit --working-dir . -- python jobs/sweep_budgets.py run.yaml \
    placement.run_dir=/data/autoscale/sweeps/budgets sweep.loop.budget=350,700,1400

Choices: one trial is one loop; embeddings and clusters are computed once and shared; poor trials stop early by the
score of their rounds; the sweep goes on where it was killed.
"""

import sys

from autoscale_ray.distributed.jobs import sweep_budgets

if __name__ == "__main__":
    sys.exit(sweep_budgets(sys.argv[1:]))
