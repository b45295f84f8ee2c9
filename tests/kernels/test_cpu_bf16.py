"""Top-k by a product that is rounded to bfloat16: the choice of the float32 product, whatever the rows.

oneDNN emulates the product where a processor has no instructions for it, so all of this runs everywhere.
"""

import pytest
import torch
from sae_kernels import cpu, cpu_bf16, fallbacks
from torch import Tensor

from .dense import EPS


@pytest.fixture(autouse=True)
def native(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "NATIVE_BF16", True)
    monkeypatch.setattr(cpu_bf16, "AGAIN", 1)  # small shapes too


def operands(
    n: int, f: int, d: int, bias: float = 1.0, dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n + f + d)
    x, w, b = (torch.randn(*shape, generator=generator) for shape in ((n, d), (f, d), (f,)))
    return x.to(dtype), w.to(dtype), bias * b


def encoded(x: Tensor, w: Tensor, b: Tensor, k: int) -> tuple[Tensor, Tensor, int]:
    """Codes in the order of the indices, and how many rows were encoded again."""
    before = fallbacks().get("fallback_rows", 0)
    values, indices = cpu.topk_encode(x, w, b, k)
    assert values.dtype == torch.float32
    indices, order = indices.sort(dim=1)
    return values.gather(1, order), indices, fallbacks()["fallback_rows"] - before


def truth(x: Tensor, w: Tensor, b: Tensor, k: int) -> tuple[Tensor, Tensor]:
    best = (x.double() @ w.double().T + b.double()).topk(k, dim=1)
    indices, order = best.indices.sort(dim=1)
    return best.values.relu().gather(1, order), indices


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("n", "f", "d", "k", "bias"),
    [(1, 40, 3, 1, 1.0), (130, 1000, 96, 16, 0.0), (64, 4608, 160, 32, 3.0), (20, 1600, 64, 100, 30.0)],
)
def test_the_choice_is_that_of_the_exact_product(n, f, d, k, bias, dtype):
    x, w, b = operands(n, f, d, bias, dtype)
    values, indices, again = encoded(x, w, b, k)
    want, places = truth(x, w, b, k)
    assert torch.equal(indices, places)
    magnitude = float((x.abs().double() @ w.abs().double().T).max() + b.abs().max())
    assert float((values - want).abs().max()) <= (d + 2) * EPS * magnitude  # float32 sums of exact products
    assert again <= n / 10
    rounded = (x.bfloat16() @ w.bfloat16().T).float() + b
    guessed = rounded.gather(1, places.long()).relu()
    assert float((guessed - want).abs().max()) > 10 * (d + 2) * EPS * magnitude


def test_latents_that_rounding_makes_equal_are_told_apart():
    """All 80 are 1 in bfloat16, each row's best are anywhere among them, and no row may stay as guessed."""
    f, d, k = 80, 2, 4
    x = torch.ones(30, d).bfloat16()
    small = torch.randperm(f, generator=torch.Generator().manual_seed(0))
    w = torch.stack([torch.ones(f), small * 2.0**-16], dim=1).bfloat16()
    b = torch.zeros(f)
    assert ((x @ w.T) == 1).all()
    values, indices, again = encoded(x, w, b, k)
    want, places = truth(x, w, b, k)
    assert again == len(x)
    assert torch.equal(indices, places)
    assert torch.equal(values, want.float())


def test_a_bias_hides_nothing():
    """The best has a product of 1001.9 and a bias of -998, as one bfloat16 -1000; 30 are above 1.9."""
    f, k = 64, 2
    x = torch.tensor([[1000.0, 1.0]]).bfloat16()
    w, b = torch.zeros(f, 2), torch.full((f,), -500.0)
    w[:30, 1], b[:30] = 3 + torch.arange(30) / 64, 0
    w[50], b[50] = torch.tensor([1.0, 1.9375]), -998
    w = w.bfloat16()
    assert float((x @ w.T).float()[0, 50]) == 1000
    values, indices, again = encoded(x, w, b, k)
    assert again == 0
    assert indices.tolist() == [[29, 50]] and values.tolist() == [[3 + 29 / 64, 3.9375]]


@pytest.mark.parametrize("power", [0, -50, -58, -62, -66, -70, -90, -110])
@pytest.mark.parametrize("which", ["row", "weight"])
def test_what_rounding_an_operand_hides_is_found(which, power):
    """Rounding takes all of the best, which is guessed as 0; others, which it leaves alone, are 0.99 of it.

    The operand that is rounded is 1 and its neighbours, half of them rounded up and half down, and the other
    is 1 and -1 in these halves: no operands of their norms lose more. Squares of the smaller powers are no
    float32 numbers, and norms 0."""
    f, d, lost = 64, 32, 0.999 * 2.0**-8
    signs = torch.ones(d)
    signs[d // 2 :] = -1
    near = 1 + signs * lost
    near[d // 2 :] = 1 - 0.999 * 2.0**-9  # below 1 there are twice as many numbers
    true = float(near @ signs)
    assert float(near.bfloat16().float() @ signs) == 0 and true > 0.7 * lost * d
    others = torch.full((f,), -1.0)  # few are in question
    others[:10] = 0.99 * true
    x, best = (near, signs) if which == "row" else (signs, near)
    x = torch.cat([x, torch.ones(1)]).unsqueeze(0)
    w = torch.zeros(f, d + 1)
    w[:, d], w[41] = others, torch.cat([best, torch.zeros(1)])
    if which == "row":
        x *= 2.0**power
    else:
        w *= 2.0**power
    _, indices, again = encoded(x, w, torch.zeros(f), 1)
    assert (indices.item(), again) == (41, int(power < -55))


def test_the_bias_of_a_latent_that_cannot_be_chosen_costs_little():
    x, w, b = operands(64, 4608, 160, 0.0, torch.float32)
    want = truth(x, w, b, 32)
    for far in (-100.0, -1e6, -torch.inf):
        b[want[1][0, 0]] = far  # one that was
        expected = truth(x, w, b, 32)
        values, indices, again = encoded(x, w, b, 32)
        assert again < len(x) / 2 and torch.equal(indices, expected[1])
        assert torch.allclose(values, expected[0].float(), rtol=1e-5)
    b[7] = torch.inf
    assert encoded(x, w, b, 32)[2] == len(x)


def test_neither_the_default_dtype_nor_no_width_is_an_error():
    x, w, b = operands(3, 816, 16, dtype=torch.float32)
    want, places, _ = encoded(x, w, b, 1)
    torch.set_default_dtype(torch.float64)
    try:
        values, indices, _ = encoded(x, w, b, 1)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(values, want) and torch.equal(indices, places)
    values, indices, _ = encoded(x[:, :0], w[:, :0], b, 1)
    assert (indices == b.argmax()).all() and torch.equal(values, b.amax().expand(3, 1))


@pytest.mark.parametrize(("bias", "second"), [(1026.0077, 0.007), (-1025.9962, 0.0035)])
def test_what_two_bfloat16_leave_of_a_bias_is_found(bias, second):
    """It becomes 1026 or -1026, and with its product nothing is left of the best, which is the largest."""
    f, product = 64, 1026 if bias < 0 else -1026
    x, w, b = torch.ones(1, 2), torch.zeros(f, 2), torch.full((f,), -1.0)
    w[41], b[41] = torch.tensor([product - product / 513, product / 513]), bias
    b[17] = second
    assert product + b[41] > b[17]
    for dtype in (torch.bfloat16, torch.float32):
        _, indices, again = encoded(x.to(dtype), w.to(dtype), b, 1)
        assert (indices.item(), again) == (41, 0)


def test_two_that_rounding_parts_the_wrong_way_are_both_looked_at():
    """The best loses 2^-16 as an operand, lies at the middle of 1 and 1 + 2^-7, and becomes 1; another lies a
    little above the middle, and becomes 1 + 2^-7."""
    f = 32
    x, w, b = torch.ones(1, 2), torch.zeros(f, 2), torch.full((f,), -1.0)
    w[:, 0] = 1
    w[7, 1], b[7] = 2.0**-8 + 0.49 * 2.0**-15, 0
    w[20, 1], b[20] = 2.0**-8, 2.0**-17
    guess = ((x.bfloat16().float() @ w.bfloat16().float().T) + b).bfloat16()[0]
    assert guess[7] == 1 and guess[20] == 1 + 2.0**-7
    _, indices, again = encoded(x, w, b, 1)
    assert (indices.item(), again) == (7, 0)


@pytest.mark.parametrize(("n", "d"), [(33, 7), (2, 576), (300, 578), (8, 4096), (1, 576)])
def test_a_product_is_rounded_once_however_much_of_it_cancels(n, d):
    """What the bound relies on, of torch and the library under it: sums are float32 until they are done."""
    f = 256
    generator = torch.Generator().manual_seed(d)
    x, w = (torch.randn(rows, d, generator=generator).bfloat16() for rows in (n, f))
    x[:, -1] = 1
    w[:, -1] = -(w[:, :-1].float() @ x[0, :-1].float())  # of the first row little remains
    got = torch.mm(x, w.t(), out=torch.empty(n, f, dtype=torch.bfloat16))
    exact, size = x.double() @ w.double().t(), x.double().abs() @ w.double().abs().t()
    assert float(size[0].mean() / exact[0].abs().mean()) > 50
    assert ((got.double() - exact).abs() <= 2.0**-8 * exact.abs() + 2 * d * EPS * size).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("what", ["zero", "equal", "negative", "nan", "inf", "nan weight", "huge"])
def test_awkward_rows_are_encoded_as_by_the_float32_product(what, dtype, monkeypatch):
    n, f, d, k = 12, 120, 24, 6
    x, w, b = operands(n, f, d, dtype=dtype)
    if what == "zero":
        x[3], x[-1], b = 0, 0, torch.zeros(f)
    elif what == "equal":
        w, b = w[:1].expand(f, d).contiguous(), torch.zeros(f)
    elif what == "negative":
        b = b - 40
    elif what == "nan weight":
        w[7, 2] = torch.nan
    elif what == "huge":
        x[3] *= 1e37  # its norm is no float32, nor is some of it any bfloat16
    else:
        x[3, 5] = float(what)
    values, indices, again = encoded(x, w, b, k)
    monkeypatch.setattr(cpu, "NATIVE_BF16", False)
    plain, places = cpu.topk_encode(x, w, b, k)
    assert torch.allclose(values.sort(dim=1).values, plain.sort(dim=1).values, rtol=1e-5, equal_nan=True)
    assert all(len(set(row.tolist())) == k for row in indices)
    if what == "negative":
        assert torch.equal(indices, places.sort(dim=1).values)
    assert again >= (0 if what == "negative" else n if what in ("equal", "nan weight") else 1)
    if what in ("zero", "nan", "inf"):  # that row is encoded by the same product, the others are as they were
        order = places[3].sort().indices
        assert torch.equal(indices[3], places[3][order])
        assert torch.equal(values[3].isnan(), plain[3][order].isnan())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_row_s_codes_do_not_depend_on_the_rows_beside_it(dtype):
    x, w, b = operands(64, 600, 40, dtype=dtype)
    x[5] = 0  # a row that is encoded again, and one whose slots are many
    x[6, 1:] = 0
    values, indices = cpu.topk_encode(x, w, b, 8)  # in their order too
    for part in (slice(0, 1), slice(3, 20), slice(40, 64)):
        some, places = cpu.topk_encode(x[part], w, b, 8)
        assert torch.equal(some, values[part]) and torch.equal(places, indices[part])


def test_the_order_of_slots_does_not_depend_on_the_rows_beside_it_where_columns_are_in_order():
    """One latent's guess lies at the very end of what is looked at: an ulp of a norm lets it in or not."""
    f, d, k = 1024, 576, 4
    generator = torch.Generator().manual_seed(48)
    x = torch.randn(d, 5, generator=generator).bfloat16().t()
    hot = torch.randperm(f - 1, generator=generator)[:30] + 1
    w, b = torch.zeros(f, d), torch.full((f,), -1e6)
    b[hot] = 8 * torch.rand(30, generator=generator)
    w[0, 3], b[hot[0]] = float.fromhex("0x1.007b64p+6"), 0.051513671875
    assert torch.equal(cpu.topk_encode(x, w, b, k)[1][:1], cpu.topk_encode(x[:1], w, b, k)[1])


def test_few_latents_need_no_guess():
    x, w, b = operands(5, 20, 8)
    before = fallbacks().get("fallback_rows", 0)
    _, indices = cpu.topk_encode(x, w, b, 4)
    assert fallbacks().get("fallback_rows", 0) == before
    assert torch.equal(indices.sort(dim=1).values, truth(x, w, b, 4)[1])


def test_a_tie_that_rounding_made_is_no_proof():
    """1 + 2^-8 is rounded to 1, the most that rounding to nearest can change."""
    f, k = 32, 1
    x = torch.tensor([[1.0, 1.0]]).bfloat16()
    w = torch.tensor([[1.0, 2.0**-9]]).expand(f, 2).clone()
    w[7, 1] = 2.0**-8
    values, indices, again = encoded(x, w.bfloat16(), torch.zeros(f), k)
    assert (indices.item(), values.item(), again) == (7, 1 + 2.0**-8, 0)


@pytest.mark.parametrize("size", [1e-12, 1e-19, 3e-20, 1e-20])
def test_products_too_small_for_the_instructions_are_encoded_again(size):
    x, w, _ = operands(64, 512, 64)
    x, w, b = (size * x).bfloat16(), (size * w).bfloat16(), torch.zeros(512)
    values, _, again = encoded(x, w, b, 8)
    want = truth(x, w, b, 8)[0].sort(dim=1).values
    assert torch.allclose(values.double().sort(dim=1).values, want, rtol=1e-4, atol=1e-43)
    assert again == (0 if size == 1e-12 else 64)


def test_it_is_taken_where_it_is_faster(monkeypatch):
    monkeypatch.setattr(cpu_bf16, "AGAIN", 48)
    fast = {(32, 4608): True, (80, 4608): True, (81, 4608): False, (64, 16384): True, (4, 48): False}
    fast |= {(32, 4611): False}  # blocks of 8 latents
    assert {(k, f): cpu_bf16.pays(k, f) for k, f in fast} == fast
