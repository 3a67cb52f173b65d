"""What every result file tells about its origin: command, commit, processor, load, versions."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def surroundings(*packages: str) -> dict[str, Any]:
    """Return where and with what a benchmark runs; `packages` are those whose versions matter to it."""
    return {
        "command": sys.argv,
        "commit": commit(),
        "processor": processor(),
        "load_average": list(os.getloadavg()),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
    }


def commit() -> str:
    """Return the short hash of the commit that is checked out, with a plus sign where files differ from it."""
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty=+"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return described.stdout.strip()


def processor() -> str:
    """Return the processor's name."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
