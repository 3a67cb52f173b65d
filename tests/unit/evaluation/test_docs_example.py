"""The example of docs/scoring.md runs and shows what it says."""

from __future__ import annotations

import re
from pathlib import Path

DOCUMENT = Path(__file__).parents[3] / "docs" / "scoring.md"


def test_the_example_runs(capsys):
    code = re.search(r"<!-- example.*?```python\n(.*?)```", DOCUMENT.read_text(), re.S)
    assert code is not None
    names: dict[str, object] = {}
    exec(compile(code.group(1), str(DOCUMENT), "exec"), names)
    fast, slow = names["result"].score.value[0].tolist()
    assert fast == 0.0
    assert slow > 0.5
    assert "no_at_fault_collisions" in capsys.readouterr().out
