"""Read GeoPackage files from outside through a resource-limited child process; see `geopackage_child`."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from autoscale_ray.errors import InputRejectedError, MissingExtraError, extra

DEADLINE_S = 600.0
MAX_FILE_BYTES = 4 << 30
INSTALL = extra("navsim")
_START = "import sys; from autoscale_ray.scenes.geopackage_child import main; main(*sys.argv[1:])"


@dataclass(frozen=True, kw_only=True, slots=True)
class Layer:
    """One layer: N rows, P geometry parts over all rows, W vertices."""

    fid_N: np.ndarray
    columns: Mapping[str, np.ndarray]
    """Numbers as float64 (NaN for null) or texts."""
    crs: str = ""
    """Coordinate system of the vertices, for example EPSG:4326."""
    points_W2: np.ndarray
    """x (east), y (north); outer rings of polygons are not closed."""
    part_offsets: np.ndarray
    part_row_P: np.ndarray
    part_holes_P: np.ndarray
    """Bool: a polygon with holes that could not be cut into ones without, of which only the outer ring is given."""

    def __len__(self) -> int:
        return len(self.fid_N)


def read_geopackage(
    path: Path, layers: Mapping[str, Sequence[str]], optional: Sequence[str] = ()
) -> dict[str, Layer]:
    """Read layers of a GeoPackage.

    Args:
        path: The file.
        layers: Wanted columns by layer.
        optional: Layers that may be missing.

    Returns:
        Layers by name, without missing optional ones.

    Raises:
        InputRejectedError: No GeoPackage, damaged, holding programs, or a layer or column is missing.
        MissingExtraError: pyogrio is not installed.
    """
    if not path.is_file():
        raise InputRejectedError(str(path), "must be a file")
    if path.stat().st_size > MAX_FILE_BYTES:
        raise InputRejectedError(str(path), f"must be at most {MAX_FILE_BYTES} bytes")
    reply = _asked(path, layers, optional)
    if reply[:1] == b"?":
        raise MissingExtraError(reply[1:].decode(), INSTALL)
    if reply[:1] != b"+":
        reason = reply[1:].decode(errors="replace") or "not readable within the limits on time and memory"
        raise InputRejectedError(str(path), "must be a sound GeoPackage", reason)
    return decoded(reply[1:], layers)


def _asked(path: Path, layers: Mapping[str, Sequence[str]], optional: Sequence[str]) -> bytes:
    """Return the child's answer, empty where it died or was too slow."""
    question = [str(path.resolve()), json.dumps(dict(layers)), json.dumps(optional)]
    command, environment = [sys.executable, "-c", _START, *question], {**os.environ, "OMP_NUM_THREADS": "1"}
    try:
        run = subprocess.run(command, capture_output=True, timeout=DEADLINE_S, check=False, env=environment)
    except subprocess.TimeoutExpired:
        return b""
    return run.stdout


def decoded(content: bytes, layers: Mapping[str, Sequence[str]]) -> dict[str, Layer]:
    """Return the layers of a child's answer."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        arrays = {
            name.removesuffix(".npy"): np.lib.format.read_array(
                io.BytesIO(archive.read(name)), allow_pickle=False
            )
            for name in archive.namelist()
        }
    return {
        name: _layer(arrays, name, columns) for name, columns in layers.items() if f"{name}/fid" in arrays
    }


def _layer(arrays: Mapping[str, np.ndarray], name: str, columns: Sequence[str]) -> Layer:
    return Layer(
        fid_N=arrays[f"{name}/fid"],
        columns={column: arrays[f"{name}/{column}"] for column in columns},
        crs=str(arrays.get(f"{name}/crs", "")),
        points_W2=arrays.get(f"{name}/points", np.zeros((0, 2))),
        part_offsets=arrays.get(f"{name}/offsets", np.zeros(1, dtype=np.int64)),
        part_row_P=arrays.get(f"{name}/row", np.zeros(0, dtype=np.int64)),
        part_holes_P=arrays.get(f"{name}/holes", np.zeros(0, dtype=bool)),
    )
