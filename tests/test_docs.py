"""What the documents say is true: the generated table, and the examples in docstrings."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

ROOT = Path(__file__).parent.parent


def test_readme_table_is_up_to_date():
    spec = importlib.util.spec_from_file_location("feature_table", ROOT / "docs" / "feature_table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    readme = (ROOT / "README.md").read_text()
    assert module.update(readme) == readme, "run `make docs`"


MODULES = sorted(
    ".".join(path.relative_to(ROOT / "python").with_suffix("").parts)
    for path in (ROOT / "python" / "fastloss").rglob("*.py")
    if ">>>" in path.read_text()
)


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    module = importlib.import_module(name)
    result = doctest.testmod(module, extraglobs={"torch": torch, "F": F})
    assert result.attempted > 0
    assert result.failed == 0
