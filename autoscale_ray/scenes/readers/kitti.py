"""Read KITTI tracking sequences: labels, oxts and calibration; there is no map.

Facts of the format: label positions are bottom centres in the rectified camera frame (x right, y down, z
forward); oxts rows are latitude, longitude, altitude, roll, pitch, yaw (0 to the east, counter-clockwise);
agents are seen in the camera's field of view only. The recorder is a VW Passat whose inertial unit is taken
to sit above the rear axle.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from autoscale_ray.errors import InputRejectedError
from autoscale_ray.scenes.readers.reader import Reader
from autoscale_ray.scenes.recording import Recording, Track, gather_tracks, recorder_track
from autoscale_ray.scenes.trust import read_file

FRAME_INTERVAL_S = 0.1
EARTH_RADIUS_M = 6378137.0
EGO_SIZE_M = (4.77, 1.82, 2.71)
"""Length, width and wheelbase."""
_KINDS = {
    **dict.fromkeys(("Car", "Van", "Truck", "Tram"), "vehicle"),
    **dict.fromkeys(("Pedestrian", "Person", "Person_sitting"), "pedestrian"),
    "Cyclist": "bicycle",
}


def units(path: Path) -> list[str]:
    """Return the names of the sequences: files of ``label/``."""
    return sorted(file.stem for file in (path / "label").glob("*.txt"))


def read(path: Path, name: str) -> Iterator[Recording]:
    """Yield the recording of one sequence.

    Raises:
        InputRejectedError: A file is missing or malformed.
    """
    oxts = _table(path / "oxts" / f"{name}.txt", f"{name}: oxts")
    if oxts.shape[1] < 6 or len(oxts) < 2:
        raise InputRejectedError(f"{name}: oxts", "must have at least 2 rows of 6 numbers", oxts.shape)
    if not (np.abs(oxts[:, 0]) < 90.0).all() or not (np.abs(oxts[:, 1]) <= 360.0).all():
        raise InputRejectedError(f"{name}: oxts", "must hold latitudes and longitudes in degrees")
    ego_F3 = np.column_stack([*mercator(oxts[:, 0], oxts[:, 1], float(oxts[0, 0])), oxts[:, 5]])
    camera_to_imu = _camera_to_imu(path / "calib" / f"{name}.txt", f"{name}: calib")
    ego = recorder_track(ego_F3, np.arange(len(ego_F3)), *EGO_SIZE_M)
    tracks = [ego, *_label_tracks(path / "label" / f"{name}.txt", name, ego_F3, camera_to_imu)]
    yield Recording(
        name=name,
        log_id=f"kitti/{name}",
        source="kitti/tracking",
        tracks=gather_tracks(tracks),
        frame_interval_s=FRAME_INTERVAL_S,
    )


def mercator(
    latitude_deg: np.ndarray, longitude_deg: np.ndarray, origin_deg: float
) -> tuple[np.ndarray, np.ndarray]:
    """Project to a Mercator plane that is true to scale at the origin's latitude: metres east and north."""
    scale = math.cos(math.radians(origin_deg)) * EARTH_RADIUS_M
    return scale * np.radians(longitude_deg), scale * np.log(np.tan(np.pi * (90.0 + latitude_deg) / 360.0))


def _table(path: Path, where: str) -> np.ndarray:
    rows = [line.split() for line in read_file(path).decode(errors="replace").splitlines() if line.strip()]
    return _numbers(rows, where)


def _numbers(rows: list[list[str]], where: str) -> np.ndarray:
    try:
        values = np.array(rows, dtype=np.float64)
    except ValueError as error:
        raise InputRejectedError(where, "must hold rows of numbers of one length", str(error)) from None
    if not np.isfinite(values).all() or values.ndim != 2:
        raise InputRejectedError(where, "must hold rows of finite numbers")
    return values


def _camera_to_imu(path: Path, where: str) -> np.ndarray:
    """Return the (4, 4) transform from the rectified camera to the inertial unit."""
    lines = [line.split() for line in read_file(path).decode(errors="replace").splitlines() if line.strip()]
    found = {line[0].rstrip(":"): line[1:] for line in lines}
    try:
        rectify = _numbers([found["R_rect"]], where).reshape(3, 3)
        to_camera = _numbers([found["Tr_velo_cam"]], where).reshape(3, 4)
        to_velodyne = _numbers([found["Tr_imu_velo"]], where).reshape(3, 4)
        chain = _square(rectify) @ _square(to_camera) @ _square(to_velodyne)
        return np.linalg.inv(chain)
    except (KeyError, ValueError, np.linalg.LinAlgError) as error:
        if isinstance(error, InputRejectedError):
            raise
        raise InputRejectedError(where, "must hold R_rect, Tr_velo_cam and Tr_imu_velo", str(error)) from None


def _square(matrix: np.ndarray) -> np.ndarray:
    whole = np.eye(4)
    whole[:3, : matrix.shape[1]] = matrix
    return whole


def _label_tracks(path: Path, name: str, ego_F3: np.ndarray, camera_to_imu: np.ndarray) -> Iterator[Track]:
    lines = [line.split() for line in read_file(path).decode(errors="replace").splitlines() if line.strip()]
    lines = [line for line in lines if len(line) > 2 and line[2] != "DontCare"]
    if not lines:
        return
    kinds = np.array([line[2] for line in lines])
    values = _numbers([line[:2] + line[3:17] for line in lines], f"{name}: label")
    if values.shape[1] != 16:
        raise InputRejectedError(f"{name}: label", "rows must have 17 columns", values.shape[1] + 1)
    frames, keys = values[:, 0].astype(np.int64), values[:, 1].astype(np.int64)
    if frames.min() < 0 or frames.max() >= len(ego_F3):
        raise InputRejectedError(
            f"{name}: label", f"frames must lie in the {len(ego_F3)} of oxts", int(frames.max())
        )
    local = np.column_stack([values[:, 12:15], np.ones(len(values))]) @ camera_to_imu.T
    turn = values[:, 15]
    facing = np.column_stack([np.cos(turn), np.zeros(len(turn)), -np.sin(turn)]) @ camera_to_imu[:3, :3].T
    x, y, yaw = ego_F3[frames].T
    cos, sin = np.cos(yaw), np.sin(yaw)
    poses = np.column_stack([
        x + cos * local[:, 0] - sin * local[:, 1],
        y + sin * local[:, 0] + cos * local[:, 1],
        yaw + np.arctan2(facing[:, 1], facing[:, 0]),
    ])  # fmt: skip
    for key in np.unique(keys):
        rows = np.flatnonzero(keys == key)
        rows = rows[np.argsort(frames[rows], kind="stable")]
        if (np.diff(frames[rows]) == 0).any():
            raise InputRejectedError(f"{name}: label track {key}", "must occur once in a frame")
        yield Track(
            key=int(key),
            kind=_KINDS.get(str(kinds[rows[0]]), "generic_object"),
            length_m=float(values[rows[0], 11]),
            width_m=float(values[rows[0], 10]),
            frames=frames[rows],
            poses=poses[rows],
        )


READER = Reader(units=units, read=read)
