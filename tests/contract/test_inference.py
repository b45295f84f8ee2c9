"""What people call, of every architecture, activation and kind: encode, decode, forward, encode_latents.

On activations of any shape and floating dtype, and through torch.compile without a break in the graph.
"""

import copy
import logging

import pytest
import torch
from contract.test_saes import CASES, EPS, PLACES, K, built, rows
from sae_kernels import dispatch, use_backend
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from sae_train.activations.base import ACTIVATIONS
from sae_train.activations.topk import TopKConfig
from sae_train.codes import Codes
from sae_train.errors import InputError
from sae_train.sae.base import SAE
from sae_train.sae.linear import LinearConfig, LinearSAE

pytestmark = pytest.mark.usefixtures("one_thread")

F = 40
ALONE = ("relu", "batch_topk", "jumprelu")
"""Activations with which a latent is active whatever the others do."""
COMPILED = [case for case in CASES if case[2] == "autoencoder"]
COMPILED += [("gated", "topk", "skip transcoder"), ("linear", "jumprelu", "crosscoder")]


@pytest.fixture(params=CASES, ids="-".join)
def case(request) -> tuple[str, str, str]:
    return request.param


@pytest.fixture
def sae(case) -> SAE:
    """As it would be after some training: magnitudes, gates and the skip differ from where they start."""
    sae = copy.deepcopy(built(case))
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            if name in ("b_enc", "r_mag", "b_mag", "w_skip"):
                parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
        if case[1] == "batch_topk":
            x, _ = PLACES[case[2]].batch(rows(60))
            sae.activation.threshold.copy_(sae.preactivations(x).quantile(0.85))
    return sae.requires_grad_(False)


@pytest.fixture
def x(case) -> Tensor:
    """[60, d_in]"""
    return PLACES[case[2]].batch(rows(60))[0]


def same(one: Codes, two: Codes) -> bool:
    return torch.equal(one.values, two.values) and (
        one.indices is two.indices is None or torch.equal(one.indices, two.indices)
    )


@pytest.mark.parametrize("shape", [(60,), (3, 20), (2, 3, 10), (60, 1)])
def test_leading_dimensions_are_kept_and_change_no_bit(sae, x, shape):
    flat = sae.encode(x)
    codes = sae.encode(x.reshape(*shape, -1))
    assert codes.shape == shape and codes.values.shape == (*shape, flat.values.shape[1])
    assert same(codes.rows(), flat)
    for name in ("l0", "dense", "active", "latents"):
        whole, own = getattr(flat, name)(), getattr(codes, name)()
        assert torch.equal(own, whole.reshape(*shape, *whole.shape[1:])), name
    assert torch.equal(codes.counts(), flat.counts())
    for got, want in (
        (sae.decode(codes), sae.decode(flat)),
        (sae(x.reshape(*shape, -1)), sae(x)),
        (sae.reconstruct(x.reshape(*shape, -1), codes), sae.reconstruct(x, flat)),
    ):
        assert got.shape == (*shape, sae.d_out)
        assert torch.equal(got.reshape(-1, sae.d_out), want)


def test_one_row_without_leading_dimensions_is_encoded_as_it_is_in_a_batch(sae, x):
    codes = sae.encode(x[7])
    assert codes.shape == () and codes.l0().shape == () and codes.dense().shape == (F,)
    torch.testing.assert_close(codes.dense(), sae.encode(x).dense()[7], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae(x[7]), sae(x)[7], rtol=1e-5, atol=1e-5 * float(sae(x).abs().max()))
    torch.testing.assert_close(sae.decode(codes), sae.decode(sae.encode(x[7:8]))[0])


@pytest.mark.parametrize("shape", [(0,), (3, 0)])
def test_no_rows_at_all_give_empty_results_of_the_right_shape(sae, shape):
    empty = torch.zeros(*shape, sae.d_in)
    codes = sae.encode(empty)
    assert codes.shape == shape and codes.dense().shape == (*shape, F) and codes.counts().sum() == 0
    assert sae(empty).shape == sae.decode(codes).shape == (*shape, sae.d_out)
    assert sae.encode_latents(empty, [1, 2]).shape == (*shape, 2)


def test_rows_that_are_not_contiguous_are_encoded_as_a_copy_of_them_is(sae, x):
    wide = torch.zeros(60, 2 * sae.d_in)[:, ::2].copy_(x)
    turned = x.reshape(6, 10, -1).transpose(0, 1)
    assert same(sae.encode(wide), sae.encode(x))
    assert same(sae.encode(turned), sae.encode(turned.contiguous()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_output_has_the_dtype_of_the_input_and_is_that_of_float32_rounded_once(sae, x, dtype):
    low = (x / 8).to(dtype)
    codes = sae.encode(low)
    assert codes.values.dtype == torch.float32 and same(codes, sae.encode(low.float()))
    out = sae(low)
    assert out.dtype == dtype and torch.equal(out, sae(low.float()).to(dtype))
    made = sae.decode(Codes(codes.values.to(dtype), codes.indices, F))
    assert made.dtype == dtype
    rounded = sae.decode(Codes(codes.values.to(dtype).float(), codes.indices, F))
    if dtype == torch.float64:
        torch.testing.assert_close(
            made.float(), rounded, rtol=1e-5, atol=64 * EPS * float(rounded.abs().max())
        )
    else:
        assert torch.equal(made, rounded.to(dtype)), "computed in float32"
    assert sae.encode_latents(low, [3]).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_dtype_give_the_dtype_of_the_input_too(sae, x, dtype):
    other = copy.deepcopy(sae).to(dtype)
    out, latents = other(x / 8), other.encode_latents(x / 8, [2, 3])
    assert out.dtype == torch.float32 and latents.dtype in (torch.float32, dtype)
    want = sae(x / 8)
    assert (out - want).norm() <= 0.1 * want.norm()


def test_an_input_of_the_wrong_width_or_kind_is_refused_in_one_line(sae):
    for wrong in (torch.zeros(2, 3, sae.d_in + 1), torch.zeros(5, 1), torch.tensor(1.0)):
        for call in (sae.encode, sae, lambda x: sae.encode_latents(x, [0])):
            with pytest.raises(
                InputError, match=rf"expected floating point .*\[\.\.\., {sae.d_in}\]"
            ) as found:
                call(wrong)
            assert str(list(wrong.shape)) in str(found.value) and "\n" not in str(found.value)
    with pytest.raises(InputError, match=r"x='int64 \[2, "):
        sae.encode(torch.zeros(2, sae.d_in, dtype=torch.int64))
    with pytest.raises(InputError, match="codes='7 latents': expected codes of 40 latents"):
        sae.decode(Codes(torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int32), 7))


# A few latents


class Largest(TorchDispatchMode):
    """Notes the elements and the bytes of the largest tensors that an op makes."""

    numel = nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor) and tensor.layout == torch.strided:
                self.numel = max(self.numel, tensor.numel())
                self.nbytes = max(self.nbytes, tensor.nbytes)
        return out


def test_selected_latents_have_the_values_they_have_among_all(case, sae, x):
    dense = sae.encode(x).dense()
    busy = dense.count_nonzero(dim=0).argsort(descending=True)[:6].tolist()
    wanted = [*busy, busy[0], 39, 0]  # in any order, one of them twice
    got = sae.encode_latents(x.reshape(3, 20, -1), torch.tensor(wanted))
    assert got.shape == (3, 20, len(wanted)) and got.count_nonzero() > 60
    got, want = got.reshape(60, -1), dense[:, wanted]
    if case[1] in ALONE:
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        assert torch.equal(got != 0, want != 0)
    else:
        assert torch.equal(got, want)
    assert sae.encode_latents(x, []).shape == (60, 0)


def test_where_latents_do_not_compete_only_the_selected_ones_are_computed(case, sae, x):
    with Largest() as made:
        sae.encode_latents(x, [4, 9])
    assert (made.numel < len(x) * F) == (case[1] in ALONE)


@pytest.mark.parametrize("name", sorted(set(ACTIVATIONS) - set(ALONE)))
def test_where_latents_compete_the_others_can_take_the_place_of_a_selected_one(name):
    sae, (x, _) = copy.deepcopy(built(("linear", name, "autoencoder"))), PLACES["autoencoder"].batch(rows(60))
    assert sae.encode_latents(x, [4]).count_nonzero() > 0
    with torch.no_grad():
        sae.b_enc[:] = 1e3 * (torch.arange(F) != 4)
    assert sae.encode_latents(x, [4]).count_nonzero() == 0


@pytest.mark.parametrize(
    "wrong", [[40], [-1], [0, 1.5], [True, False], torch.zeros(2, 2, dtype=torch.int64), "ab", [[1]]]
)
def test_what_is_no_list_of_latents_is_refused(wrong):
    sae = built(("linear", "topk", "autoencoder"))
    for call in (lambda: sae.encode_latents(torch.zeros(3, sae.d_in), wrong), lambda: sae.directions(wrong)):
        with pytest.raises(InputError, match=r"latents=.*: expected a list of whole numbers from 0 to 39"):
            call()


def test_gradients_of_selected_latents_are_those_of_all(sae, x):
    one, two = (x.clone().requires_grad_() for _ in range(2))
    sae.encode_latents(one, [3, 8, 11]).sum().backward()
    sae.encode(two).dense()[:, [3, 8, 11]].sum().backward()
    assert two.grad.abs().sum() > 0
    torch.testing.assert_close(one.grad, two.grad, rtol=1e-5, atol=1e-5)


def test_directions_are_what_latents_add_to_a_reconstruction(sae):
    latents = [5, 0, 5, 31]
    none, one = (
        sae.decode(Codes(torch.full((4, 1), value), torch.tensor(latents)[:, None].int(), F))
        for value in (0.0, 1.0)
    )
    size = float(one.abs().max())
    torch.testing.assert_close(sae.directions(latents), one - none, rtol=1e-5, atol=64 * EPS * size)


def test_selected_latents_of_a_topk_sae_take_bounded_memory():
    n, f = 4096, 8192
    sae = LinearSAE(LinearConfig(d_sae=f, activation=TopKConfig(k=K)), 8).requires_grad_(False)
    sae.w_enc.normal_(generator=torch.Generator().manual_seed(0))
    with Largest() as made:
        sae.encode_latents(torch.randn(n, 8), range(16))
    assert 0 < made.nbytes <= 20 << 20 < n * f * 4, "16 MiB of pre-activations at a time, or 20 of guesses"


# torch.compile


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def close(got: Tensor, want: Tensor, rtol: float = 1e-5) -> None:
    """Sums of 12 products of numbers of the size of `want`, taken in another order."""
    torch.testing.assert_close(got, want, rtol=rtol, atol=64 * EPS * float(want.abs().max()))


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("case", COMPILED, ids="-".join, indirect=True)
def test_compiled_it_is_one_graph_for_every_batch_size_and_gives_what_it_gives_without(case, sae, x):
    counters = CompileCounterWithBackend("eager"), CompileCounterWithBackend("eager")
    encode = torch.compile(sae.encode, fullgraph=True, dynamic=True, backend=counters[0])
    forward = torch.compile(sae, fullgraph=True, dynamic=True, backend=counters[1])
    for shape in ((4, 15), (2, 7), (5, 3)):  # none of them as long as a row is wide, which would be a guard
        part = x[: shape[0] * shape[1]].reshape(*shape, -1)
        got, want = encode(part), sae.encode(part)
        assert got.shape == shape
        close(got.dense(), want.dense())
        assert torch.equal(got.dense() != 0, want.dense() != 0) and want.l0().sum() > 0
        close(forward(part), sae(part))
        if case[1] == "topk":
            assert same(got, want), "the same kernel"
        if case[1] == "topk" and case[0] != "gated":
            assert torch.equal(forward(part), sae(part)), "the same kernels"
    assert [counter.frame_count for counter in counters] == [1, 1], "nothing was compiled again"


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("name", ["linear", "gated"])
def test_gradients_through_the_compiled_kernels_are_those_without(name):
    case = (name, "topk", "skip transcoder")
    sae, (x, _) = copy.deepcopy(built(case)).requires_grad_(True), PLACES[case[2]].batch(rows())
    found = []
    for forward in (sae, torch.compile(sae, fullgraph=True, backend="aot_eager")):
        sae.zero_grad()
        rows_in = x.clone().requires_grad_()
        forward(rows_in).square().sum().backward()
        grads = {n: p.grad.clone() for n, p in sae.named_parameters() if p.grad is not None}
        found.append({"x": rows_in.grad} | grads)
    assert found[0].keys() == found[1].keys() >= {"x", "w_enc", "b_dec", "w_dec"}
    for key, want in found[0].items():
        assert want.abs().sum() > 0 or (name, key) == ("gated", "b_enc"), key  # which only opens gates
        torch.testing.assert_close(found[1][key], want, rtol=1e-4, atol=1e-5 * float(want.abs().max()))


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
def test_the_default_compiler_takes_it_too():
    case = ("gated", "topk", "autoencoder")
    sae, (x, _) = copy.deepcopy(built(case)).requires_grad_(False), PLACES[case[2]].batch(rows())
    compiled = torch.compile(sae, fullgraph=True, dynamic=True)
    for n in (64, 10):
        close(compiled(x[:n].bfloat16()), sae(x[:n].bfloat16()), 2.0**-8)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("how", ["as it is", "compiled"])
def test_the_fast_kernels_run_and_say_so(how, caplog, monkeypatch):
    monkeypatch.setattr(dispatch, "_logged", set())
    case = ("linear", "topk", "autoencoder")
    sae, (x, _) = built(case), PLACES[case[2]].batch(rows())
    forward = sae if how == "as it is" else torch.compile(sae, fullgraph=True, backend="aot_eager")
    with caplog.at_level(logging.INFO, logger="sae_kernels"), torch.no_grad():
        forward(x.reshape(2, 32, -1))
    said = [record.getMessage() for record in caplog.records if record.name == "sae_kernels"]
    assert said == [f"{op} runs on backend cpu (first choice)" for op in ("topk_encode", "sparse_decode")]
    with use_backend("reference"), torch.no_grad():
        close(forward(x), sae(x))
