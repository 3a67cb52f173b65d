"""Nothing unaccounted (promise P6): generated scenes, one in a hundred bad, through an ingest killed on the way.

    OMP_NUM_THREADS=1 python -m benchmarks.bench_ledger --scenes 1000000 --kills 5 --check --json out.json

The source are SUMO files written here: cars on eight far-apart roads, one window every 7.5 s, so that windows share no
frame and what is planted in one shows in that one alone. Nine kinds of damage, files cut short, and an ingest killed at
drawn times and started again. Afterwards the ids in the pool and in its quarantine table are compared, as sets, with
those that the generator knows; the bytes of a second, undisturbed ingest of the same files have to be the same
(`--quick`, 10^4 scenes).
"""

from __future__ import annotations

import argparse
import gzip
import json
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from benchmarks.surroundings import common_parser, surroundings, tell, verdict

INTERVAL_S, SPAN_S = 0.5, 600.0
NUM_ROADS, ROAD_GAP_M = 8, 300.0
ROAD_LENGTH_M, EDGE_LENGTH_M = 6400, 200
FRAMES_PER_SCENE, FIRST_ANCHOR = 15, 4
SCENES_PER_CAR = int((SPAN_S / INTERVAL_S - FIRST_ANCHOR - 8 - 1) // FRAMES_PER_SCENE) + 1
SCENES_PER_FILE = NUM_ROADS * SCENES_PER_CAR
BAD_SHARE = 0.01
SPEED_MPS = 10.0
MAX_RSS_MIB = 1536.0
WINDOW_KINDS = (
    "too fast",
    "too sharp",
    "jump ahead",
    "jump aside",
    "turned at once",
    "turned away",
    "reversed at once",
)
CAR_KINDS = {"too long": "long", "too thin": "thin"}
"""Kinds of damage; beside these, files that hold the same recording, and files cut short."""


@dataclass
class Expected:
    """What the generator knows: the outcome of every scene."""

    good: set[str] = field(default_factory=set)
    bad: dict[str, str] = field(default_factory=dict)
    repeated: int = 0
    unreadable: set[str] = field(default_factory=set)


def write_source(folder: Path, num_scenes: int, seed: int, num_cut: int = 3) -> Expected:
    """Write files with `num_scenes` scenes (rounded up to whole files), and as many again as are repeated or cut."""
    expected = Expected()
    folder.mkdir(parents=True)
    (folder / "roads.net.xml").write_text(_net())
    num_files = -(-num_scenes // SCENES_PER_FILE)
    for number in range(num_files):
        name = f"t{number:05d}"
        part = folder / f"{number // 100:03d}"
        if not part.exists():
            part.mkdir()
            for kind in ("net", "rou"):
                (part / f"roads.{kind}.xml").write_text(_net() if kind == "net" else _ROUTES)
        # The reader takes vehicle types from the routes of the same name.
        (part / f"{name}.rou.xml").write_text(_ROUTES)
        text = _fcd(name, np.random.default_rng([seed, number]), expected)
        (part / f"{name}.fcd.xml.gz").write_bytes(gzip.compress(text.encode(), 1))
    _repeat_and_cut(folder, num_files, num_cut, expected)
    return expected


def _repeat_and_cut(folder: Path, num_files: int, num_cut: int, expected: Expected) -> None:
    first = folder / "000" / "t00000.fcd.xml.gz"
    again = folder / "zzz"
    again.mkdir()
    (again / "roads.net.xml").write_text(_net())
    shutil.copy(first.with_name("t00000.rou.xml"), again)
    shutil.copy(first, again)
    expected.repeated = sum("/t00000/" in key for key in expected.good)
    for number in range(num_cut):
        content = first.read_bytes()
        name = again / f"cut{number}.fcd.xml.gz"
        name.write_bytes(content[: len(content) * (number + 1) // (num_cut + 1)])
        expected.unreadable.add(str(name.relative_to(folder)))


def _net() -> str:
    """Return a network of straight roads, each of edges that follow one another."""
    edges, links = [], []
    for road in range(NUM_ROADS):
        y = road * ROAD_GAP_M
        for number, x in enumerate(range(0, ROAD_LENGTH_M, EDGE_LENGTH_M)):
            edge = f"r{road}e{number}"
            lane = f'<lane id="{edge}_0" index="0" speed="13.9" shape="{x},{y} {x + EDGE_LENGTH_M},{y}"/>'
            edges.append(f'<edge id="{edge}">{lane}</edge>')
            links.append(f'<connection from="{edge}" to="r{road}e{number + 1}" fromLane="0" toLane="0"/>')
    return f"<net>{''.join(edges)}{''.join(links)}</net>"


_ROUTES = (
    '<routes><vType id="car" length="4.5" width="1.8"/><vType id="long" length="60" width="1.8"/>'
    '<vType id="thin" length="4.5" width="0.1"/></routes>'
)


def _fcd(name: str, generator: np.random.Generator, expected: Expected) -> str:
    """Return one file, and note the outcome of its scenes."""
    num_frames = round(SPAN_S / INTERVAL_S)
    rows = []
    for car in range(NUM_ROADS):
        values, kind = _car(f"{name}/{name}-0/{car}", num_frames, generator, expected)
        values[:, 1] += car * ROAD_GAP_M
        rows.append((kind, values))
    steps = []
    for frame in range(num_frames):
        vehicles = "".join(
            f'<vehicle id="{car}" x="{v[frame, 0]:.2f}" y="{v[frame, 1]:.2f}" angle="{v[frame, 2]:.1f}" type="{kind}" '
            f'speed="{v[frame, 3]:.2f}" acceleration="{v[frame, 4]:.2f}"/>'
            for car, (kind, v) in enumerate(rows)
        )
        steps.append(f'<timestep time="{frame * INTERVAL_S:.2f}">{vehicles}</timestep>')
    return f"<fcd-export>{''.join(steps)}</fcd-export>"


def _car(
    recording: str, num_frames: int, generator: np.random.Generator, expected: Expected
) -> tuple[np.ndarray, str]:
    """Return x, y, angle, speed, acceleration by frame, and the vehicle type."""
    values = np.zeros((num_frames, 5))
    values[:, 0] = 20.0 + SPEED_MPS * INTERVAL_S * np.arange(num_frames)
    values[:, 2], values[:, 3] = 90.0, SPEED_MPS
    of_car = list(CAR_KINDS)[generator.integers(2)] if generator.random() < BAD_SHARE / 5.0 else None
    for scene in range(SCENES_PER_CAR):
        anchor = FIRST_ANCHOR + scene * FRAMES_PER_SCENE
        key = f"sumo/{recording}/{round(anchor * INTERVAL_S * 1e3)}"
        kind = of_car
        if kind is None and generator.random() < BAD_SHARE * 4.0 / 5.0:
            kind = WINDOW_KINDS[generator.integers(len(WINDOW_KINDS))]
            _spoil(values, kind, anchor + int(generator.integers(1, 7)))
        if kind is None:
            expected.good.add(key)
        else:
            expected.bad[key] = kind
    return values, CAR_KINDS.get(of_car or "", "car")


def _spoil(values: np.ndarray, kind: str, frame: int) -> None:
    """Plant one kind of damage at a frame."""
    column, change = {
        "too fast": (3, 60.0),
        "too sharp": (4, 25.0),
        "jump ahead": (0, 12.0),
        "jump aside": (1, 12.0),
        "turned at once": (2, 100.0),
        "turned away": (2, 55.0),
        "reversed at once": (2, 180.0),
    }[kind]
    values[frame, column] += change


def compare(pool: Path, expected: Expected) -> dict[str, int]:
    """Compare pool and quarantine table with what the generator knows; every count but the first four must be 0."""
    from autoscale_ray.scenes.parquet import read_parquet

    kept_list = [
        key
        for file in sorted(pool.glob("scenes-*.parquet"))
        for key in read_parquet(file, ["scene_id"])["scene_id"].to_pylist()
    ]
    rows = read_parquet(pool / "quarantine.parquet").to_pylist()
    kept, by_id = set(kept_list), [row for row in rows if row["element"].startswith("sumo/")]
    twice = [row for row in by_id if row["rule"].startswith("scene_id must be unique")]
    refused = {row["element"] for row in by_id if row not in twice} if len(twice) < 10_000 else set()
    files = {row["file"] for row in rows if not row["element"].startswith("sumo/")}
    # A bad scene of the file that stands twice is refused twice.
    return {
        "kept": len(kept),
        "quarantined": len(refused),
        "repeated": len(twice),
        "unreadable_files": len(files),
        "good_lost": len(expected.good - kept),
        "bad_kept": len(kept & set(expected.bad)),
        "bad_not_quarantined": len(set(expected.bad) - refused),
        "good_quarantined": len(refused & expected.good),
        "unknown": len((kept | refused) - expected.good - set(expected.bad)),
        "twice_in_pool": len(kept_list) - len(kept),
        "repeats_missed": abs(len(twice) - expected.repeated),
        "unreadable_missed": len(files ^ expected.unreadable),
        "without_reason": sum(not row["rule"] for row in rows),
    }


ACCOUNTS = ("kept", "quarantined", "repeated", "unreadable_files")
_CHILD = """
import sys, json, resource, torch
torch.set_num_threads(1)
from autoscale_ray.scenes.ingest import ingest
from autoscale_ray.scenes.windows import WindowOptions
manifest = ingest("sumo", sys.argv[1], sys.argv[2], "synthetic", options=WindowOptions(stride_s=7.5))
use = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps({"rss_mib": use.ru_maxrss / 1024, "cpu_s": use.ru_utime + use.ru_stime,
                  "content_hash": manifest.content_hash, "num_scenes": manifest.num_scenes}))
"""


def run_ingest(source: Path, pool: Path, kill_after_s: float | None = None) -> dict | None:
    """Ingest in a fresh process; with a time, end it by SIGKILL then, and return None unless it was done before."""
    child = subprocess.Popen([sys.executable, "-c", _CHILD, str(source), str(pool)], stdout=subprocess.PIPE)
    try:
        reply, _ = child.communicate(timeout=kill_after_s)
    except subprocess.TimeoutExpired:
        child.kill()
        child.communicate()
        return None
    if child.returncode != 0:
        raise RuntimeError(f"the ingest ended with {child.returncode}")
    return json.loads(reply)


def main() -> int:
    """Run the benchmark; return 1 when something is unaccounted for under --check."""
    parser = common_parser(__doc__, quick="10^4 scenes, and a second ingest to compare with")
    parser.add_argument("--scenes", type=int, default=1_000_000)
    parser.add_argument(
        "--kills", type=int, default=5, help="times that the ingest is killed before it may end"
    )
    parser.add_argument(
        "--kill-after-s", type=float, nargs=2, default=(20.0, 60.0), help="range that times are drawn from"
    )
    parser.add_argument("--folder", type=Path, help="where the files go; a temporary folder by default")
    arguments = parser.parse_args()
    result = run(arguments)
    tell(result, arguments.json)
    missed = [
        f"{name} {count} 0" for name, count in result["ledger"].items() if name not in ACCOUNTS and count
    ]
    missed += [f"rss_mib {result['rss_mib']:.0f} {MAX_RSS_MIB:.0f}"] * (result["rss_mib"] > MAX_RSS_MIB)
    missed += ["same_hash_undisturbed 0 1"] * (result.get("same_hash_undisturbed") is False)
    return verdict(missed, check=arguments.check)


def run(arguments: argparse.Namespace) -> dict:
    """Write the source, ingest it under kills, compare."""
    num_scenes = 10_000 if arguments.quick else arguments.scenes
    generator = np.random.default_rng([arguments.seed, 1])
    with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
        source, pool = Path(scratch) / "source", Path(scratch) / "pool"
        expected = write_source(source, num_scenes, arguments.seed)
        kills = 0
        low, high = (2.0, 6.0) if arguments.quick else arguments.kill_after_s
        begin = time.monotonic()
        done = None
        while done is None:
            after_s = float(generator.uniform(low, high)) if kills < arguments.kills else None
            done = run_ingest(source, pool, after_s)
            kills += done is None
        result = {"seed": arguments.seed, "kills": kills, "wall_s": time.monotonic() - begin, **done}
        result |= {"ledger": compare(pool, expected), "bad_by_kind": _counts(expected.bad)}
        result |= surroundings("pyarrow", "numpy", "lxml", "shapely")
        if arguments.quick:
            whole = run_ingest(source, Path(scratch) / "whole")
            assert whole is not None
            result["same_hash_undisturbed"] = whole["content_hash"] == done["content_hash"]
    return result


def _counts(bad: dict[str, str]) -> dict[str, int]:
    names, counts = np.unique(list(bad.values()), return_counts=True)
    return dict(zip(names.tolist(), counts.tolist(), strict=True))


if __name__ == "__main__":
    sys.exit(main())
