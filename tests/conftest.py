"""How tests are dealt out to processes."""

from __future__ import annotations

import pytest
from xdist.scheduler import LoadFileScheduling


class OneCluster(LoadFileScheduling):
    """File by file, but all tests on Ray in one process: they share a cluster."""

    def _split_scope(self, nodeid: str) -> str:
        return "tests/ray" if nodeid.startswith("tests/ray/") else super()._split_scope(nodeid)


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> OneCluster:
    """Deal tests out so wherever there is more than one process."""
    return OneCluster(config, log)
