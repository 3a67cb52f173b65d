"""Table and curve of a sweep."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.table import Table
from scipy import stats

from autoscale_ray.files import in_one_step

Row = Mapping[str, Any]
SERIES = {"dev, last round": ("objective", "se"), "test, recommended mixture": ("test_objective", "test_se")}
"""What is drawn: score and standard error of a trial, both in [0, 1]."""
CUT_SHORT = ("early", "stopped")
"""How a trial ends that was not played to its end: by ASHA, or by whoever asked it to stop."""
REPLICATE = "seed"
"""Trials that differ in nothing but this field are repetitions of one another."""


@dataclass(frozen=True, slots=True)
class Point:
    """Mean score of some repetitions and its 95 % interval, in [0, 1]."""

    x: float
    mean: float
    half_width: float
    num_trials: int


def write_sweep(rows: Sequence[Row], fields: Sequence[str], folder: Path) -> None:
    """Write ``sweep.csv`` and, where a swept field other than the seed is a number, ``sweep.png`` against it.

    Args:
        rows: One mapping a trial: the swept fields, objective in [0, 1], its standard error, rounds, run_dir.
        fields: Names of the swept fields.
        folder: Receives the files.
    """
    ordered = in_order(rows, fields)
    with (
        in_one_step(folder / "sweep.csv") as path,
        path.open("w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.DictWriter(file, fieldnames=list(ordered[0]))
        writer.writeheader()
        writer.writerows(ordered)
    x_field = next((field for field in fields if field != REPLICATE and is_numeric(rows, field)), None)
    if x_field is not None:
        draw_curve(ordered, fields, x_field, folder / "sweep.png")


def sweep_table(rows: Sequence[Row], fields: Sequence[str]) -> Table:
    """Return the sweep as a table for the terminal."""
    table = Table(title="Sweep: dev after the last round, test of the recommended mixture, x100")
    for name in (*fields, "dev", "SE", "test", "SE", "rounds", "ended"):
        table.add_column(name, justify="right")
    for row in in_order(rows, fields):
        scores = [row["objective"], row["se"], row["test_objective"], row["test_se"]]
        told = ["-" if not is_number(score) else f"{100 * score:.2f}" for score in scores]
        table.add_row(*(f"{row[field]}" for field in fields), *told, f"{row['rounds']}", f"{row['ended']}")
    return table


def curves(rows: Sequence[Row], fields: Sequence[str], x_field: str) -> Iterator[tuple[str, list[Point]]]:
    """Yield one labelled curve for each combination of the other swept fields and each score.

    Args:
        rows: One mapping a trial.
        fields: Names of the swept fields.
        x_field: The one on the axis.
    """
    others = [field for field in fields if field not in (x_field, REPLICATE)]
    for label in sorted({label_of(row, others) for row in rows}):
        chosen = [row for row in rows if label_of(row, others) == label]
        for name, (score, se) in SERIES.items():
            points = points_of(chosen, x_field, score, se)
            if points:
                yield ", ".join(filter(None, [name, label])), points


def points_of(rows: Sequence[Row], x_field: str, score: str, se: str) -> list[Point]:
    """Return the points of a curve.

    The interval of one trial is 1.96 standard errors over scenes; that of n >= 2 repetitions is
    t(0.975, n - 1) sd / sqrt(n), which holds the noise of training as well.
    """
    points = []
    for x in sorted({row[x_field] for row in rows}):
        scored = [row for row in rows if row[x_field] == x and is_number(row[score])]
        values = np.array([row[score] for row in scored], dtype=float)
        if len(values) > 1:
            spread = values.std(ddof=1) / math.sqrt(len(values))
            half = float(stats.t.ppf(0.975, len(values) - 1) * spread)
        elif len(values) == 1 and is_number(scored[0][se]):
            half = float(stats.norm.ppf(0.975) * scored[0][se])
        else:
            half = math.nan
        if len(values):
            points.append(Point(float(x), float(values.mean()), half, len(values)))
    return points


def draw_curve(rows: Sequence[Row], fields: Sequence[str], x_field: str, path: Path) -> None:
    """Draw the scores x 100 against one field, with 95 % intervals; hollow where a trial stopped early."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    span = max(row[x_field] for row in rows) - min(row[x_field] for row in rows)
    for number, (label, points) in enumerate(curves(rows, fields, x_field)):
        xs = [point.x + 0.006 * number * span for point in points]  # so that no interval hides another
        means = [100 * point.mean for point in points]
        halves = [100 * point.half_width for point in points]
        axes.errorbar(xs, means, yerr=halves, marker="o", capsize=3, label=label)
    early = [row for row in rows if row["ended"] in CUT_SHORT and is_number(row["objective"])]
    if early:
        xs, values = [row[x_field] for row in early], [100 * row["objective"] for row in early]
        axes.plot(xs, values, "o", mfc="white", mec="black", zorder=9, label="stopped early")
    axes.set(xlabel=x_field, ylabel="score x100, 95 % interval")
    axes.legend()
    with in_one_step(path) as temporary:
        figure.savefig(temporary, dpi=120)


def in_order(rows: Sequence[Row], fields: Sequence[str]) -> list[Row]:
    """Return the rows sorted by the swept fields, numbers as numbers."""
    return sorted(rows, key=lambda row: [sort_key(row[field]) for field in fields])


def sort_key(value: Any) -> tuple[float, str]:
    """Return a key that puts numbers in their order before words."""
    return (float(value), "") if is_number(value) else (math.inf, str(value))


def label_of(row: Row, fields: Sequence[str]) -> str:
    """Return the values of some fields in words."""
    return ", ".join(f"{field.rpartition('.')[2]} {row[field]}" for field in fields)


def is_numeric(rows: Sequence[Row], field: str) -> bool:
    """Return whether a field holds numbers alone."""
    return all(is_number(row[field]) for row in rows)


def is_number(value: Any) -> bool:
    """Return whether a value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
