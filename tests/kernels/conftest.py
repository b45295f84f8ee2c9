"""Where the kernel tests run: every backend on every device it serves, Triton without a GPU included.

The tests' root conftest has set TRITON_INTERPRET=1 if there is no CUDA device: Triton then runs kernels in
Python on CPU tensors. A test that is parametrised over backends is skipped where Triton says that it
cannot take the tensors: float64 anywhere, and CPU tensors on a machine whose GPU it compiles for.

On a GPU these tests carry the mark `gpu`, but for those of the compile gate and of the benchmark.

Every launch that the interpreter runs here must be one that the compile gate compiles for GPUs (`launches`).
"""

import re
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
import torch
from sae_kernels import available_backends, use_backend

HAS_CUDA = torch.cuda.is_available()
if not HAS_CUDA:
    from . import launches
DEVICES = ("cpu", "cuda") if HAS_CUDA else ("cpu",)
PLACES = [
    (name, device)
    for name in available_backends()
    for device in DEVICES
    if (name, device) != ("cpu", "cuda") and (name, device, HAS_CUDA) != ("triton", "cpu", True)
]
HERE, WITHOUT_GPU = Path(__file__).parent, ("test_compile_gate.py", "test_gpu_bench.py")
NOT_FOR_TRITON = re.compile(r"backend 'triton' cannot run \w+: (a tensor is (float64|on cpu)\b.*)")


@pytest.hookimpl(tryfirst=True)  # before marks are selected by
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HAS_CUDA and item.path.parent == HERE and item.path.name not in WITHOUT_GPU:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(params=PLACES, ids="-".join)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """The device to put tensors on while one backend is in force; a test that takes this runs on each."""
    name, where = request.param
    with use_backend(name):
        yield where


@pytest.fixture
def triton_device() -> Iterator[str]:
    """The device to put tensors on while Triton is in force: its GPU, or the CPU that interprets."""
    with use_backend("triton"):
        yield "cuda" if HAS_CUDA else "cpu"


@pytest.fixture(autouse=True)
def every_launch_is_one_that_the_gate_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    if not HAS_CUDA:
        monkeypatch.setattr(launches.InterpretedFunction, "run", launches.checked_run)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    try:
        return (yield)
    except ValueError as error:
        refused = NOT_FOR_TRITON.fullmatch(str(error))
        if refused is None:
            raise
        pytest.skip(refused[1])
