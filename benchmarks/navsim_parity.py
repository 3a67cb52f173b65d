"""Compare this scorer with golden vectors of the official one; exits 0 only if every quantity agrees.

    python -m benchmarks.navsim_parity --golden DIR [--json FILE] [--backend auto|torch|numba] [--device cpu|cuda]

Prints the worst case of each quantity. "golden reference" rows use the golden PDM-Closed poses, "end to end" rows
run PDM-Closed as well.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from autoscale_ray.errors import InvalidInputError
from autoscale_ray.evaluation import (
    PreparedScene,
    ScoreResult,
    epdms,
    pdms,
    prepare_all,
    two_frame_extended_comfort,
    with_extended_comfort,
)
from autoscale_ray.evaluation.scoring import Metric
from benchmarks.golden_scenes import (
    Arrays,
    GoldenVersion,
    load_arrays,
    load_inputs,
    load_version,
    trajectories_with,
)
from benchmarks.parity_checks import (
    POSE_TOLERANCE_M,
    RULES,
    SCORE_TOLERANCE,
    Check,
    check_aggregation,
    check_history,
    check_observation,
    check_poses,
    check_reference,
    check_simulation,
    check_tracker,
    compare,
)

SCORE = {"v1": pdms, "v2": epdms}
PRODUCT_V2 = 4
"""The first four sub-scores of v2 multiply."""


@dataclass(frozen=True, slots=True, eq=False)
class Cases:
    """Results of the 8- and 40-waypoint cases of one version, read as one array (S, K, ...)."""

    golden: GoldenVersion
    is_coarse: np.ndarray
    coarse: ScoreResult
    fine: ScoreResult
    prefix: str

    def read(self, getter: Callable[[ScoreResult], torch.Tensor]) -> np.ndarray:
        """Return one quantity of every case."""
        shape = self.is_coarse.shape
        coarse, fine = (_per_case(getter(result).cpu().numpy(), shape) for result in (self.coarse, self.fine))
        return np.where(self.is_coarse.reshape(*shape, *[1] * (coarse.ndim - 2)), coarse, fine)

    def check(
        self, name: str, getter: Callable[[ScoreResult], torch.Tensor], tolerance: float = SCORE_TOLERANCE
    ) -> Check:
        """Compare one quantity with the golden one of that name."""
        return compare(self.prefix + name, self.read(getter), self.golden.outputs[name], tolerance)


def check_scores(
    inputs: Arrays,
    golden: GoldenVersion,
    prepared: Sequence[PreparedScene],
    label: str,
    options: dict[str, str],
) -> list[Check]:
    """Compare every sub-score, raw and filtered, every final score and the measures behind them."""
    coarse, fine = (
        SCORE[golden.version](
            prepared,
            trajectories_with(inputs, golden.scene_rows, count),
            keep_states=True,
            backend=options["backend"],
            device=options["device"],
        )
        for count in (8, 40)
    )
    is_coarse = inputs["traj_n"][golden.scene_rows] == 8
    cases = Cases(golden, is_coarse, coarse, fine, f"{golden.version} {label}: ")
    checks = _sub_score_checks(cases) + _measure_checks(cases, prepared)
    return checks + (_final_checks_v2(cases) if golden.version == "v2" else [])


def _per_case(value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Reshape (S, K, ...) or (S * K, ...) to (S, K, ...)."""
    tail = value.shape[2:] if value.shape[:2] == shape else value.shape[1:]
    return value.reshape(*shape, *tail)


def _sub_score_checks(cases: Cases) -> list[Check]:
    checks = []
    for name in cases.coarse.raw:
        checks.append(cases.check(f"raw_{name}", lambda result, name=name: result.raw[name].value))
        if f"filtered_{name}" in cases.golden.outputs:
            checks.append(
                cases.check(f"filtered_{name}", lambda result, name=name: result.filtered[name].value)
            )
    final = "raw_score" if cases.golden.version == "v1" else "raw_pdm_score"
    return [*checks, cases.check(final, lambda result: result.raw_score.value)]


def _measure_checks(cases: Cases, prepared: Sequence[PreparedScene]) -> list[Check]:
    outputs, prefix = cases.golden.outputs, cases.prefix
    fields = {
        "progress_raw": "progress_m",
        "collision_time_idx": "collision_step",
        "ttc_time_idx": "ttc_step",
        "comfort_flags": "comfort_flags",
        "ego_areas": "ego_areas",
    }
    checks = [
        cases.check(name, lambda result, field=field: getattr(result.measures, field))
        for name, field in fields.items()
    ]
    shape = outputs["pdm_progress_raw"].shape
    reference = {
        "pdm_progress_raw": np.array([scene.reference_progress_m for scene in prepared]),
        "pdm_multi_prod": np.array([scene.reference_multiplier for scene in prepared]),
    }
    for name, value in reference.items():
        ours = np.broadcast_to(value[:, None], shape)
        checks.append(compare(prefix + name, ours, outputs[name], SCORE_TOLERANCE))
    return [*checks, cases.check("sim_states", _states, POSE_TOLERANCE_M)]


def _states(result: ScoreResult) -> torch.Tensor:
    assert result.states is not None
    return result.states


def _final_checks_v2(cases: Cases) -> list[Check]:
    outputs, prefix = cases.golden.outputs, cases.prefix
    comfort = _extended_comfort(cases)
    names = list(cases.coarse.filtered)
    filtered = {name: cases.read(lambda result, name=name: result.filtered[name].value) for name in names}
    raw = {name: cases.read(lambda result, name=name: result.raw[name].value) for name in names}
    ours = {
        "two_frame_extended_comfort": comfort.value.numpy(),
        "raw_multiplicative_metrics_prod": np.prod([raw[name] for name in names[:PRODUCT_V2]], axis=0),
        "filtered_multiplicative_metrics_prod": np.prod(
            [filtered[name] for name in names[:PRODUCT_V2]], axis=0
        ),
    }
    checks = [compare(prefix + name, value, outputs[name], SCORE_TOLERANCE) for name, value in ours.items()]
    weighted = np.stack([filtered[name] for name in names[PRODUCT_V2:]], axis=-1)
    golden_weighted = outputs["filtered_weighted_metrics"][..., : weighted.shape[-1]]

    def with_comfort(result: ScoreResult) -> torch.Tensor:
        device = result.score.value.device
        return with_extended_comfort(
            result, Metric(comfort.value.to(device), comfort.valid.to(device))
        ).score_with_comfort.value

    return [
        *checks,
        compare(f"{prefix}filtered_weighted_metrics", weighted, golden_weighted, SCORE_TOLERANCE),
        cases.check("filtered_pdm_score", lambda result: result.raw_score.value),
        cases.check("epdms_no_ec", lambda result: result.score.value),
        cases.check("epdms_one_stage", with_comfort),
    ]


def _extended_comfort(cases: Cases) -> Metric:
    states = torch.as_tensor(cases.read(_states))
    before = torch.as_tensor(cases.golden.outputs["ec_prev_k"])[..., None, None]
    previous = torch.take_along_dim(states, before, dim=1)
    interval_s = cases.golden.outputs["ec_dt"]
    flat = two_frame_extended_comfort(states.flatten(0, 1), previous.flatten(0, 1), interval_s.ravel())
    return Metric(flat.value.view(interval_s.shape), flat.valid.view(interval_s.shape))


def check_version(inputs: Arrays, golden: GoldenVersion, options: dict[str, str]) -> list[Check]:
    """Run every comparison of one version, with the golden reference and end to end."""
    rules, backend = RULES[golden.version], options["backend"]
    given = prepare_all(golden.scenes, rules, golden.outputs["pdm_poses"], backend)
    own = prepare_all(golden.scenes, rules, backend=backend)
    return [
        *check_simulation(inputs, golden, backend),
        *check_poses(inputs, golden, given),
        *check_history(golden, given),
        *check_observation(inputs, golden),
        *check_reference(golden, own),
        *check_scores(inputs, golden, given, "golden reference", options),
        *check_scores(inputs, golden, own, "end to end", options),
    ]


def run_checks(folder: Path, backend: str = "auto", device: str = "cpu") -> list[Check]:
    """Compare everything a golden folder holds; it may hold any part of the files and any subset of scenes."""
    checks: list[Check] = []
    lqr, aggregation = load_arrays(folder, "lqr"), load_arrays(folder, "aggregation")
    if lqr is not None:
        checks += check_tracker(lqr, backend)
    if aggregation is not None:
        checks += check_aggregation(aggregation)
    inputs = load_inputs(folder)
    for version in ("v2", "v1"):
        golden = load_version(folder, inputs, version)
        if golden is not None:
            checks += check_version(inputs, golden, {"backend": backend, "device": device})
    if not checks:
        raise InvalidInputError(str(folder), "must hold at least one file of golden outputs")
    return checks


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--golden", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--backend", choices=("auto", "torch", "numba"), default="auto")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    checks = run_checks(options.golden, options.backend, options.device)
    for check in checks:
        verdict = "ok  " if check.passed else "FAIL"
        note = f"  [{check.note}]" if check.note else ""
        print(
            f"{verdict} {check.name}: worst {check.worst:.3g} (allowed {check.tolerance:.3g}) at {check.where}{note}"
        )
    failed = [check.name for check in checks if not check.passed]
    print(f"{len(checks) - len(failed)} of {len(checks)} quantities agree")
    if options.json:
        rows = [{**asdict(check), "passed": check.passed} for check in checks]
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
