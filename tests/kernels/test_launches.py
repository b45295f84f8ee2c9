"""The compile gate compiles each way in which an op can launch a kernel, and no other.

Ops are called here with every dtype, format and option that makes a difference, and their launches are
recorded instead of run. A class of launches (`launches`) that no module lists in `cases` fails, and so
does one that is listed and never launched.
"""

from collections import defaultdict
from collections.abc import Iterator
from itertools import cycle, product
from typing import Any

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
    latent_step_many,
    segment_rows,
    settle,
    sparse_decode,
    sparse_grad,
    threshold_encode,
    topk_encode,
    use_backend,
)
from sae_kernels.latents import split
from torch import Tensor

if torch.cuda.is_available():
    pytest.skip("launches are recorded in the interpreter", allow_module_level=True)

from sae_kernels.triton import compress, dead, decode, encode, encode_fused, recover, select
from sae_kernels.triton.launch import SHAPES, Case, broken

from . import launches

BF16, F32 = torch.bfloat16, torch.float32
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
N, K, F, D = 2, 2, 8, 4
Recorded = dict[str, set[launches.Class]]


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorded]:
    """Classes of launches by kernel; no kernel runs, so results are whatever was in memory."""
    found: Recorded = defaultdict(set)

    def record(kernel: Any, *args: Any, **options: Any) -> None:
        found[launches.name_of(kernel)].add(launches.class_of_launch(kernel, args, options))

    assert broken() is None  # looked at once in a process, with a kernel that has to run
    monkeypatch.setattr(launches.InterpretedFunction, "run", record)
    with use_backend("triton"):
        yield found


def assert_same(found: Recorded, kernels: set[str], elsewhere: Any = lambda name, this: False) -> None:
    """What was launched is what is compiled, for these kernels and no others, but for what is `elsewhere`."""
    compiled = {name.rpartition(".triton.")[2]: classes for name, classes in launches.compiled().items()}
    launched = {name.rpartition(".triton.")[2]: classes for name, classes in found.items()}
    assert launched.keys() == kernels
    for name in kernels:
        left_out = launched[name] - compiled[name]
        assert not left_out, f"{name} is launched and not compiled: {sorted(map(sorted, left_out))}"
        idle = {this for this in compiled[name] - launched[name] if not elsewhere(name, this)}
        assert not idle, f"{name} is compiled and never launched: {sorted(map(sorted, idle))}"


def encoder(dtype: torch.dtype, n: int = N, f: int = F) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    x, w = (torch.randn(rows, D, generator=draw).to(dtype) for rows in (n, f))
    return x, w, torch.zeros(f)


def test_every_encoder_is_compiled_as_it_is_launched(recorded, monkeypatch):
    def on_amd() -> None:  # where the library's product of narrow operands is rounded to their dtype
        monkeypatch.setattr(torch.version, "hip", "some version")
        monkeypatch.setattr(encode, "_product", lambda x, w, out: None)
        monkeypatch.setattr(compress, "multiply", lambda a, b, out: None)

    for prepare in (lambda: None, on_amd):
        prepare()
        for dtype, variable, bias in product(FLOATS, ("e1", "e2"), (F32, BF16)):
            monkeypatch.setenv("SAE_KERNELS_ENCODER", variable)
            for f in (8, 100, 128, 3000):
                x, w, b = encoder(dtype, f=f)
                topk_encode(x, w, b.to(bias), K)
                dead_encode(x, w, b.to(bias), K)
                batch_topk_encode(x, w, b.to(bias), 1)
        with monkeypatch.context() as patch:
            patch.setattr(compress, "SMALL", 0)  # so that it guesses
            for dtype in FLOATS:
                batch_topk_encode(*encoder(dtype, n=20, f=40), 1)
    dead_encode(*encoder(F32, n=1, f=dead.MAX_WHOLE + 1), K)

    def elsewhere(name: str, this: launches.Class) -> bool:
        """What only NVIDIA's newer GPUs launch."""
        return name == "encode_fused._filtered_product" and ("DESCRIPTORS", "True") in this

    kernels = {"encode._append", "keys._merge", "select._threshold", "encode_fused._filtered_product"}
    kernels |= {"recover._list_failed", "recover._recover", "recover._recover_merge", "dead._keep_largest"}
    kernels |= {"compress._collect", "compress._place", "recompute._recompute"}
    assert_same(recorded, kernels, elsewhere)


def test_threshold_encode_is_compiled_as_it_is_launched(recorded, monkeypatch):
    def record_and_run(kernel: Any, *args: Any, **options: Any) -> Any:
        record(kernel, *args, **options)
        return launches.true_run(
            kernel, *args, **options
        )  # what it has counted decides what is launched next

    record = launches.InterpretedFunction.run
    monkeypatch.setattr(launches.InterpretedFunction, "run", record_and_run)
    monkeypatch.setattr(compress, "KEPT", 16)
    for dtype in FLOATS:
        x, w, b = encoder(dtype, n=3, f=40)
        threshold_encode(x, w, b.to(dtype) + 100, torch.zeros(40, dtype=dtype))
    assert_same(recorded, {"compress._append_above", "compress._move"})


def codes(n: int, k: int, dtype: torch.dtype, compressed: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """values, indices, offsets"""
    values, indices = torch.ones(n, k, dtype=dtype), torch.zeros(n, k, dtype=torch.int32)
    if not compressed:
        return values, indices, None
    return values.flatten(), indices.flatten(), torch.arange(0, n * k + 1, k)


def test_every_decoder_is_compiled_as_it_is_launched(recorded):
    others = cycle(FLOATS)  # of what is small, and converted before
    for weight, rows, k, compressed in product(FLOATS, FLOATS, (1, 3, 300), (False, True)):
        values, indices, offsets = codes(N, k, next(others), compressed)
        w, x, bias = torch.ones(F, D, dtype=weight), torch.ones(N, D, dtype=rows), torch.ones(D)
        sparse_decode(values, indices, w, offsets)
        gather_dot(x, indices, w, offsets)
        decode_residual(values, indices, w, bias.to(next(others)), x, offsets)
    assert_same(recorded, {"decode._sparse_decode", "decode._gather_dot", "decode._decode_residual"})


def test_every_gradient_and_step_is_compiled_as_it_is_launched(recorded):
    rows_of_pieces = 200  # enough slots for lists that are cut
    others = cycle(FLOATS)
    for rows, compressed, d in product(FLOATS, (False, True), (1, D)):
        values, indices, offsets = codes(rows_of_pieces, K, next(others), compressed)
        segment_rows(values, indices, torch.ones(rows_of_pieces, d, dtype=rows), F, offsets)
    for x, g, given, compressed in product(FLOATS, FLOATS, (True, False), (False, True)):
        values, indices, offsets = codes(rows_of_pieces, K, next(others), compressed)
        dots = values.to(next(others)) if given else None
        x, g = (torch.ones(rows_of_pieces, D, dtype=dtype) for dtype in (x, g))
        sparse_grad(x, g, values, indices, torch.ones(F, D), 0.5, dots, offsets)
    del recorded[next(name for name in recorded if name.endswith("decode._gather_dot"))]  # of missing dots
    for form, moment, lazy, many in product(("plain", "low", "split"), (F32, BF16), (False, True), (1, 2)):
        latents = make_latents(form, moment, lazy, many)
        adam = AdamStep(1e-3, beta1=0.0 if lazy else 0.9)
        counters = cycle([None, make_counters(100), make_counters(2**40)])
        for dtypes, dead_dtype, unit, centred, clip in product(
            ((F32, F32), (BF16, BF16), (BF16, F32)),
            (None, F32, BF16),
            (True, False),
            (True, False),
            ("none", "own", "given"),
        ):
            values, indices, offsets = codes(
                rows_of_pieces, K, next(others), many == 1 and dead_dtype is None
            )
            x, residual = (torch.ones(rows_of_pieces, D, dtype=dtype) for dtype in dtypes)
            most = None if clip == "none" else 1.0
            norms = torch.ones(many) if clip == "given" else None
            dead = None if dead_dtype is None else make_dead(dead_dtype)
            if many == 1:
                batch = (x, residual, values, indices, values, latents, adam, 0.5, centred, unit)
                norm = None if norms is None else norms[0]
                latent_step(
                    *batch, clip=most, clip_norm=norm, dead=dead, counters=next(counters), offsets=offsets
                )
            else:
                rows = (torch.stack([each] * many) for each in (x, residual, values, indices, values))
                latent_step_many(
                    *(*rows, latents, [adam] * many, 0.5, centred, unit, most, norms, [dead] * many),
                    counters=counters_of(many, next(counters)),
                )
        if many == 1:
            settle(latents, adam)
    kernels = {"adam._update", "adam._square_gradients", "adam._update_bias", "update._sum_lists_kernel"}
    kernels |= {"lists._list_slots", "lists._sum_pieces", "lists._scan", "lists._add_dead_rows"}
    kernels |= {"columns._column_sums", "columns._add_partials", "guard._check", "guard._decide"}
    assert_same(recorded, kernels | {"formats._settle"})


def make_latents(form: str, moment: torch.dtype, lazy: bool, many: int) -> Latents:
    first = () if many == 1 else (many,)

    def make(*shape: int) -> Weight:
        shape = (*first, *shape)
        value, moments = torch.ones(shape), (torch.zeros(shape, dtype=moment) for _ in range(2))
        if form == "split":
            value, remainder = split(value)
            return Weight(value, *moments, remainder=remainder)
        return Weight(value, *moments, low=value.bfloat16() if form == "low" else None)

    last = torch.zeros((*first, F), dtype=torch.int32) if lazy else None
    return Latents(make(F, D), make(F), make(F, D), make(D), step=torch.zeros(first), last_step=last)


def make_dead(dtype: torch.dtype) -> DeadGrads:
    rows = torch.ones(2, D, dtype=dtype)
    return DeadGrads(torch.arange(2), rows, torch.ones(2, dtype=dtype), rows)


def make_counters(tokens: int) -> Counters:
    counts, sums, last = (torch.zeros(F, dtype=torch.int64) for _ in range(3))
    return Counters(counts, sums, torch.zeros(F), last, tokens)


def counters_of(many: int, one: Counters | None) -> Counters | None:
    if one is None:
        return None
    tensors = (torch.stack([each] * many) for each in (one.counts, one.sums, one.maxima, one.last_fired))
    return Counters(*tensors, one.tokens)


def sizes_of(cases: list[Case], kernel: Any, *names: str) -> set[tuple[int, ...]]:
    """Constants and warps that a kernel is compiled with."""
    mine = [case for case in cases if case.kernel is kernel]
    return {(*(case.constants[name] for name in names), case.num_warps) for case in mine}


def sizes_in(launch: dict[str, Any], *names: str) -> tuple[int, ...]:
    return tuple(launch[name] for name in (*names, "num_warps"))


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_launches_for_any_number_of_slots_or_dead_latents_are_compiled(shape):
    cases = decode.cases(shape)
    residual, gather = (
        sizes_of(cases, kernel, "SLOTS", "COLUMNS")
        for kernel in (decode._decode_residual, decode._gather_dot)
    )
    for slots in range(1, 3000):
        assert {decode.residual_tile(slots, compressed) for compressed in (False, True)} <= residual
        assert decode.gather_tile(slots) in gather
    assert (*decode.DECODE,) in sizes_of(cases, decode._sparse_decode, "SLOTS", "COLUMNS")
    keep = sizes_of(dead.cases(shape), dead._keep_largest, "CHUNK", "WHOLE")
    assert {(*dead.launch_of(latents),) for latents in range(1, shape.f, 17)} <= keep
    guesses = sizes_of(select.cases(shape), select._threshold, "ROWS", "BLOCK")
    for how in (encode.plan, encode_fused.plan):
        for f in (shape.f, 1000, 5000, 10**5):
            width = -(-f // how(shape.k, f).stripes)
            assert sizes_in(select.threshold_launch(width), "ROWS", "BLOCK") in guesses
    cases = recover.cases(shape)
    first = sizes_of(cases, recover._recover, "BUFFER", "DEPTH", "ROWS", "UPCAST")
    second = sizes_of(cases, recover._recover_merge, "KEYS", "BLOCK", "STEP")
    for k in range(1, recover.MAX_K + 1):
        assert sizes_in(recover.recover_launch(k), "BUFFER", "DEPTH", "ROWS", "UPCAST") in first
        assert sizes_in(recover.recover_merge_launch(k), "KEYS", "BLOCK", "STEP") in second
