"""What a call allocates: one gradient, and O(N) beside it."""

from __future__ import annotations

import subprocess
import sys

import pytest

MEASURE = """
import torch, fastloss, sys
def status(key):
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) for line in f if line.startswith(key)) / 1024
N, V = 2048, 20000
x = torch.ones(N, V, dtype=getattr(torch, sys.argv[1])).requires_grad_()
y = torch.zeros(N, dtype=torch.int64)
small = torch.zeros(64, V, requires_grad=True)
fastloss.cross_entropy(small, y[:64]).backward()  # threads, workspaces
options = eval(sys.argv[2])
before = status("VmRSS")
loss = fastloss.cross_entropy(x, y, **options)
loss.sum().backward()
print(status("VmHWM") - before - x.nbytes / 2**20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("options", ["{}", "{'reduction': 'none'}", "{'softcap': 30.0, 'label_smoothing': 0.1}"])
def test_peak_beyond_logits_and_gradient(dtype, options):
    """Less than 10 MiB, where one more (N, V) tensor would be 78 or 156 MiB."""
    run = subprocess.run([sys.executable, "-c", MEASURE, dtype, options], capture_output=True, text=True, check=True)
    assert float(run.stdout) < 10, run.stdout


IMPORT = """
import sys, torch
fresh = set(sys.modules)
import fastloss
heavy = {"triton", "transformers", "trl", "numpy", "matplotlib", "rich"} & (set(sys.modules) - fresh)
assert not heavy, heavy
"""


def test_import_is_light():
    subprocess.run([sys.executable, "-W", "error", "-c", IMPORT], check=True)
