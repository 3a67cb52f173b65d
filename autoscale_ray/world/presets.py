"""How often each family occurs on each side and how good its synthetic experts are.

Qualities: ``F`` faithful; ``G`` a dynamics gap (all speeds times 0.8, the driver keeps to 0.7 of the limit);
``H`` harmful, the pseudo-expert ignores other agents and the light; ``S`` split: harmful where a visible
attribute of road or agents is set (truck, second lane), faithful elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from autoscale_ray.world.families import FAMILIES

QUALITIES = ("F", "G", "H", "S")

REAL_SHARES = {
    "cruise": 180,
    "follow": 142,
    "curve": 84,
    "queue": 54,
    "curve_follow": 52,
    "red_light": 48,
    "overtake": 26,
    "recovery": 20,
    "crossing": 14,
    "cut_in": 10,
    "left_turn": 10,
    "merge": 10,
    "cyclist": 10,
    "pedestrian": 7,
    "roundabout": 7,
    "obstacle": 7,
    "dart_out": 19,
}
"""Scenes of each family in 700 real ones: a long tail that holds the families that weigh most."""

POOL_SHARES = {
    "cruise": 20.0,
    "curve": 13.0,
    "follow": 15.0,
    "curve_follow": 9.0,
    "crossing": 8.0,
    "queue": 5.5,
    "overtake": 4.0,
    "cut_in": 2.5,
    "left_turn": 2.5,
    "pedestrian": 2.5,
    "merge": 2.5,
    "obstacle": 2.5,
    "cyclist": 3.0,
    "red_light": 2.5,
    "roundabout": 2.0,
    "recovery": 1.5,
    "dart_out": 2.0,
}
"""Percent of the synthetic pool, the rest being perturbed copies: most where it helps least."""

NEAR_DUPLICATES = {"cruise": 20, "curve": 20}
"""Families of the pool that are made from a few base scenes, and how many."""
COPY_SHARE = 0.02
"""Share of the pool that is real scenes with the ego moved, turned and slowed."""

_FAITHFUL = dict.fromkeys(FAMILIES, "F")


@dataclass(frozen=True, slots=True)
class Preset:
    """A known gap between the two training pools."""

    quality: Mapping[str, str]
    real_shares: Mapping[str, float]
    """Relative frequency of every family of this world, by name; dev and test hold these families too."""
    pool_shares: Mapping[str, float]
    near_duplicates: Mapping[str, int]
    copy_share: float
    weighted: bool = True
    """Whether safety families weigh three times in dev and test."""
    num_real: int = 700
    """Real training scenes, unless the configuration says how many."""


def _with_gap(**quality: str) -> Preset:
    return Preset(_FAITHFUL | quality, REAL_SHARES, POOL_SHARES, NEAR_DUPLICATES, COPY_SHARE)


_EQUAL = dict.fromkeys(FAMILIES, 1.0)
_SOON_LEARNT: dict[str, float] = dict.fromkeys(("overtake", "recovery", "cyclist"), 1.0)

PRESETS: dict[str, Preset] = {
    "harm_low_deficit": _with_gap(
        follow="H", curve_follow="G", crossing="S", cyclist="S", red_light="H", overtake="G", roundabout="G"
    ),
    "harm_high_deficit": _with_gap(
        cut_in="H", roundabout="H", crossing="H", cyclist="S", curve_follow="G", overtake="G"
    ),
    "no_harm": _with_gap(),
    "even": Preset(_FAITHFUL, _EQUAL, _EQUAL, {}, 0.0, weighted=False),
    "null": Preset(_FAITHFUL, _SOON_LEARNT, _SOON_LEARNT, {}, 0.0, weighted=False, num_real=30),
}
"""`even` has equal shares and still something to gain, because families differ in how many scenes they need. `null` has
much to lose and nothing to gain: its families are soon learnt to their end, but not from the real scenes, and an equal
share of the default budget is more than any of them needs (docs/world.md). What has no share is on no side."""


def counts(shares: Mapping[str, float], total: int) -> dict[str, int]:
    """Split `total` by largest remainder, ties to the earlier name."""
    whole = sum(shares.values())
    exact = {name: total * share / whole for name, share in shares.items()}
    result = {name: int(value) for name, value in exact.items()}
    missing = total - sum(result.values())
    by_remainder = sorted(exact, key=lambda name: result[name] - exact[name])
    for name in by_remainder[:missing]:
        result[name] += 1
    return result
