"""Which backend runs: the best that can, said once; or the one asked for, or an error that says why not."""

import logging
import subprocess
import sys

import pytest
import torch
from sae_kernels import available_backends, chunked, dispatch, gather_dot, sparse_decode, use_backend


def codes(device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    values = torch.ones(2, 3, device=device)
    return values, torch.zeros(2, 3, dtype=torch.int32, device=device), torch.ones(5, 4, device=device)


def test_the_automatic_choice_is_logged_once_with_its_reason(caplog, monkeypatch):
    monkeypatch.setattr(dispatch, "_logged", set())
    with caplog.at_level(logging.INFO, logger="sae_kernels"), use_backend("auto"):
        sparse_decode(*codes())
        sparse_decode(*codes())
        sparse_decode(*codes("meta"))
    assert [record.getMessage() for record in caplog.records] == [
        "sparse_decode runs on backend cpu (first choice)",
        "sparse_decode runs on backend reference (not cpu: a tensor is on meta; "
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
    with pytest.raises(ValueError, match="backend is 'cuda': expected auto or one of cpu, torch, reference"):
        use_backend("cuda")
    assert dispatch.requested() == before
    assert available_backends() == ["cpu", "torch", "reference"]


def test_a_choice_holds_until_its_block_ends_even_by_an_error():
    before = dispatch.requested()
    with pytest.raises(KeyError), use_backend("torch"), use_backend("reference"):
        raise KeyError
    assert dispatch.requested() == before


def test_a_choice_without_a_block_holds_from_then_on():
    with use_backend("auto"):
        use_backend("reference")
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
