"""What the documents say is true: the generated table, and the examples in docstrings."""

from __future__ import annotations

import doctest
import importlib.util
from pathlib import Path

import pytest

import fastloss.divergences
import fastloss.logprobs
import fastloss.losses

ROOT = Path(__file__).parent.parent


def test_readme_table_is_up_to_date():
    spec = importlib.util.spec_from_file_location("feature_table", ROOT / "docs" / "feature_table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    readme = (ROOT / "README.md").read_text()
    assert module.update(readme) == readme, "run `make docs`"


@pytest.mark.parametrize("module", [fastloss.losses, fastloss.divergences, fastloss.logprobs], ids=lambda m: m.__name__)
def test_docstring_examples(module):
    result = doctest.testmod(module, extraglobs={"torch": __import__("torch")})
    assert result.attempted > 0
    assert result.failed == 0
