"""The two demos as a newcomer runs them: wall time, CPU and memory of `make demo` and `make demo-real`.

python -m benchmarks.bench_demo --data DATA --check --json result.json

Targets: `make demo` under 5 min and 6 GiB, `make demo-real` under 20 min; installation is apart. Memory is the sum of
the resident sizes of all processes, which counts a shared page once for every process that maps it; beside it stands
the sum with every page counted once (PSS). The folders `demo` and `demo-real` must not be there, since a finished run
is not run again; they stay, to be looked at.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.process_meter import CpuMeter, MemoryMeter
from benchmarks.surroundings import ROOT, surroundings, tell

TARGETS = {
    "demo": {"wall_s": 300.0, "peak_rss_gib": 6.0},
    "demo-real": {"wall_s": 1200.0, "peak_rss_gib": 6.0},
}


def measure(target: str, *settings: str) -> dict[str, float]:
    """Run one make target to its end; return seconds and GiB.

    Raises:
        SystemExit: If the folder is there already or the command fails.
    """
    if (ROOT / target).exists():
        raise SystemExit(
            f"{ROOT / target}: is there already; move it away, a finished run would not run again"
        )
    memory, cpu, started = MemoryMeter(), CpuMeter(), time.perf_counter()
    ended = subprocess.run(["make", "--silent", target, *settings], cwd=ROOT, check=False)
    wall_s = time.perf_counter() - started
    if ended.returncode:
        raise SystemExit(f"make {target}: ended with code {ended.returncode}")
    return {"wall_s": wall_s, "cpu_s": cpu.stop(), **memory.stop()}


def main() -> int:
    parser = argparse.ArgumentParser(description="The demos as a newcomer runs them.")
    parser.add_argument(
        "--data", type=Path, help="folder with the recordings; without it demo-real is left out"
    )
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--check", action="store_true", help="exit 1 where a target is missed")
    options = parser.parse_args()
    settings = {"demo": (), "demo-real": (f"DATA={options.data}",)}
    subprocess.run(["make", "--silent", ".venv/cpu"], cwd=ROOT, check=True)
    figures = {
        target: measure(target, *settings[target])
        for target in options.targets
        if target == "demo" or options.data
    }
    tell(surroundings("torch", "ray") | figures, options.json)
    missed = [
        f"{target}_{name} {row[name]:.2f} {limit}"
        for target, row in figures.items()
        for name, limit in TARGETS[target].items()
        if row[name] > limit
    ]
    print("\n".join(missed))
    return int(options.check and bool(missed))


if __name__ == "__main__":
    sys.exit(main())
