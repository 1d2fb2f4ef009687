"""How long NCCL's collectives take, as NCCL itself estimates when it chooses an algorithm: a latency and bytes over a
bandwidth, the least over its algorithms and protocols. Microseconds, bytes, GB/s; docs/scaling.md has the sources."""

from __future__ import annotations

from collections.abc import Iterable
from math import ceil, inf, log2
from typing import NamedTuple

from scaling_messages import Message


class Protocol(NamedTuple):
    """Latencies of an algorithm with it: of the launch, of a step over NVLink, of a step between nodes."""

    base: float
    near: float
    far: float


# NCCL 2.28.3, src/graph/tuning.cc, baseLatencies and hwLatencies: LL, LL128, Simple.
RING = Protocol(6.6, 0.6, 2.7), Protocol(14.0, 1.9, 4.0), Protocol(8.4, 3.4, 14.0)
TREE = Protocol(6.8, 0.6, 5.0), Protocol(14.0, 1.25, 8.5), Protocol(8.4, 4.0, 14.0)
POST = 1.0, 1.0, 3.0  # what a step takes at least where a ring crosses the network (an Intel host)
LL128_SHARE = 0.92  # of the bandwidth; of a tree's within a node 7/9, between nodes 120/128 of 0.92
NVLS_LATENCY = 25.0
PAT_BASE, PAT_STEP, PAT_RANK, PAT_SHARE = 8.0, 14.0 / 3.5, 2.8, 0.75


class Fabric(NamedTuple):
    """Ranks and what joins them. `bus`: what a ring moves through each rank; `ll`: the most of its LL protocol in one
    node, on two, and on more; `nvls`: bytes reduced per time in the switch, where five or more ranks are."""

    name: str
    per_node: int
    bus: float
    ll: tuple[float, float, float]
    nvls: float
    sizes: tuple[int, ...]


FABRICS = {
    "hgx": Fabric("a node of 8 H100 (NVLink 4)", 8, 370, (141, 39, 20.4), 273, (2, 4, 8)),
    "nvl72": Fabric("a GB200 NVL72 (NVLink 5)", 72, 770, (282, 78, 40.8), 423, (2, 4, 8, 16, 32, 64)),
    "ib": Fabric("nodes of 8 H100, 8 x NDR", 8, 370, (141, 39, 20.4), 0, (16, 32, 64)),
    "spread": Fabric("nodes of which each has one rank, NDR", 1, 47, (141, 39, 20.4), 0, (2, 4, 8, 16, 32, 64)),
}


class Model(NamedTuple):
    """All latencies times `scale`."""

    scale: float = 1.0

    def time(self, fabric: Fabric, tp: int, messages: Iterable[Message]) -> float:
        """Of collectives one after the other."""
        return sum(
            self.all_gather(fabric, tp, m.bytes * tp)
            if m.op == "gather"
            else self.all_reduce(fabric, tp, m.bytes, m.op)
            for m in messages
        )

    def all_gather(self, fabric: Fabric, tp: int, total: float) -> float:
        """`total` bytes arrive, the rank's own among them."""
        return min(self._ring(fabric, tp, total, 1), self._pat(fabric, tp, total))

    def reduce_scatter(self, fabric: Fabric, tp: int, total: float) -> float:
        """Of `total` bytes in each rank."""
        return self.all_gather(fabric, tp, total)

    def all_reduce(self, fabric: Fabric, tp: int, total: float, op: str) -> float:
        """The switch sums float32, but has no maximum of it."""
        found = [self._ring(fabric, tp, total, 2), self._tree(fabric, tp, total)]
        if op == "sum" and fabric.nvls and tp >= 5:
            found.append(self.scale * NVLS_LATENCY + total / (1e3 * fabric.nvls))
        return min(found)

    def _ring(self, fabric: Fabric, tp: int, total: float, rounds: int) -> float:
        nodes = ceil(tp / fabric.per_node)
        steps, far_steps = rounds * (tp - 1), rounds * (nodes - 1)
        shares = _shares(fabric, nodes, (0.5, LL128_SHARE, 1.0))
        times = []
        for (base, near, far), post, bandwidth in zip(_far(RING, fabric), POST, shares, strict=True):
            near = near if nodes == 1 else max(near, post)
            latency = base + (steps - far_steps) * near + far_steps * far
            times.append(self.scale * latency + total / tp * steps / (1e3 * bandwidth))
        return min(times)

    def _tree(self, fabric: Fabric, tp: int, total: float) -> float:
        nodes = ceil(tp / fabric.per_node)
        shares = _shares(fabric, nodes, (0.92 / 3.8, 0.92 * (7 / 9 if nodes == 1 else 120 / 128), 0.92))
        times = []
        for (base, near, far), bandwidth in zip(TREE, shares, strict=True):
            latency = base + 2 * ((tp / nodes - 1) * near + int(log2(nodes)) * far)
            times.append(self.scale * latency + 2 * total / (1e3 * bandwidth))
        return min(times)

    def _pat(self, fabric: Fabric, tp: int, total: float) -> float:
        if fabric.per_node > 1:
            return inf
        latency = PAT_BASE + int(log2(tp)) * PAT_STEP + PAT_RANK * tp
        return self.scale * latency + total / (1e3 * PAT_SHARE * fabric.bus)


def _shares(fabric: Fabric, nodes: int, of_bus: tuple[float, float, float]) -> list[float]:
    """Bandwidths of LL, LL128 and Simple."""
    ll, ll128, simple = (fabric.bus * share for share in of_bus)
    return [min(ll, fabric.ll[min(nodes, 3) - 1]), ll128, simple]


def _far(ring: tuple[Protocol, ...], fabric: Fabric) -> list[Protocol]:
    """With one rank on a node nothing hides the network's latency: NCCL takes the tree's."""
    return [p._replace(far=t.far) if fabric.per_node == 1 else p for p, t in zip(ring, TREE, strict=True)]
