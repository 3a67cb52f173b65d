"""Draw the representation benchmark: every arm's mean over the seeds with its interval, one panel for each figure."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

Table = Mapping[str, Mapping[str, tuple[float, float]]]
SHOWN = ("recall@1", "recall@5", "map", "nmi", "ari", "score homogeneity", "difference homogeneity")


def draw(tables: Mapping[str, Table], path: Path) -> None:
    """Write the picture.

    Args:
        tables: By data set, arm and figure: mean and half width of the interval (NaN with one seed).
        path: Image file.
    """
    num_arms = max(len(table) for table in tables.values())
    size = (2.1 * len(SHOWN) + 1.5, (0.24 * num_arms + 0.7) * len(tables))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(tables), len(SHOWN), squeeze=False)
    for row, (name, table) in zip(grid, tables.items(), strict=True):
        arms = list(table)[::-1]
        colours = ["#c44e52" if arm == "graph-rae" else "#8fa9c4" for arm in arms]
        for axes, key in zip(row, SHOWN, strict=True):
            mean, width = (np.array([table[arm][key][part] for arm in arms]) for part in (0, 1))
            axes.barh(arms, np.nan_to_num(mean), xerr=np.nan_to_num(width), color=colours, error_kw={"lw": 1})
            axes.set_title(f"{name}: {key}" if axes is row[0] else key, fontsize=8)
            axes.tick_params(labelsize=7)
            if axes is not row[0]:
                axes.set_yticklabels([])
            if not np.isfinite(mean).any():
                axes.set_axis_off()
    figure.savefig(path, dpi=110)
