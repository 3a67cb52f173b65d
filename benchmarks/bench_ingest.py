"""How fast and how frugally the recordings at hand become pools, and whether their window counts are the known ones.

    OMP_NUM_THREADS=1 python -m benchmarks.bench_ingest --data ../shared/data --check --json out.json

Each source is ingested by a fresh process whose peak memory is read at its end. The rival for CommonRoad is
commonroad-io reading the same files and handing their values over, plus our own time behind the reading; give the
Python of an environment that has it with --rival-python.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

from benchmarks.openscene_source import NUM_SCENES, write_source
from benchmarks.surroundings import common_parser, surroundings, tell, verdict

EXPECTED = {
    "commonroad/USA_US101": 2472,
    "commonroad/USA_Lanker": 961,
    "commonroad/CHN_Sha": 5700,
    "commonroad/DEU_Muc": 1543,
    "commonroad/2020a": 35,
    "sumo": 31325,
    "scenarionet": 183,
    "av2-sensor": 5,
    "av2-forecasting": 31,
    "kitti": 299,
    "interaction": 248,
    "navsim": NUM_SCENES,
}
"""Windows of moving egos, scenes and quarantined ones together; docs/data.md explains each difference to the source."""
MAX_WALL_S = 180.0
MAX_RSS_MIB = 1536.0
MIN_SPEEDUP = 10.0
ROUNDS = 7
MIN_OPENSCENE_PER_MINUTE = 5000.0
"""Scenes of fabricated OpenScene logs a minute on two cores, from the processor time of all processes."""
_SOURCES = (
    ("commonroad", "real/commonroad_ngsim/scenarios.zip", "real"),
    ("commonroad", "synthetic/commonroad_sumo/scenarios.zip", "synthetic"),
    ("commonroad", "synthetic/commonroad_sumo_2020a", "synthetic"),
    ("scenarionet", "real/nuscenes_mini_scenarionet", "real"),
    ("av2-sensor", "real/argoverse2/sensor", "real"),
    ("av2-forecasting", "real/argoverse2/motion_forecasting", "real"),
    ("kitti", "real/kitti_tracking", "real"),
    ("interaction", "real/fzi_taf_bw/datasets", "real"),
    ("sumo", "synthetic/sumo_generated", "synthetic"),
)
_RIVAL = """
import sys, time
import numpy as np
from commonroad.common.file_reader import CommonRoadFileReader

def values(scenario):
    for obstacle in scenario.dynamic_obstacles:
        later = obstacle.prediction.trajectory.state_list if obstacle.prediction else []
        states = [obstacle.initial_state, *later]
        rows = [(*s.position, s.orientation, s.velocity, s.time_step, getattr(s, "acceleration", None)) for s in states]
        yield np.array(rows, dtype=float), obstacle.obstacle_shape.length, obstacle.obstacle_shape.width
    for lane in scenario.lanelet_network.lanelets:
        yield lane.left_vertices, lane.right_vertices, lane.successor, lane.adj_left, lane.adj_right

spent = [0.0, 0.0]
for name in sys.argv[1:]:
    begin = time.process_time()
    scenario, _ = CommonRoadFileReader(name).open()
    read = time.process_time()
    list(values(scenario))
    spent = [spent[0] + read - begin, spent[1] + time.process_time() - read]
print(*[seconds / len(sys.argv[1:]) for seconds in spent])
"""


def main() -> int:
    """Run the benchmark; return 1 when a target is missed under --check."""
    parser = common_parser(
        __doc__, quick="leave out the large sources", seed_help="seed of the choice of files for the rival"
    )
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rival-python", type=Path, help="Python that has commonroad-io")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        return _child(*arguments.child, processes=arguments.processes)
    sources = [
        entry for entry in _SOURCES if not arguments.quick or ("zip" not in entry[1] and entry[0] != "sumo")
    ]
    rows = [_run(*entry, arguments) for entry in sources]
    if not arguments.quick:
        with tempfile.TemporaryDirectory() as folder:
            logs = write_source(Path(folder), arguments.seed)
            rows.append(_run("navsim", str(logs), "real", arguments) | {"path": "fabricated OpenScene logs"})
    result: dict[str, object] = {"sources": rows, "seed": arguments.seed} | surroundings(
        "torch", "pyarrow", "numpy", "lxml", "shapely"
    )
    if arguments.rival_python:
        result["commonroad_per_file"] = _against_rival(arguments)
    tell(result, arguments.json)
    return verdict(_missed(result, rows, complete=not arguments.quick), check=arguments.check)


def _missed(result: dict[str, object], rows: list[dict], *, complete: bool) -> list[str]:
    counts: dict[str, int] = {}
    for row in rows:
        for name, count in row["windows"].items():
            counts[name] = counts.get(name, 0) + count
    missed = [
        f"windows_{name} {counts[name]} {EXPECTED[name]}"
        for name in counts
        if counts[name] != EXPECTED.get(name)
    ]
    missed += [f"rss_mib_{row['path']} {row['rss_mib']:.0f} {MAX_RSS_MIB:.0f}" for row in rows
               if row["rss_mib"] > MAX_RSS_MIB]  # fmt: skip
    wall = sum(row["wall_s"] for row in rows if row["path"].endswith("zip"))
    if complete and wall > MAX_WALL_S:
        missed.append(f"commonroad_wall_s {wall:.0f} {MAX_WALL_S:.0f}")
    for row in rows:
        per_minute = 2 * 60.0 * row["scenes"] / row["cpu_s"]
        if "navsim" in row["windows"] and per_minute < MIN_OPENSCENE_PER_MINUTE:
            missed.append(f"openscene_scenes_per_minute {per_minute:.0f} {MIN_OPENSCENE_PER_MINUTE:.0f}")
    rival = result.get("commonroad_per_file")
    if isinstance(rival, dict) and rival["speedup"] < MIN_SPEEDUP:
        missed.append(f"commonroad_speedup {rival['speedup']:.1f} {MIN_SPEEDUP:.0f}")
    return missed


def _run(format: str, path: str, domain: str, arguments: argparse.Namespace) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.bench_ingest", "--processes", str(arguments.processes)]
        command += ["--child", format, str(arguments.data / path), f"{folder}/pool", domain]
        begin = time.monotonic()
        reply = subprocess.run(command, capture_output=True, text=True, check=True)
        return {"path": path, "wall_s": time.monotonic() - begin, **json.loads(reply.stdout.splitlines()[-1])}


def _child(format: str, path: str, out: str, domain: str, *, processes: int) -> int:
    import resource

    import torch

    from autoscale_ray.scenes.ingest import ingest
    from autoscale_ray.scenes.pool import open_pool
    from autoscale_ray.scenes.windows import WindowOptions

    torch.set_num_threads(1)
    options = WindowOptions(egos="all" if format == "scenarionet" else "recorder")
    files = {"maps": Path(path).parent / "maps"} if format == "navsim" else None
    manifest = ingest(format, path, out, domain, options=options, files=files, num_processes=processes)
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    quarantine = open_pool(out, allow_empty=True).side_table("quarantine")
    assert quarantine is not None
    names = [name.rsplit("/", 3)[0] for name in quarantine["element"].to_pylist()]
    windows: dict[str, int] = {}
    for name, count in [*manifest.counts["source"].items(), *((name, 1) for name in names)]:
        key = _key(format, path, name)
        windows[key] = windows.get(key, 0) + count
    print(json.dumps({
        "windows": windows,
        "scenes": manifest.num_scenes,
        "quarantined": manifest.num_quarantined,
        "cpu_s": sum(use.ru_utime + use.ru_stime for use in usage),
        "rss_mib": max(use.ru_maxrss for use in usage) / 1024.0,
        "content_hash": manifest.content_hash,
    }))  # fmt: skip
    return 0


def _key(format: str, path: str, source: str) -> str:
    if format != "commonroad":
        return format
    return source if path.endswith(".zip") else "commonroad/2020a"


def _against_rival(arguments: argparse.Namespace) -> dict[str, float]:
    """Compare CPU seconds a file on every eighth recorded scenario, the best of `ROUNDS` on both sides.

    Reading ends where a side has the file's values as arrays; for the rival that is its own reading and the taking of
    the values from its objects. What follows is the same for both: laying tracks end to end, the road map, windows,
    gates.
    """
    archive = arguments.data / "real/commonroad_ngsim/scenarios.zip"
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(archive) as file:
            names = sorted(file.namelist())[arguments.seed % 8 :: 8]
            file.extractall(folder, names)
        files = [Path(folder) / name for name in names]
        command = [str(arguments.rival_python), "-c", _RIVAL, *map(str, files)]
        _our_seconds(files)
        ours, theirs = [], []
        for _ in range(ROUNDS):
            # In turns, so that a machine whose load changes is the same for both.
            ours.append(_our_seconds(files))
            reply = subprocess.run(command, capture_output=True, text=True, check=True)
            theirs.append([float(value) for value in reply.stdout.split()])
    reading, conversion = (min(column) for column in zip(*ours, strict=True))
    rival_parse, rival_values = (min(column) for column in zip(*theirs, strict=True))
    return {
        "num_files": float(len(files)),
        "our_reading_s": reading,
        "our_conversion_s": conversion,
        "rival_parse_s": rival_parse,
        "rival_values_s": rival_values,
        "speedup": (rival_parse + rival_values + conversion) / (reading + conversion),
        "speedup_of_reading": (rival_parse + rival_values) / reading,
        "bound_by_conversion": (rival_parse + rival_values + conversion) / conversion,
    }


def _our_seconds(files: list[Path]) -> tuple[float, float]:
    """Return CPU seconds a file of reading, and of everything behind it."""
    import torch

    from autoscale_ray.scenes.gates import gate
    from autoscale_ray.scenes.readers import commonroad
    from autoscale_ray.scenes.windows import WindowOptions, cut_windows

    torch.set_num_threads(1)
    behind = [0.0]

    def timed(function: Callable) -> Callable:
        def call(*values: object) -> object:
            begin = time.process_time()
            result = function(*values)
            behind[0] += time.process_time() - begin
            return result

        return call

    shared = {"gather_tracks": commonroad.gather_tracks, "make_road_map": commonroad.make_road_map}
    try:
        for name, function in shared.items():
            setattr(commonroad, name, timed(function))
        begin = time.process_time()
        recordings = [next(commonroad.read(path, path.name)) for path in files]
        read = time.process_time()
    finally:
        for name, function in shared.items():
            setattr(commonroad, name, function)
    for recording in recordings:
        for table in cut_windows(recording, "real", WindowOptions()):
            gate(table, recording.name)
    after = time.process_time() - read
    return (read - begin - behind[0]) / len(files), (after + behind[0]) / len(files)


if __name__ == "__main__":
    sys.exit(main())
