"""Tell what a pool holds and what was refused."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from autoscale_ray.scenes.pool import open_pool


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolInfo:
    """Counts of one pool."""

    path: str
    schema_version: int
    content_hash: str
    num_scenes: int
    num_quarantined: int
    num_bytes: int
    scenes_by_domain: dict[str, int]
    scenes_by_source: dict[str, int]
    scenes_by_log: dict[str, int]
    quarantined_by_rule: dict[str, int]
    num_with_fifth_second: int
    """Scenes whose ego is recorded at 5 s."""
    num_with_previous: int
    """Scenes with the window half a second earlier in the pool."""


def pool_info(path: Path | str) -> PoolInfo:
    """Return the counts of a pool by domain, source, log and quarantine rule.

    Raises:
        PoolError: No usable pool; a pool whose scenes were all quarantined is accepted.
    """
    pool = open_pool(path, allow_empty=True)
    manifest = pool.manifest
    quarantine = pool.side_table("quarantine", ["rule"])
    rules = Counter(quarantine["rule"].to_pylist() if quarantine is not None else [])
    valid = pool.list_column("ego_valid") if len(pool) else []
    return PoolInfo(
        path=str(path),
        schema_version=manifest.schema_version,
        content_hash=manifest.content_hash,
        num_scenes=manifest.num_scenes,
        num_quarantined=manifest.num_quarantined,
        num_bytes=sum(file.num_bytes for file in manifest.files),
        scenes_by_domain=dict(manifest.counts["domain"]),
        scenes_by_source=dict(manifest.counts["source"]),
        scenes_by_log=dict(manifest.counts["log"]),
        quarantined_by_rule=dict(rules.most_common()),
        num_with_fifth_second=sum(bool(row[-1]) for row in valid),
        num_with_previous=int((pool.column("prev_scene_id") != "").sum()) if len(pool) else 0,
    )
