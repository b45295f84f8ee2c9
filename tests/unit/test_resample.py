"""Dead latents start anew from badly reconstructed rows, under every optimizer; nothing else moves a bit."""

import copy
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sae_train.activations.base import ACTIVATIONS
from sae_train.activations.topk import TopKConfig
from sae_train.batch import Batch
from sae_train.checkpoint import Checkpointer
from sae_train.places import Widths
from sae_train.registry import discover
from sae_train.sae.base import SAES
from sae_train.sae.linear import LinearConfig, LinearSAE
from sae_train.train.fused import FusedStepper
from sae_train.train.members import Member, MemberConfig
from sae_train.train.optim import OPTIMIZERS, OptimConfig, published_weights
from sae_train.train.resample import ENCODER_SHARE, per_latent, resample, resample_member
from sae_train.train.stepper import AutogradStepper, Step, Stepper

pytestmark = pytest.mark.usefixtures("optional_libraries", "one_thread")

for package in ("sae_train.activations", "sae_train.sae"):
    discover(package)

D, F, N, K, STEPS = 16, 256, 96, 4, 40  # F * D = 4096 is the least that 8-bit Adam quantises
EPS = 2.0**-24
CPU = torch.device("cpu")
DEAD = torch.tensor([3, 50, 51, 200, 255])
OPTIONS: dict[str, dict[str, Any]] = {"schedule_free": {"decay": 0}, "adam8bit": {"eps": 1e-7}}
each_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


def rows(seed: int, n: int = N, d: int = D) -> Tensor:
    directions = torch.randn(40, d, generator=torch.Generator().manual_seed(99))
    draw = torch.Generator().manual_seed(seed)
    strengths = torch.rand(n, 40, generator=draw) * (torch.rand(n, 40, generator=draw) < 0.1)
    return 3 * (strengths @ directions) + 3 + 0.05 * torch.randn(n, d, generator=draw)


def make_member(name: str = "adam", ema: float = 0.0, **optim: Any) -> Member:
    """DEAD latents can never fire; a latent is dead after four steps."""
    sae = LinearConfig(d_sae=F, activation=TopKConfig(k=K), dead_after_tokens=4 * N, auxk_coefficient=0)
    config = OptimConfig(name=name, **{"lr": 3e-3} | OPTIONS.get(name, {}) | optim)
    member = Member(MemberConfig("main", "h", 0, sae, config), D, STEPS, STEPS * N, ema, CPU)
    member.initialise({"h": rows(0, 512)})
    with torch.no_grad():
        member.sae.get_parameter("b_enc")[DEAD] = -1e6
    return member


def train(member: Member, first: int, last: int, stepper: Stepper | None = None) -> Step:
    stepper = stepper or AutogradStepper()
    for step in range(first, last):
        member.begin_step(step)
        x = rows(1 + step)
        done = stepper.step(member, Batch(x, x))
    return done


def numbers(value: Any) -> Tensor:
    """Of a part of an optimizer's state: what it stands for."""
    out: Tensor = value.dequantize() if hasattr(value, "dequantize") and hasattr(value, "codes") else value
    return out.detach().clone()


def everything(member: Member) -> dict[str, Tensor]:
    """Weights, and for each parameter what the optimizer keeps."""
    out = {name: p.detach().clone() for name, p in member.sae.named_parameters()}
    for name, parameter in member.sae.named_parameters():
        state = member.optimizer.state[parameter]
        out |= {f"{name} {part}": numbers(value) for part, value in state.items()}
    return out


def resampled(member: Member, dead: Tensor, losses: Tensor, seed: int = 0, n: int = N) -> Tensor:
    assert isinstance(member.sae, LinearSAE)
    batch = Batch(rows(77, n), rows(77, n))
    generator = torch.Generator().manual_seed(seed)
    return resample(member.sae, member.optimizer, dead, batch, losses, generator)


@each_optimizer
def test_dead_latents_point_at_rows_are_forgotten_by_the_optimizer_and_the_rest_keeps_its_bits(name):
    member = make_member(name)
    train(member, 0, 10)
    before = everything(member)
    assert torch.equal(resampled(member, DEAD, torch.ones(N)), DEAD)
    after = everything(member)
    live = torch.ones(F, dtype=torch.bool)
    live[DEAD] = False
    assert before.keys() == after.keys()
    for part, tensor in before.items():
        rest = live if tensor.dim() > 0 and len(tensor) == F else ...
        assert torch.equal(after[part][rest], tensor[rest]), part
    # Weights: unit directions of rows, encoder rows as long as live ones (codes are top-k), no bias.
    directions = torch.nn.functional.normalize(rows(77) * member.sae.input_scale - after["b_dec"], dim=-1)
    cosines = after["w_dec"][DEAD] @ directions.T
    assert len(set(cosines.argmax(dim=1).tolist())) == len(DEAD)
    assert bool((cosines.amax(dim=1) - 1).abs().max() < 2 * D * EPS)
    length = before["w_enc"][live].norm(dim=-1).mean()
    torch.testing.assert_close(after["w_enc"][DEAD], length * after["w_dec"][DEAD], rtol=8 * EPS, atol=0)
    assert bool((after["b_enc"][DEAD] == 0).all())
    # The optimizer.
    for weight in ("w_enc", "b_enc", "w_dec"):
        parts = {part for part in after if part.startswith(f"{weight} ") and part.split()[1] != "step"}
        assert len(parts) >= 1
        for part in parts:
            if name == "schedule_free":
                others = before[part][live]
                want = (
                    after[weight] if part.endswith(" z") else others.mean(dim=0).expand(F, *others.shape[1:])
                )
                torch.testing.assert_close(after[part][DEAD], want[DEAD], rtol=F * EPS, atol=0)
            else:
                assert before[part].count_nonzero() > 0 and after[part][DEAD].count_nonzero() == 0, part


def test_what_schedule_free_publishes_starts_anew_too():
    member = make_member("schedule_free")
    train(member, 0, 10)
    resampled(member, DEAD, torch.ones(N))
    with published_weights(member.optimizer):
        published = member.sae.get_parameter("w_dec").detach().clone()
    assert torch.equal(published[DEAD], member.sae.get_parameter("w_dec")[DEAD])


def test_rows_are_drawn_with_the_square_of_their_loss_and_never_twice():
    member = make_member()
    losses = torch.zeros(N)
    losses[7], losses[40] = 1.0, 3.0
    x = torch.nn.functional.normalize(rows(77) * member.sae.input_scale - member.sae.get_parameter("b_dec"))
    first: Counter[int] = Counter()
    for seed in range(400):
        one = copy.deepcopy(member)
        assert torch.equal(resampled(one, DEAD, losses, seed), DEAD[:2])  # two rows have a loss
        drawn = (one.sae.get_parameter("w_dec")[DEAD[:2]] @ x.T).argmax(dim=1).tolist()
        assert sorted(drawn) == [7, 40]
        first[drawn[0]] += 1
    # 9 to 1: four standard deviations of 400 draws are 24
    assert abs(first[40] - 360) <= 24


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_losses_of_any_size_and_rows_that_are_not_finite_do_no_harm(scale):
    member = make_member()
    losses = torch.full((N,), scale)
    losses[5:20], losses[20:30] = math.nan, math.inf
    chosen = resampled(member, torch.arange(N), losses)
    assert len(chosen) == N - 25
    assert all(bool(torch.isfinite(p).all()) for p in member.sae.parameters())


@pytest.mark.parametrize(("dead", "loss"), [([], 1.0), ([1, 2], 0.0), ([1, 2], math.nan)])
def test_without_dead_latents_or_errors_nothing_changes(dead, loss):
    member = make_member()
    train(member, 0, 3)
    before = everything(member)
    assert len(resampled(member, torch.tensor(dead, dtype=torch.int64), torch.full((N,), loss))) == 0
    for part, tensor in everything(member).items():
        assert torch.equal(tensor, before[part]), part


def test_a_row_that_is_the_centre_is_no_direction():
    member = make_member()
    assert isinstance(member.sae, LinearSAE)
    with torch.no_grad():
        member.sae.b_dec.zero_()
    x = torch.cat([torch.zeros(N - 1, D), rows(5, 1)])
    chosen = resample(
        member.sae, member.optimizer, DEAD, Batch(x, x), torch.ones(N), torch.Generator().manual_seed(0)
    )
    assert chosen.tolist() == DEAD[:1].tolist()
    assert float(member.sae.w_dec[DEAD].detach().norm(dim=-1).min()) > 0.99


@each_optimizer
def test_all_latents_can_be_resampled_at_once_and_training_goes_on(name):
    member = make_member(name)
    train(member, 0, 3)
    assert len(resampled(member, torch.arange(F), torch.ones(300), n=300)) == F
    before = [p.detach().clone() for p in member.sae.parameters()]
    train(member, 3, 12)
    assert int(member.skipped) == 0
    for one, two in zip(member.sae.parameters(), before, strict=True):
        assert bool(torch.isfinite(one).all()) and not torch.equal(one, two)


@each_optimizer
def test_the_first_step_of_a_resampled_latent_is_not_many_times_the_learning_rate(name):
    """Adam's with a second moment of zero is 3.2 times; without a first moment it would be 32 times."""
    member = make_member(name, warmup=0.0, **({} if name == "schedule_free" else {"decay": 0.0}))
    done = train(member, 0, 30)
    chosen = resample_member(member, done, 29)
    assert len(chosen) >= len(DEAD)
    kept = [member.optimizer.state[p]["z"] if name == "schedule_free" else p for p in member.sae.parameters()]
    before = [p.detach().clone() for p in kept]
    train(member, 30, 31)
    moved = max(float((one - two).detach().abs().max()) for one, two in zip(kept, before, strict=True))
    assert moved < 10 * 3e-3


@pytest.mark.parametrize("stepper", [AutogradStepper, FusedStepper])
def test_resampled_latents_fire_again_and_count_as_alive(stepper):
    member, alone = make_member(), make_member()
    for one in (member, alone):
        done = train(one, 0, 8, stepper())
        if one is member:
            assert set(DEAD.tolist()) <= set(resample_member(member, done, 7).tolist())
            assert not bool(member.stats.dead(member.dead_after_tokens).any())
            counts = member.stats.counts[DEAD].clone()
        train(one, 8, STEPS, stepper())
    assert bool((alone.stats.counts[DEAD] == 0).all())
    assert (member.stats.counts[DEAD] > counts).sum() >= 3


def test_an_average_of_weights_starts_anew_in_the_resampled_rows():
    member = make_member(ema=0.99)
    done = train(member, 0, 8)
    chosen = resample_member(member, done, 7)
    assert member.average is not None and isinstance(member.sae, LinearSAE)
    averaged = dict(member.average.module.named_parameters())
    for name, parameter in per_latent(member.sae).items():
        assert torch.equal(averaged[name][chosen], parameter[chosen]), name
        rest = torch.ones(F, dtype=torch.bool)
        rest[chosen] = False
        assert not torch.equal(averaged[name][rest], parameter[rest]), name


@pytest.mark.parametrize("ema", [0.0, 0.9])
@each_optimizer
def test_a_run_that_resamples_resumes_to_the_bit_and_draws_by_its_seed_and_step(tmp_path: Path, name, ema):
    def run(member: Member, first: int, last: int, shift: int = 0) -> None:
        for step in range(first, last):
            done = train(member, step, step + 1)
            if (step + 1) % 6 == 0:
                resample_member(member, done, step + shift)

    straight, member, other = (make_member(name, ema) for _ in range(3))
    run(straight, 0, 18)
    run(other, 0, 18, shift=1)
    run(member, 0, 10)
    Checkpointer(tmp_path).save(10, {"member": member.state_dict()}, {})
    loaded = Checkpointer(tmp_path).load()
    assert loaded is not None
    resumed = make_member(name, ema)
    resumed.load_state_dict(loaded[1]["member"])
    run(resumed, 10, 18)
    want, got = everything(straight), everything(resumed)
    assert want.keys() == got.keys()
    for part, tensor in want.items():
        assert torch.equal(got[part], tensor), part
    assert torch.equal(resumed.trained().get_parameter("w_dec"), straight.trained().get_parameter("w_dec"))
    assert not torch.equal(other.sae.get_parameter("w_dec"), straight.sae.get_parameter("w_dec"))


def test_a_transcoders_decoder_row_is_the_target_of_the_row_that_its_encoder_reads():
    config = LinearConfig(kind="transcoder", d_sae=F, activation=TopKConfig(k=K), skip=True)
    sae = LinearSAE(config, Widths((D,), (D + 3,)))
    x, y = rows(1), rows(2, d=D + 3)
    sae.initialise(x, torch.Generator().manual_seed(0), y)
    with torch.no_grad():
        sae.w_skip.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.Adam(sae.parameters())
    losses = torch.zeros(N)
    losses[11] = 1
    chosen = resample(sae, optimizer, DEAD, Batch(x, y), losses, torch.Generator().manual_seed(0))
    read = x[11] * sae.input_scale - sae.centre
    target = y[11] * sae.output_scale - sae.b_dec - sae.w_skip @ read
    for row, want in ((sae.w_enc[chosen[0]], read), (sae.w_dec[chosen[0]], target)):
        assert float(torch.cosine_similarity(row, want, dim=0).detach()) > 1 - 1e-6
    assert chosen.tolist() == DEAD[:1].tolist() and float(sae.w_dec[3].detach().norm()) == pytest.approx(1)


@pytest.mark.parametrize(("activation", "share"), [("relu", ENCODER_SHARE), ("topk", 1.0)])
def test_encoder_rows_are_short_where_latents_fire_all_the_same_and_fire_at_once_where_they_compete(
    activation, share
):
    options = {"k": K} if activation == "topk" else {}
    sae = LinearSAE(LinearConfig(d_sae=F, activation=ACTIVATIONS.config(activation)(**options)), D)
    x = rows(1)
    sae.initialise(x, torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam(sae.parameters())
    resample(sae, optimizer, DEAD, Batch(x, x), torch.ones(N), torch.Generator().manual_seed(0))
    # encoder rows were unit vectors, as decoder rows are
    torch.testing.assert_close(
        sae.w_enc[DEAD].detach().norm(dim=-1), torch.full((5,), share), rtol=F * EPS, atol=0
    )
    read = x * sae.input_scale - sae.b_dec.detach()
    own = (sae.w_dec[DEAD].detach() @ torch.nn.functional.normalize(read).T).argmax(dim=1)
    assert bool((sae.encode(x[own]).dense()[range(5), DEAD] > 0).all())


@pytest.mark.parametrize("width", [D, F], ids=["", "as wide as there are latents"])
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("sae_name", list(SAES))
def test_every_architecture_and_activation_can_be_resampled(sae_name, activation, width):
    options = {"k": K} if hasattr(ACTIVATIONS.config(activation)(), "k") else {}
    config = SAES.config(sae_name)(d_sae=F, activation=ACTIVATIONS.config(activation)(**options))
    sae = SAES.build(config, width)
    assert isinstance(sae, LinearSAE)
    x = rows(1, d=width)
    sae.initialise(x, torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam(sae.parameters())
    before = {name: p.detach().clone() for name, p in sae.named_parameters()}
    live = torch.ones(F, dtype=torch.bool)
    live[DEAD] = False
    resample(sae, optimizer, DEAD, Batch(x, x), torch.ones(N), torch.Generator().manual_seed(0))
    for name, parameter in sae.named_parameters():
        if name == "b_dec":
            assert torch.equal(parameter, before[name])
        else:
            assert torch.equal(parameter[live], before[name][live]), name
        if name not in ("w_enc", "w_dec", "b_enc", "b_dec"):
            mean = before[name][live].mean(dim=0).expand(len(DEAD))
            torch.testing.assert_close(parameter[DEAD].detach(), mean, rtol=F * EPS, atol=0)
