"""Several SAEs whose launches are shared: each gets what it gets alone, bit for bit.

Only a step that is clipped to its own norm may differ, by the order of one sum of torch's: it is allowed what
`test_triton_step` allows. The loop that other backends run is tested here too; encoding is in
`test_triton_many_encode`.
"""

from collections import Counter
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from sae_kernels import (
    AdamStep,
    Counters,
    DeadGrads,
    Latents,
    Weight,
    latent_step,
    latent_step_many,
    use_backend,
)
from sae_kernels.triton import adam as adam_kernels
from sae_kernels.triton import columns, guard, lists
from sae_kernels.triton.launch import SHAPES
from sae_kernels.triton.lists import PIECE
from torch import Tensor

from .test_triton_step import (
    BF16,
    EPS,
    F32,
    WEIGHTS,
    D,
    K,
    N,
    assert_close,
    assert_same_bits,
    make_batch,
    make_counters,
    make_dead,
    make_latents,
    tensors,
)

M, F = 3, 4
COUNTED = ("counts", "sums", "maxima", "last_fired")
Batch = dict[str, Tensor]


def stack(ones: list[Latents]) -> Latents:
    def of(name: str) -> Weight:
        parts = [vars(getattr(one, name)) for one in ones]
        whole = {
            p: None if parts[0][p] is None else torch.stack([part[p] for part in parts]) for p in parts[0]
        }
        return Weight(**whole)

    last = None if ones[0].last_step is None else torch.stack([one.last_step for one in ones])
    return Latents(*map(of, WEIGHTS), step=torch.stack([one.step for one in ones]), last_step=last)


def make_ones(device: str, number: int = M, **how: Any) -> list[Latents]:
    """SAEs whose weights, moments and numbers of steps differ."""
    draw, ones = torch.Generator().manual_seed(0), []
    for m in range(number):
        one = make_latents(device, **{"f": F, **how})
        for name in WEIGHTS:
            weight = getattr(one, name)
            weight.store(weight.master().roll(m, dims=-1))
            weight.second.copy_(torch.rand(weight.second.shape, generator=draw) * 1e-4)
            if one.last_step is None:
                weight.first.copy_(torch.randn(weight.first.shape, generator=draw) * 1e-2)
        one.step.fill_(float(2 * m))
        if one.last_step is not None:
            one.last_step.fill_(m)
        ones.append(one)
    return ones


def make_batches(ones: list[Latents], seed: int, **how: Any) -> tuple[list[Batch], Batch]:
    """Each one's, and all of them stacked."""
    each = [make_batch(one, 10 * seed + m, **how) for m, one in enumerate(ones)]
    return each, {name: torch.stack([batch[name] for batch in each]) for name in each[0]}


def make_adams(lazy: bool = False, number: int = M) -> list[AdamStep]:
    return [AdamStep(lr=1e-2 / (m + 1), beta1=0.0 if lazy else 0.9) for m in range(number)]


def stack_counters(device: str, number: int = M) -> Counters:
    ones = [make_counters(device, F) for _ in range(number)]
    return Counters(*(torch.stack([getattr(one, part) for one in ones]) for part in COUNTED), tokens=N)


def assert_each_has_the_bits(got: Latents, want: list[Latents]) -> None:
    for m, one in enumerate(want):
        assert_same_bits(got.one(m), one)


@pytest.mark.parametrize(
    ("how", "moment", "lazy", "options", "rows"),
    [
        ("plain", F32, False, {}, F32),
        ("plain", BF16, False, {"unit_norm": False, "centred": False}, F32),
        ("plain", F32, True, {"unit_norm": False, "clip": 0.1, "clip_norm": True}, F32),
        ("low", F32, False, {"centred": False, "clip": 0.1, "clip_norm": True}, BF16),
        ("low", BF16, False, {}, BF16),
        ("low", BF16, True, {"centred": False}, F32),
        ("split", F32, False, {"unit_norm": False}, F32),
        ("split", BF16, False, {"clip": 1e9}, F32),
        ("split", BF16, True, {"clip": 0.1}, BF16),
    ],
)
def test_steps_are_those_of_each_alone(triton_device, how, moment, lazy, options, rows):
    want = make_ones(triton_device, how=how, moment=moment, lazy=lazy)
    got, counters = stack(want), stack_counters(triton_device)
    alone, adams = deepcopy(counters), make_adams(lazy)
    own_norm = "clip" in options and "clip_norm" not in options
    clip_norms = torch.tensor([0.05, 0.2, 3.0], device=triton_device) if "clip_norm" in options else None
    options = {name: value for name, value in options.items() if name != "clip_norm"}
    for seed in range(2):
        each, batch = make_batches(want, seed, rows=rows)
        dead: list[DeadGrads | None] = [None, make_dead(want[1], seed), make_dead(want[2], seed + 5)]
        dead = dead if seed else [None] * M
        norms = latent_step_many(
            *batch.values(),
            got,
            adams,
            -2 / (N * D),
            **options,
            clip_norms=clip_norms,
            dead=dead,
            counters=counters,
        )
        assert norms.shape == (M,) and norms.dtype == F32
        for m, one in enumerate(want):
            norm = latent_step(
                *each[m].values(),
                *(one, adams[m], -2 / (N * D)),
                **options,
                clip_norm=None if clip_norms is None else clip_norms[m],
                dead=dead[m],
                counters=alone.one(m),
            )
            assert abs(norms[m] - norm) <= 4 * (N * K + D) * EPS * norm
    for part in COUNTED:
        assert torch.equal(getattr(counters, part), getattr(alone, part)), part
    if own_norm:
        for m, one in enumerate(want):
            assert_close(got.one(m), one, terms=N * K + D)
    else:
        assert_each_has_the_bits(got, want)


def test_steps_are_those_of_the_reference_one_by_one(triton_device):
    got = stack(make_ones(triton_device, how="low"))
    want, adams = deepcopy(got), make_adams()
    for seed in range(2):
        _, batch = make_batches([want.one(m) for m in range(M)], seed)
        dead = [make_dead(want.one(0), seed), None, None]
        norms = []
        for latents, backend in ((got, "triton"), (want, "reference")):
            with use_backend(backend):
                norms.append(latent_step_many(*batch.values(), latents, adams, 0.01, clip=0.1, dead=dead))
        assert ((norms[0] - norms[1]).abs() <= 8 * (N * K + D) * EPS * norms[1]).all()
        for m in range(M):
            assert_close(got.one(m), want.one(m), terms=N * K + D)


def test_tiles_end_with_their_sae_and_lists_that_are_cut_are_each_ones_own(triton_device, monkeypatch):
    """Rows and latents are no multiples of any block, and of every block there are several."""
    monkeypatch.setattr(adam_kernels, "VECTOR_BLOCK", 4)
    monkeypatch.setattr(guard, "CHECK_ROWS", 16)
    monkeypatch.setattr(columns, "MIN_ROWS", 4)
    monkeypatch.setattr(lists, "LIST_BLOCK", 64)
    monkeypatch.setattr(lists, "SCAN_BLOCK", 16)
    f, n, d = 5, PIECE + 9, 35
    want = make_ones(triton_device, how="low", moment=BF16, f=f, d=d, lazy=True)
    got, adams = stack(want), make_adams(lazy=True)
    each, batch = make_batches(want, 0, n=n, k=2)
    for tensor in (batch["indices"][1], each[1]["indices"]):
        tensor[:40] = torch.where(tensor[:40] == 0, 1, tensor[:40])  # its latent 0 has no list that is cut
    assert [int((one["indices"] == 0).any(dim=1).sum()) > PIECE for one in each] == [True, False, True]
    latent_step_many(*batch.values(), got, adams, 0.01)
    for m, one in enumerate(want):
        latent_step(*each[m].values(), one, adams[m], 0.01)
    assert_each_has_the_bits(got, want)


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("where", ["x", "residual", "dots", "dead"])
def test_only_the_sae_with_a_step_that_is_not_finite_is_skipped(triton_device, clip, where):
    start = stack(make_ones(triton_device, how="low", lazy=True))
    _, batch = make_batches([start.one(m) for m in range(M)], 0)
    clean, got, adams = deepcopy(start), deepcopy(start), make_adams(lazy=True)
    dead = [make_dead(start.one(m), m) for m in range(M)]
    norms = latent_step_many(*batch.values(), clean, adams, 0.5, clip=clip, dead=dead)
    if where == "dead":
        dead[1].w_dec[1, 3] = torch.nan
    else:
        batch[where][1, 2, 0] = torch.nan
    counters = stack_counters(triton_device)
    found = latent_step_many(*batch.values(), got, adams, 0.5, clip=clip, dead=dead, counters=counters)
    assert not found[1].isfinite() and torch.equal(found[[0, 2]], norms[[0, 2]])
    assert_same_bits(got.one(1), start.one(1))
    for m in (0, 2):
        assert_same_bits(got.one(m), clean.one(m))
    assert (counters.counts[:, 0] >= N - 1).all() and counters.maxima.isfinite().all()


@pytest.mark.parametrize("n", [0, N])
def test_saes_without_codes_or_rows_move_by_their_moments(triton_device, n):
    want = make_ones(triton_device)
    got, adams = stack(want), make_adams()
    each, batch = make_batches(want, 0, n=n)
    for values in (each[1]["values"], batch["values"][1]):
        values.zero_()
    norms = latent_step_many(*batch.values(), got, adams, 0.5)
    for m, one in enumerate(want):
        norm = latent_step(*each[m].values(), one, adams[m], 0.5)
        assert (norm == 0) == (n == 0) and abs(norms[m] - norm) <= 4 * (N * K + D) * EPS * norm
    assert_each_has_the_bits(got, want)


def test_one_sae_is_the_sae_alone_and_two_runs_give_the_same_bits(triton_device):
    (want,) = make_ones(triton_device, 1, how="split", moment=BF16)
    start = stack([want])
    (each,), batch = make_batches([want], 0)
    dead, adam = make_dead(want, 0), AdamStep(1e-2)
    norm = latent_step(*each.values(), want, adam, 0.5, clip=0.1, dead=dead)
    for _ in range(2):
        got = deepcopy(start)
        norms = latent_step_many(*batch.values(), got, [adam], 0.5, clip=0.1, dead=[dead])
        assert torch.equal(norms, norm[None])
        assert_same_bits(got.one(0), want)


@pytest.mark.skipif(torch.cuda.is_available(), reason="launches are counted in the interpreter")
@pytest.mark.parametrize("clip", [None, 1.0])
def test_three_saes_take_the_launches_of_one(triton_device, monkeypatch, clip):
    from . import launches

    ones = make_ones(triton_device)
    each, batch = make_batches(ones, 0, n=PIECE + 1)
    found: list[Counter[str]] = []

    def count(kernel: Any, *args: Any, **options: Any) -> None:
        found[-1][launches.name_of(kernel)] += 1

    monkeypatch.setattr(launches.InterpretedFunction, "run", count)
    dead = [make_dead(one, 0) for one in ones]
    many, options = stack(ones), {"clip": clip, "scale": 0.5}
    found.append(Counter())
    latent_step(*each[0].values(), ones[0], AdamStep(1e-2), dead=dead[0], **options)
    found.append(Counter())
    latent_step_many(*batch.values(), many, make_adams(), dead=dead, **options)
    assert found[0] == found[1] and found[0].total() >= 10


def test_updates_of_one_and_of_several_are_compiled():
    cases = [case for case in adam_kernels.cases(SHAPES[0]) if case.kernel is adam_kernels._update]
    assert sum(case.constants["MANY"] for case in cases) == len(cases) // 2


def test_the_loop_of_every_backend_steps_each_alone(device):
    want = make_ones(device, how="low")
    got, adams, counters = stack(want), make_adams(), stack_counters(device)
    alone = deepcopy(counters)
    for seed in range(2):
        each, batch = make_batches(want, seed)
        dead = [None, make_dead(want[1], 0), None]
        norms = latent_step_many(*batch.values(), got, adams, 0.5, dead=dead, counters=counters)
        for m, one in enumerate(want):
            norm = latent_step(*each[m].values(), one, adams[m], 0.5, dead=dead[m], counters=alone.one(m))
            assert abs(norms[m] - norm) <= 4 * (N * K + D) * EPS * norm
    assert_each_has_the_bits(got, want)
    for part in COUNTED:
        assert torch.equal(getattr(counters, part), getattr(alone, part)), part


def test_what_does_not_fit_is_refused(triton_device):
    ones = make_ones(triton_device)
    many, adams = stack(ones), make_adams()
    _, batch = make_batches(ones, 0)
    with pytest.raises(ValueError, match=r"latent_step_many of one SAE or more: .* adams 2"):
        latent_step_many(*batch.values(), many, adams[:2], 0.5)
    with pytest.raises(ValueError, match="adams 3, dead 2"):
        latent_step_many(*batch.values(), many, adams, 0.5, dead=[None, None])
    with pytest.raises(ValueError, match="adams differ in more than lr: expected the same betas and eps"):
        latent_step_many(*batch.values(), many, [*adams[:2], AdamStep(1e-2, beta2=0.9)], 0.5)
    one = make_latents(triton_device, f=M)
    with pytest.raises(ValueError, match=r"w_dec is \(3, 20\): expected \[M, F, D\]"):
        latent_step_many(*batch.values(), one, adams, 0.5)
    with pytest.raises(ValueError, match=r"clip_norm is .* \(2,\): expected \[3\]"):
        latent_step_many(*batch.values(), many, adams, 0.5, clip=1.0, clip_norms=torch.ones(2))
    wrong = DeadGrads(torch.tensor([1, 2], device=triton_device), *(torch.zeros(3, 3),) * 3)
    with pytest.raises(ValueError, match="dead"):
        latent_step_many(*batch.values(), many, adams, 0.5, dead=[None, wrong, None])
    none = [tensor[:0] for tensor in batch.values()]
    with pytest.raises(ValueError, match="of one SAE or more: expected the same number of each"):
        latent_step_many(*none, replace(many, w_dec=replace(many.w_dec, value=many.w_dec.value[:0])), [], 0.5)
    for name, tensor in tensors(many):
        assert torch.equal(tensor, dict(tensors(stack(ones)))[name]), name
