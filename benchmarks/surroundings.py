"""What benchmarks share: their common options, and what every result file tells about its origin."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def common_parser(
    about: str | None, *, quick: str, seed_help: str | None = None, seed: int = 0
) -> argparse.ArgumentParser:
    """Return a parser with the options of every benchmark; the first line of its module says what it is."""
    parser = argparse.ArgumentParser(description=(about or "").partition("\n")[0])
    parser.add_argument("--seed", type=int, default=seed, help=seed_help)
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--check", action="store_true", help="exit 1 and name every missed target")
    return parser


def tell(figures: Mapping[str, Any], path: Path | None) -> None:
    """Print the figures as JSON; write them to a file where one is asked for."""
    text = json.dumps(figures, indent=1)
    print(text)
    if path:
        path.write_text(text)


def verdict(missed: Sequence[str], *, check: bool) -> int:
    """Return the exit status; name every missed target where they are checked."""
    for line in missed if check else ():
        print(line)
    return int(check and bool(missed))


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
