"""The core of the tests on other versions of Python, torch and Triton than those of constraints.txt.

`nox` makes an environment for each, downloads what it needs (PyPI's torch is a CUDA build: some 6 GB a version) and
runs the tests on the CPU. `nox -R` keeps the environments; what follows `--` goes to pytest. docs/install.md has the
results.
"""

from __future__ import annotations

import nox

nox.options.error_on_missing_interpreters = True  # or a version that was not tested would look like one that passed

# Python, and the requirements that pip is given beside the package. Each torch asks for a Triton of its own.
OLDEST = "3.10", ["torch==2.9.0", "triton==3.5.0", "numpy<2.4"]
# The interpreter of Triton before 3.7 fails with NumPy 2.4: its tests would be skipped.
MIDDLE = "3.12", ["torch==2.11.0", "triton==3.6.0", "numpy<2.4"]
NEWEST = "3.13", ["torch==2.15.0"]

CORE = [
    "tests/test_cross_entropy.py",
    "tests/test_conformance.py",
    "tests/test_numerics.py",
    "tests/test_arguments.py",
    "tests/test_compile.py",
    "tests/test_dynamic_sizes.py",
    "tests/test_transforms.py",
    "tests/test_losses.py",
    "tests/test_dense.py",
    "tests/test_logprobs.py",
    "tests/test_linear.py",
    "tests/test_linear_conformance.py",
    "tests/test_linear_options.py",
    "tests/test_fake_tensors.py",
    "tests/test_flops.py",
    "tests/test_loss_scale.py",
    "tests/test_shared_tensors.py",
    "tests/test_groups.py",
    "tests/test_cuda_on_host.py",
    "tests/test_cuda.py",
    "tests/test_triton.py",
    "tests/test_triton_heads.py",
    "tests/test_triton_head_grads.py",
]


@nox.session
@nox.parametrize(
    "python,requirements",
    [nox.param(*OLDEST, id="oldest"), nox.param(*MIDDLE, id="torch-2.11"), nox.param(*NEWEST, id="newest")],
)
def versions(session: nox.Session, requirements: list[str]) -> None:
    """The core of the tests."""
    build = f"build-dir={session.create_tmp()}/objects"
    # Without the CUDA kernels, which take minutes: their sources are tested as C++ on the host.
    session.install("-C", "cmake.define.FASTLOSS_CUDA=OFF", "-C", build, ".[test]", *requirements)
    session.run("python", "-m", "pip", "list")
    session.run(
        "python", "-m", "pytest", "-m", "not slow", "-n", "logical", "--dist", "worksteal", *CORE, *session.posargs
    )
