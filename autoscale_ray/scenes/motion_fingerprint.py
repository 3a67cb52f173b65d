"""Find recordings that are overlapping cuts of one log, from the motion they share.

Two recordings belong to the same log when some track in each has the same `STRETCH` consecutive speeds, at
least `MIN_DISTINCT` of them different (a standing vehicle proves nothing). Logs are the connected components.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from autoscale_ray.scenes.recording import Tracks

STRETCH = 15
MIN_DISTINCT = 8


def motion_fingerprints(tracks: Tracks) -> np.ndarray:
    """Return a hash (uint64, unique) of each stretch of equal-step speeds of the tracks.

    The first row of a track is left out: sources store it apart, often with other rounding.
    """
    speeds_R = np.linalg.norm(tracks.velocities_R2, axis=1)
    found = [
        _stretches(speeds_R[first + 1 : end])
        for first, end in zip(tracks.offsets[:-1], tracks.offsets[1:], strict=True)
        if end - first > STRETCH and tracks.valid_R[first:end].all()
    ]
    return np.unique(np.concatenate([np.zeros(0, dtype=np.uint64), *found]))


def _stretches(speeds: np.ndarray) -> np.ndarray:
    # Speeds are recomputed from velocity components, so they are rounded before their bits are compared.
    rounded = np.round(speeds, 6) + 0.0
    windows = np.lib.stride_tricks.sliding_window_view(rounded, STRETCH)
    distinct = 1 + (np.diff(np.sort(windows, axis=1), axis=1) != 0).sum(axis=1)
    windows = windows[(distinct >= MIN_DISTINCT) & np.isfinite(windows).all(axis=1)]
    bits = np.ascontiguousarray(windows).view(np.uint64)
    mixed = np.zeros(len(bits), dtype=np.uint64)
    for column in bits.T:
        mixed = (mixed ^ (column >> np.uint64(17)) ^ column) * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> np.uint64(29)
    return mixed


def shared_groups(prints: Mapping[str, np.ndarray], known: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the group of each recording: the smallest name among all that are linked.

    Args:
        prints: Unique fingerprints of each recording; those that share one are linked.
        known: Groups known otherwise; recordings of one known group are linked too.
    """
    names = sorted(prints)
    parent = {name: name for name in names}

    def root(name: str) -> str:
        while parent[name] != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    values = np.concatenate([np.zeros(0, dtype=np.uint64), *[prints[name] for name in names]])
    owners = np.repeat(np.arange(len(names)), [len(prints[name]) for name in names])
    order = np.argsort(values, kind="stable")
    same = np.flatnonzero(values[order][1:] == values[order][:-1])
    pairs = np.unique(np.stack([owners[order][same], owners[order][same + 1]], axis=1), axis=0)
    first_of_group: dict[str, str] = {}
    linked = [(names[left], names[right]) for left, right in pairs]
    linked += [(first_of_group.setdefault(group, name), name) for name, group in (known or {}).items()]
    for left, right in linked:
        one, two = sorted((root(left), root(right)))
        parent[two] = one
    return {name: root(name) for name in names}
