"""Who may import whom: the book only the book, and no module a script."""

import ast
import subprocess
import sys
from pathlib import Path

from conftest import ROOT

PACKAGE = ROOT / "lit_llama"


def imports(path: Path, module_level: bool = False) -> set[str]:
    body = ast.parse(path.read_text("utf-8")).body
    if module_level:
        body = [node for node in body if not isinstance(node, ast.FunctionDef | ast.ClassDef)]
    nodes = [node for statement in body for node in ast.walk(statement)]
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return names | {node.module for node in nodes if isinstance(node, ast.ImportFrom)}


def test_the_book_imports_only_the_book() -> None:
    book = {f"lit_llama.{path.stem}" for path in PACKAGE.glob("*.py")}
    for path in PACKAGE.glob("*.py"):
        if path.name != "training.py":
            ours = {name for name in imports(path, True) if name.startswith("lit_llama")}
            assert ours <= book, path


def test_no_module_imports_a_script() -> None:
    folders = ("finetune", "generate", "evaluate", "scripts", "benchmarks", "tests")
    scripts = {path.stem for folder in folders for path in (ROOT / folder).glob("*.py")}
    for path in PACKAGE.rglob("*.py"):
        names = {name.partition(".")[0] for name in imports(path)}
        assert not names & {*folders, *scripts}, path


def test_the_model_loads_neither_lightning_nor_matplotlib() -> None:
    code = "import sys, lit_llama.model; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    assert "torch" in loaded.split()
    assert not {"lightning", "matplotlib"} & set(loaded.split())
