"""The CUDA kernels without a GPU: on the host, as PTX, as machine code. (The tests of every engine run them too.)"""

from __future__ import annotations

import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import cuda_ptx
import pytest
import torch
import torch.nn.functional as F
from cases import CASES, DTYPES, LOSS_CASES, SHAPES
from check import assert_as_good_as_torch, assert_case, value_and_grad
from cuda_engine import DEVICES, cuda_on_host

import fastloss
from fastloss import backends
from fastloss.backends import cuda
from fastloss.backends.device import Passing

pytestmark = pytest.mark.usefixtures("one_thread")
needs_ptx = pytest.mark.skipif(cuda_ptx.missing() is not None, reason=f"{cuda_ptx.missing()}")

# Columns for which rows are cut differently: one block; a cluster of two and of eight on sm_90; too long for one block
# on sm_80 and sm_120, in three and in sixteen slices; each with an odd length, whose rows begin anywhere.
LONG = {torch.float32: [8192, 19001, 100001, 128256], torch.bfloat16: [16384, 38003, 131071], torch.float64: [30001]}


def rows(N: int, V: int, dtype: torch.dtype, g: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    x, y, _ = CASES[0].inputs(N, V, dtype, g)
    return x, y


def test_a_refusal_that_passes_is_not_remembered(monkeypatch, generator):
    """A driver that is busy at the first call is asked again at the next."""
    x, y = rows(3, 17, torch.float32, generator)
    reasons = iter(["the driver is busy", "the driver is busy", None])

    class Busy:
        device_type = "cpu"

        def cannot_run(self, index):
            return next(reasons)

    monkeypatch.setattr(cuda, "module", lambda: Busy())
    monkeypatch.setattr(cuda, "_able", set())
    with fastloss.use_backend("cuda"):
        for _ in range(2):
            with pytest.raises(NotImplementedError, match="the driver is busy"):
                fastloss.cross_entropy(x, y)
        assert cuda.refuses(x.device, x.dtype, y.dtype, CASES[0].objective) is None
        assert cuda.refuses(x.device, x.dtype, y.dtype, CASES[0].objective) is None  # and remembered


def test_what_another_backend_ran_is_not_remembered_either(monkeypatch, generator):
    x, y = rows(3, 17, torch.float32, generator)
    busy: str | None = Passing("the driver is busy")
    first = backends.BACKENDS[0]
    table = (first._replace(name="cuda", refuses=lambda *request: busy), *backends.BACKENDS[:1])
    monkeypatch.setattr(backends, "BACKENDS", table)
    monkeypatch.setattr(backends, "_chosen", {})
    request = x.device, x.dtype, y.dtype, CASES[0].objective
    assert backends.choose_for(*request).name == "cpu" and not backends._chosen
    busy = None
    assert backends.choose_for(*request).name == "cuda" and backends._chosen


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", LONG, ids=str)
def test_long_rows(device, dtype, generator):
    """In one block, over a cluster, and in slices with two kernels: the same loss and gradient."""
    for V in LONG[dtype]:
        for case in CASES[1], CASES[-1]:
            x, y, options = case.inputs(4, V, dtype, generator)
            with cuda_on_host(device):
                assert_as_good_as_torch(fastloss.cross_entropy, case.oracle, x, y, options)


@pytest.mark.parametrize("device", DEVICES)
def test_other_losses_of_long_rows(device, generator):
    for turn, case in enumerate(LOSS_CASES):
        dtype = (torch.float32, torch.bfloat16)[turn % 2]
        with cuda_on_host(device):
            assert_case(case, 2, LONG[dtype][turn % 3], dtype, "mean", generator)


@pytest.mark.parametrize("device", DEVICES)
def test_other_losses_do_not_depend_on_the_place(device, generator):
    """At any alignment of the logits, the target logits and the gradient."""
    for case in LOSS_CASES[::4]:
        for V in 1003, 20011:
            x, y, options = case.inputs(5, V, torch.bfloat16, generator)
            options = {name: value for name, value in options.items() if name not in ("mask", "token_weight")}
            with cuda_on_host(device):
                whole = value_and_grad(case.loss(), x, None, y, **options, reduction="sum")[1]
                for i in 0, 3:
                    own = {k: v[i : i + 1] if k == "probs" else v for k, v in options.items()}
                    alone = value_and_grad(
                        case.loss(), x[i : i + 1].clone(), None, y[i : i + 1].clone(), **own, reduction="sum"
                    )[1]
                    assert torch.equal(alone[0], whole[i]), case.name


@pytest.mark.parametrize("device", DEVICES)
def test_a_row_does_not_depend_on_its_place(device, generator):
    """The same bits alone and in a batch, at any alignment, and with a gradient elsewhere aligned than the logits."""
    for dtype in torch.float32, torch.bfloat16:
        for V in 1003, 3000, 20011, 100003:
            x, y = rows(9, V, dtype, generator)
            q = torch.rand(9, V, generator=generator).softmax(1).to(dtype)
            with cuda_on_host(device):
                for target in y, q:
                    for reduction in "sum", "none":
                        losses, grad = value_and_grad(fastloss.cross_entropy, x, None, target, reduction=reduction)
                        for i in 0, 3, 8:
                            loss, own = value_and_grad(
                                fastloss.cross_entropy, x[i : i + 1], None, target[i : i + 1], reduction=reduction
                            )
                            assert torch.equal(own[0], grad[i])
                            assert reduction == "sum" or torch.equal(loss[0], losses[i])


@pytest.mark.parametrize("device", ["sm_80", "sm_90"])
def test_threads_in_any_order(device, generator):
    """Barriers are where they must be: the order in which threads run changes nothing."""
    with cuda_on_host(device) as control:
        for dtype, V in (torch.float32, 5001), (torch.bfloat16, 40007), (torch.bfloat16, 3000):
            for case in CASES[0], CASES[-1], LOSS_CASES[8], LOSS_CASES[14], LOSS_CASES[15]:
                x, y, options = case.inputs(3, V, dtype, generator)
                results = []
                for seed in range(4):
                    control.set_schedule_seed(seed)
                    results.append(value_and_grad(case.loss(), x, None, y, **options))
                control.set_schedule_seed(0)
                for loss, grad in results[1:]:
                    assert torch.equal(loss, results[0][0]) and torch.equal(grad, results[0][1])


def test_bad_labels_trip_an_assertion_and_write_nothing(generator):
    x, _ = rows(3, 500, torch.float32, generator)
    for bad in 500, -1, 2**40:
        y = torch.tensor([0, bad, 1])
        for reduction in "mean", "sum", "none":
            with cuda_on_host(), pytest.raises(RuntimeError, match="device-side assert: target: class index"):
                value_and_grad(fastloss.cross_entropy, x, None, y, reduction=reduction)
    with cuda_on_host():
        assert fastloss.cross_entropy(x, torch.tensor([0, 1, 2])).isfinite()


@pytest.mark.parametrize("V", [3000, 100001])
def test_the_upstream_gradient_stays_on_the_device(V, generator, monkeypatch):
    """Nothing is read back, and a factor of one costs a launch that does nothing."""
    x, y = rows(4, V, torch.float32, generator)
    x.requires_grad_()

    def forbidden(*_: Any) -> None:
        raise AssertionError("waits for the device")

    with cuda_on_host():
        for name in "item", "__float__", "__bool__", "tolist", "cpu":
            monkeypatch.setattr(torch.Tensor, name, forbidden)
        upstreams = [torch.tensor(1.0), torch.tensor(0.5), torch.tensor(-3.0)]
        losses = [fastloss.cross_entropy(x, y, normalizer=torch.tensor(7.0)) for _ in upstreams]
        grads = [torch.autograd.grad(loss, x, g)[0] for loss, g in zip(losses, upstreams, strict=True)]
        monkeypatch.undo()
    exact = x.detach().double().requires_grad_()
    (want,) = torch.autograd.grad(F.cross_entropy(exact, y, reduction="sum") / 7, exact)
    for grad, g in zip(grads, upstreams, strict=True):
        torch.testing.assert_close(grad.double(), want * g.double(), rtol=2e-6, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("upstream", [1.0, 0.25])
def test_in_place(dtype, upstream, generator):
    """The gradient overwrites the logits: in one block, over a cluster, with two kernels, and afterwards rescaled."""
    for device, V in ("sm_80", 3001), ("sm_80", 100003), ("sm_90", 100003):
        x, y = rows(5, V, dtype, generator)
        want = value_and_grad(fastloss.cross_entropy, x, torch.tensor(upstream), y)[1]
        leaf = x.clone().requires_grad_()
        logits = leaf * 1
        with cuda_on_host(device):
            fastloss.cross_entropy(logits, y, inplace=True).backward(torch.tensor(upstream))
        torch.testing.assert_close(leaf.grad, want)


def test_offsets_beyond_32_bits(generator):
    """Two rows more than 2^31 elements apart; the memory between them is never touched."""
    V, stride = 3001, 2**31 + 8
    x = torch.empty(stride + V, dtype=torch.bfloat16).as_strided((2, V), (stride, 1))
    logits, y = rows(2, V, torch.bfloat16, generator)
    x.copy_(logits)
    with cuda_on_host():
        losses = fastloss.cross_entropy(x, y, reduction="none", out_dtype=torch.float32)
        packed = fastloss.cross_entropy(logits, y, reduction="none", out_dtype=torch.float32)
    assert torch.equal(losses, packed)


# ---- as PTX ---------------------------------------------------------------------------------------------------------


@needs_ptx
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_case_as_ptx(case, dtype, generator):
    """Compiled, and executed with bounds, alignment and races checked: fused and with two kernels."""
    turn = CASES.index(case) + DTYPES.index(dtype)
    shapes = list(SHAPES.values())
    for arch, reduction in ("sm_80", "mean"), ("sm_90", "sum"), ("sm_80", "none"), ("sm_90", "none"):
        if reduction == "none" and case.name in ("normalizer", "everything"):
            continue
        turn += 2
        N, V = shapes[turn % len(shapes)]
        x, y, options = case.inputs(N, V, dtype, generator)
        upstream = torch.rand(N, generator=generator) if reduction == "none" else None
        with cuda_ptx.cuda_as_ptx(arch):
            assert_as_good_as_torch(
                fastloss.cross_entropy, case.oracle, x, y, {**options, "reduction": reduction}, upstream
            )


@needs_ptx
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", LOSS_CASES, ids=lambda case: case.name)
def test_other_losses_as_ptx(case, dtype, generator):
    turn = LOSS_CASES.index(case) + DTYPES.index(dtype)
    shapes = list(SHAPES.values())
    for arch, reduction in ("sm_80", "mean"), ("sm_90", "none"):
        turn += 2
        N, V = shapes[turn % len(shapes)]
        with cuda_ptx.cuda_as_ptx(arch):
            assert_case(case, N, V, dtype, reduction, generator)


PAIRS = [case for case in LOSS_CASES if case.objective.paired]


@needs_ptx
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_long_pairs_as_ptx(arch, generator):
    """Both rows over a cluster's shared memory on sm_90, in slices on sm_80."""
    for turn, case in enumerate(PAIRS[1::3]):
        with cuda_ptx.cuda_as_ptx(arch) as emulator:
            assert_case(case, 1, 50001, (torch.bfloat16, torch.float32)[turn % 2], "mean", generator)
        clusters = sum(launch.cluster_barriers for launch in emulator.log)
        assert (clusters > 0) == (arch == "sm_90")


@needs_ptx
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_long_rows_as_ptx(arch, generator):
    """Slices and two kernels on sm_80; clusters with distributed shared memory on sm_90."""
    for dtype, V in (torch.bfloat16, 100001), (torch.float32, 50257):
        for case in CASES[0], CASES[4]:
            x, y, options = case.inputs(2, V, dtype, generator)
            with cuda_ptx.cuda_as_ptx(arch) as emulator:
                assert_as_good_as_torch(fastloss.cross_entropy, case.oracle, x, y, options)
            clusters = sum(launch.cluster_barriers for launch in emulator.log)
            assert (clusters > 0) == (arch == "sm_90")


@needs_ptx
def test_other_kernels_as_ptx(generator):
    """Statistics, upstream gradients that are not one, rescaling in place, labels out of range."""
    x, y = rows(3, 1001, torch.bfloat16, generator)
    with cuda_ptx.cuda_as_ptx() as emulator:
        _, stats = fastloss.cross_entropy(x, y, return_stats=True)
        half = value_and_grad(fastloss.cross_entropy, x, torch.tensor(0.5), y)[1]
        leaf = x.clone().requires_grad_()
        fastloss.cross_entropy(leaf * 1, y, inplace=True).backward(torch.tensor(0.5))
        with pytest.raises(cuda_ptx.find_ptxemu().DeviceAssert, match="class index out of bounds"):
            fastloss.cross_entropy(x, torch.tensor([0, 1001, 2]))
    assert torch.equal(stats.argmax, x.float().argmax(1))
    exact = value_and_grad(F.cross_entropy, x.double(), torch.tensor(0.5), y)[1]
    torch.testing.assert_close(half.double(), exact, rtol=5e-3, atol=1e-6)
    torch.testing.assert_close(leaf.grad.double(), exact, rtol=1e-2, atol=1e-6)
    assert any("rescale" in launch.kernel for launch in emulator.log)


# ---- as machine code ------------------------------------------------------------------------------------------------


def cuobjdump() -> str | None:
    """NVIDIA's disassembler: the toolkit's, or the one in Triton's wheel."""
    if found := shutil.which("cuobjdump"):
        return found
    spec = find_spec("triton")
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(path) if path.exists() else None


def dump(*options: str) -> str:
    built = cuda.module()
    tool = cuobjdump()
    if isinstance(built, str) or tool is None:
        pytest.skip(built if isinstance(built, str) else "cuobjdump is not installed")
    return subprocess.run([tool, *options, built.__file__], capture_output=True, text=True, check=True).stdout


ARCHITECTURES = {"sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_103", "sm_120"}
KERNELS = re.compile(r"cuda_(float32|float64|bfloat16|float16)\d+([a-z_]+)")


def test_no_kernel_spills():
    """Every kernel, for every architecture: no stack, no local memory, registers for the threads it is meant for."""
    found = {}
    arch = None
    for line in dump("-res-usage").splitlines():
        if match := re.search(r"arch = (sm_\d+)", line):
            arch = match[1]
        elif match := re.search(r"Function (\S+):", line):
            name = match[1]
        elif match := re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", line):
            found[arch, name] = tuple(map(int, match.groups()))
    assert {arch for arch, _ in found} == ARCHITECTURES
    assert len(found) == len(ARCHITECTURES) * 4 * 22
    for (arch, name), (registers, stack, local) in found.items():
        assert (stack, local) == (0, 0), f"{name} {arch}"
        # 512 threads at most; three blocks of 128 for 32,000 logits on chip, or ten of 96 with two kernels.
        assert registers <= (96 if "row_" in name and not re.search("float64|Lb1ELb0E", name) else 128), (
            f"{name} {arch}: {registers}"
        )


def test_sixteen_bytes_at_a_time():
    """The loops over V: asynchronous copies, shared loads and global accesses of 128 bits, in the machine code."""
    code = dump("-sass", "-arch", "sm_80")
    wanted = {
        "row_states": ["LDGSTS.E.BYPASS.128", "LDS.128"],
        "row_loss_grad": ["LDGSTS.E.BYPASS.128", "LDS.128", "STG.E.128"],
        "row_grad": ["LDG.E.128", "STG.E.128"],
        "rescale": ["LDG.E.128", "STG.E.128"],
        "pair_states": ["LDGSTS.E.BYPASS.128", "LDS.128"],
        "pair_mixtures": ["LDGSTS.E.BYPASS.128", "LDS.128"],
        "pair_grad": ["LDGSTS.E.BYPASS.128", "LDS.128", "STG.E.128"],
        "pair_loss_grad": ["LDGSTS.E.BYPASS.128", "LDS.128", "STG.E.128"],
    }
    seen = set()
    for function in code.split("Function : ")[1:]:
        element, kernel = KERNELS.search(function.split(maxsplit=1)[0]).groups()
        assert "STL" not in function and "LDL" not in function
        for instruction in wanted.get(kernel, []):
            assert instruction in function, f"{kernel} {element}: no {instruction}"
            seen.add((kernel, element))
    assert len(seen) == 32


def test_without_a_driver_the_backend_refuses():
    """And does not raise: other backends must get their turn."""
    built = cuda.module()
    if isinstance(built, str):
        pytest.skip(built)
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert "CUDA says" in built.cannot_run(0)


def test_built_for_a_gpu_and_imported_without_one():
    built = cuda.module()
    if isinstance(built, str):
        pytest.skip(built)
    assert {f"sm_{a}" for a in built.architectures.split()} == ARCHITECTURES
    assert "runtime" in built.driver_report()
    assert "cuda       runs on cuda tensors, not on cpu" in fastloss.explain(torch.zeros(1, 2), torch.tensor([0]))
