"""Real text that is on every machine with Python: the functions of its standard library, and what they say of
themselves."""

from __future__ import annotations

import ast
import random
import re
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "__pycache__"}
_WORD = re.compile(r"[A-Za-z]+|[0-9]+|[^\sA-Za-z0-9]")
PAD, UNKNOWN, START, END = range(4)


class Documented(NamedTuple):
    """A function or class: `package` is where its module lies, `first` its docstring's first line, `rest` the rest."""

    package: str
    name: str
    arguments: str
    first: str
    rest: str


@lru_cache(maxsize=1)
def documented() -> list[Documented]:
    """Everything with a docstring, in an order that is the same on every run."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = [p for p in sorted(root.rglob("*.py")) if not _SKIPPED.intersection(p.relative_to(root).parts)]
    found = dict.fromkeys(item for path in paths for item in _in_module(path, path.relative_to(root).parts[0]))
    if len(found) < 1000:
        raise SystemExit(f"{root} has no sources of Python's standard library, or they have been stripped")
    items = list(found)
    random.Random(0).shuffle(items)
    return items


def _in_module(path: Path, package: str) -> Iterator[Documented]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and (doc := ast.get_docstring(node)):
            first, _, rest = doc.partition("\n")
            arguments = "" if isinstance(node, ast.ClassDef) else ast.unparse(node.args)
            yield Documented(package.removesuffix(".py"), node.name, arguments, first.strip(), rest.strip())


def split(items: list, held_out: int) -> tuple[list, list]:
    """(for training, held out)."""
    return items[held_out:], items[:held_out]


def words(text: str) -> list[str]:
    """Words, numbers and signs, in lower case; names are taken apart at their capitals and underscores."""
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", text)
    return [word.lower() for word in _WORD.findall(spaced) if word != "_"]


class Vocabulary:
    """The most frequent words, after the marks PAD, UNKNOWN, START and END."""

    def __init__(self, texts: Iterable[list[str]], size: int) -> None:
        counts = Counter(word for text in texts for word in text)
        self.words = ["<pad>", "<unk>", "<s>", "</s>", *(word for word, _ in counts.most_common(size - 4))]
        self.index = {word: i for i, word in enumerate(self.words)}

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, text: list[str], extra: dict[str, int] | None = None) -> list[int]:
        """Ids; a word that is not here has that of `extra`, or else UNKNOWN."""
        return [self.index.get(word, (extra or {}).get(word, UNKNOWN)) for word in text]

    def decode(self, ids: Iterable[int], extra: list[str] = []) -> str:  # noqa: B006 - never changed
        """Up to the END; ids beyond the vocabulary are those of `extra` words."""
        text = []
        for i in ids:
            if i == END:
                break
            text.append(self.words[i] if i < len(self) else extra[i - len(self)])
        return " ".join(text)


def padded(rows: list[list[int]], value: int = PAD) -> Tensor:
    """(rows, longest)."""
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)


def documents() -> list[list[str]]:
    """Whole docstrings, as words."""
    return [words(f"{item.first} {item.rest}") for item in documented()]


def token_stream(texts: list[list[str]], vocabulary: Vocabulary) -> Tensor:
    """All texts one after the other, an END after each."""
    return torch.tensor([i for text in texts for i in (*vocabulary.encode(text), END)])


def windows(tokens: Tensor, batch: int, length: int) -> Tensor:
    """(batch, length), from random places."""
    starts = torch.randint(len(tokens) - length, (batch, 1))
    return tokens[starts + torch.arange(length)]
