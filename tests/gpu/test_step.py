"""`latent_step` and the decoders at real size: every storage format against the reference, which defines it.

Sums have at most as many terms as the busiest latent has rows, or a row has columns: 64 * terms * EPS are
allowed of the root mean square, as an Adam step divides by a root of squares of such sums. A bfloat16 moment
is one of the two neighbours of the float32 one, and the noise of its place decides which.
"""

from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from sae_kernels import (
    Latents,
    decode_residual,
    gather_dot,
    latent_step,
    segment_rows,
    settle,
    sparse_decode,
    sparse_grad,
    use_backend,
)
from sae_kernels.latents import noise, round_stochastically
from torch import Tensor

from .problem import (
    BF16_EPS,
    DEVICE,
    EPS,
    NAMES,
    SIZES,
    TINY,
    Codes,
    Size,
    adam_for,
    dictionary,
    encode,
    make_counters,
    make_dead,
    make_latents,
    make_rows,
    needs_gpu,
    rms,
    tensors_of,
)

pytestmark = needs_gpu
F32, BF16 = torch.float32, torch.bfloat16
cuda: Any = MagicMock() if TINY else torch.cuda  # in the interpreter there is nothing to wait for or capture


@pytest.fixture(autouse=True)
def plain_memory() -> Iterator[None]:
    """Memory is not filled with NaN, which would take long; Triton runs everything."""
    torch.use_deterministic_algorithms(False)
    with use_backend("triton"):
        yield


def scale_of(size: Size) -> float:
    return -2 / (size.n * size.d)


def step(size: Size, latents: Latents, codes: Codes, **options: Any) -> Tensor:
    return latent_step(*codes.args, latents, adam_for(latents), scale_of(size), **options)


def batches(size: Size, latents: Latents, dtype: torch.dtype, count: int) -> list[Codes]:
    """Codes of `count` batches; encoded with the same weights, as steps here change them little."""
    w = latents.w_dec.master()
    return [encode(size, latents, make_rows(size, w, 10 + i).to(dtype)) for i in range(count)]


def assert_same_step(size: Size, got: Latents, want: Latents, before: Latents, terms: int) -> None:
    """Up to the order of sums: of how far weights have moved, and of moments."""
    assert torch.equal(got.step, want.step)
    for name in NAMES:
        a, b, old = getattr(got, name), getattr(want, name), getattr(before, name).master()
        moved, rounding = rms(b.master() - old), 4 * EPS * rms(old)
        assert moved > 0, name
        narrow = a.first.dtype == BF16
        relative = 64 * terms * EPS + (4 * BF16_EPS if narrow else 0.0)
        assert rms(a.master() - b.master()) <= relative * moved + rounding, name
        for field in ("first", "second"):
            m, w = getattr(a, field).float(), getattr(b, field).float()
            assert rms(m - w) <= relative * rms(w), f"{name}.{field}"
        if a.low is not None:
            assert torch.equal(a.low, a.value.bfloat16()), name
    norms = got.w_dec.master().double().norm(dim=1)
    assert (norms - 1).abs().max() <= 8 * EPS


def terms_of(size: Size, codes: list[Codes]) -> int:
    """Of the longest sum: of a latent's rows, or of a column."""
    return max(size.n, size.d, *(int(c.indices.flatten().bincount().max()) for c in codes))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dead", [False, True], ids=["no dead", "dead"])
@pytest.mark.parametrize(
    ("fmt", "moment", "dtype", "lazy", "clip"),
    [
        ("plain", F32, F32, False, "own"),
        ("low", F32, BF16, False, "own"),
        ("low", BF16, BF16, False, "lagged"),
        ("split", F32, BF16, False, None),
        ("split", BF16, BF16, False, "own"),
        ("low", F32, BF16, True, None),
        ("split", BF16, BF16, True, "own"),
    ],
)
def test_two_steps_in_every_format_are_those_of_the_reference(size, fmt, moment, dtype, lazy, clip, dead):
    size = SIZES[size]
    got = make_latents(size, fmt, moment, lazy)
    before, want = deepcopy(got), deepcopy(got)
    counters, w, codes = (make_counters(size), make_counters(size)), dictionary(size), []
    for i in range(2):
        # Encoded before each step, since `dots` are those of the weights that it begins with.
        codes.append(batch := encode(size, got, make_rows(size, w, 10 + i).to(dtype)))
        gradient = rms(scale_of(size) * batch.residual.float()) * size.k**0.5
        options: dict[str, Any] = {"dead": make_dead(size, 20 + i, gradient) if dead else None}
        if clip is not None:
            options["clip"] = 1e-3
            options["clip_norm"] = torch.tensor(3e-3, device=DEVICE) if clip == "lagged" else None
        norms = []
        for latents, backend, counted in zip((got, want), ("triton", "reference"), counters, strict=True):
            with use_backend(backend):
                norms.append(step(size, latents, batch, counters=counted, **options))
        assert float(norms[0]) == pytest.approx(float(norms[1]), rel=64 * terms_of(size, codes) * EPS)
    assert_same_step(size, got, want, before, terms_of(size, codes))
    for field in ("counts", "sums", "maxima", "last_fired"):
        assert torch.equal(getattr(counters[0], field), getattr(counters[1], field)), field
    if lazy:
        assert torch.equal(got.last_step, want.last_step)
        assert (got.last_step == 10).any() and (got.last_step == 12).any()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("moment", [F32, BF16], ids=str)
def test_settling_catches_up_the_rows_that_lazy_steps_have_left_alone(size, moment):
    size = SIZES[size]
    got = make_latents(size, "split", moment, lazy=True)
    start = deepcopy(got)
    for batch in batches(size, got, BF16, 2):
        step(size, got, batch)
    stepped, want = deepcopy(got), deepcopy(got)
    idle, recent = got.last_step == 10, got.last_step == 12
    assert idle.any() and recent.any()
    for latents, backend in ((got, "triton"), (want, "reference")):
        with use_backend(backend):
            settle(latents, adam_for(latents))
    assert (got.last_step == 12).all()
    for name, tensor in tensors_of(got).items():
        other = tensors_of(want)[name]
        if name.endswith("second") and name != "b_dec.second":
            wide, exact = tensor.float(), tensors_of(start)[name].float() * 0.999**2
            coarse = 2 * BF16_EPS if tensor.dtype == BF16 else 4 * EPS
            assert (wide[idle] - exact[idle]).abs().le(coarse * exact[idle]).all(), name
            off = (wide - other.float()).abs()
            assert off.le(coarse * other.float()).all() and off.ne(0).double().mean() <= 1e-3, name
            assert torch.equal(tensor[recent], tensors_of(stepped)[name][recent]), name
        else:
            assert torch.equal(tensor, other), name


@pytest.mark.parametrize("size", SIZES)
def test_bfloat16_moments_are_float32_ones_rounded_by_the_noise_of_their_place(size):
    size = SIZES[size]
    narrow, wide = make_latents(size, "low", BF16), make_latents(size, "low", F32)
    for name in ("w_enc", "w_dec"):
        for field in ("first", "second"):  # both begin at the same numbers
            getattr(getattr(wide, name), field).copy_(getattr(getattr(narrow, name), field))
    (batch,) = batches(size, wide, BF16, 1)
    for latents in (narrow, wide):
        step(size, latents, batch)
    for salt, name in ((0, "w_enc"), (2, "w_dec")):
        for which, field in enumerate(("first", "second")):
            exact, got = getattr(getattr(wide, name), field), getattr(getattr(narrow, name), field)
            drawn = noise(exact.shape, wide.step, 2 * salt + which)
            want = round_stochastically(exact, drawn)
            # Two compilations may round a sum differently, which the noise turns into a step now and then.
            assert (got != want).double().mean() <= 1e-3 + 64 * EPS / BF16_EPS, (name, field)
            assert (got.float() - exact).abs().le(2 * BF16_EPS * exact.abs() + 1e-38).all(), (name, field)


def test_a_split_master_takes_the_step_of_a_float32_one():
    size = SIZES["A"]
    both = [make_latents(size, fmt) for fmt in ("plain", "split")]
    before = deepcopy(both[0])
    (batch,) = batches(size, both[0], F32, 1)
    for latents in both:
        step(size, latents, batch, clip=1.0)
    assert_same_step(size, both[1], both[0], before, terms=1)


@pytest.mark.parametrize("clip", ["own", "lagged", None])
@pytest.mark.parametrize("dead", [False, True], ids=["no dead", "dead"])
def test_a_step_repeats_its_bits_and_never_waits_for_the_device(clip, dead):
    size = SIZES["A"]
    found = []
    for _ in range(2):
        latents = make_latents(size, "split", BF16)
        (batch,) = batches(size, latents, BF16, 1)
        options: dict[str, Any] = {"clip": None if clip is None else 1e-3, "counters": make_counters(size)}
        options["clip_norm"] = torch.tensor(3e-3, device=DEVICE) if clip == "lagged" else None
        options["dead"] = make_dead(size, 3, 1e-6) if dead else None
        step(size, latents, batch, **options)  # kernels are compiled
        cuda.set_sync_debug_mode("error")
        try:
            step(size, latents, batch, **options)
            encode(size, latents, batch.x)
        finally:
            cuda.set_sync_debug_mode("default")
        found.append(tensors_of(latents) | vars(options["counters"]))
    for name, tensor in found[0].items():
        other = found[1][name]
        assert torch.equal(tensor, other) if isinstance(tensor, Tensor) else tensor == other, name


def captured(work: Callable[[], object]) -> Callable[[], object]:
    """Does it once, and returns what does it again from a graph."""
    side = cuda.Stream()
    side.wait_stream(cuda.current_stream())
    with cuda.stream(side):
        work()
    cuda.current_stream().wait_stream(side)
    graph = cuda.CUDAGraph()
    with cuda.graph(graph):
        work()  # on a GPU this is written down and not done; in the interpreter, done now and not replayed
    return graph.replay


def test_a_step_replayed_from_a_graph_is_the_step():
    size = SIZES["A"]
    eager, replayed = (make_latents(size, "low", BF16) for _ in range(2))
    rows = make_rows(size, eager.w_dec.master(), 1).bfloat16()

    def work(latents: Latents) -> None:
        step(size, latents, encode(size, latents, rows), clip=1e-3)

    work(eager)
    work(eager)
    captured(lambda: work(replayed))()
    for name, tensor in tensors_of(eager).items():
        assert torch.equal(tensor, tensors_of(replayed)[name]), name


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_decoders_and_gradients_are_those_of_float64(size, dtype):
    size = SIZES[size]
    latents = make_latents(size, "low" if dtype == BF16 else "plain")
    (codes,) = batches(size, latents, dtype, 1)
    x, values, indices, w = codes.x, codes.values, codes.indices, latents.w_dec.product()
    bias = torch.randn(size.d, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(4))
    out, dots = sparse_decode(values, indices, w.float()), gather_dot(x, indices, w)
    residual, loss, residual_dots = decode_residual(values, indices, w, bias, x)
    segments = segment_rows(values, indices, x, size.f)
    dz, d_w_enc, d_w_dec, d_b_enc, d_b_dec = sparse_grad(x, x, values, indices, w, -0.5, dots)

    def by_row(one: Tensor, formula: str) -> Tensor:
        parts = zip(one.split(256), indices.long().split(256), strict=True)
        return torch.cat([torch.einsum(formula, a.double(), w[i].double()) for a, i in parts])

    flat, row = indices.flatten().long(), torch.arange(size.n, device=DEVICE).repeat_interleave(size.k)

    def by_latent(of_slots: Tensor, rows: Tensor) -> Tensor:
        total = torch.zeros(size.f, rows.shape[1], dtype=torch.float64, device=DEVICE)
        for part in torch.arange(len(flat), device=DEVICE).split(1 << 15):
            total.index_add_(
                0, flat[part], of_slots.flatten()[part, None].double() * rows[row[part]].double()
            )
        return total

    exact = x.double() - by_row(values, "nk,nkd->nd") - bias.double()
    want_dots = by_row(x, "nd,nkd->nk")
    want_dz = torch.where(values == 0, 0, -0.5 * want_dots)
    terms = terms_of(size, [codes])
    rounding = BF16_EPS if dtype == BF16 else 0.0
    for name, got, want, coarse in (
        ("sparse_decode", out, by_row(values, "nk,nkd->nd"), 0.0),
        ("gather_dot", dots, want_dots, 0.0),
        ("residual", residual, exact, rounding),
        ("loss", loss, exact.square().sum(dim=1), 0.0),
        ("dots", residual_dots, by_row(residual, "nd,nkd->nk"), 0.0),
        ("segment_rows", segments, by_latent(values, x), 0.0),
        ("dz", dz, want_dz, 0.0),
        ("d_w_enc", d_w_enc, by_latent(want_dz, x), 0.0),
        ("d_w_dec", d_w_dec, -0.5 * by_latent(values, x), 0.0),
        ("d_b_enc", d_b_enc, by_latent(want_dz, torch.ones_like(x[:, :1])).squeeze(1), 0.0),
        ("d_b_dec", d_b_dec, -0.5 * x.double().sum(dim=0), 0.0),
    ):
        assert (got.double() - want).norm() <= (4 * terms * EPS + coarse) * want.norm(), name
