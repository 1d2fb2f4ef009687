"""How many digits the divergences keep as a student becomes its teacher:

    python studies/divergence_error.py                 two minutes on one core
    python studies/divergence_error.py --dtypes float32 --beta 0.5

The student's logits are the teacher's and some noise, as little as makes the divergence what the table says. Relative
errors of the mean loss, and of the norm of its gradient's error, against float64 on the same logits; beside them those
of the textbook's formula by torch's operations in float32.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

import fastloss

Loss = Callable[[Tensor, Tensor], Tensor]
ROWS = 16


def textbook_kl(p: Tensor, q: Tensor, direction: str) -> Tensor:
    """Of the student's logits p and the teacher's q."""
    log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
    log_p, log_q = (log_p, log_q) if direction == "forward" else (log_q, log_p)
    return torch.nn.functional.kl_div(log_p, log_q, log_target=True, reduction="none").sum(-1).mean()


def textbook_js(p: Tensor, q: Tensor, beta: float) -> Tensor:
    """Likewise."""
    log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
    log_m = torch.logaddexp(log_q + math.log(beta), log_p + math.log1p(-beta))
    kl = partial(torch.nn.functional.kl_div, log_target=True, reduction="none")
    return (beta * kl(log_m, log_q) + (1 - beta) * kl(log_m, log_p)).sum(-1).mean()


def losses(betas: list[float]) -> Iterator[tuple[str, Loss, Loss]]:
    """(name, ours, the textbook's)."""
    for beta in betas:
        yield f"JS {beta:g}", partial(fastloss.js_div_with_logits, beta=beta), partial(textbook_js, beta=beta)
    for way in "forward", "reverse":
        ours = partial(fastloss.kl_div_with_logits, direction=way)
        yield f"{way} KL", ours, partial(textbook_kl, direction=way)


def value_and_grad(loss: Loss, x: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """In float64, whatever computed it."""
    x = x.clone().requires_grad_()
    value = loss(x, u)
    value.backward()
    return value.detach().double(), x.grad.double()


def students(loss: Loss, aim: float, V: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits of a student and of its teacher, of about that divergence; 16-bit ones cannot be as near as one likes."""
    g = torch.Generator().manual_seed(V)
    u = (torch.randn(ROWS, V, generator=g) * 3).to(dtype)
    noise, eps = torch.randn(ROWS, V, generator=g), 1e-2
    for _ in range(4):  # quadratic in eps
        x = (u.float() + eps * noise).to(dtype)
        eps *= (aim / max(loss(x.double(), u.double()).item(), aim / 1e4)) ** 0.5
    return (u.float() + eps * noise).to(dtype), u


def relative(got: tuple[Tensor, Tensor], exact: tuple[Tensor, Tensor]) -> list[float]:
    return [((a - b).norm() / b.norm()).item() for a, b in zip(got, exact, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", nargs="*", default=["float32", "bfloat16", "float16"])
    parser.add_argument("--vocabularies", nargs="*", type=int, default=[1000, 32000])
    parser.add_argument("--beta", nargs="*", type=float, default=[0.1, 0.5, 0.9])
    parser.add_argument("--backend", default="cpu")
    options = parser.parse_args()
    print("| loss | logits | V | divergence | loss off by | torch's | gradient off by | torch's |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for name, ours, textbook in losses(options.beta):
        for dtype in (getattr(torch, dtype) for dtype in options.dtypes):
            for V in options.vocabularies:
                for power in (-3, -5, -7, -9, -12) if dtype == torch.float32 else (-3, -5):
                    x, u = students(textbook, 10.0**power, V, dtype)
                    exact = value_and_grad(textbook, x.double(), u.double())
                    with fastloss.use_backend(options.backend):
                        found = relative(value_and_grad(partial(ours, out_dtype=torch.float32), x, u), exact)
                    theirs = relative(value_and_grad(lambda x, u, f=textbook: f(x.float(), u.float()), x, u), exact)
                    cells = f"{found[0]:.1e} | {theirs[0]:.1e} | {found[1]:.1e} | {theirs[1]:.1e}"
                    print(f"| {name} | {str(dtype)[6:]} | {V} | {exact[0]:.0e} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
