"""Trains the model of train_lm.py on many ranks, and beside it on one: their loss curves are the same.

    torchrun --nproc-per-node 2 examples/train_tp.py                      the vocabulary cut over two ranks
    torchrun --nproc-per-node 4 examples/train_tp.py --data-parallel 2    two by two: rows, and vocabulary
    torchrun --nproc-per-node 2 examples/train_tp.py --fsdp               FSDP2: rows, and every parameter

By NCCL where each rank has a GPU, otherwise by Gloo on CPUs. Rank 0 also trains the whole model on whole batches, with
torch's cross-entropy, a step of each in turn. The exit code says whether the curves stay within --tolerance.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lm.model import LanguageModel
from lm.recipe import MAX_GRADIENT, at_least, optimizer, windows
from parts.training import finish
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy, embedding
from tqdm import tqdm

from fastloss import VocabShard, linear_cross_entropy

# ---- the model in parts ---------------------------------------------------------------------------------------------


class SumOverRanks(torch.autograd.Function):
    """What all ranks of the group computed a part of."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: dist.ProcessGroup) -> Tensor:
        whole = part.clone()
        dist.all_reduce(whole, group=group)
        return whole

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        # All ranks go on with the same sum to the same loss: each has its gradient whole, and none has to be added.
        return grad, None


class ShardedEmbedding(nn.Module):
    """This rank's rows of an embedding. The model's head is tied to it, so both are cut alike: a rank looks up the
    tokens that it has rows of, and the sum over ranks has all."""

    def __init__(self, whole: nn.Embedding, shard: VocabShard) -> None:
        super().__init__()
        self.shard = shard
        self.weight = nn.Parameter(whole.weight.detach()[shard.start : shard.stop].clone())

    def forward(self, tokens: Tensor) -> Tensor:  # (B, T) -> (B, T, width)
        here = (tokens >= self.shard.start) & (tokens < self.shard.stop)
        rows = embedding(torch.where(here, tokens - self.shard.start, 0), self.weight)
        return SumOverRanks.apply(rows * here[..., None], self.shard.group)


class WithLoss(nn.Module):
    """A language model from tokens to its loss, without logits. FSDP has the head's weight whole only in here."""

    def __init__(self, model: LanguageModel, shard: VocabShard | None = None) -> None:
        super().__init__()
        self.model, self.shard = model, shard

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        hidden = self.model.hidden(inputs).flatten(0, 1)  # (B T, width)
        return linear_cross_entropy(hidden, self.model.embedding.weight, targets.flatten(), shard=self.shard)


# ---- how it is trained ----------------------------------------------------------------------------------------------


class OneProcess:
    """The whole model on whole batches, with torch's loss of whole logits: what the others are compared with."""

    def __init__(self, options: argparse.Namespace, vocab: int, device: torch.device) -> None:
        torch.manual_seed(options.seed)  # all ranks start from the same weights
        self.model = self.arrange(LanguageModel(vocab, options.context).to(device))
        self.optimizer, self.schedule = optimizer(self.model.parameters(), options.steps)

    def arrange(self, model: LanguageModel) -> nn.Module:
        return model

    def step(self, inputs: Tensor, targets: Tensor) -> float:
        """The loss of these rows, (B, T), before the step."""
        self.optimizer.zero_grad()
        loss = self.backward(inputs, targets)
        clip(self.grads(), self.squares().sqrt())
        self.optimizer.step()
        self.schedule.step()
        return loss.item()

    def backward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """The loss of all rows, with all gradients made."""
        loss = cross_entropy(self.model(inputs).flatten(0, 1), targets.flatten())
        loss.backward()
        return loss.detach()

    def grads(self) -> list[Tensor]:
        """What this rank has of them."""
        return [p.grad for p in self.model.parameters()]

    def squares(self) -> Tensor:
        """The sum of all gradients' squares."""
        return sum_of_squares(self.grads())


class TensorParallel(OneProcess):
    """A mesh of ranks: along "data" they share the rows of a batch, along "tensor" the vocabulary. The rest of the
    model, the body, is on each of them."""

    def __init__(self, options: argparse.Namespace, vocab: int, device: torch.device, mesh: DeviceMesh) -> None:
        self.data, self.tensor = mesh.get_group("data"), mesh.get_group("tensor")
        self.shard = VocabShard.even(vocab, self.tensor)
        super().__init__(options, vocab, device)

    def arrange(self, model: LanguageModel) -> nn.Module:
        # Made whole, for the demo's sake, so that it starts as the other does; a large one would be made in parts.
        model.embedding = ShardedEmbedding(model.embedding, self.shard)
        self.rows = model.embedding.weight
        self.body = [p for p in model.parameters() if p is not self.rows]
        return WithLoss(model, self.shard)

    def backward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        loss = self.model(*part_of(inputs, targets, self.data))
        loss.backward()
        # Over "tensor" nothing is to be done: the loss has summed the gradient of the hidden states there.
        for grad in self.grads():
            average(grad, self.data)
        return average(loss.detach(), self.data)

    def squares(self) -> Tensor:
        """Of the embedding those of all ranks' rows; of the body, which each rank has, once."""
        of_rows = sum_of_squares([self.rows.grad])
        dist.all_reduce(of_rows, group=self.tensor)
        return of_rows + sum_of_squares([p.grad for p in self.body])

    def figures(self) -> dict[str, Any]:
        """What to show of this rank, after training."""
        return {
            "ranks that share the batch": dist.get_world_size(self.data),
            "ranks that share the vocabulary": self.shard.ranks,
            "the first's rows of the head": f"{len(self.rows):,} of {self.shard.vocab_size:,}",
            "copies of parameters differ by": self.spread(),
        }

    def spread(self) -> float:
        """By how much what several ranks have differs from the first one's."""
        groups = [(p, dist.group.WORLD) for p in self.body] + [(self.rows, self.data)]
        worst = torch.zeros((), device=self.rows.device)
        for mine, group in groups:
            first = mine.detach().clone()
            dist.broadcast(first, group=group, group_src=0)
            worst = torch.maximum(worst, (mine.detach() - first).abs().max())
        dist.all_reduce(worst, dist.ReduceOp.MAX)
        return worst.item()


class FullySharded(OneProcess):
    """FSDP2: ranks share the rows of a batch, and each keeps a part of every parameter. The blocks are units, and what
    is left, with it the tied head, is the root's: whole from the forward's beginning to the backward's end."""

    def __init__(self, options: argparse.Namespace, vocab: int, device: torch.device, mesh: DeviceMesh) -> None:
        self.mesh, self.data = mesh["data"], mesh.get_group("data")
        super().__init__(options, vocab, device)

    def arrange(self, model: LanguageModel) -> nn.Module:
        for block in model.blocks:
            fully_shard(block, mesh=self.mesh)
        return fully_shard(WithLoss(model), mesh=self.mesh)

    def backward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        loss = self.model(*part_of(inputs, targets, self.data))
        loss.backward()  # and FSDP averages the gradients
        return average(loss.detach(), self.data)

    def grads(self) -> list[Tensor]:
        return [grad.to_local() for grad in super().grads()]

    def squares(self) -> Tensor:
        of_parts = super().squares()
        dist.all_reduce(of_parts, group=self.data)
        return of_parts

    def figures(self) -> dict[str, Any]:
        parameters = list(self.model.parameters())
        kept, all_there_are = sum(p.to_local().numel() for p in parameters), sum(p.numel() for p in parameters)
        return {
            "ranks that share the batch": self.mesh.size(),
            "the first's parameters": f"{kept:,} of {all_there_are:,}",
        }


def part_of(inputs: Tensor, targets: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """This rank's sequences of a batch: as many as any other's, so that the mean of means is the mean."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    return inputs.chunk(ranks)[rank], targets.chunk(ranks)[rank]


def sum_of_squares(grads: list[Tensor]) -> Tensor:
    # Not torch's norm, whose float32 sums of millions of numbers on CPUs go wrong by some ten-thousandths: by another
    # amount of a part than of the whole, so that the curves would drift apart.
    return torch.stack([grad.square().sum() for grad in grads]).sum()


def clip(grads: list[Tensor], norm: Tensor) -> None:
    """As nn.utils.clip_grad_norm_, whatever the norm is of."""
    scale = (MAX_GRADIENT / (norm + 1e-6)).clamp(max=1)
    for grad in grads:
        grad.mul_(scale)


def average(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    """In place, over the ranks."""
    dist.all_reduce(values, group=group)  # Gloo knows sums, no means
    return values.div_(dist.get_world_size(group))


# ---- side by side ---------------------------------------------------------------------------------------------------


def compare(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Trains on many ranks and on one, a step of each in turn; returns what they showed."""
    data = torch.load(prepare(options))
    tokens, vocab, first = data["train"], data["vocab"], dist.get_rank() == 0
    shape = (options.data_parallel, dist.get_world_size() // options.data_parallel)
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=("data", "tensor"))
    many = (FullySharded if options.fsdp else TensorParallel)(options, vocab, device, mesh)
    one = OneProcess(options, vocab, device) if first else None
    curves: list[tuple[float, float]] = []
    batches = torch.Generator().manual_seed(options.seed)  # the same on all ranks
    with tqdm(range(options.steps), desc="Training", unit="step", disable=not first) as bar:
        for _ in bar:
            starts = torch.randint(len(tokens) - options.context, (options.batch,), generator=batches)
            inputs, targets = (t.to(device) for t in windows(tokens, starts, options.context))
            loss = many.step(inputs, targets)
            if one is not None:
                curves.append((loss, one.step(inputs, targets)))
                bar.set_postfix_str("many {:.6f}, one {:.6f}".format(*curves[-1]), refresh=False)
    return {**many.figures(), **described(curves)}


def described(curves: list[tuple[float, float]]) -> dict[str, Any]:
    """Of rank 0: the others have no curves."""
    if not curves:
        return {}
    return {
        "loss at first": curves[0][0],
        "loss at last": curves[-1][0],
        "at last, on one rank": curves[-1][1],
        "largest difference": torch.tensor([abs(many - one) for many, one in curves]).max().item(),  # NaN if any is
    }


def prepare(options: argparse.Namespace) -> Path:
    """The file of tokens, which the first rank makes."""
    said: list[Any] = [None, None]
    if dist.get_rank() == 0:
        from lm import corpus

        options.out.mkdir(parents=True, exist_ok=True)
        try:
            said[0] = corpus.prepare(options)
        except corpus.UnusableText as error:
            said[1] = str(error)
    dist.broadcast_object_list(said)
    if said[1] is not None:
        raise SystemExit(f"train_tp.py: {said[1]}" if dist.get_rank() == 0 else 1)
    return said[0]


def join() -> torch.device:
    """Joins the other ranks; returns where this one computes."""
    local = int(os.environ["LOCAL_RANK"])
    if torch.cuda.device_count() < int(os.environ["LOCAL_WORLD_SIZE"]):
        dist.init_process_group("gloo")
        return torch.device("cpu")
    torch.cuda.set_device(local)
    dist.init_process_group("nccl", device_id=(device := torch.device("cuda", local)))
    return device


def parse_options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train one small language model on many ranks, and beside it on one.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--data-parallel", type=at_least(1), default=1, help="ranks that share a batch's rows; others, the vocabulary")
    add("--fsdp", action="store_true", help="FSDP2 over all ranks, instead of a vocabulary that they share")
    add("--text", type=Path, help="a text file to train on; without it, Python's standard library")
    add("--steps", type=at_least(1), default=30, help="training steps")
    add("--batch", type=at_least(1), default=4, help="sequences per step, of all ranks together")
    add("--context", type=at_least(1), default=64, help="tokens per sequence")
    add("--vocab", type=at_least(257), default=8000, help="entries of the tokenizer: bytes, pairs and an end mark")
    add("--tolerance", type=float, default=1e-4, help="nats by which the curves may differ")
    add("--out", type=Path, default=Path("out"), help="folder for the tokens")
    add("--json", type=Path, metavar="FILE", help="write the figures there")
    add("--seed", type=int, default=0, help="of the weights and the batches")
    add("--threads", type=at_least(1), default=1, help="CPU threads of each rank")
    options = parser.parse_args(argv)
    if "RANK" not in os.environ:
        parser.error("it is for many processes: torchrun --nproc-per-node 2 examples/train_tp.py")
    ranks = int(os.environ["WORLD_SIZE"])
    if options.fsdp:
        options.data_parallel = ranks
    if ranks % options.data_parallel or options.batch % options.data_parallel:
        parser.error(
            f"--data-parallel: expected a number that divides the {ranks} ranks and the batch of {options.batch}, got "
            f"{options.data_parallel}"
        )
    return options


def main(argv: list[str] | None = None) -> None:
    options = parse_options(argv)
    torch.set_num_threads(options.threads)
    device = join()
    try:
        figures = compare(options, device)
    finally:
        dist.destroy_process_group()
    if "largest difference" in figures:  # on the first rank
        finish("One model, on many ranks and on one", figures, options)
        if not figures["largest difference"] <= options.tolerance:
            raise SystemExit(f"train_tp.py: the curves differ by more than {options.tolerance} nats")


if __name__ == "__main__":
    main()
