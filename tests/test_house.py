"""The house rules a machine can check: names, imports, documents that point at what exists, no orphan op."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import vkernels
from vkernels.spec import OPS, all_specs

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = sorted((ROOT / "vkernels").rglob("*.py"))
NATIVE = [*ROOT.glob("csrc/**/*"), *ROOT.glob("tests/cuda/*")]
SOURCES = [p for p in NATIVE if p.suffix in (".h", ".cpp", ".cu")]
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
EVIDENCE = {"spec.py", "__main__.py", "explain.py", "explain_cli.py", "aot.py", "tune.py"}


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


@pytest.mark.parametrize("path", LIBRARY, ids=lambda p: str(p.relative_to(ROOT)))
def test_arrows_point_down(path):
    roots = {name.split(".")[0] for name in imports(path)}
    assert not roots & {"vkernels_video", "transformers", "einops", "benchmarks", "tests"}, (
        "python/ -> vkernels -> torch"
    )
    if path.name not in EVIDENCE and not {"testing", "bench"} & set(path.parts):
        evidence = [n for n in imports(path) if re.fullmatch(r"vkernels\.(ops\.\w+\.)?spec", n)]
        assert not evidence, "evidence is not runtime"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_native_code_knows_no_torch(path):
    assert not re.search(r"#include\s*<(torch|ATen|c10)/", path.read_text())


def test_import_needs_torch_alone():
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('triton','transformers','einops','av','scipy'), None));"
        "import vkernels; print(vkernels.__version__); assert 'vkernels.bench' not in sys.modules"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_every_op_folder_has_its_rooms():
    folders = sorted(p.name for p in (ROOT / "vkernels" / "ops").iterdir() if (p / "__init__.py").exists())
    assert folders == sorted(OPS)
    for name in folders:
        rooms = {p.name for p in (ROOT / "vkernels" / "ops" / name).iterdir()}
        assert {"api.py", "spec.py"} <= rooms, f"{name} lacks a room"
        assert (ROOT / "tests" / "ops" / f"test_{name}.py").exists(), f"{name} has no witness"
        assert (ROOT / "docs" / "kernels" / f"{name}.md").exists(), f"{name} has no kernel note"
        assert (ROOT / "csrc" / name).exists(), f"{name} has no native code"
        assert hasattr(vkernels, name), f"{name} is not public"


def test_specs_are_complete():
    for spec in all_specs():
        assert spec.cases, f"{spec.name} has no case"
        assert len(spec.rejects) >= 3, f"{spec.name} shows fewer than three refusals"
        assert spec.source
        assert [b.name for b in spec.backends][-1] == "reference", "the reference comes last"


def test_public_names_have_docstrings():
    for name in vkernels.__all__:
        assert (getattr(vkernels, name).__doc__ or "").strip(), f"vkernels.{name} has no docstring"
    for spec in all_specs():
        for word in ("Args:", "Returns:", "Raises:", "Gradients", "Deterministic", "Source"):
            assert word in spec.fn.__doc__, f"{spec.name}: its docstring does not state {word}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_documents_point_at_what_exists(path):
    text = re.sub(r"(?s)```.*?```", "", path.read_text())
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        if not target.startswith(("http://", "https://")):
            assert (path.parent / target).exists(), f"{path.name} points at {target}"
    for quoted in re.findall(r"`((?:vkernels|csrc|tests|docs|benchmarks|python)/[\w./-]+)`", text):
        assert (ROOT / quoted).exists(), f"{path.name} names {quoted}"


def test_no_file_is_two_files():
    long = {
        str(p.relative_to(ROOT)): n
        for p in [*LIBRARY, *SOURCES, *(ROOT / "python").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]
        if (n := len(p.read_text().splitlines())) > 600
    }
    assert not long, f"past 600 lines: {long}"


def test_comments_promise_nothing():
    for path in [*LIBRARY, *SOURCES, *(ROOT / "python").rglob("*.py")]:
        assert not re.search(r"\b(TODO|FIXME|XXX)\b", path.read_text()), path
