"""The targets of the default method, and which of them a table of rows misses."""

from __future__ import annotations

from benchmarks.controlled.rows import Row

REGRET_TARGETS = {
    ("base", 4): 0.40,
    ("base", 6): 0.30,
    ("base", 10): 0.25,
    ("seed_noise_x2", 6): 0.42,
    ("wrong_clusters", 6): 0.38,
    ("saturating_harm", 6): 0.22,
    ("k64", 6): 0.60,
    ("transfer_x3", 6): 0.60,
}
DEFAULT, WITHOUT_RUN_0 = "response", "response, no run 0"
"""The default spends its first run on real scenes alone, as the loop does; the other never trains without any."""
STRETCH = {4: 0.27, 6: 0.22, 10: 0.18}
FLOOR_MASS = 2 * 0.01 * 3 / 16
"""Twice the floor that three harmful clusters of sixteen hold (floor_final 1 % of a uniform share)."""
Check = tuple[str, float, str, bool]
"""Name, measured value, target as text, met."""


def checks(rows: list[Row], p_values: dict[str, float], method: str) -> list[Check]:
    """Compare a variant of ours with every target; ``p_values`` by baseline and R."""
    ours = {(row.family, row.num_runs): row for row in rows if row.method == method}
    found = [
        at_most(f"regret[{family}, R={num_runs}]", ours[family, num_runs].regret, target)
        for (family, num_runs), target in REGRET_TARGETS.items()
        if (family, num_runs) in ours
    ]
    for (family, num_runs), row in ours.items():
        at = f"[R={num_runs}]"
        if family == "base":
            found.append(
                at_most(f"worse_than_uniform{at}", row.worse_than_uniform, 0.05 if num_runs < 6 else 0.02)
            )
        if family == "null":
            found.append(at_most(f"null_kl_mean{at}", row.kl_from_start, 0.01))
            found.append(at_most(f"null_kl_max{at}", row.kl_from_start_max, 0.1))
        if family == "harmful" and num_runs >= 6:
            found.append(at_most(f"harmful_mass{at}", row.harmful_mass, FLOOR_MASS))
    found += [at_most(f"paired_p[{name}]", value, 0.05) for name, value in sorted(p_values.items())]
    return found


def stretch_checks(rows: list[Row]) -> list[Check]:
    """Compare with the stretch targets (reported, not enforced)."""
    return [
        at_most(f"stretch[R={row.num_runs}]", row.regret, STRETCH[row.num_runs])
        for row in rows
        if row.method == DEFAULT and row.family == "base" and row.num_runs in STRETCH
    ]


def at_most(name: str, measured: float, target: float) -> Check:
    """Return whether a measured value keeps to its limit; NaN does not."""
    return name, measured, f"<= {target:.4g}", bool(measured <= target)
