"""Read NAVSIM data sets: OpenScene logs with nuPlan maps, cut by a scene filter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from autoscale_ray.errors import InputRejectedError, InvalidInputError, MissingExtraError
from autoscale_ray.scenes.geopackage import INSTALL
from autoscale_ray.scenes.readers.navsim_scenes import Source, cut_scenes
from autoscale_ray.scenes.readers.nuplan_map import map_files, open_map
from autoscale_ray.scenes.readers.openscene import read_log
from autoscale_ray.scenes.readers.reader import Reader, SceneTables
from autoscale_ray.scenes.readers.scene_filter import SceneFilter, read_scene_filter
from autoscale_ray.scenes.trust import member_names

SOURCE = "navsim"


def checked_files(files: Mapping[str, Path], allowed: tuple[str, ...], format: str) -> None:
    """Check the files beside a source: a folder with maps is needed, the others may be there.

    Raises:
        InvalidInputError: No maps, or a file of another name.
        MissingExtraError: A package that reads maps is not installed.
    """
    for package in ("pyogrio", "pyproj"):
        if find_spec(package) is None:
            raise MissingExtraError(package, INSTALL)
    unknown = [name for name in files if name not in allowed]
    if unknown:
        raise InvalidInputError(unknown[0], f"is nothing that the format {format} uses")
    if "maps" not in files:
        raise InvalidInputError("maps", f"the format {format} needs the folder with nuPlan maps")
    map_files(files["maps"])


def chosen_scenes(files: Mapping[str, Path], default: SceneFilter) -> SceneFilter:
    """Return the scene filter that was given, or the default."""
    return read_scene_filter(files["filter"]) if "filter" in files else default


def log_units(path: Path, files: Mapping[str, Path] | None = None) -> list[str]:
    """Return the log pickles, only those that the filter names.

    Raises:
        InputRejectedError: The filter names logs and none of them is here.
    """
    names = member_names(path, ".pkl")
    wanted = chosen_scenes(files or {}, SceneFilter()).log_names
    if wanted is None:
        return names
    found = [name for name in names if Path(name).stem in wanted]
    if names and not found:
        raise InputRejectedError(str(path), "must hold logs that the scene filter names", Path(names[0]).stem)
    return found


def read_scenes(files: Mapping[str, Path], path: Path, unit: str, domain: str) -> SceneTables:
    """Yield the scenes of one log, and the windows that were refused.

    Args:
        files: ``maps``, and ``filter`` where there is one.
        path: Folder, archive or file with log pickles.
        unit: One of `log_units`.
        domain: ``real`` or ``synthetic``.

    Raises:
        InputRejectedError: The log or its map is refused.
    """
    log = read_log(path, unit)
    road = open_map(files["maps"], log.location)
    source = Source(unit=unit, name=SOURCE, domain=domain)
    yield from cut_scenes(log, road, chosen_scenes(files, SceneFilter()), source)


def _with_files(files: Mapping[str, Path]) -> Reader:
    checked_files(files, ("maps", "filter"), "navsim")
    chosen_scenes(files, SceneFilter())
    return replace(READER, units=partial(log_units, files=files), read_scenes=partial(read_scenes, files))


READER = Reader(units=log_units, with_files=_with_files)
