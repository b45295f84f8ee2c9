"""Triton's decoders against dense float64, at the edges of their tiles, of row lengths and of bfloat16.

A float32 sum of m terms drifts from the exact one by at most about m * EPS of the sum of magnitudes,
far less in the root mean square over a tensor of random signs, for which the tests allow 4 * m * EPS.
"""

import mmap

import pytest
import torch
from sae_kernels import decode_residual, gather_dot, sparse_decode, use_backend
from torch import Tensor

EPS = 2.0**-24  # float32 unit roundoff
BF16_EPS = 2.0**-8  # bfloat16 unit roundoff
# N, slots per row (in the mean, where rows differ), F, D. Tiles have 16 to 256 slots and 64 to 256 columns:
# fewer than one, more than one, a last one that is not full, and rows of more slots than any tile has.
SHAPES = [(1, 1, 1, 1), (6, 5, 40, 70), (5, 33, 50, 300), (3, 20, 7, 513), (2, 270, 60, 65)]
LAYOUTS = ["fixed", "compressed"]
DTYPES = [torch.float32, torch.bfloat16]


class Problem:
    """Codes with empty slots and repeated indices, latent 0 in every row with slots; weights, bias, rows."""

    def __init__(self, n: int, k: int, f: int, d: int, layout: str, dtype: torch.dtype, device: str) -> None:
        draw = torch.Generator().manual_seed(n + k + f + d)
        lengths = torch.full((n,), k)
        if layout == "compressed" and n > 1:  # one row takes all that another lacks, so that one is empty
            lengths[0], lengths[-1] = 0, 2 * k
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        values = torch.randn(n * k, generator=draw)
        values[torch.rand(n * k, generator=draw) < 0.3] = 0
        indices = torch.randint(f, (n * k,), generator=draw, dtype=torch.int32)
        indices[offsets[:-1][lengths > 0]] = 0
        shape = (n, k) if layout == "fixed" else (n * k,)
        self.row = torch.arange(n).repeat_interleave(lengths)
        self.values, self.indices = values.view(shape).to(device), indices.view(shape).to(device)
        self.offsets = () if layout == "fixed" else (offsets.to(device),)
        self.weight, self.target = (torch.randn(rows, d, generator=draw).to(device, dtype) for rows in (f, n))
        self.bias = torch.randn(d, generator=draw).to(device)
        self.codes = (self.values, self.indices, self.weight)

    def decode(self) -> Tensor:
        return sparse_decode(*self.codes, *self.offsets)

    def residual(self) -> tuple[Tensor, Tensor, Tensor]:
        return decode_residual(*self.codes, self.bias, self.target, *self.offsets)

    def dots(self, rows: Tensor) -> Tensor:
        return gather_dot(rows, self.indices, self.weight, *self.offsets)

    def exact_decode(self) -> Tensor:
        latents = self.indices.cpu().flatten().long()
        codes = torch.zeros(len(self.target), len(self.weight), dtype=torch.float64)
        codes.index_put_((self.row, latents), self.values.cpu().double().flatten(), accumulate=True)
        return codes @ self.weight.cpu().double()

    def exact_dots(self, rows: Tensor) -> Tensor:
        dense = rows.cpu().double() @ self.weight.cpu().double().T
        return dense[self.row, self.indices.cpu().flatten().long()].view(self.indices.shape)


def assert_close(got: Tensor, want: Tensor, tolerance: float) -> None:
    assert got.shape == want.shape
    error = (got.cpu().double() - want).square().mean().sqrt()
    assert error <= tolerance * want.square().mean().sqrt()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_output_agrees_with_dense_float64(triton_device, shape, layout, dtype):
    problem = Problem(*shape, layout, dtype, triton_device)
    tolerance = 4 * max(2 * shape[1], shape[3]) * EPS
    rounding = BF16_EPS if dtype == torch.bfloat16 else 0.0
    decoded = problem.exact_decode()
    assert_close(problem.decode(), decoded, tolerance + rounding)

    residual, loss, dots = problem.residual()
    exact = problem.target.cpu().double() - (decoded + problem.bias.cpu().double())
    assert residual.dtype == problem.target.dtype and loss.dtype == dots.dtype == torch.float32
    assert_close(residual, exact, tolerance + rounding)
    assert_close(loss, exact.square().sum(dim=1), 2 * tolerance)  # of what was not rounded
    assert_close(dots, problem.exact_dots(residual), tolerance)  # of what was
    assert_close(problem.dots(problem.target), problem.exact_dots(problem.target), tolerance)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_bfloat16_residual_is_that_of_float32_rounded_once(triton_device, layout):
    problem = Problem(4, 20, 30, 300, layout, torch.bfloat16, triton_device)
    rounded, loss, _ = problem.residual()
    problem.target = problem.target.float()
    wide, wide_loss, _ = problem.residual()
    assert torch.equal(rounded, wide.bfloat16())
    assert not torch.equal(wide, wide.bfloat16().float())
    assert torch.allclose(loss, wide_loss, rtol=300 * EPS, atol=0)


def test_bfloat16_is_rounded_to_nearest_with_ties_to_even(triton_device):
    half = 2.0**-8  # half a unit in the last place of 1
    exact = [1 + part * half for part in (0.5, 1, 1.5, 2.5, 3, 3.5, 5, 7)]
    exact += [-x for x in exact] + [0.0]
    want = torch.tensor(exact, device=triton_device)
    upper = want.bfloat16()  # each is a bfloat16 number and a rest that is one too
    weight = torch.stack([upper, (want - upper.float()).bfloat16()])
    assert torch.equal(weight.float().sum(dim=0), want)
    ones, both = torch.ones(1, 2, device=triton_device), torch.tensor([[0, 1]], device=triton_device).int()
    assert torch.equal(sparse_decode(ones, both, weight)[0], want.bfloat16())
    residual, _, _ = decode_residual(
        -ones, both, weight.float(), torch.zeros_like(want), torch.zeros_like(upper)[None]
    )
    assert torch.equal(residual[0], want.bfloat16())


def test_what_is_not_finite_stays_so_when_it_is_rounded_and_stays_in_its_row(triton_device):
    problem = Problem(4, 5, 30, 70, "fixed", torch.bfloat16, triton_device)
    clean = problem.decode(), *problem.residual()
    problem.values[2, 3] = torch.nan
    broken = problem.decode(), *problem.residual()
    others = [0, 1, 3]
    for before, after in zip(clean, broken, strict=True):
        assert after[2].isnan().all()
        assert torch.equal(before[others], after[others])
    largest = torch.full((1, 1), torch.finfo(torch.bfloat16).max, device=triton_device)
    index = torch.zeros(1, 1, dtype=torch.int32, device=triton_device)
    assert (
        sparse_decode(torch.full_like(largest, 1 + BF16_EPS), index, largest.bfloat16()) == torch.inf
    ).all()


def test_sums_have_the_same_bits_whatever_the_dtype_they_are_read_from(triton_device):
    problem = Problem(3, 20, 30, 300, "fixed", torch.bfloat16, triton_device)
    decoded, dots = problem.decode(), problem.dots(problem.target)
    problem.codes = (problem.values, problem.indices, problem.weight.float())
    problem.weight = problem.weight.float()
    assert torch.equal(decoded, problem.decode().bfloat16())
    assert torch.equal(dots, problem.dots(problem.target.float()))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_runs_give_the_same_bits(triton_device, layout):
    problem = Problem(2, 270, 20, 70, layout, torch.bfloat16, triton_device)
    runs = [(problem.decode(), *problem.residual(), problem.dots(problem.target)) for _ in range(2)]
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


def test_rows_of_equal_length_are_decoded_alike_in_either_layout(triton_device):
    fixed = Problem(4, 9, 30, 70, "fixed", torch.float32, triton_device)
    offsets = torch.arange(5, device=triton_device) * 9
    flat = (fixed.values.flatten(), fixed.indices.flatten())
    assert torch.equal(sparse_decode(*flat, fixed.weight, offsets), fixed.decode())
    dots = gather_dot(fixed.target, flat[1], fixed.weight, offsets)
    assert torch.equal(dots.view(4, 9), fixed.dots(fixed.target))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_inputs_are_read_where_they_lie(triton_device, layout):
    problem = Problem(4, 5, 30, 70, layout, torch.float32, triton_device)
    want = problem.decode(), *problem.residual(), problem.dots(problem.target)

    def apart(tensor: Tensor) -> Tensor:
        """No two elements are neighbours."""
        return torch.stack([tensor, tensor + 1], dim=-1)[..., 0]

    def in_wider_rows(tensor: Tensor) -> Tensor:
        return torch.cat([tensor, tensor + 1], dim=1)[:, : tensor.shape[1]]

    for spread in (apart, in_wider_rows):
        strided = Problem(4, 5, 30, 70, layout, torch.float32, triton_device)
        strided.codes = (apart(problem.values), apart(problem.indices), spread(problem.weight))
        strided.weight, strided.indices = strided.codes[2], strided.codes[1]
        strided.bias, strided.target = apart(problem.bias), spread(problem.target)
        strided.offsets = tuple(apart(offsets) for offsets in problem.offsets)
        assert not any(t.is_contiguous() for t in (*strided.codes, strided.bias, strided.target))
        got = strided.decode(), *strided.residual(), strided.dots(strided.target)
        assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))

    expanded = torch.ones((), device=triton_device).expand(4, 70)  # the gradient of a sum
    assert torch.equal(problem.dots(expanded), problem.dots(expanded.contiguous()))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_without_slots_the_reconstruction_is_the_bias(triton_device, layout):
    none = Problem(4, 0, 30, 70, layout, torch.float32, triton_device)
    assert (none.decode() == 0).all()
    residual, loss, dots = none.residual()
    assert torch.equal(residual, none.target - none.bias)
    assert_close(loss, residual.cpu().double().square().sum(dim=1), 4 * 70 * EPS)
    assert dots.numel() == none.dots(none.target).numel() == 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_without_rows_there_is_nothing(triton_device, layout):
    empty = Problem(0, 3, 30, 70, layout, torch.float32, triton_device)
    residual, loss, dots = empty.residual()
    assert residual.shape == empty.decode().shape == (0, 70)
    assert loss.shape == (0,)
    assert dots.shape == empty.dots(empty.target).shape == empty.indices.shape


def test_weight_rows_of_empty_slots_are_not_fetched(triton_device):
    problem = Problem(6, 9, 40, 70, "fixed", torch.float32, triton_device)
    want = problem.decode()
    used = problem.indices[problem.values != 0].long()
    unused = torch.ones(40, dtype=torch.bool, device=triton_device).index_fill_(0, used, False)
    assert unused[problem.indices.long()].any()
    problem.weight[unused] = torch.nan
    assert torch.equal(problem.decode(), want)


def test_places_in_the_weights_are_counted_in_64_bits(triton_device):
    stride = 2**30 + 64  # row 2 begins beyond 2^31 elements
    size = 2 * stride + 128
    if triton_device == "cuda":
        memory = torch.zeros(size, dtype=torch.bfloat16, device="cuda")
    else:  # pages that nothing touches take no memory
        pages = mmap.mmap(-1, 2 * size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory = torch.frombuffer(pages, dtype=torch.bfloat16)
    weight = memory.as_strided((3, 70), (stride, 1))
    weight[2] = torch.arange(1, 71).bfloat16()
    rows = torch.ones(1, 70, device=triton_device)
    values, indices = rows[:, :1], torch.full((1, 1), 2, dtype=torch.int32, device=triton_device)
    assert torch.equal(sparse_decode(values, indices, weight)[0], weight[2])
    residual, _, dots = decode_residual(values, indices, weight, torch.zeros_like(rows[0]), 0 * rows)
    assert torch.equal(residual[0], -weight[2].float())
    assert dots.item() == -sum(i * i for i in range(1, 71))
    assert gather_dot(rows, indices, weight).item() == sum(range(1, 71))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_residual_has_the_gradients_of_the_definition(triton_device, layout):
    grads = []
    for backend in ("triton", "reference"):
        problem = Problem(4, 3, 9, 6, layout, torch.float32, triton_device)
        leaves = [t.requires_grad_() for t in (problem.values, problem.weight, problem.bias, problem.target)]
        with use_backend(backend):
            residual, loss, dots = problem.residual()
            assert not dots.requires_grad
            ramp = torch.arange(residual.numel(), device=triton_device).view_as(residual) / residual.numel()
            grads.append(torch.autograd.grad((ramp * residual).sum() + loss.square().sum(), leaves))
    for got, want in zip(*grads, strict=True):
        assert_close(got, want.cpu().double(), 4 * 32 * EPS)  # the reference has drifted too


def test_every_tile_can_be_launched():
    decode = pytest.importorskip("sae_kernels.triton.decode")
    for num_slots in (*range(300), 1000, 5000, 10**6):
        tiles = {
            "fixed": decode.residual_tile(num_slots, compressed=False),
            "compressed": decode.residual_tile(num_slots, compressed=True),
            "gather": decode.gather_tile(num_slots),
        }
        for tile in tiles.values():
            assert all(size & (size - 1) == 0 for size in tile)
            assert 16 <= tile.slots <= 256 and 64 <= tile.columns <= 256 and 4 <= tile.warps <= 8
            a_thread = tile.slots * tile.columns / (32 * tile.warps)  # elements that it holds
            assert a_thread == (64 if tile.slots == 256 else 32)
        assert tiles["fixed"].slots >= min(num_slots, 256)
        assert tiles["compressed"].slots >= min(1.5 * num_slots - 1, 256)
