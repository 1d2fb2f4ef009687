"""The house's layers: imports point downwards, and nothing heavy is imported at the top."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import fastloss

PACKAGE = Path(fastloss.__file__).parent
# A module may import those of lower layers, and its own layer's submodules.
LAYERS = [
    {"strides"},
    {"spec", "saved"},
    {"arguments"},
    {"reduction"},
    {"backends"},
    {"rows"},
    {"parallel"},
    {"public", "keywords"},
    {"evaluate"},
    {"losses", "divergences", "topk", "logprobs"},
    {"linear"},
    {"pointer", "contrastive"},
    {"dense", "embeddings", "adaptive"},
    {"lm"},
    {"nn"},
    {"integrations"},
    {""},
    {"doctor"},
    {"bench"},
    {"__main__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
MODULES = sorted(p.relative_to(PACKAGE) for p in PACKAGE.rglob("*.py"))


def layer_of(path: Path) -> str:
    return "" if path == Path("__init__.py") else path.parts[0].removesuffix(".py")


def imports(path: Path) -> list[str]:
    """The layers of fastloss that a module imports, wherever in the file."""
    depth = len(path.parts) - 1
    found = []
    for node in ast.walk(ast.parse((PACKAGE / path).read_text())):
        if isinstance(node, ast.ImportFrom) and node.level > depth:
            found += [node.module.split(".")[0]] if node.module else [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "fastloss":
            parts = node.module.split(".")
            found += parts[1:2] or [a.name if a.name in LEVEL else "" for a in node.names]
    return [name for name in found if name != "_native"]


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_imports_point_downwards(path):
    here = layer_of(path)
    assert here in LEVEL, f"give {path} a place in LAYERS"
    for name in imports(path):
        name = name if name in LEVEL else ""
        assert LEVEL[name] < LEVEL[here] or name == here, f"{path} imports {name or 'the package'}"


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_files_and_functions_are_short(path):
    text = (PACKAGE / path).read_text()
    assert text.count("\n") <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            doc = ast.get_docstring(node) or ""
            assert node.end_lineno - node.lineno - doc.count("\n") <= 90, node.name
