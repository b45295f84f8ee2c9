"""What is particular to an architecture: how transcoders start, which prefixes are drawn, what gates do."""

import copy
from collections import Counter
from itertools import pairwise

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sae_train.activations.topk import TopKConfig
from sae_train.batch import Batch
from sae_train.errors import InputError
from sae_train.places import Widths
from sae_train.sae.base import SAE
from sae_train.sae.gated import GatedConfig, GatedSAE
from sae_train.sae.io import load_sae, save_sae
from sae_train.sae.linear import LinearConfig, LinearSAE
from sae_train.sae.matryoshka import MatryoshkaConfig, MatryoshkaSAE, drawn, shares

pytestmark = pytest.mark.usefixtures("one_thread")

D, F, N = 16, 96, 256
EPS = 2.0**-24
NO_DEAD = torch.zeros(0, dtype=torch.int64)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rows(seed: int, n: int = N) -> torch.Tensor:
    directions = torch.randn(40, D, generator=seeded(99))
    strengths = torch.rand(n, 40, generator=seeded(seed)) * (
        torch.rand(n, 40, generator=seeded(seed + 7)) < 0.1
    )
    return 3 * (strengths @ directions) + 2 + 0.05 * torch.randn(n, D, generator=seeded(seed + 9))


def mlp(x: torch.Tensor, dominated: bool = False, width: int = 12) -> torch.Tensor:
    """What a layer makes of rows; `dominated` by one direction, as those of language models are."""
    first = torch.randn(D, 4 * D, generator=seeded(1)) / D**0.5
    second = torch.randn(4 * D, width, generator=seeded(2)) / D
    if dominated:
        u, s, v = torch.linalg.svd(second, full_matrices=False)
        second = u @ torch.diag(s * torch.arange(1, width + 1) ** -1.5) @ v
    return torch.nn.functional.gelu(x @ first) @ second * 20 - 4


def topk(k: int = 4, **options) -> TopKConfig:
    return TopKConfig(k=k, **options)


def started(sae: SAE, x: torch.Tensor, y: torch.Tensor | None = None) -> SAE:
    sae.initialise(x, seeded(0), y)
    return sae


def train(sae: SAE, steps: int, target=lambda x: x) -> list[float]:
    optimizer, out = torch.optim.Adam(sae.parameters(), lr=5e-3), []
    for step in range(steps):
        sae.begin_step(step, steps)
        x = rows(100 + step)
        optimizer.zero_grad()
        losses = sae.losses(Batch(x, target(x)), NO_DEAD)
        losses.total.backward()
        sae.before_step()
        optimizer.step()
        sae.after_step()
        out.append(float(losses.terms["mse"].detach()))
    return out


# Transcoders and crosscoders


@pytest.mark.parametrize(
    ("k", "skip", "dominated"), [(2, False, False), (48, False, False), (16, True, False), (16, False, True)]
)
def test_a_transcoder_starts_better_than_without_latents_and_learns(k, skip, dominated):
    config = LinearConfig(kind="transcoder", d_sae=F, skip=skip, activation=topk(k))
    x = rows(0, 2048)
    sae = started(LinearSAE(config, Widths((D,), (12,))), x, mlp(x, dominated))
    x = rows(1, 2048)
    y = mlp(x, dominated)
    with torch.no_grad():
        start = float(sae.losses(Batch(x, y), NO_DEAD).total)
        without = float((y * sae.output_scale - sae.b_dec).square().mean())
    assert start < 0.95 * without, (start, without)
    losses = train(sae, 60, lambda x: mlp(x, dominated))
    assert sum(losses[-10:]) / 10 < 0.8 * start


def test_a_skip_connection_alone_learns_a_linear_map():
    linear = torch.randn(D, 6, generator=seeded(5))
    config = LinearConfig(kind="transcoder", skip=True, d_sae=4, activation=topk(1))
    x = rows(0, 2048)
    sae = started(LinearSAE(config, Widths((D,), (6,))), x, x @ linear)
    losses = train(sae, 200, lambda x: x @ linear)
    assert losses[-1] < 0.05 * losses[0]
    x = rows(3)
    skip = (x * sae.input_scale - sae.centre) @ sae.w_skip.T / sae.output_scale
    torch.testing.assert_close(sae(x), sae.decode(sae.encode(x)) + skip, rtol=1e-5, atol=1e-4)


def test_a_crosscoder_scales_each_hook_by_itself_and_its_latents_cost_their_norms_at_all_hooks():
    sae = LinearSAE(LinearConfig(kind="crosscoder", d_sae=F, activation=topk()), Widths((D, 12)))
    x = torch.cat([rows(0), 1000 * mlp(rows(0))], dim=-1)
    started(sae, x)
    centred = x * torch.cat([sae.input_scale[0].expand(D), sae.input_scale[1].expand(12)]) - sae.b_dec
    for part, width in zip(centred.detach().split([D, 12], dim=-1), (D, 12), strict=True):
        assert float(part.norm(dim=-1).mean()) == pytest.approx(width**0.5, rel=1e-4)
    norms = sae.w_dec[:, :D].norm(dim=-1) + sae.w_dec[:, D:].norm(dim=-1)
    torch.testing.assert_close(sae.decoder_norms(), norms)
    assert (norms > 1.01).all()  # of a row of unit norm
    assert sae.config.num_latents(D) == sae.d_sae


def test_an_expansion_counts_latents_per_dimension_of_one_hook():
    sae = LinearSAE(LinearConfig(kind="crosscoder", expansion=3, activation=topk()), Widths((D, D)))
    assert sae.d_sae == 3 * D and sae.w_enc.shape == (3 * D, 2 * D)


@pytest.mark.parametrize("sae_class", [LinearSAE, MatryoshkaSAE, GatedSAE])
def test_transcoders_of_several_hooks_to_several_hooks_fold_and_come_back(sae_class, tmp_path):
    config = {LinearSAE: LinearConfig, MatryoshkaSAE: MatryoshkaConfig, GatedSAE: GatedConfig}[sae_class]
    widths = Widths((D, 6), (12, 5))
    sae = sae_class(config(kind="transcoder", skip=True, d_sae=F, activation=topk()), widths)
    x = torch.cat([rows(0), 50 * mlp(rows(0), width=6)], dim=-1)
    y = torch.cat([mlp(rows(0)), mlp(rows(0), width=5) / 50], dim=-1)
    started(sae, x, y)
    with torch.no_grad():
        sae.w_skip.add_(torch.randn(17, 22, generator=seeded(4)), alpha=0.1)
    assert sae.input_scale.shape == sae.output_scale.shape == (2,)
    save_sae(sae, tmp_path, {})
    loaded = load_sae(tmp_path)
    assert loaded.widths == widths
    for mine, other in zip(sae(x).split([12, 5], dim=-1), loaded(x).split([12, 5], dim=-1), strict=True):
        assert (mine - other).abs().max() < 1000 * EPS * mine.abs().max()


# Matryoshka


def test_shares_are_rising_and_end_with_all():
    assert [float(share) for share in shares(" 1/8  0.5 1 ")] == [0.125, 0.5, 1]
    assert MatryoshkaSAE(MatryoshkaConfig(d_sae=65536), 8).ends == [2048, 6144, 14336, 30720, 65536]
    assert MatryoshkaSAE(MatryoshkaConfig(d_sae=33, activation=topk()), 8).ends == [2, 4, 8, 16, 33]
    assert MatryoshkaSAE(MatryoshkaConfig(d_sae=4, activation=topk()), 8).ends == [
        1,
        2,
        4,
    ]  # each number once


@pytest.mark.parametrize(
    "wrong",
    [
        "", "1/2", "1/2 1/4 1", "1/2 1/2 1", "0 1", "1/2 1 2", "-1/2 1", "1/0 1", "a 1", "1e-3 1", "1/1e9 1",
        "0.5,1", "9" * 5000 + " 1", "1e" + "9" * 30, " ".join(f"{i}/70" for i in range(1, 71)),
    ],
)  # fmt: skip
def test_prefixes_that_are_no_rising_shares_are_refused(wrong):
    with pytest.raises(InputError, match=r"sae\.prefixes=.*rising shares") as caught:
        MatryoshkaConfig(prefixes=wrong)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(("count", "d_sae"), [(1, 96), (-2, 96), (65, 96), (10, 9)])
def test_a_number_of_drawn_prefixes_that_cannot_be_is_refused(count, d_sae):
    with pytest.raises(InputError, match=r"sae\.sampled"):
        MatryoshkaSAE(MatryoshkaConfig(sampled=count, d_sae=d_sae, activation=topk()), D)


def test_drawn_prefixes_are_a_function_of_seed_and_step_and_follow_the_power_law():
    d_sae, count, steps = 1000, 5, 4000
    found = [drawn(d_sae, count, 0, step) for step in range(steps)]
    assert found == [drawn(d_sae, count, 0, step) for step in range(steps)]
    assert found != [drawn(d_sae, count, 1, step) for step in range(steps)]
    assert all(ends[-1] == d_sae and ends[0] >= 1 and len(ends) == count for ends in found)
    assert all(a < b for ends in found for a, b in pairwise(ends))
    shorter = Counter(end <= d_sae // 4 for ends in found for end in ends[:-1])
    # P(at most a quarter) = 1/2, less some for what may not be drawn twice; 16,000 draws: sd 0.004
    assert shorter[True] / shorter.total() == pytest.approx(0.5, abs=0.02)
    assert drawn(3, 3, 0, 0) == [1, 2, 3]


def test_a_step_draws_its_own_prefixes_whatever_steps_came_before():
    config = MatryoshkaConfig(d_sae=F, sampled=4, prefix_seed=3, activation=topk())
    one, two = (started(MatryoshkaSAE(config, D), rows(0)) for _ in range(2))
    for step in range(5):
        one.begin_step(step, 9)
    two.begin_step(4, 9)
    assert one.ends == two.ends == drawn(F, 4, 3, 4)
    batch = Batch(rows(1), rows(1))
    assert torch.equal(one.losses(batch, NO_DEAD).total, two.losses(batch, NO_DEAD).total)
    two.begin_step(5, 9)
    assert not torch.equal(one.losses(batch, NO_DEAD).total, two.losses(batch, NO_DEAD).total)


def fvu_of_prefix(sae: SAE, x: torch.Tensor, end: int) -> float:
    with torch.no_grad():
        y_hat = (sae.encode(x).dense()[:, :end] @ sae.w_dec[:end] + sae.b_dec) / sae.input_scale
        return float((x - y_hat).square().sum() / (x - x.mean(dim=0)).square().sum())


def test_first_latents_reconstruct_better_alone_than_those_of_a_linear_sae():
    plain = started(LinearSAE(LinearConfig(d_sae=F, activation=topk()), D), rows(0))
    nested = started(MatryoshkaSAE(MatryoshkaConfig(d_sae=F, activation=topk()), D), rows(0))
    for sae in (plain, nested):
        train(sae, 120)
    x = rows(3, 2048)
    for end in nested.ends[1:-1]:
        assert fvu_of_prefix(nested, x, end) < fvu_of_prefix(plain, x, end) - 0.05, end
    assert fvu_of_prefix(nested, x, F) < 0.5


# Gated


def gated(**options) -> GatedSAE:
    sae = started(GatedSAE(GatedConfig(d_sae=F, activation=topk(), **options), D), rows(0))
    assert isinstance(sae, GatedSAE)
    return sae


def test_a_gated_sae_starts_as_the_linear_one_and_magnitudes_change_no_gate():
    sae, x = gated(), rows(1)
    linear = started(LinearSAE(LinearConfig(d_sae=F, activation=topk()), D), rows(0))
    assert torch.equal(sae.encode(x).dense(), linear.encode(x).dense())
    with torch.no_grad():
        sae.r_mag.fill_(1.0)
        sae.b_mag.fill_(0.25)
    codes, gates = sae.encode(x), linear.encode(x)
    assert torch.equal(codes.indices, gates.indices) and torch.equal(codes.active(), gates.active())
    torch.testing.assert_close(codes.values[codes.active()], gates.values[gates.active()] * torch.e + 0.25)
    with torch.no_grad():
        sae.b_mag.fill_(-100.0)  # a magnitude that is not positive is an empty slot
    assert sae.encode(x).l0().sum() == 0


def test_a_latent_whose_gate_is_shut_has_no_magnitude_however_large():
    sae, x = gated(), rows(1)
    with torch.no_grad():
        sae.b_enc[:-2] = -1e3  # fewer open gates than slots
        sae.b_mag[:-2] = 1e6
    codes = sae.encode(x)
    assert codes.dense()[:, :-2].abs().sum() == 0 and codes.l0().sum() > 0


def test_the_gate_loss_trains_gates_and_leaves_decoder_and_magnitudes_alone():
    sae, x = gated(), rows(1)
    sae.losses(Batch(x, x), NO_DEAD).terms["gate"].backward()
    assert sae.w_enc.grad.abs().sum() > 0 and sae.b_enc.grad.abs().sum() > 0
    assert all(p.grad is None for p in (sae.w_dec, sae.r_mag, sae.b_mag))


def test_folding_keeps_the_scale_of_magnitudes_and_divides_their_bias():
    sae = gated()
    with torch.no_grad():
        sae.b_mag.add_(1.0)
        sae.r_mag.add_(0.3)
    folded = sae.folded()
    assert torch.equal(folded.r_mag, sae.r_mag)
    torch.testing.assert_close(folded.b_mag, sae.b_mag / sae.input_scale)


# Memory


class LargeTensors(TorchDispatchMode):
    """Counts the tensors of at least so many elements that ops make."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.numel, self.count = numel, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided:  # a sparse one is
                self.count += tensor.numel() >= self.numel  # as small as what it holds
        return out


def test_gates_and_prefixes_make_no_tensor_of_rows_times_latents():
    n, f, counts = 512, 4096, []
    x = rows(1, n)
    for sae_class, config in (
        (LinearSAE, LinearConfig),
        (GatedSAE, GatedConfig),
        (MatryoshkaSAE, MatryoshkaConfig),
    ):
        sae = started(sae_class(config(d_sae=f, activation=topk(8)), D), rows(0))
        with LargeTensors(n * f // 4) as made:
            sae.losses(Batch(x, x), torch.arange(32)).total.backward()
        counts.append(made.count)
    # the encoder looks at blocks of pre-activations, of this size here; nothing else does
    assert counts[1:] == counts[:1] * 2
    with LargeTensors(n * f // 4) as made:
        sae.preactivations(x)
    assert made.count > 0, "nothing was counted"


def test_a_copy_has_prefixes_of_its_own():
    sae = started(MatryoshkaSAE(MatryoshkaConfig(d_sae=F, sampled=4, activation=topk()), D), rows(0))
    twin = copy.deepcopy(sae)
    sae.begin_step(7, 9)
    assert twin.ends != sae.ends
