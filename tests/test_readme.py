"""The README's Python runs as it stands, one block after the other."""

import re
from pathlib import Path

README = Path(__file__).resolve().parent.parent / "README.md"


def test_every_example_runs(capsys):
    blocks = re.findall(r"(?s)```python\n(.*?)```", README.read_text())
    assert len(blocks) >= 7
    names: dict = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
    assert "attention: backend" in capsys.readouterr().out
