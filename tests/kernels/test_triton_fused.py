"""Encoder E2: the top k with the filter inside the product, exact whatever was guessed.

Integer inputs make float32 sums exact in any order: results on them are compared with the reference bit for
bit, ties included. Without a GPU the PTX of the filter is run by the few lines of `run_ptx`, so that its
arithmetic is held equal to that of the Triton it stands for; on a GPU the tiles that have it run.
"""

import math
import re
import struct

import pytest
import torch
import triton
import triton.language as tl
from sae_kernels import reference
from sae_kernels.triton import encode_fused, select, tuning
from sae_kernels.triton.encode_fused import plan, tile_for, topk_encode_fused
from sae_kernels.triton.keys import pack
from torch import Tensor

EPS = 2.0**-24  # float32 unit roundoff
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OWN = tile_for(torch.device(DEVICE), torch.bfloat16)
TILES = [OWN, OWN._replace(descriptors=not OWN.descriptors), OWN._replace(ptx=False)]
if torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0):
    TILES = [tile for tile in TILES if not tile.descriptors]  # the copy engine is Hopper's


def real(n: int, f: int, d: int) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(n + f + d)
    x, w, b = (torch.randn(*shape, generator=draw).to(DEVICE) for shape in ((n, d), (f, d), (f,)))
    return x, w, b


def integers(n: int, f: int, d: int) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(n + f + d)
    shapes = ((n, d), (f, d), (f,))
    x, w, b = (torch.randint(-2, 3, s, generator=draw).float().to(DEVICE) for s in shapes)
    return x, w, b


def placed(values: Tensor, indices: Tensor, f: int) -> Tensor:
    assert (indices.sort(dim=1).values.diff(dim=1) > 0).all()
    return values.new_zeros(len(values), f).scatter(1, indices.long(), values)


def failures() -> int:
    return int(sum(int(count) for count in select.fallback_rows().values()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("n", "k", "f", "d"), [(1, 1, 1, 1), (1, 3, 700, 5), (35, 4, 520, 72), (3, 40, 40, 16), (5, 1, 256, 8)]
)
def test_codes_are_the_largest_of_each_row(n, k, f, d, dtype):
    x, w, b = real(n, f, d)
    x, w = x.to(dtype), w.to(dtype)
    values, indices = topk_encode_fused(x, w, b, k)
    assert values.dtype == torch.float32 and indices.dtype == torch.int32
    exact = (x.double() @ w.double().T + b.double()).relu()
    size = (x.double().abs() @ w.double().abs().T + b.double().abs()).max()
    error = 2 * (d + 1) * EPS * size
    assert (values - exact.gather(1, indices.long())).abs().max() <= error
    assert (values.sort(descending=True).values - exact.topk(k).values).abs().max() <= error
    assert ((indices >= 0) & (indices < f)).all()
    assert (placed(values, indices, f) != 0).sum() == (values != 0).sum()


@pytest.mark.parametrize("tile", TILES)
def test_every_tile_gives_the_same_codes_and_takes_the_smaller_index_of_a_tie(tile):
    x, w, b = integers(35, 400, 16)
    want, want_indices = reference.topk_encode(x, w, b, 5)
    before = failures()
    values, indices = topk_encode_fused(x.bfloat16(), w.bfloat16(), b, 5, tile=tile)
    assert torch.equal(values, want)
    assert torch.equal(indices.sort().values, want_indices.sort().values)
    assert failures() == before


@pytest.mark.parametrize("guess", [math.inf, 50.0, -math.inf, -100.0, math.nan])
def test_rows_whose_guess_is_wrong_are_encoded_again_and_counted(guess):
    x, w, b = integers(5, 300, 9)
    want, want_indices = reference.topk_encode(x, w, b, 2)
    capacity = plan(2, 300).capacity
    assert capacity < 300
    guesses = torch.full((5,), 1.0, device=DEVICE)
    pre = x @ w.T + b
    assert (((pre >= 1).sum(dim=1) >= 2) & ((pre >= 1).sum(dim=1) <= capacity)).all()
    guesses[[0, 3]] = guess
    before = failures()
    values, indices = topk_encode_fused(x, w, b, 2, guess=guesses)
    assert failures() == before + 2
    assert torch.equal(values, want)
    assert torch.equal(indices.sort().values, want_indices.sort().values)


def test_rows_of_equal_scores_overflow_and_are_still_exact():
    x, w, b = (
        torch.ones(3, 4, device=DEVICE),
        torch.ones(300, 4, device=DEVICE),
        torch.zeros(300, device=DEVICE),
    )
    before = failures()
    values, indices = topk_encode_fused(x, w, b, 2)
    assert failures() == before + 3
    assert (values == 4).all() and indices.sort().values.tolist() == [[0, 1]] * 3


def test_rows_without_positive_scores_have_empty_slots_and_huge_ones_are_kept():
    x, w, b = integers(6, 300, 9)
    negative = topk_encode_fused(x, w, b - 100, 3)
    assert (negative[0] == 0).all() and placed(*negative, 300).shape == (6, 300)
    huge, want = (encode(x * 1e30, w, b, 3) for encode in (topk_encode_fused, reference.topk_encode))
    assert torch.allclose(huge[0].sort().values, want[0].sort().values, rtol=10 * EPS, atol=0.0)


def test_a_row_that_is_not_finite_shows_in_its_own_codes_and_in_no_others():
    x, w, b = integers(5, 290, 9)
    clean = placed(*topk_encode_fused(x, w, b, 3), 290)
    for bad in (math.nan, math.inf):  # infinities of both signs meet in the sum, or zeros times infinity
        x[2] = bad
        values, indices = topk_encode_fused(x, w, b, 3)
        assert values[2].isnan().all() and ((indices >= 0) & (indices < 290)).all()
        others = [0, 1, 3, 4]
        assert torch.equal(placed(values[others], indices[others], 290), clean[others])


def test_no_rows_give_no_codes():
    x, w, b = real(1, 40, 6)
    values, indices = topk_encode_fused(x[:0], w, b, 3)
    assert values.shape == indices.shape == (0, 3) and indices.dtype == torch.int32


def test_strided_operands_and_rows_that_the_copy_engine_refuses_are_taken():
    x, w, b = integers(7, 300, 9)
    strided = [torch.stack([t, t + 1], dim=-1)[..., 0] for t in (x, w, b)]
    sx, sw, sb = strided
    want = topk_encode_fused(x, w, b, 3)
    for tile in TILES:  # rows of 18 bytes
        codes = topk_encode_fused(sx.bfloat16(), sw.bfloat16(), sb, 3, tile=tile)
        for got, wanted in zip(codes, want, strict=True):
            assert torch.equal(got, wanted)


def test_two_runs_give_the_same_bits():
    tensors = real(9, 500, 24)
    for first, second in zip(topk_encode_fused(*tensors, 4), topk_encode_fused(*tensors, 4), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("f", [24576, 65536, 131072, 1 << 20])
@pytest.mark.parametrize("k", [1, 8, 32, 64, 128, 512])
def test_a_guess_fails_in_less_than_one_of_a_hundred_thousand_rows(k, f):
    how = plan(k, f)

    def at_least(hits: int, trials: int) -> float:
        """Chance that the sample has `hits` or more of the `trials` largest."""
        p = 1 / how.stripes
        log = [
            math.lgamma(trials + 1) - math.lgamma(i + 1) - math.lgamma(trials - i + 1) for i in range(hits)
        ]
        chances = (
            c + i * math.log(p) + (trials - i) * math.log1p(-p) for i, c in enumerate(log) if i <= trials
        )
        return 1 - math.fsum(math.exp(chance) for chance in chances)

    assert how.rank == k or at_least(how.rank, k - 1) < 1e-5  # else fewer than k candidates
    assert 1 - at_least(how.rank, how.capacity) < 1e-5  # else more than have a place
    assert how.stripes >= 16 and how.capacity <= 8192


def test_the_encoder_is_chosen_by_size_unless_the_environment_says_which(monkeypatch):
    monkeypatch.delenv(tuning.ENCODER_VARIABLE, raising=False)
    assert tuning.encoder_for(8192, 4096, 131072, 64) == "e1"
    assert tuning.encoder_for(8192, 768, 24576, 32, torch.float32) == "e1"
    assert tuning.encoder_for(8192, 768, 24576, 32) == ("e2" if OWN is encode_fused.HOPPER else "e1")
    for name in tuning.ENCODERS:
        monkeypatch.setenv(tuning.ENCODER_VARIABLE, name)
        assert tuning.encoder_for(8192, 4096, 131072, 64) == name
    monkeypatch.setenv(tuning.ENCODER_VARIABLE, "e3")
    with pytest.raises(ValueError, match="SAE_KERNELS_ENCODER is 'e3': expected one of e1, e2"):
        tuning.encoder_for(1, 1, 1, 1)


def as_float(bits: int | float) -> float:
    return bits if isinstance(bits, float) else struct.unpack("<f", struct.pack("<I", bits & 0xFFFFFFFF))[0]


def as_int(value: int | float) -> int:
    raw = struct.unpack("<i", struct.pack("<f", value))[0] if isinstance(value, float) else value
    return (raw & 0xFFFFFFFF) - ((raw & 0x80000000) << 1)


PTX = {
    "mov.b32": lambda a: a,
    "setp.geu.f32": lambda a, b: not as_float(a) < as_float(b),
    "setp.lt.u32": lambda a, b: a < b,
    "setp.nan.f32": lambda a, b: math.isnan(as_float(a)) or math.isnan(as_float(b)),
    "mul.wide.s32": lambda a, b: a * b,
    "add.s64": lambda a, b: a + b,
    "add.f32": lambda a, b: as_float(a) + as_float(b),
    "shr.s32": lambda a, b: as_int(a) >> b,
    "and.b32": lambda a, b: as_int(a) & b,
    "xor.b32": lambda a, b: as_int(a) ^ as_int(b),
    "selp.b32": lambda a, b, chosen: a if chosen else b,
    "sub.s32": lambda a, b: a - b,
    "cvt.u64.u32": lambda a: a,
    "shl.b64": lambda a, b: a << b,
}


def run_ptx(text: str, inputs: dict[str, int | float], count: int, keys: dict[int, int]) -> int:
    """Run the filter's PTX for one element; returns the row's new count and writes to keys, by address."""
    values: dict[str, int | float] = dict(inputs)

    def read(name: str) -> int | float:
        if name.startswith("0f"):
            return as_float(int(name[2:], 16))
        return values[name] if name in values else int(name, 0)

    body = text.replace("\n", " ").strip(" {}").replace("DONE:", "")
    for line in filter(None, (part.strip() for part in body.split(";"))):
        guard, op, arguments = re.fullmatch(r"(?:@(!?\w+) +)?([\w.]+) +(.*)", line).groups()
        if op == ".reg" or (guard and bool(values[guard.lstrip("!")]) == guard.startswith("!")):
            continue
        to, *names = (name.strip(" []{}") for name in arguments.split(","))
        if op == "bra":
            return count
        if op == "st.global.v2.b32":
            low, high = (as_int(read(name)) for name in names)
            keys[values[to]] = (high << 32) | (low & 0xFFFFFFFF)
        elif op == "atom.relaxed.gpu.global.add.u32":
            assert values[names[0]] == inputs["$5"] + 4 * inputs["$3"]  # the row's counter
            values[to], count = count, count + read(names[1])
        else:
            values[to] = PTX[op](*map(read, names))
    return count


@triton.jit
def _pack_all(scores, keys, first, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(keys + at, pack(tl.load(scores + at), first + at))


def test_the_ptx_appends_the_keys_of_pack_at_the_row_s_next_place():
    special = [0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan, -math.nan, 1e-42, -1e-42, 3e38, -3e38]
    scores = torch.tensor([*special, 2.5, -2.5, 0.1, -0.1], device=DEVICE)
    keys = torch.empty(16, dtype=torch.int64, device=DEVICE)
    _pack_all[(1,)](scores, keys, 1000, SIZE=16)
    row, capacity, base = 3, 9, 1 << 40
    for guess in (-math.inf, 0.0, 1.0, math.inf):
        count, written, want = 0, {}, []
        for latent, score in enumerate(scores.tolist(), start=1000):
            inputs = {"$1": score, "$2": guess, "$3": row, "$4": latent, "$5": 1 << 20, "$6": base}
            count = run_ptx(encode_fused._APPEND.value, inputs | {"$7": capacity}, count, written)
            if not score < guess:
                want.append(int(keys[latent - 1000]))
        assert count == len(want) > 0
        assert written == {base + 8 * (row * capacity + i): key for i, key in enumerate(want[:capacity])}
