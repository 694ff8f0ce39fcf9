"""The Python of the README and of the pages under docs/ runs as it stands, one block after the other."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def run_blocks(page: Path) -> int:
    blocks = re.findall(r"(?s)```python\n(.*?)```", page.read_text())
    names: dict = {}
    for block in blocks:
        exec(compile(block, str(page), "exec"), names)
    return len(blocks)


def test_every_example_of_the_readme_runs(capsys):
    assert run_blocks(ROOT / "README.md") >= 7
    assert "attention: backend" in capsys.readouterr().out


def test_every_example_of_the_drop_in_page_runs():
    assert run_blocks(ROOT / "docs" / "drop-in.md") >= 4


def test_every_example_of_the_distributed_page_runs(capsys):
    assert run_blocks(ROOT / "docs" / "distributed.md") == 1
    assert "imbalance 1.0" in capsys.readouterr().out


def test_every_example_of_the_model_page_runs(capsys):
    pytest.importorskip("transformers")
    pytest.importorskip("einops")
    assert run_blocks(ROOT / "docs" / "model.md") >= 4
    assert "tiny_st_llm_qa" in capsys.readouterr().out
