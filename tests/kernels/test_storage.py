"""Storage formats of parameters and moments: split masters, the noise, and stochastic rounding, bit by bit.

What does not fit is refused. The other side of each test of numbers works on integers or in float64."""

import copy
import dataclasses

import pytest
import torch
from sae_kernels import (
    AdamStep,
    Counters,
    DeadGrads,
    Latents,
    Weight,
    gather_dot,
    latent_step,
    segment_rows,
    sparse_decode,
    use_backend,
)
from sae_kernels.latents import join, noise, round_stochastically, split
from torch import Tensor


def floats(bits: Tensor) -> Tensor:
    """int64 bit patterns below 2^32 -> float32"""
    return torch.where(bits >= 2**31, bits - 2**32, bits).int().view(torch.float32)


def many_floats() -> Tensor:
    """Random bits, and the awkward numbers: zeros of both signs, denormals, ties, the largest; all finite."""
    draw = torch.Generator().manual_seed(0)
    bits = torch.randint(2**32, (1 << 18,), generator=draw)
    magnitudes = [0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x10000, 0x7FFFFF, 0x800000, 0x3F7FFFFF, 0x3F800000]
    magnitudes += [0x3F807FFF, 0x3F808000, 0x3F808001, 0x3F818000, 0x7F7F0000, 0x7F7F7FFF]
    ends = torch.tensor(magnitudes)
    found = floats(torch.cat([bits, ends, ends + 2**31]))
    return found[torch.isfinite(found)]


def test_a_split_master_joins_to_the_same_bits():
    master = many_floats()
    master = torch.cat([master, floats(torch.tensor([0x7F7FFFFF, 0xFF7FFFFF]))])  # its value rounds up to inf
    value, remainder = split(master)
    assert (value.dtype, remainder.dtype) == (torch.bfloat16, torch.int16)
    assert torch.equal(join(value, remainder).view(torch.int32), master.view(torch.int32))


def test_the_value_of_a_split_master_is_the_nearest_bfloat16_of_ties_the_larger_in_magnitude():
    master = many_floats()
    value = split(master)[0]
    # Beyond the midpoint between the largest bfloat16 and the next power of two the nearest is infinite.
    below = (master.view(torch.int32) & 0x7FFFFFFF) < 0x7F7F8000
    assert torch.equal(torch.isfinite(value), below)
    master, value = master[below], value[below]
    exact, got = master.double(), value.double()
    for step in (-1, 1):  # the neighbours of the value are not nearer
        other = (value.view(torch.int16) + step).view(torch.bfloat16).double()
        other = torch.where(other.isfinite() & (other.sign() * got.sign() >= 0), other, torch.inf)
        nearer = (other - exact).abs() < (got - exact).abs()
        assert not nearer.any()
        tie = (other - exact).abs() == (got - exact).abs()
        assert (got.abs()[tie] > other.abs()[tie]).all()
    rounded = master.bfloat16()  # to nearest, ties to even: the same but for ties
    ties = (master.view(torch.int32) & 0xFFFF) == 0x8000
    assert torch.equal(rounded[~ties].view(torch.int16), value[~ties].view(torch.int16))


def test_split_and_join_take_tensors_that_are_not_contiguous():
    master = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)).T
    value, remainder = split(master)
    assert torch.equal(join(value, remainder), master)
    assert torch.equal(join(value.T.contiguous().T, remainder), master)


@pytest.mark.parametrize("kind", ["plain", "low", "split"])
def test_a_stored_master_comes_back_and_its_copy_for_products_is_its_rounding(kind):
    draw = torch.Generator().manual_seed(1)
    before, master = torch.randn(2, 30, 7, generator=draw)
    zeros = torch.zeros_like(master)
    if kind == "split":
        value, remainder = split(before)
        weight = Weight(value, zeros, zeros, remainder=remainder)
    else:
        weight = Weight(before.clone(), zeros, zeros, low=before.bfloat16() if kind == "low" else None)
    places = [t.data_ptr() for t in (weight.value, weight.low, weight.remainder) if t is not None]
    weight.store(master)
    assert torch.equal(weight.master(), master)
    assert [t.data_ptr() for t in (weight.value, weight.low, weight.remainder) if t is not None] == places
    want = {"plain": master, "low": master.bfloat16(), "split": split(master)[0]}[kind]
    assert torch.equal(weight.product(), want)


def murmur_noise(element: int, step: int, salt: int) -> int:
    """The finalizer of MurmurHash3 on Python integers, applied twice with the step between."""

    def finalize(h: int) -> int:
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
            h ^= h >> shift
            h = h * factor % 2**32
        return h ^ (h >> 16)

    return finalize(finalize(element % 2**32) ^ ((step * 0x9E3779B1 + salt) % 2**32)) >> 16


@pytest.mark.parametrize("step", [1, 2, 12345, 2**23 + 1])
@pytest.mark.parametrize("start", [0, 1000, 2**31 - 5, 2**32 - 5])
def test_noise_is_the_hash_of_element_step_and_salt(step, start):
    for salt in (0, 1, 17):
        got = noise(torch.Size((3, 5)), torch.tensor(float(step)), salt, start)
        assert got.dtype == torch.int32
        assert got.flatten().tolist() == [murmur_noise(start + i, step, salt) for i in range(15)]


def test_noise_of_a_block_is_that_block_of_the_whole():
    step = torch.tensor(7.0)
    whole = noise(torch.Size((6, 8)), step, 3)
    assert torch.equal(noise(torch.Size((2, 8)), step, 3, start=16), whole[2:4])


def test_noise_is_spread_evenly_and_differs_between_steps_and_salts():
    step, shape = torch.tensor(3.0), torch.Size((1 << 18,))
    drawn = noise(shape, step, 0)
    assert drawn.min() >= 0
    assert drawn.max() < 2**16
    counts = torch.bincount(drawn >> 8, minlength=256).double()  # 1024 expected in each bin
    chi_squared = float(((counts - 1024) ** 2 / 1024).sum())
    assert 255 - 6 * 510**0.5 < chi_squared < 255 + 6 * 510**0.5  # 255 degrees of freedom, 6 deviations
    for other in (noise(shape, step, 1), noise(shape, step + 1, 0)):
        # Of independent draws one in 2^16 agrees: 4 here, give or take 2.
        assert int((drawn == other).sum()) <= 4 + 6 * 2


def test_stochastic_rounding_is_exact_on_average_over_all_noises():
    draw = torch.Generator().manual_seed(2)
    some = many_floats()
    exact = torch.cat([some[torch.randint(len(some) - 34, (20,), generator=draw)], some[-34:]])
    exact = exact[exact.abs() < 3e38]  # above, the next bfloat16 is inf
    noises = torch.arange(2**16, dtype=torch.int32)
    for number in exact:
        rounded = round_stochastically(number.expand(2**16), noises)
        # Neighbours of 8 bits each: a float64 sum of 2^16 of them is not rounded.
        assert float(rounded.double().mean()) == float(number), number.item()
        assert rounded.amax() == rounded.amin() or rounded.amin() < number < rounded.amax()


def test_stochastic_rounding_is_monotone_in_number_and_noise():
    numbers = many_floats()
    numbers = numbers[(numbers >= 0) & (numbers < 3e38)].sort().values
    for drawn in (0, 1, 0x7FFF, 0x8000, 0xFFFF):
        up = round_stochastically(numbers, torch.full(numbers.shape, drawn, dtype=torch.int32)).float()
        assert (up.diff() >= 0).all()
        more = torch.full(numbers.shape, min(drawn + 1, 0xFFFF), dtype=torch.int32)
        assert (round_stochastically(numbers, more).float() >= up).all()


def test_stochastic_rounding_keeps_what_is_a_bfloat16_already():
    exact = many_floats().bfloat16()
    exact = exact[exact.isfinite()]
    drawn = torch.full(exact.shape, 0xFFFF, dtype=torch.int32)
    assert torch.equal(round_stochastically(exact.float(), drawn).view(torch.int16), exact.view(torch.int16))


def make_latents(device: str) -> Latents:
    """Split masters with bfloat16 moments of zero; w_enc and w_dec are [23, 12]."""
    draw = torch.Generator().manual_seed(4)

    def weight(*shape: int) -> Weight:
        value, remainder = (part.to(device) for part in split(torch.randn(shape, generator=draw)))
        return Weight(value, torch.zeros_like(value), torch.zeros_like(value), remainder=remainder)

    return Latents(weight(23, 12), weight(23), weight(23, 12), weight(12), torch.zeros((), device=device))


def empty_step(device: str) -> dict[str, Tensor]:
    """Two rows without an active latent."""
    zeros = torch.zeros(2, 3, device=device)
    rows = torch.ones(2, 12, device=device)
    codes = {"values": zeros, "dots": zeros, "indices": zeros.int()}
    return {"x": rows, "residual": rows} | codes


def test_bfloat16_moments_are_rounded_stochastically_and_a_split_master_keeps_every_bit(device):
    latents = make_latents(device)
    before = latents.w_enc.master()
    latents.w_enc.second.fill_(1.0)  # decays to 0.999, between two bfloat16 numbers
    latent_step(**empty_step(device), latents=latents, adam=AdamStep(1e-2), scale=0.5)
    below, above = 0.99609375, 1.0
    stored = latents.w_enc.second.float()
    assert set(stored.unique().tolist()) == {below, above}
    drawn = torch.tensor([murmur_noise(i, 1, 1) for i in range(stored.numel())]).view(stored.shape)
    # 0.999 is 0.744 of the way up; at that noise the rounding of 0.999 to float32 may decide.
    clear = ((drawn / 2**16) - (1 - (0.999 - below) / (above - below))).abs() > 1e-4
    up = drawn / 2**16 > 1 - (0.999 - below) / (above - below)
    assert torch.equal((stored.cpu() == above)[clear], up[clear])
    assert torch.equal(latents.w_enc.master(), before)  # no gradient, no move


@pytest.mark.parametrize(
    ("name", "field", "change", "message"),
    [
        ("b_enc", "value", lambda t: t.double(), "b_enc.value is torch.float64: expected torch.bfloat16"),
        ("w_enc", "remainder", lambda t: t.int(), "w_enc.remainder is torch.int32: expected torch.int16"),
        ("w_dec", "first", lambda t: t.half(), "expected torch.float32 or torch.bfloat16"),
        ("w_dec", "first", lambda t: t.T.contiguous().T, "w_dec.first is .*: expected a contiguous"),
        (
            "w_enc",
            "first",
            lambda t: t.float(),
            "w_enc.first is torch.float32: expected torch.bfloat16, as second",
        ),
        ("b_dec", "second", lambda t: t[1:], "b_dec.second is \\(11,\\): expected a contiguous \\[12\\]"),
        ("b_dec", "second", lambda t: t.to("meta"), "b_dec.second is on meta: expected cpu"),
    ],
)
def test_a_parameter_whose_format_does_not_fit_is_refused(name, field, change, message):
    latents = make_latents("cpu")
    weight = getattr(latents, name)
    setattr(latents, name, dataclasses.replace(weight, **{field: change(getattr(weight, field))}))
    with pytest.raises(ValueError, match=message):
        latent_step(**empty_step("cpu"), latents=latents, adam=AdamStep(1e-2), scale=0.5)


def test_two_copies_for_products_and_lazy_steps_with_a_first_moment_are_refused():
    latents = make_latents("cpu")
    latents.last_step = torch.zeros(23, dtype=torch.int32)
    with pytest.raises(ValueError, match="lazy steps are exact for beta1 = 0 only"):
        latent_step(**empty_step("cpu"), latents=latents, adam=AdamStep(1e-2), scale=0.5)
    latents.w_enc.low = latents.w_enc.value.clone()
    with pytest.raises(ValueError, match="w_enc has a remainder and a low copy"):
        latent_step(**empty_step("cpu"), latents=latents, adam=AdamStep(1e-2, beta1=0.0), scale=0.5)


def test_an_encoder_and_a_decoder_in_two_formats_are_refused():
    latents = make_latents("cpu")
    master = latents.w_dec.master()
    latents.w_dec = Weight(master, latents.w_dec.first, latents.w_dec.second, low=master.bfloat16())
    with pytest.raises(
        ValueError, match=r"w_enc and w_dec keep value, remainder, .* and value, low, .*: expected"
    ):
        latent_step(**empty_step("cpu"), latents=latents, adam=AdamStep(1e-2), scale=0.5)


def test_codes_that_do_not_fit_the_latents_are_refused():
    latents, args = make_latents("cpu"), empty_step("cpu")
    for change, message in [
        ({"x": args["x"][:, 1:]}, "x is \\(2, 11\\): expected \\[2, 12\\]"),
        ({"dots": args["dots"][:, 1:]}, "dots is \\(2, 2\\)"),
        ({"indices": args["indices"] + 23}, "indices run from 23 to 23"),
    ]:
        with pytest.raises(ValueError, match=message):
            latent_step(**args | change, latents=latents, adam=AdamStep(1e-2), scale=0.5)


def test_offsets_that_are_not_those_of_the_slots_are_refused():
    indices, rows = torch.zeros(3, dtype=torch.int32), torch.ones(2, 4)
    for offsets in ([0, 1, 2], [0, 1, 5], [1, 2, 3], [0, -1, 3], [0, 5, 3]):
        for op, args in (
            (sparse_decode, (torch.ones(3), indices, torch.ones(6, 4))),
            (gather_dot, (rows, indices, torch.ones(6, 4))),
            (segment_rows, (torch.ones(3), indices, rows, 6)),
        ):
            with pytest.raises(ValueError, match=f"offsets run from {offsets[0]} to {offsets[2]}"):
                op(*args, torch.tensor(offsets))


@pytest.mark.parametrize("backend", ["cpu", "torch", "reference"])
@pytest.mark.parametrize("index", [-1, 6])
def test_indices_out_of_range_are_refused_by_every_backend(backend, index):
    indices = torch.tensor([[0, index]], dtype=torch.int32)
    with use_backend(backend):
        with pytest.raises(ValueError, match="indices run from"):
            sparse_decode(torch.ones(1, 2), indices, torch.ones(6, 4))
        with pytest.raises(ValueError, match="indices run from"):
            gather_dot(torch.ones(1, 4), indices, torch.ones(6, 4))
        with pytest.raises(ValueError, match="indices run from"):
            segment_rows(torch.ones(1, 2), indices, torch.ones(1, 4), 6)


def wrong_counters(field: str, tensor: torch.Tensor) -> Counters:
    zeros = torch.zeros(23, dtype=torch.int64)
    return dataclasses.replace(
        Counters(zeros, zeros.clone(), torch.zeros(23), zeros.clone(), 2), **{field: tensor}
    )


def dead_grads(latents: int, rows: int, first: int = 0, repeated: int | None = None) -> DeadGrads:
    """In the rows of latents from `first` on, the last of them replaced by `repeated`."""
    number = torch.arange(first, first + latents).flip(0)
    number[-1] = number[-1] if repeated is None else repeated
    return DeadGrads(number, torch.ones(rows, 12), torch.ones(rows), torch.ones(rows, 12))


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"clip": 0.0}, "clip is 0.0: expected a positive number"),
        ({"clip": float("nan")}, "clip is nan"),
        ({"clip": 1.0, "clip_norm": torch.ones(1)}, "clip_norm is .*: expected \\[\\]"),
        ({"dead": dead_grads(2, 1)}, "dead.w_enc is .*\\(1, 12\\): expected \\[2, 12\\]"),
        ({"dead": dead_grads(24, 24)}, "dead.latents run from 0 to 23: expected 0 to 22"),
        ({"dead": dead_grads(3, 3, first=-1)}, "dead.latents run from -1 to 1"),
        ({"dead": dead_grads(4, 4, repeated=2)}, "dead.latents has 2 twice: expected each latent once"),
        ({"counters": wrong_counters("sums", torch.zeros(23))}, "counters.sums is torch.float32"),
        ({"counters": wrong_counters("maxima", torch.zeros(3))}, "counters.maxima is .*\\(3,\\)"),
        ({"counters": wrong_counters("counts", torch.zeros(99, dtype=torch.int64))}, "counters.counts is"),
    ],
)
def test_options_of_a_step_that_do_not_fit_are_refused(option, message):
    with pytest.raises(ValueError, match=message):
        latent_step(
            **empty_step("cpu"), latents=make_latents("cpu"), adam=AdamStep(1e-2), scale=0.5, **option
        )


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("backend", ["cpu", "torch", "reference"])
def test_a_norm_to_clip_by_that_is_nan_skips_the_step(backend, plain):
    latents = make_latents("cpu")
    if plain:
        for name in ("w_enc", "b_enc", "w_dec", "b_dec"):
            master = getattr(latents, name).master()
            setattr(latents, name, Weight(master, torch.zeros_like(master), torch.zeros_like(master)))
    before = copy.deepcopy(latents)
    args = empty_step("cpu") | {"values": torch.ones(2, 3), "dots": torch.ones(2, 3)}
    nan = torch.tensor(float("nan"))
    with use_backend(backend):
        norm = latent_step(**args, latents=latents, adam=AdamStep(1e-2), scale=0.5, clip=1.0, clip_norm=nan)
    assert float(norm) > 0 and float(latents.step) == float(before.step)
    for name in ("w_enc", "b_enc", "w_dec", "b_dec"):
        new, old = getattr(latents, name), getattr(before, name)
        assert torch.equal(new.master(), old.master()), name
        assert torch.equal(new.first, old.first) and torch.equal(new.second, old.second), name


@pytest.mark.parametrize("backend", ["cpu", "torch", "reference"])
def test_rows_without_slots_are_decoded_as_zeros(backend):
    values = torch.zeros(3, 0)
    with use_backend(backend):
        assert torch.equal(sparse_decode(values, values.int(), torch.ones(6, 4)), torch.zeros(3, 4))


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"lr": float("nan")}, "lr is nan"),
        ({"lr": 1e-3, "beta1": 1.0}, "beta1 is 1.0"),
        ({"lr": 1e-3, "beta2": -0.1}, "beta2 -0.1"),
        ({"lr": 1e-3, "eps": -1e-8}, "eps -1e-08"),
    ],
)
def test_hyperparameters_that_would_spoil_every_weight_are_refused(options, complaint):
    with pytest.raises(ValueError, match=complaint):
        AdamStep(**options)
