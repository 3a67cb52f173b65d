"""Fabricate NAVSIM logs and a nuPlan map of realistic size for the ingest benchmark; no file of NAVSIM is used.

Sizes: a town of 169 junctions with 1248 lanes and 2296 lane connectors, a vertex each metre; logs of 30 s at 2 Hz with
eight cameras' entries and about 50 objects a frame. A log of 60 frames gives 47 scenes.
"""

from __future__ import annotations

import sys
from pathlib import Path

NUM_JUNCTIONS, SPACING_M, NUM_LANES = 13, 1.0, 2
NUM_LOGS, NUM_FRAMES, NUM_AGENTS = 40, 60, 60
NUM_SCENES = NUM_LOGS * (NUM_FRAMES - 13)


def write_source(folder: Path, seed: int) -> Path:
    """Write ``maps`` and ``logs``; return the folder with the logs."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "unit"))
    from scenes.navsim_files import frames_of, make_drive, write_log
    from scenes.navsim_town import make_town, write_maps

    town = make_town(NUM_JUNCTIONS, NUM_LANES, SPACING_M, seed=seed + 5)
    write_maps(town, folder / "maps")
    for number in range(NUM_LOGS):
        row = number % NUM_JUNCTIONS
        drive = make_drive(
            town,
            junctions=tuple((column, row) for column in range(NUM_JUNCTIONS)),
            num_frames=NUM_FRAMES,
            num_agents=NUM_AGENTS,
            speed=9.0,
            seed=seed * NUM_LOGS + number,
            name=f"2021.05.12.19.36.12_veh-35_{number:05d}_00204",
        )
        write_log(folder / "logs", frames_of(drive, with_cameras=True))
    return folder / "logs"
