"""Write the tables and the figure of the controlled benchmark."""

from __future__ import annotations

import platform
from pathlib import Path

import numpy as np

from benchmarks.controlled.rows import Row
from benchmarks.controlled.targets import DEFAULT, Check
from benchmarks.surroundings import commit, processor


def markdown(
    rows: list[Row], found: list[Check], stretch: list[Check], others: list[Check], command: str, seed: int
) -> str:
    """Return the result file: provenance, targets, and one line per family, method and R."""
    lines = [
        "# Controlled mixtures: regret against the known optimum",
        "",
        f"Command: {command}; commit {commit()}; Python {platform.python_version()}, numpy {np.__version__}; "
        f"hardware: {processor()}, one thread.",
        f"Problem seed {seed}. The method was tuned on problem seeds 1, 2 and 3; 7411 was a first report (`_first`).",
        "",
        "Regret = mean loss to the oracle / mean loss of uniform (0 oracle, 1 uniform), 95 % bootstrap interval over "
        "problems. R counts every training run; the default (`response`) spends the first of them on real scenes, as "
        "the loop does, `response, no run 0` and the other methods do not. Counts are whole scenes.",
        "",
        "## Targets",
        "",
        "| target | measured | wanted | met |",
        "|---|---|---|---|",
        *[_check_line(check) for check in (*found, *stretch)],
        "",
        "## The same without a real-only run (reported, not enforced)",
        "",
        "| target | measured | wanted | met |",
        "|---|---|---|---|",
        *[_check_line(check) for check in others],
        "",
        "## All rows",
        "",
        "| family | method | R | problems | evaluations | regret | 95 % | worse than uniform | KL to optimum | "
        "KL from start (max) | harmful mass |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
        *[_row_line(row) for row in rows],
        "",
    ]
    return "\n".join(lines)


def draw(rows: list[Row], path: Path) -> None:
    """Draw regret against rounds in the base family, all methods; ours thick, names at the line ends."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 7))
    by_method = _curves(rows)
    colours = matplotlib.color_sequences["tab10"]  # ten colours times three dashes tell thirty methods apart
    heights = _spread([curve[-1].regret for curve in by_method.values()], 0.032)
    for place, (method, curve) in enumerate(by_method.items()):
        ours = method == DEFAULT
        style = (
            {"color": "black", "linewidth": 3.0} if ours else {"color": colours[place % 10], "linewidth": 1.2}
        )
        dashes = "-" if ours else ("-", "--", ":")[place % 3]
        runs, regret = [row.num_runs for row in curve], [row.regret for row in curve]
        axes.plot(runs, regret, linestyle=dashes, marker="o", ms=3, **style)
        axes.plot(
            [10, 10.25], [regret[-1], heights[place]], linestyle=dashes, linewidth=0.5, color=style["color"]
        )
        axes.text(10.3, heights[place], method, fontsize=8, va="center", color=style["color"])
        if ours:
            low, high = [row.regret_low for row in curve], [row.regret_high for row in curve]
            axes.fill_between(runs, low, high, color="black", alpha=0.15, linewidth=0)
    axes.axhline(1.0, color="grey", linewidth=0.8, linestyle=":")
    axes.set(
        xlabel="training runs R", ylabel="normalised simple regret (0 oracle, 1 uniform)", xlim=(3.7, 12.2)
    )
    axes.set_xticks([4, 6, 10])
    axes.set_ylim(0, None)
    axes.set_title(f"Base family, {next(iter(by_method.values()))[0].num_problems} problems")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _curves(rows: list[Row]) -> dict[str, list[Row]]:
    curves: dict[str, list[Row]] = {}
    for row in rows:
        if row.family == "base":
            curves.setdefault(row.method, []).append(row)
    return dict(sorted(curves.items(), key=lambda item: item[1][-1].regret))


def _spread(values: list[float], gap: float) -> list[float]:
    """Move sorted label heights apart by at least the gap."""
    placed: list[float] = []
    for value in values:
        placed.append(max(value, placed[-1] + gap) if placed else value)
    return placed


def _check_line(check: Check) -> str:
    name, measured, target, met = check
    return f"| {name} | {measured:.4f} | {target} | {'yes' if met else '**no**'} |"


def _row_line(row: Row) -> str:
    return (
        f"| {row.family} | {row.method} | {row.num_runs} | {row.num_problems} | {row.evaluations} "
        f"| {row.regret:.3f} | {row.regret_low:.3f}-{row.regret_high:.3f} | {100 * row.worse_than_uniform:.0f} % "
        f"| {row.kl_to_optimum:.2f} | "
        f"{row.kl_from_start:.4f} ({row.kl_from_start_max:.3f}) | {row.harmful_mass:.4f} |"
    )
