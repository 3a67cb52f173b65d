"""Every default of the mixture optimiser Cluster-GA, with unit and limit meaning."""

from __future__ import annotations

from dataclasses import dataclass

from autoscale_ray.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class AscentConfig:
    """Settings of the mixture optimiser."""

    seed: int = 0
    """Seed of the exploration design; the run index enters beside it, so a replay draws the same signs."""
    perturbation: float = 1.6
    """Log-weight step of an exploration pair, e^+-c; 0 never explores, > 3 starves half of the clusters."""
    floor_explore: float = 0.1
    """Least scenes per cluster while searching, as a share of budget / K, in [0, 1]."""
    floor_final: float = 0.02
    """The same for the recommended mixture, in [0, 1]; 0 lets a cluster get nothing."""
    scene_sd: float = 0.146
    """SD of one dev scene's score within a run (score units), used where a run reports no error."""
    offset_sd: float = 0.004
    """Prior SD of a run's common score offset (training seed), score units."""
    offset_real_only_sd: float = 0.03
    """The same for the real-only run, whose steps all go to real scenes."""
    null_prior: float = 0.5
    """Prior probability that all clusters share one response curve, in [0, 1]; 0 switches the guard off."""

    def __post_init__(self) -> None:
        for name in ("floor_explore", "floor_final", "null_prior"):
            _require(0.0 <= getattr(self, name) <= 1.0, name, "must be in [0, 1]", getattr(self, name))
        for name in ("scene_sd", "offset_sd", "offset_real_only_sd"):
            _require(getattr(self, name) > 0.0, name, "must be > 0", getattr(self, name))
        _require(0.0 <= self.perturbation <= 10.0, "perturbation", "must be in [0, 10]", self.perturbation)


def _require(holds: bool, name: str, rule: str, value: object) -> None:
    if not holds:
        raise ConfigError(f"ascent.{name}", rule, value)
