"""The scorer imports without Ray, faiss, pyarrow, numba, scipy or shapely."""

from __future__ import annotations

import subprocess
import sys


def test_importing_the_scorer_pulls_nothing_heavy():
    code = (
        "import sys, autoscale_ray.evaluation as e; "
        "print(sorted({'ray', 'faiss', 'pyarrow', 'numba', 'scipy', 'shapely'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
