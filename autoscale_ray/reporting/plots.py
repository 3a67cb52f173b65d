"""Plots of a run, made from its summary. matplotlib without a display; every figure is closed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from autoscale_ray.files import in_one_step

Summary = Mapping[str, Any]


def write_plots(summary: Summary, folder: Path) -> dict[str, Path]:
    """Draw every plot that the summary has data for.

    Args:
        summary: Tree of `autoscale_ray.reporting.summary.summarise`.
        folder: Where the PNG files go; created.

    Returns:
        Path by plot name.
    """
    return {name: save(figure, folder / f"{name}.png") for name, figure in figures(summary).items()}


def figures(summary: Summary) -> dict[str, Figure]:
    """Return every plot that the summary has data for, by name."""
    drawn = {}
    if summary["arms"]:
        drawn["arms"] = arms_figure(summary)
    if summary["rounds"]:
        drawn["score_per_round"] = score_figure(summary)
    if len(summary["rounds"]) > 1:
        drawn["weights_per_round"] = weights_figure(summary)
    return drawn


def save(figure: Figure, path: Path) -> Path:
    """Write a figure as PNG through a temporary file, so a reader never sees half of it; make its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"savefig.dpi": 130}), in_one_step(path) as temporary:
        figure.savefig(temporary, format="png", bbox_inches="tight")
    return path


def weights_figure(summary: Summary) -> Figure:
    """Return scenes per cluster as stacked bars: one for each round, and what AutoScale was trained on at the end."""
    rounds = [done for done in summary["rounds"] if done["weights"]]
    columns = [(f"{done['index']}", done["counts"]) for done in rounds]
    columns += [("final", arm["counts"]) for arm in summary["arms"] if arm["name"] == "autoscale"]
    figure = Figure(figsize=(1.6 + 0.75 * len(columns) + 2.0, 4.2))
    axes = figure.subplots()
    colours = matplotlib.colormaps["tab20"](np.arange(len(summary["clusters"])) % 20)
    bottom = np.zeros(len(columns))
    for colour, cluster in zip(colours, summary["clusters"], strict=True):
        heights = np.array([counts.get(cluster["id"], 0) for _, counts in columns], dtype=float)
        axes.bar([name for name, _ in columns], heights, bottom=bottom, color=colour, label=cluster["id"])
        bottom += heights
    axes.set(xlabel="round", ylabel="synthetic scenes", title="Mixture by round")
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8, ncols=1 + len(colours) // 17)
    return figure


def score_figure(summary: Summary) -> Figure:
    """Return the dev objective by round with its standard error over logs."""
    rounds = [done for done in summary["rounds"] if done["totals"]["objective"] is not None]
    figure = Figure(figsize=(6.4, 4.0))
    axes = figure.subplots()
    axes.errorbar(
        [done["index"] for done in rounds],
        [100 * done["totals"]["objective"] for done in rounds],
        yerr=[100 * (done["total_se"]["objective"] or 0.0) for done in rounds],
        marker="o",
        capsize=3,
    )
    axes.axhline(100 * rounds[0]["totals"]["objective"], color="grey", linewidth=0.8, linestyle="--")
    axes.text(
        rounds[-1]["index"], 100 * rounds[0]["totals"]["objective"], "real only", va="bottom", ha="right"
    )
    axes.set(
        xlabel="round (each explores another mixture)", ylabel="dev score W x100", title="Score by round"
    )
    axes.set_xticks([done["index"] for done in rounds])
    axes.grid(alpha=0.3)
    return figure


def arms_figure(summary: Summary) -> Figure:
    """Return the test objective of every arm: mean with its standard error, and a dot for each training seed."""
    arms = [arm for arm in summary["arms"] if arm["totals"]["objective"] is not None]
    figure = Figure(figsize=(1.8 + 1.1 * len(arms), 4.0))
    axes = figure.subplots()
    unit = " or ".join(sorted({arm["error_unit"] for arm in arms}))
    labels = [f"{arm['name']}\n{arm['num_scenes']} scenes" for arm in arms]
    for position, arm in enumerate(arms):
        colour = "tab:orange" if arm["name"] == "autoscale" else "tab:blue"
        seeds = [100 * value for value in arm["seed_totals"]["objective"] if value is not None]
        axes.plot([position + 0.12] * len(seeds), seeds, ".", color="grey", markersize=7)
        error = 100 * (arm["total_se"]["objective"] or 0.0)
        mean = 100 * arm["totals"]["objective"]
        axes.errorbar(position, mean, yerr=error, fmt="o", color=colour, capsize=4, markersize=8)
    axes.set_xticks(range(len(arms)), labels, fontsize=8)
    axes.set(
        xlim=(-0.5, len(arms) - 0.5),
        ylabel=f"test score W x 100, SE over {unit}s; grey: seeds",
        title=f"Test at {summary['steps']} optimiser steps each",
    )
    axes.grid(axis="y", alpha=0.3)
    return figure
