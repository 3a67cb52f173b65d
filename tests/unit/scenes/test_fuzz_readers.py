"""Every reader on truncated, bit-flipped and reordered files; the long campaign writes a dated result file."""

from __future__ import annotations

import json
import os
import tempfile
import traceback
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autoscale_ray.scenes.readers import scenarionet
from scenes.fuzzing import damaged, read_pickle, read_source, timed_case
from scenes.reader_files import SOURCES, write

CASES = int(os.environ.get("AUTOSCALE_FUZZ_CASES", "100000"))
RESULT = os.environ.get("AUTOSCALE_FUZZ_RESULT")


@pytest.fixture(autouse=True)
def _pickles_in_this_process(monkeypatch):
    monkeypatch.setattr(scenarionet, "read_pickle", read_pickle)


@pytest.mark.parametrize("format", SOURCES)
def test_the_undamaged_source_gives_scenes(format, tmp_path):
    write(SOURCES[format](), tmp_path)
    counts = read_source(format, tmp_path)
    assert counts["kept"] >= 1
    assert counts["refused"] == counts["quarantined"] == 0


@pytest.mark.parametrize("format", SOURCES)
@settings(
    max_examples=60,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(seed=st.integers(0, 2**32 - 1))
def test_damaged_files_give_sound_scenes_or_one_refusal(format, seed):
    with tempfile.TemporaryDirectory() as folder:
        write(damaged(SOURCES[format](), np.random.default_rng(seed)), Path(folder))
        timed_case(format, Path(folder))


# Seeds that once ended in a traceback, by format; 11824: a track 1e18 frames long, 469: a lane 1e18 m long, 3637 and
# 5742: a link that its light does not have, 52: coordinates that overflow, 1920: a column name that is no text, 8476:
# 16-bit floats, 10449: a footer at which Arrow ends the process,
# 1156, 9147 and 12003: names, texts and dictionaries that Arrow hands on unchecked, 1121 and 4610: degrees
# beyond the pole, 2209: a line end inside a line.
FOUND = {
    "commonroad": (11824,),
    "sumo": (469, 656, 3637, 4905, 5742, 5988, 11479),
    "av2-sensor": (52, 1920, 8476, 9176, 9764, 11292),
    "av2-forecasting": (10449, 1156, 9147, 12003),
    "kitti": (1121, 3460, 5533),
    "interaction": (2209, 4610, 5056, 5214),
}


@pytest.mark.parametrize(("format", "seed"), [(format, seed) for format in FOUND for seed in FOUND[format]])
def test_what_fuzzing_found_stays_fixed(format, seed, tmp_path):
    write(damaged(SOURCES[format](), np.random.default_rng(seed)), tmp_path)
    timed_case(format, tmp_path)


def test_a_map_with_areas_and_no_lane_is_read(tmp_path):
    files = SOURCES["av2-sensor"]()
    name = "log/map/log_map_archive_x.json"
    files[name] = json.dumps({**json.loads(files[name]), "lane_segments": {}}).encode()
    write(files, tmp_path)
    assert read_source("av2-sensor", tmp_path)["kept"] >= 1


@pytest.mark.slow
@pytest.mark.timeout(20_000)
@pytest.mark.parametrize("format", SOURCES)
def test_long_campaign(format, tmp_path):
    """An equal share of CASES for each format; seeds are 0, 1, 2, ...; every fault is printed with its seed."""
    files, found, faults, slowest_s = SOURCES[format](), Counter(), [], 0.0
    num_cases = CASES // len(SOURCES)
    write(files, tmp_path)
    for seed in range(num_cases):
        changed = damaged(files, np.random.default_rng(seed))
        (name,) = [name for name in files if changed[name] != files[name]] or [next(iter(files))]
        (tmp_path / name).write_bytes(changed[name])
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                counts, took_s = timed_case(format, tmp_path)
            found[
                next(
                    kind
                    for kind in ("kept", "quarantined", "refused", "nothing")
                    if counts[kind] or kind == "nothing"
                )
            ] += 1
            slowest_s = max(slowest_s, took_s)
        except Exception:
            faults.append((seed, traceback.format_exc(limit=-3)))
        (tmp_path / name).write_bytes(files[name])
    row = {"format": format, "cases": num_cases, "faults": len(faults), "slowest_s": slowest_s, **found}
    print(json.dumps(row))
    if RESULT:
        with Path(RESULT).open("a") as file:
            file.write(json.dumps({**row, "first_faults": faults[:20]}) + "\n")
    assert not faults, faults[0]
