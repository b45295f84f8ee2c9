"""Dense top-k in Triton: exactly the k largest of each row, ties to the smaller index.

Integers of few bits are multiplied and added without rounding in any order, in bfloat16 too, and tie all
the time: on them the kernel has to give the bits of a stable sort that shares no code with it.
"""

import math

import pytest
import torch
from sae_kernels import dead_encode, use_backend
from torch import Tensor

dead = pytest.importorskip("sae_kernels.triton.dead")

EPS = 2.0**-24
# One latent; rows below a block, of a whole one, beyond it.
SHAPES = [(1, 1, 1, 1), (1, 3, 2, 1), (7, 5, 40, 6), (5, 8, 128, 127), (6, 4, 333, 50)]


def integers(n: int, d: int, f: int, device: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    draw = torch.Generator().manual_seed(n + d + f)
    tensors = [torch.randint(-2, 3, shape, generator=draw) for shape in ((n, d), (f, d), (f,))]
    x, w, b = (t.float().to(device) for t in tensors)
    return [x.to(dtype), w.to(dtype), b]


def by_stable_sort(x: Tensor, w: Tensor, b: Tensor, k: int) -> Tensor:
    """The definition in float64: rank in a stable descending order below k."""
    acts = (x.double() @ w.double().T + b.double()).relu()
    rank = acts.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return (acts * (rank < k)).float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "d", "f", "k"), SHAPES)
def test_the_k_largest_are_kept_and_ties_go_to_the_smaller_index(triton_device, n, d, f, k, dtype):
    x, w, b = integers(n, d, f, triton_device, dtype)
    assert torch.equal(dead_encode(x, w, b, k), by_stable_sort(x, w, b, k))


@pytest.mark.parametrize("k", [1, 700, 2499])
def test_rows_that_do_not_fit_registers_are_read_in_chunks_with_the_same_result(
    triton_device, monkeypatch, k
):
    monkeypatch.setattr(dead, "MAX_WHOLE", 100)
    x, w, b = integers(3, 6, 2500, triton_device)
    assert not dead.launch_of(2500).whole and dead.launch_of(2500).chunk < 2500
    assert torch.equal(dead_encode(x, w, b, k), by_stable_sort(x, w, b, k))


def test_floats_of_any_size_are_told_apart_to_the_last_bit(triton_device):
    # w = 1, so that pre-activations are these very numbers: neighbours, denormals, the largest and smallest.
    around = torch.tensor([1.0, 1.0 + 2**-23, 1.0 - 2**-24, 1.0 + 2**-22, 3e38, 3.4e38, 1e-38, 2.0**-126])
    draw = torch.Generator().manual_seed(0)
    spread = torch.exp2(torch.rand(4, 32, generator=draw) * 250 - 125)
    x = torch.cat([around.repeat(4, 4), spread], dim=1)
    x = x.gather(1, torch.rand(4, 64, generator=draw).argsort(dim=1)).to(triton_device)
    w, b = torch.eye(64, device=triton_device), torch.zeros(64, device=triton_device)
    for k in (1, 3, 20, 63):
        assert torch.equal(dead_encode(x, w, b, k), by_stable_sort(x, w, b, k)), k


def test_random_floats_agree_with_float64_and_exactly_k_are_kept(triton_device):
    n, d, f, k = 9, 24, 200, 31
    draw = torch.Generator().manual_seed(1)
    x, w, b = (torch.randn(*shape, generator=draw).to(triton_device) for shape in ((n, d), (f, d), (f,)))
    got, want = dead_encode(x, w, b, k).double(), by_stable_sort(x, w, b, k).double()
    assert ((got > 0).sum(dim=1) == k).all()
    # in another order only numbers that differ by less than the rounding of a sum of d terms may swap
    gap = (got.sort(dim=1).values - want.sort(dim=1).values).abs().max()
    assert gap <= 4 * d * EPS * want.max()


@pytest.mark.parametrize("k", [1, 5, 39])
def test_of_equal_preactivations_the_first_k_are_kept(triton_device, k):
    x, w = torch.zeros(3, 2, device=triton_device), torch.ones(40, 2, device=triton_device)
    b = torch.full((40,), 0.7, device=triton_device)
    want = torch.zeros(3, 40, device=triton_device)
    want[:, :k] = 0.7
    assert torch.equal(dead_encode(x, w, b, k), want)


def test_rows_without_enough_positive_preactivations_keep_what_they_have(triton_device):
    x = torch.tensor([[-1.0], [0.0], [1.0]], device=triton_device)
    w = torch.arange(1.0, 21.0, device=triton_device).unsqueeze(1)
    b = torch.full((20,), -17.0, device=triton_device)
    got = dead_encode(x, w, b, 10)
    assert got[:2].abs().sum() == 0 and got[2].tolist() == [0.0] * 17 + [1.0, 2.0, 3.0]


@pytest.mark.parametrize("k", [7, 40, 10**6])
def test_with_k_as_large_as_the_latents_all_positive_ones_are_kept(triton_device, k):
    x, w, b = integers(5, 3, 7, triton_device)
    assert torch.equal(dead_encode(x, w, b, k), (x @ w.T + b).relu())


def test_no_rows_give_no_rows(triton_device):
    x, w, b = integers(0, 3, 7, triton_device)
    assert dead_encode(x, w, b, 2).shape == (0, 7)


def test_arguments_need_not_be_contiguous(triton_device):
    x, w, b = integers(8, 6, 50, triton_device)
    strided = (x.T.contiguous().T, torch.cat([w, w], dim=1)[:, :6], torch.stack([b, b], dim=1)[:, 0])
    assert not any(t.is_contiguous() for t in strided)
    assert torch.equal(dead_encode(*strided, 7), by_stable_sort(x, w, b, 7))


def test_numbers_that_are_not_finite_are_not_hidden(triton_device):
    x, w, b = integers(4, 3, 30, triton_device)
    b = torch.ones_like(b)
    b[11], b[17] = math.inf, math.nan
    got = dead_encode(x, w, b, 3)
    assert got[:, 11].isinf().all() and got[:, 17].isnan().all()
    assert ((got != 0).sum(dim=1) <= 3).all()
    for bad in (math.nan, math.inf):  # and no more than k are kept of them either
        got = dead_encode(x, w, torch.full_like(b, bad), 3)
        assert (got[:, :3] != 0).all() and got[:, 3:].abs().sum() == 0


def test_gradients_equal_those_of_the_reference_and_two_runs_give_the_same_bits(triton_device):
    draw = torch.Generator().manual_seed(3)
    tensors = [torch.randn(*shape, generator=draw).to(triton_device) for shape in ((9, 12), (60, 12), (60,))]
    weights = torch.randn(9, 60, generator=draw).to(triton_device)
    found = []
    for backend in ("triton", "triton", "reference"):
        leaves = [t.clone().requires_grad_() for t in tensors]
        with use_backend(backend):
            out = dead_encode(*leaves, 13)
        (out * weights).sum().backward()
        found.append([out.detach(), *(leaf.grad for leaf in leaves)])
    for first, second, want in zip(*found, strict=True):
        assert torch.equal(first, second)
        assert (first - want).norm() <= 4 * 60 * EPS * want.norm()
