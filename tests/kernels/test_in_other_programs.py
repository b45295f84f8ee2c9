"""What a program around the ops may do: tensors of any layout and dtype, other defaults, torch.compile.

What could be read or written wrongly is refused; everything else gives what it gives by default.
"""

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from sae_kernels import (
    AdamStep,
    Counters,
    DeadGrads,
    Latents,
    Weight,
    batch_topk_encode,
    dead_encode,
    decode_residual,
    gather_dot,
    latent_step,
    settle,
    sparse_decode,
    threshold_encode,
    topk_encode,
    topk_encode_many,
    use_backend,
)
from torch import Tensor

N, D, F, K = 6, 5, 24, 3
EPS = 2.0**-24  # float32 unit roundoff


def draw(*shape: int, device: str = "cpu", seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32).to(device)


def make_latents(device: str, *many: int, lazy: bool = False) -> Latents:
    def weight(*shape: int) -> Weight:
        value = draw(*many, *shape, device=device)
        return Weight(value, torch.zeros_like(value), torch.zeros_like(value))

    last_step = torch.zeros(*many, F, dtype=torch.int32, device=device) if lazy else None
    step = torch.zeros(many, dtype=torch.float32, device=device)
    return Latents(weight(F, D), weight(F), weight(F, D), weight(D), step, last_step)


def make_counters(device: str) -> Counters:
    counts, sums, last_fired = (torch.zeros(F, dtype=torch.int64, device=device) for _ in range(3))
    maxima = torch.zeros(F, dtype=torch.float32, device=device)
    return Counters(counts, sums, maxima, last_fired, tokens=N)


def step_arguments(latents: Latents, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x, residual, values, indices, dots"""
    x = draw(N, D, device=device, seed=1)
    values, indices = topk_encode(x, latents.w_enc.value, latents.b_enc.value, K)
    residual, _, dots = decode_residual(values, indices, latents.w_dec.value, latents.b_dec.value, x)
    return x, residual, values, indices, dots


def every_second(tensor: Tensor) -> Tensor:
    """The same numbers, at every second place of larger memory."""
    return torch.stack([tensor, tensor], dim=-1)[..., 0]


# -- what a step writes ----------------------------------------------------------------------------------


def test_a_step_writes_to_contiguous_tensors_alone(device):
    latents = make_latents(device, lazy=True)
    args, adam = step_arguments(latents, device), AdamStep(1e-2, beta1=0.0)
    counters = make_counters(device)
    for name in ("counts", "sums", "maxima", "last_fired"):
        strided = replace(counters, **{name: every_second(getattr(counters, name))})
        with pytest.raises(ValueError, match=rf"counters.{name} has strides \(2,\): expected a contiguous"):
            latent_step(*args, latents, adam, -0.1, counters=strided)
    strided = replace(latents, last_step=every_second(latents.last_step))
    for call in (lambda: latent_step(*args, strided, adam, -0.1), lambda: settle(strided, adam)):
        with pytest.raises(ValueError, match=r"latents.last_step has strides \(2,\)"):
            call()
    assert not latents.step.any() and not counters.counts.any()


def test_a_step_of_one_sae_refuses_several(device):
    latents = make_latents(device, 2, lazy=True)
    x, values = draw(2, N, D, device=device), draw(2, N, K, device=device)
    indices = torch.zeros(2, N, K, dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match=r"w_dec is \(2, 24, 5\): expected \[F, D\], of one SAE"):
        latent_step(x, x, values, indices, values, latents, AdamStep(1e-2, beta1=0.0), -0.1)
    with pytest.raises(ValueError, match=r"expected \[F, D\], of one SAE"):
        settle(latents, AdamStep(1e-2, beta1=0.0))


def test_a_backward_through_weights_that_a_step_has_changed_since_is_refused(device):
    latents = make_latents(device)
    x = draw(N, D, device=device, seed=1).requires_grad_()
    out = sparse_decode(*topk_encode(x, latents.w_enc.value, latents.b_enc.value, K), latents.w_dec.value)
    latent_step(*step_arguments(latents, device), latents, AdamStep(1e-2), -0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_rows_are_settled_with_the_step_that_left_them_alone(device):
    latents = make_latents(device, lazy=True)
    latents.w_enc.first.fill_(1)
    with pytest.raises(ValueError, match=r"beta1 is 0.9 with last_step set"):
        settle(latents, AdamStep(1e-2))
    longer = replace(latents, last_step=torch.zeros(F + 1, dtype=torch.int32, device=device))
    with pytest.raises(ValueError, match=r"latents.last_step is torch.int32 \(25,\): expected .*\[24\]"):
        settle(longer, AdamStep(1e-2, beta1=0.0))
    assert latents.w_enc.first.all()
    settle(replace(latents, last_step=None), AdamStep(1e-2))  # nothing to settle


def test_what_is_no_option_of_a_step_is_named(device):
    latents = make_latents(device)
    (x, residual, *codes), adam = step_arguments(latents, device), AdamStep(1e-2)
    with pytest.raises(ValueError, match=r"clip_norm is 2.0: expected a tensor"):
        latent_step(x, residual, *codes, latents, adam, -0.1, clip=1.0, clip_norm=2.0)
    counted = replace(make_counters(device), tokens=torch.tensor(7, device=device))
    with pytest.raises(ValueError, match=r"counters.tokens is tensor\(.*: expected a whole number"):
        latent_step(x, residual, *codes, latents, adam, -0.1, counters=counted)
    with pytest.raises(ValueError, match=r"residual is \(6, 4\): expected \[6, 5\]"):
        latent_step(x, residual[:, 1:], *codes, latents, adam, -0.1)
    whole = torch.zeros(1, D, dtype=torch.int32, device=device)
    dead = DeadGrads(torch.zeros(1, dtype=torch.int64, device=device), whole, draw(1, device=device), whole)
    with pytest.raises(ValueError, match=r"dead.w_enc is torch.int32: expected a floating point"):
        latent_step(x, residual, *codes, latents, adam, -0.1, dead=dead)
    for k in (2.0, None, "2", 0, F + 1):
        with pytest.raises(ValueError, match=rf"k is {k}: expected 1 to 24, the number of latents"):
            topk_encode(x, latents.w_enc.value, latents.b_enc.value, k)
    with pytest.raises(ValueError, match=r"k is 2.5: expected a whole number of at least 1"):
        dead_encode(x, latents.w_enc.value, latents.b_enc.value, 2.5)
    with pytest.raises(ValueError, match=r"threshold is 0.5: expected a tensor"):
        threshold_encode(x, latents.w_enc.value, latents.b_enc.value, 0.5)


# -- dtypes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_gradients_of_rows_that_are_wider_than_the_weight_are_not_rounded_to_it(device, low):
    x, w = draw(N, D, device=device).requires_grad_(), draw(F, D, device=device, seed=1).to(low)
    values, indices = topk_encode(x, w, draw(F, device=device), K)
    given = draw(N, K, device=device, seed=2) * 1e5  # beyond what float16 holds
    for op in (values, gather_dot(x, indices, w)):
        (got,) = torch.autograd.grad(op, x, given)
        chosen = (given * (values > 0) if op is values else given).double()
        want = torch.einsum("nk,nkd->nd", chosen, w.double()[indices.long()])
        limit = 2 * K * EPS * torch.einsum("nk,nkd->nd", chosen.abs(), w.double().abs()[indices.long()])
        assert ((got - want).abs() <= limit).all()


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_products_of_narrow_operands_are_not_rounded_however_many_slots_there_are(device, low):
    latents = 600
    x, w = draw(2, 8, device=device).to(low), draw(latents, 8, device=device, seed=1).to(low)
    b = draw(latents, device=device, seed=2)
    exact = (x.double() @ w.double().T + b.double()).relu().sort(dim=-1, descending=True).values
    limit = 16 * EPS * (x.double().abs() @ w.double().abs().T + b.double().abs()).amax()
    values, _ = topk_encode(x, w, b, 513)  # Triton has no list of candidates that long
    assert (values.sort(dim=-1, descending=True).values - exact[:, :513]).abs().max() <= limit
    values, *_ = batch_topk_encode(x, w, b, 4)
    want = exact.flatten().sort(descending=True).values[:8]
    assert (values.sort(descending=True).values - want).abs().max() <= limit
    dense = dead_encode(x, w, b, latents)
    assert (dense.sort(dim=-1, descending=True).values - exact).abs().max() <= limit


def test_a_gradient_of_many_slots_is_summed_in_float32(device):
    slots = 2000
    w = torch.ones(2, 3, dtype=torch.bfloat16, device=device, requires_grad=True)
    values = torch.ones(slots, 1, device=device)
    indices = torch.zeros(slots, 1, dtype=torch.int32, device=device)
    rows = torch.ones(slots, 3, device=device)
    for out in (sparse_decode(values, indices, w), gather_dot(rows, indices, w)):
        (got,) = torch.autograd.grad(out.float().sum(), w)
        assert got[0].tolist() == [2000.0] * 3


def test_a_latent_that_is_masked_by_its_bias_is_not_chosen(device):
    x, w = draw(N, D, device=device).bfloat16(), draw(F, D, device=device, seed=1).bfloat16()
    b = torch.full((F,), -torch.inf, device=device)
    b[::3] = 1.0
    values, indices = topk_encode(x, w, b, K)
    assert values.isfinite().all()
    assert (indices[values > 0] % 3 == 0).all() and (values > 0).any()


def test_a_backward_inside_autocast_is_not_rounded():
    x, w, b = draw(N, D).requires_grad_(), draw(F, D, seed=1), draw(F)
    out = dead_encode(x, w, b, F)
    (want,) = torch.autograd.grad(out.sum(), x, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        (got,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(got, want)


def test_codes_of_one_sae_and_of_several_have_one_dtype():
    x, w, b = (draw(2, *shape).double() for shape in ((N, D), (F, D), (F,)))
    both, _ = topk_encode_many(x, w, b, [K, K])
    one, _ = topk_encode_many(x[:1], w[:1], b[:1], [K])
    assert both.dtype == one.dtype == torch.float64
    assert torch.equal(both[:1].sort().values, one.sort().values)


def test_a_width_of_zero_is_a_width(device):
    values, indices = draw(N, K, device=device), torch.zeros(N, K, dtype=torch.int32, device=device)
    assert sparse_decode(values, indices, draw(F, 0, device=device)).shape == (N, 0)


# -- defaults of torch -----------------------------------------------------------------------------------


def everything(device: str) -> list[Tensor]:
    """What the ops give from the same tensors, codes as sets."""
    latents = make_latents(device)
    x, w, b = draw(N, D, device=device), latents.w_enc.value.clone(), latents.b_enc.value.clone()
    out = [topk_encode(x, w, b, K)[0], batch_topk_encode(x, w, b, K)[0], dead_encode(x, w, b, K)]
    out.append(threshold_encode(x, w, b, torch.ones((), dtype=torch.float32, device=device))[0])
    args = step_arguments(latents, device)
    norm = latent_step(*args, latents, AdamStep(1e-2), -1e5, clip=1.0)
    return [*(t.flatten().sort().values for t in out), *args[1:], norm, latents.step, *latents.written()]


@pytest.fixture
def other_defaults() -> Iterator[None]:
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_default_device("cpu")
    torch.set_default_device(None)


@pytest.mark.usefixtures("other_defaults")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_the_default_dtype_is_nothing_to_the_ops(device, dtype):
    want = everything(device)
    torch.set_default_dtype(dtype)
    got = everything(device)
    assert all(g.dtype == w.dtype and torch.equal(g, w) for g, w in zip(got, want, strict=True))


@pytest.mark.usefixtures("other_defaults")
def test_the_default_device_is_nothing_to_the_ops(device):
    x, w, b = draw(64, D, device=device), draw(4608, D, device=device), draw(4608, device=device)
    latents, small = make_latents(device), draw(N, D, device=device)
    args = step_arguments(latents, device)
    with torch.device("meta"):
        for k in (2, 200):
            values, indices = topk_encode(x[:3], w[:600] if k > 2 else w, b[:600] if k > 2 else b, k)
            assert values.device.type == indices.device.type == device
        batch_topk_encode(small, w[:F], b[:F], K)
        threshold_encode(small, w[:F], b[:F], b[0].clone())
        gather_dot(small, args[3], w[:F])
        norm = latent_step(*args, latents, AdamStep(1e-2), -0.1, clip=1.0)
    assert norm.device.type == device and int(latents.step) == 1


def test_the_package_can_be_imported_where_the_default_device_is_another():
    code = """
import torch
torch.set_default_device("meta")
from sae_kernels import gather_dot
one = torch.ones(1, 1, device="cpu")
print(gather_dot(one, torch.zeros(1, 1, dtype=torch.int32, device="cpu"), one))
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout == "tensor([[1.]])\n"


# -- torch.compile ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_ops_in_a_compiled_function_give_what_they_give_outside(backend):
    torch._dynamo.reset()
    w, b = draw(4608, D, seed=1), draw(4608)

    def both(x: Tensor) -> Tensor:
        values, indices = topk_encode(2 * x, w, b, K)
        return sparse_decode(values, indices, w) + gather_dot(x, indices, w).sum(dim=1, keepdim=True)

    with use_backend(backend):
        given = draw(64, D, seed=2).requires_grad_()
        out, want = torch.compile(both, backend="eager")(given), both(given)
        assert torch.equal(out, want)
        grads = [torch.autograd.grad(y.square().sum(), given)[0] for y in (out, want)]
    assert torch.equal(*grads)
    torch._dynamo.reset()
