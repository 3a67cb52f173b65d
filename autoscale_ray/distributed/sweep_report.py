"""Table and curve of a sweep."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

Z_95 = 1.96
"""Half width of a 95 % interval in standard errors."""


def write_sweep(rows: Sequence[Mapping[str, Any]], fields: Sequence[str], folder: Path) -> None:
    """Write ``sweep.csv`` and, where the first swept field is a number, ``sweep.png``.

    Args:
        rows: One mapping a trial: the swept fields, objective in [0, 1], its standard error, round, run_dir.
        fields: Names of the swept fields.
        folder: Receives the files.
    """
    ordered = sorted(rows, key=lambda row: [str(type(row[field])) + f"{row[field]:>20}" for field in fields])
    with open(folder / "sweep.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(ordered[0]))
        writer.writeheader()
        writer.writerows(ordered)
    if all(isinstance(row[fields[0]], int | float) for row in ordered):
        draw_curve(ordered, fields[0], folder / "sweep.png")


def draw_curve(rows: Sequence[Mapping[str, Any]], field: str, path: Path) -> None:
    """Draw the dev objective x 100 against one field, with 95 % intervals from scenes alone."""
    scored = sorted((row for row in rows if row["objective"] is not None), key=lambda row: row[field])
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.errorbar(
        [row[field] for row in scored],
        [100 * row["objective"] for row in scored],
        yerr=[100 * Z_95 * (row["se"] or 0.0) for row in scored],
        marker="o",
        capsize=3,
    )
    axes.set(xlabel=field, ylabel="dev objective x100 of the last round (95 %)")
    figure.savefig(path, dpi=120)
