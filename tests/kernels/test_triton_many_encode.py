"""Several SAEs that are encoded at once: each gets the codes that it gets alone.

Integer inputs make float32 sums exact in any order, so codes are compared bit for bit, ties included. Encoder
E2 takes all SAEs in one launch; every other encoder and backend takes one after the other.
"""

from typing import Any

import pytest
import torch
from sae_kernels import decode_residual, numbered, topk_encode, topk_encode_many, use_backend
from sae_kernels.triton import encode, encode_fused, tuning
from sae_kernels.triton.recover import fallback_rows
from torch import Tensor

M = 3


def integers(device: str, n: int, f: int, d: int, number: int = M) -> tuple[Tensor, Tensor, Tensor]:
    """Whose sums are exact, so that every order of them gives the same codes."""
    draw = torch.Generator().manual_seed(n + f + d)
    shapes = ((number, n, d), (number, f, d), (number, f))
    x, w, b = (torch.randint(-2, 3, s, generator=draw).float().to(device) for s in shapes)
    return x, w, b


def in_order(values: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """By latent, empty slots first, whose latents mean nothing."""
    indices = indices.masked_fill(values == 0, -1)
    indices, order = indices.sort(dim=-1)
    return values.gather(-1, order), indices


def assert_codes_are_those_of_each_alone(x: Tensor, w: Tensor, b: Tensor, ks: list[int]) -> None:
    values, indices = topk_encode_many(x, w, b, ks)
    assert values.shape == indices.shape == (*x.shape[:2], max(ks))
    assert values.dtype == torch.float32 and indices.dtype == torch.int32
    for m, k in enumerate(ks):
        assert (values[m, :, k:] == 0).all() and (indices[m, :, k:] == 0).all()
        assert ((indices[m] >= 0) & (indices[m] < w.shape[1])).all()
        alone = in_order(*topk_encode(x[m], w[m], b[m], k))
        for got, want in zip(in_order(values[m, :, :k], indices[m, :, :k]), alone, strict=True):
            assert torch.equal(got, want), (m, k)


@pytest.mark.parametrize("ks", [[5, 5, 5], [1, 7, 3]])
def test_codes_are_those_of_each_alone_on_every_backend(device, ks):
    assert_codes_are_those_of_each_alone(*integers(device, 6, 40, 9), ks)


def test_operands_are_rounded_as_they_are_for_each_alone(device):
    x, w, b = integers(device, 6, 40, 9)
    x, w = x + 2.0**-10, w + 2.0**-10  # what bfloat16 has no room for
    assert_codes_are_those_of_each_alone(x, w.bfloat16(), b, [4, 4, 4])
    with torch.autocast(device, dtype=torch.bfloat16):
        assert_codes_are_those_of_each_alone(x, w, b, [4, 4, 4])
        rounded = topk_encode_many(x, w, b, [4, 4, 4])[0]
    assert not torch.equal(rounded, topk_encode_many(x, w, b, [4, 4, 4])[0])


@pytest.fixture
def fused(triton_device, monkeypatch):
    """Encoder E2, and the rows that it has had to encode again."""
    monkeypatch.setenv(tuning.ENCODER_VARIABLE, "e2")

    def failures() -> int:
        return int(sum(int(count) for count in fallback_rows().values()))

    return triton_device, failures


@pytest.mark.parametrize(
    ("n", "f", "d", "ks"),
    [(35, 400, 9, [5, 5, 5]), (3, 300, 24, [2, 6, 1]), (1, 40, 5, [40, 3, 8]), (4, 256, 8, [3])],
)
def test_codes_of_the_fused_encoder_are_those_of_each_alone(fused, n, f, d, ks):
    device, failures = fused
    x, w, b = integers(device, n, f, d, len(ks))
    assert (encode_fused.plan(max(ks), f).stripes > 1) == (f > 40)
    before = failures()
    assert_codes_are_those_of_each_alone(x.bfloat16(), w.bfloat16(), b, ks)
    assert failures() == before
    with use_backend("reference"):
        want = topk_encode_many(x, w, b, ks)
    for got, wanted in zip(in_order(*topk_encode_many(x, w, b, ks)), in_order(*want), strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("elements", [4 * 19 * 2, 3 * 19])
def test_samples_are_taken_of_as_many_saes_or_rows_as_there_is_room_for(fused, monkeypatch, elements):
    device, failures = fused
    monkeypatch.setattr(encode_fused, "SAMPLE_ELEMENTS", elements)  # of 19 latents: 2 SAEs, or 3 rows of one
    before = failures()
    assert_codes_are_those_of_each_alone(*integers(device, 4, 300, 9), [2, 2, 2])
    assert failures() == before


def test_rows_that_fail_are_encoded_again_with_the_weights_of_their_sae(fused):
    """Equal scores overflow: one SAE has them in every row, one in its last; one has no positive score."""
    device, failures = fused
    ks = [1, 2, 2]
    x, w, b = integers(device, 5, 300, 9)
    assert encode_fused.plan(2, 300).capacity < 300
    w[0], x[1, 4], b[:2], b[2] = w[0, :1].clone(), 0, 0, -100
    before = failures()
    values, _ = topk_encode_many(x, w, b, ks)
    assert failures() == before + 5 + 1
    assert (values[2] == 0).all()
    assert_codes_are_those_of_each_alone(x, w, b, ks)
    x, w, b = integers(device, 5, 300, 9)
    guess = torch.ones(M, 5, device=device)
    guess[1, 3], guess[2, 0] = torch.inf, -torch.inf
    before = failures()
    guessed = encode_fused.topk_encode_fused_many(x, w, b, 2, guess)
    assert failures() == before + 2
    for got, want in zip(guessed, topk_encode_many(x, w, b, [2, 2, 2]), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_in_one_sae_shows_in_none_of_the_others(fused, bad):
    device, _ = fused
    x, w, b = integers(device, 5, 290, 9)
    clean = topk_encode_many(x, w, b, [3, 3, 3])
    x[1, 0], w[1, 0], b[1, 0] = bad, bad, bad  # beside the last rows and latents of the SAE before
    values, indices = topk_encode_many(x, w, b, [3, 3, 3])
    assert values[1, 0].isnan().all()
    for m in (0, 2):
        assert torch.equal(values[m], clean[0][m]) and torch.equal(indices[m], clean[1][m])


def test_several_saes_are_encoded_one_by_one_where_they_cannot_share(fused, monkeypatch):
    device, _ = fused
    x, w, b = integers(device, 4, 600, 5)
    want = topk_encode_many(x, w, b, [3, 2, 4])

    def refuse(*args: Any) -> None:
        raise AssertionError("shared")

    monkeypatch.setattr(encode, "topk_encode_fused_many", refuse)
    for name, value in (("MANY_BYTES", 0), ("MAX_K", 3)):
        with monkeypatch.context() as patch:
            patch.setattr(encode, name, value)
            assert torch.equal(topk_encode_many(x, w, b, [3, 2, 4])[0], want[0])
    monkeypatch.setenv(tuning.ENCODER_VARIABLE, "e1")
    for got, wanted in zip(topk_encode_many(x, w, b, [3, 2, 4]), want, strict=True):
        assert torch.equal(got, wanted)
    monkeypatch.setenv(tuning.ENCODER_VARIABLE, "e2")
    with pytest.raises(AssertionError, match="shared"):
        topk_encode_many(x, w, b, [3, 2, 4])


def test_codes_of_stacked_saes_decode_as_those_of_one(device):
    x, w, b = integers(device, 4, 12, 5)
    values, indices = topk_encode_many(x, w, b, [3, 2, 4])
    whole = decode_residual(
        values.flatten(0, 1), numbered(indices, 12), w.flatten(0, 1), x.new_zeros(5), x.flatten(0, 1)
    )[0]
    for m in range(M):
        alone = decode_residual(values[m], indices[m], w[m], x.new_zeros(5), x[m])[0]
        assert torch.equal(whole.unflatten(0, (M, 4))[m], alone)


def test_what_does_not_fit_is_refused(triton_device):
    x, w, b = integers(triton_device, 4, 8, 5)
    with pytest.raises(ValueError, match=r"topk_encode_many of one SAE or more: .* ks 2"):
        topk_encode_many(x, w, b, [1, 2])
    with pytest.raises(ValueError, match="k is 9: expected 1 to 8"):
        topk_encode_many(x, w, b, [1, 2, 9])
    with pytest.raises(ValueError, match="3 SAEs have 3221225472 rows or latents"):
        topk_encode_many(x[:, :1].expand(-1, 2**30, -1), w, b, [1, 2, 3])
    with pytest.raises(ValueError, match="3 SAEs have 3221225472 rows or latents"):
        topk_encode_many(x, w[:, :1].expand(-1, 2**30, -1), b[:, :1].expand(-1, 2**30), [1, 2, 3])
