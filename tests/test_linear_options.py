"""What each field of torch.nn.LinearCrossEntropyOptions does to fastloss.linear_cross_entropy."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

import fastloss
from fastloss.linear import chunks

if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
    pytest.skip("needs torch 2.13's LinearCrossEntropyOptions", allow_module_level=True)

N, H, V = 96, 8, 65
Options = torch.nn.LinearCrossEntropyOptions


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()


def rows_at_once(options: Any) -> int:
    """The most rows whose logits there is memory for."""
    seen, buffer = [], chunks._logits_buffer

    def record(head: Any, rows: int, *more: Any) -> Tensor:
        seen.append(rows)
        return buffer(head, rows, *more)

    with patch.object(chunks, "_logits_buffer", record):
        fastloss.linear_cross_entropy(numbers(N, H), numbers(V, H), torch.arange(N) % V, options=options).backward()
    return max(seen)


@pytest.mark.parametrize("rows", [1, 7, 24])
def test_batch_chunk_size(rows):
    assert 1 <= rows_at_once(Options(batch_chunk_size=rows)) <= rows
    assert rows_at_once(Options()) == rows_at_once(None) == N  # so little fits into max_chunk_bytes at once


@pytest.mark.parametrize("method", ["aspect_ratio", "aspect_ratio:2", "aspect_ratio:5", "aspect_ratio:100"])
def test_chunking_method(method):
    options = Options(chunking_method=method)
    asked = options._adjust(N, H, V, torch.float32).batch_chunk_size  # torch's own answer
    assert asked < N
    assert 1 <= rows_at_once(options) <= asked
    same = Options(chunking_method=method, batch_chunk_size=asked)
    assert rows_at_once(same) == rows_at_once(options)
    with pytest.raises(ValueError, match="batch_chunk_size"):
        rows_at_once(Options(chunking_method=method, batch_chunk_size=asked + 1))


def test_acc_dtype():
    """Sums are float32, of float64 float64: what asks for more raises."""
    for dtype, wide in ((torch.float32, torch.float64), (torch.bfloat16, torch.float64)):
        given = numbers(N, H, dtype=dtype), numbers(V, H, dtype=dtype), torch.arange(N) % V
        with pytest.raises(ValueError, match="acc_dtype"):
            fastloss.linear_cross_entropy(*given, options=Options(acc_dtype=wide))
        want = fastloss.linear_cross_entropy(*given)
        assert torch.equal(want, fastloss.linear_cross_entropy(*given, options=Options(acc_dtype=torch.float32)))
    given = numbers(N, H, dtype=torch.float64), numbers(V, H, dtype=torch.float64), torch.arange(N) % V
    fastloss.linear_cross_entropy(*given, options=Options(acc_dtype=torch.float64))


def test_allow_retain_graph():
    """It always is."""
    for allowed in (False, True):
        hidden = numbers(N, H)
        options = Options(allow_retain_graph=allowed)
        loss = fastloss.linear_cross_entropy(hidden, numbers(V, H), torch.arange(N) % V, options=options)
        first, second = (torch.autograd.grad(loss, hidden, retain_graph=True)[0] for _ in range(2))
        torch.testing.assert_close(first, second)
