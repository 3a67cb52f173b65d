"""Tables for the terminal, made from the summary of a run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from autoscale_ray.records import Clusters

Summary = Mapping[str, Any]
ERRORS = {
    "log": "\u00b1 standard error over logs",
    "scene": "\u00b1 standard error over the scenes of one log, which is too small",
}
MIN_CHOICE = 10
"""Synthetic scenes of a cluster below which there is nothing to choose from."""
MIN_BARE_WEIGHT = 0.1
"""Dev weight in such clusters from which on the reader is told."""


def round_table(summary: Summary, index: int) -> Table:
    """Return one round as a table: weight, scenes and dev score of every cluster."""
    done = summary["rounds"][index]
    kind = "real scenes only" if not done["weights"] else f"{done['num_scenes']} synthetic scenes"
    took = f"took: {seconds_text(summary['spent']['seconds_by_round'][index])}"
    lines = [_totals_line(done, "dev"), took, *(_run_lines(summary) if index == 0 else ())]
    table = Table(title=f"Round {index}: {kind}", caption="\n".join(lines))
    for name in ("cluster", "pool", "dev scenes", "weight", "scenes", "dev score x100", "SE"):
        table.add_column(name, justify="left" if name == "cluster" else "right")
    for cluster in summary["clusters"]:
        name = cluster["id"]
        weight = done["weights"].get(name)
        table.add_row(
            name,
            f"{cluster['pool']}",
            f"{cluster['dev']}",
            "-" if weight is None else f"{weight:.3f}",
            f"{done['counts'].get(name, 0)}",
            points(done["cluster_scores"][name]),
            points(done["cluster_se"][name]),
        )
    return table


def _run_lines(summary: Summary) -> list[str]:
    """Return what a reader is told once in a run, with its first round."""
    sizes = [(cluster["pool"], cluster["dev_weight"]) for cluster in summary["clusters"]]
    budget = budget_line(summary["budget"], sum(size for size, _ in sizes))
    return [line for line in (budget, coverage_line(sizes), unscored_line(summary, "dev")) if line]


def budget_line(budget: int, pool: int) -> str:
    """Return a notice where the budget asks for more scenes than the pool has; empty otherwise."""
    if budget <= pool:
        return ""
    return f"loop.budget {budget} is larger than the pool: every round asks for all {pool} scenes"


def unscored_line(summary: Summary, *sides: str) -> str:
    """Return how many scenes of some sides cannot be scored; empty where all can."""
    counts = {side: summary["unscored"].get(side, 0) for side in sides}
    told = ", ".join(f"{count} of {side}" for side, count in counts.items() if count)
    return (
        f"scenes without a score, in no mean: {told} (stages/reference_drives-*.json says why)"
        if told
        else ""
    )


def arm_table(summary: Summary) -> Table:
    """Return the final comparison: one row an arm, scored on test scenes nobody chose by."""
    lines = [
        "W: the objective, scene scores by weight; gain: W of AutoScale less W of the arm, paired, "
        "its error without that of training seeds and search; "
        f"mIoU: of BEV occupancy; {error_line(summary['arms'])}",
        unscored_line(summary, "test"),
        spent_line(summary),
    ]
    table = Table(
        title=f"Test scores x 100, {summary['steps']} optimiser steps each (non-reactive pseudo-simulation)",
        caption="\n".join(line for line in lines if line),
        box=SIMPLE_HEAD,  # fits 80 columns
        pad_edge=False,
        collapse_padding=True,
    )
    for name in ("arm", "scenes", "epochs", "W", "gain", "EPDMS", "PDMS", "mIoU"):
        table.add_column(name, justify="left" if name == "arm" else "right", no_wrap=True)
    for arm in summary["arms"]:
        scores = [_with_error(arm, name) for name in ("objective", "epdms", "pdms", "miou")]
        scores.insert(1, gain_text(summary["gains"].get(arm["name"])))
        table.add_row(arm["name"], f"{arm['num_scenes']}", f"{arm['epochs']:.1f}", *scores)
    return table


def error_line(scored: Sequence[Mapping[str, Any]]) -> str:
    """Return what the standard errors are over."""
    return "; ".join(sorted({ERRORS[one["error_unit"]] for one in scored}))


def cluster_table(clusters: Clusters) -> Table:
    """Return the sizes of the clusters."""
    sizes_KX = zip(clusters.pool_sizes_K.tolist(), clusters.dev_weights_K.tolist(), strict=True)
    table = Table(title=f"{len(clusters.cluster_ids)} clusters", caption=coverage_line(sizes_KX))
    for name in ("cluster", "synthetic", "real", "dev", "dev weight"):
        table.add_column(name, justify="left" if name == "cluster" else "right")
    for k, name in enumerate(clusters.cluster_ids):
        sizes = (clusters.pool_sizes_K[k], clusters.real_counts_K[k], clusters.dev_counts_K[k])
        table.add_row(name, *(f"{size}" for size in sizes), f"{clusters.dev_weights_K[k]:.3f}")
    return table


def spent_line(summary: Summary) -> str:
    """Return what the run cost in one line."""
    spent = summary["spent"]
    return (
        f"spent: {spent['search_runs']} search and {spent['comparison_runs']} comparison training runs, "
        f"{spent['optimiser_steps']} optimiser steps; {seconds_text(spent['seconds'])}"
    )


def seconds_text(seconds: Mapping[str, float]) -> str:
    """Return the seconds of the stages that took any; those of an earlier start took none."""
    shown = [f"{name.replace('_', ' ')} {value:.0f} s" for name, value in seconds.items() if value >= 0.5]
    return ", ".join(shown) or "less than a second a stage"


def coverage_line(clusters: Iterable[tuple[int, float]]) -> str:
    """Return a warning where much of the dev weight lies in clusters that the pool cannot serve; empty otherwise.

    Args:
        clusters: Synthetic scenes and dev weight of every cluster.
    """
    bare = sum(weight for pool, weight in clusters if pool < MIN_CHOICE)
    if bare < MIN_BARE_WEIGHT:
        return ""
    return (
        f"{100 * bare:.0f} % of the dev weight lies in clusters with fewer than {MIN_CHOICE} synthetic scenes: "
        "the pool holds little that is like them, and no mixture can add it"
    )


def gain_text(gain: Mapping[str, float | None] | None) -> str:
    """Return a paired difference in points with its standard error; empty where there is none."""
    if gain is None or gain["mean"] is None:
        return ""
    mean = round(100 * gain["mean"], 1) + 0.0  # no minus before a zero
    return f"{mean:+.1f}{_error(gain['se'])}"


def points(value: float | None) -> str:
    """Return a score in [0, 1] as points out of 100; a dash where it is missing."""
    return "-" if value is None else f"{100 * value:.1f}"


def _totals_line(done: Mapping[str, Any], side: str) -> str:
    names = {"W": "objective", "EPDMS": "epdms", "PDMS": "pdms", "BEV mIoU": "miou"}
    scores = ", ".join(f"{shown} {_with_error(done, name)}" for shown, name in names.items())
    return f"{side}: {scores} ({error_line([done])})"


def _with_error(scored: Mapping[str, Any], name: str) -> str:
    return points(scored["totals"][name]) + _error(scored["total_se"][name])


def _error(value: float | None) -> str:
    return "" if value is None else f"\u00b1{points(value)}"
