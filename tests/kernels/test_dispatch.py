"""Which backend runs: the best that can, said once; or the one asked for, or an error that says why not."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sae_kernels import available_backends, chunked, cpu, dispatch, gather_dot, sparse_decode, use_backend


def codes(device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    values = torch.ones(2, 3, device=device)
    return values, torch.zeros(2, 3, dtype=torch.int32, device=device), torch.ones(5, 4, device=device)


WHERE_TRITON_RUNS = (
    "Triton runs on CUDA and ROCm" if torch.cuda.is_available() else "Triton interprets here, on CPU tensors"
)
DECODE = """
import logging, torch
from sae_kernels import dispatch, sparse_decode, use_backend
logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
def decode(device):
    codes = torch.ones(2, 3, device=device), torch.zeros(2, 3, dtype=torch.int32, device=device)
    return sparse_decode(*codes, torch.ones(5, 4, device=device))
"""


def run_python(code: str, first_on_path: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    """A process of its own, in which Triton compiles: what is imported or broken there stays there."""
    path = [*([str(first_on_path)] if first_on_path else []), *sys.path]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "TRITON_INTERPRET": "0", **env}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)


def test_the_automatic_choice_is_logged_once_with_its_reason(caplog, monkeypatch):
    monkeypatch.setattr(dispatch, "_logged", set())
    with caplog.at_level(logging.INFO, logger="sae_kernels"), use_backend("auto"):
        sparse_decode(*codes())
        sparse_decode(*codes())
        sparse_decode(*codes("meta"))
    assert [record.getMessage() for record in caplog.records] == [
        "sparse_decode runs on backend cpu (first choice)",
        "sparse_decode runs on backend reference (not cpu: a tensor is on meta; "
        f"not triton: a tensor is on meta, and {WHERE_TRITON_RUNS}; "
        "not torch: a tensor is on meta, and it is written for cpu and cuda)",
    ]


def test_a_backend_asked_for_by_name_raises_when_it_cannot_run():
    reason = "backend 'cpu' cannot run sparse_decode: a tensor is on meta"
    with use_backend("cpu"), pytest.raises(ValueError, match=reason):
        sparse_decode(*codes("meta"))


def test_an_op_that_a_backend_lacks_is_a_reason_too(monkeypatch):
    monkeypatch.delattr(chunked, "gather_dot")
    _, indices, weight = codes()
    with use_backend("torch"), pytest.raises(ValueError, match="it does not implement gather_dot"):
        gather_dot(torch.ones(2, 4), indices, weight)


def test_unknown_backends_are_refused_and_change_nothing():
    before = dispatch.requested()
    with pytest.raises(ValueError, match="expected auto or one of cpu, triton, torch, reference"):
        use_backend("cuda")
    assert dispatch.requested() == before
    assert available_backends() == ["cpu", "triton", "torch", "reference"]


def test_a_choice_holds_until_its_block_ends_even_by_an_error():
    before = dispatch.requested()
    with pytest.raises(KeyError), use_backend("torch"), use_backend("reference"):
        raise KeyError
    assert dispatch.requested() == before


def test_a_choice_without_a_block_holds_from_then_on():
    with use_backend("auto"):
        use_backend("reference")
        assert dispatch.requested() == "reference"


def test_a_block_ends_with_what_was_chosen_when_it_began():
    with use_backend("auto"):
        made_before = use_backend("torch")
        use_backend("reference")
        with made_before:
            assert dispatch.requested() == "torch"
            with made_before:
                assert dispatch.requested() == "torch"
            assert dispatch.requested() == "torch"
        assert dispatch.requested() == "reference"


def test_the_backward_runs_on_the_backend_of_its_forward(monkeypatch):
    calls = []

    def noted(*args):
        calls.append("torch")
        return run(*args)

    run = chunked.gather_dot
    monkeypatch.setattr(chunked, "gather_dot", noted)
    values, indices, weight = codes()
    with use_backend("torch"):
        out = sparse_decode(values.requires_grad_(), indices, weight)
    with use_backend("reference"):
        out.sum().backward()
    assert calls == ["torch"]
    assert (values.grad == 4).all()


def test_importing_the_package_loads_no_backend_and_nothing_beyond_torch():
    code = (
        "import torch, sys; before = set(sys.modules); import sae_kernels;"
        "print(*sorted(m for m in set(sys.modules) - before if not m.startswith('sae_kernels')));"
        "print(*sorted(m for m in sys.modules if m in ('sae_kernels.cpu', 'sae_kernels.chunked')))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton compiles here")
def test_interpreted_triton_serves_those_who_ask_for_it_alone(caplog, monkeypatch):
    monkeypatch.setattr(dispatch, "_logged", set())
    monkeypatch.delattr(cpu, "gather_dot")
    _, indices, weight = codes()
    with caplog.at_level(logging.INFO, logger="sae_kernels"), use_backend("auto"):
        gather_dot(torch.ones(2, 4), indices, weight)
    assert [record.getMessage() for record in caplog.records] == [
        "gather_dot runs on backend torch (not cpu: it does not implement gather_dot; "
        "not triton: Triton interprets here, which is for tests)"
    ]
    with use_backend("triton"):
        assert (gather_dot(torch.ones(2, 4), indices, weight) == 4).all()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("raise ImportError('libtriton.so is missing')", "ImportError: libtriton.so is missing"),
        ("raise RuntimeError('no driver')", "RuntimeError: no driver"),
        # A version from before `knobs`. That torch, which looks too, finds what it wants is all it has.
        (
            "class language: dtype = str\nimport sys; sys.modules['triton.language'] = language",
            "AttributeError: module 'triton' has no attribute 'knobs'",
        ),
    ],
)
def test_a_broken_triton_is_one_warning_and_the_next_backend_runs(tmp_path, content, reason):
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text(content)
    ask = """
for device in ("meta", "meta", "cpu"):
    dispatch.select("sparse_decode", "auto", torch.empty(1, device=device))
with use_backend("triton"):
    try:
        decode("cpu")
    except ValueError as error:
        print(error)
"""
    out = run_python(DECODE + ask, first_on_path=tmp_path)
    why = f"it cannot be imported ({reason})"
    assert out.stderr.splitlines() == [
        f"WARNING backend triton is not used: {why}",
        "INFO sparse_decode runs on backend reference (not cpu: a tensor is on meta; "
        f"not triton: {why}; not torch: a tensor is on meta, and it is written for cpu and cuda)",
        "INFO sparse_decode runs on backend cpu (first choice)",
    ]
    assert out.stdout == f"backend 'triton' cannot run sparse_decode: {why}\n"


def test_triton_asked_for_by_name_says_which_tensor_is_not_on_a_gpu():
    ask = """
with use_backend("triton"):
    try:
        decode("cpu")
    except ValueError as error:
        print(error)
"""
    out = run_python(DECODE + ask)
    why = "a tensor is on cpu, and Triton runs on CUDA and ROCm"
    assert out.stdout == f"backend 'triton' cannot run sparse_decode: {why}\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a kernel can be launched here")
def test_a_kernel_that_cannot_be_launched_is_one_warning_and_the_reason_ever_after():
    probe = """
from sae_kernels.triton import launch
assert launch.broken() == launch.broken()
print(launch.broken())
"""
    out = run_python(DECODE + probe)
    assert out.stdout.startswith("a test kernel failed with ")
    assert out.stderr == f"WARNING Triton is not used: {out.stdout}"
