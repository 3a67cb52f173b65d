"""The report of a run: one HTML file that needs nothing beside it and no network."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure

from autoscale_ray.files import in_one_step
from autoscale_ray.reporting.plots import figures
from autoscale_ray.reporting.tables import error_line, gain_text, points, spent_line, unscored_line

Summary = Mapping[str, Any]
TITLES = {
    "arms": "Arms on test",
    "score_per_round": "Score by round",
    "weights_per_round": "Mixture by round",
}


def write_report(summary: Summary, path: Path, pictures: Sequence[tuple[str, Path]] = ()) -> Path:
    """Write the report of a run, finished or not.

    Args:
        summary: Tree of `autoscale_ray.reporting.summary.summarise`.
        path: HTML file; replaced in one step.
        pictures: Title and PNG file of further pictures, such as the embedding map.

    Returns:
        The path.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["points"], environment.filters["gain"] = points, gain_text
    text = environment.get_template("report.html.j2").render(
        summary=summary,
        spent=spent_line(summary),
        figures=[(TITLES[name], _svg(TITLES[name], figure)) for name, figure in figures(summary).items()],
        pictures=[(title, _png(picture)) for title, picture in pictures if picture.is_file()],
        errors=error_line(summary["arms"]),
        unscored=unscored_line(summary, "dev", "test"),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with in_one_step(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def _svg(title: str, figure: Figure) -> Markup:
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "autoscale", "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    drawn = buffer.getvalue()[buffer.getvalue().index("<svg") + len("<svg") :]
    return Markup(f'<svg role="img" aria-label="{title}"{drawn}')  # our own drawing, no outside text


def _png(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode("ascii")
