"""Real text to tokens: Python's standard library, or a file of the user's, through a byte-pair tokenizer."""

from __future__ import annotations

import argparse
import platform
import random
import sysconfig
import time
from pathlib import Path

import torch
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END = "<|end|>"
VALIDATION = 0.05  # of the documents, or of a single text's end
_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "__pycache__"}


class UnusableText(Exception):
    """The text cannot be read, or is too short to train on."""


def prepare(options: argparse.Namespace) -> Path:
    """Reads the text, trains the tokenizer on its training part, and saves the tokens; returns their file."""
    console = Console(highlight=False, soft_wrap=True)
    train, validation, source = _standard_library(options.seed) if options.text is None else _one_text(options.text)
    size = sum(len(text.encode()) for text in train + validation) / 1e6
    console.print(f"Text        {source}, {size:.1f} MB")

    began = time.perf_counter()
    tokenizer = train_tokenizer(train, options.vocab)
    tokens = {"train": _encode(tokenizer, train), "validation": _encode(tokenizer, validation)}
    count, vocab = sum(map(len, tokens.values())), tokenizer.get_vocab_size()
    for part, ids in tokens.items():
        if len(ids) <= options.context:
            raise UnusableText(
                f"{source} is too short: its {part} part has {len(ids)} tokens, and a single sequence takes "
                f"{options.context + 1}. Give a longer text (a megabyte is a good start) or a smaller --context"
            )
    elapsed = time.perf_counter() - began
    console.print(f"Tokenizer   {vocab:,} byte pairs, {count:,} tokens, {elapsed:.1f} s")

    tokenizer.save(str(options.out / "tokenizer.json"))
    path = options.out / "tokens.pt"
    torch.save({**tokens, "vocab": vocab}, path)
    return path


def train_tokenizer(texts: list[str], vocab: int) -> Tokenizer:
    """A byte-level byte-pair tokenizer, as GPT-2's: any text can be encoded and decoded."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _encode(tokenizer: Tokenizer, texts: list[str]) -> torch.Tensor:
    end = tokenizer.token_to_id(END)
    ids = [token for encoding in tokenizer.encode_batch(texts) for token in (*encoding.ids, end)]
    return torch.tensor(ids, dtype=torch.int32)


def _standard_library(seed: int) -> tuple[list[str], list[str], str]:
    """Training and validation documents: one module each, its tests and other people's packages left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = [path for path in sorted(root.rglob("*.py")) if not _SKIPPED.intersection(path.relative_to(root).parts)]
    if len(paths) < 100:
        raise UnusableText(
            f"only {len(paths)} modules of Python's standard library have their source here: give a text with --text"
        )
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in paths]
    random.Random(seed).shuffle(texts)
    held_out = round(VALIDATION * len(texts))
    source = f"{len(texts)} modules of the standard library of Python {platform.python_version()}"
    return texts[held_out:], texts[:held_out], source


def _one_text(path: Path) -> tuple[list[str], list[str], str]:
    """Training and validation text: the beginning and the end of the file."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UnusableText(f"cannot read the text {path} ({error.strerror}): give a text file's path") from None
    cut = round((1 - VALIDATION) * len(text))
    return [text[:cut]], [text[cut:]], str(path)
