"""Fused steps at real size beside those of autograd, over some tens of steps, with AuxK from the start.

Both start from the same weights and see the same rows. In float32 their sums differ in order, and a
near tie for the k-th place may go to another latent; with bfloat16 products the fused step also rounds
residuals and the gradients' inputs. A weight's Adam step is at most about lr and errs by what its gradient
errs, so two runs are at most a share of steps * lr apart, which is what is compared.
"""

from collections.abc import Iterator

import pytest
import torch
from sae_kernels import use_backend
from torch import Tensor

from sae_train.activations.topk import TopKConfig
from sae_train.batch import Batch
from sae_train.sae.linear import LinearConfig
from sae_train.train.fused import FusedStepper
from sae_train.train.members import Member, MemberConfig
from sae_train.train.optim import OptimConfig
from sae_train.train.stepper import AutogradStepper, Step, Stepper

from .problem import DEVICE, SIZES, TINY, dictionary, draws, make_rows, needs_gpu, rms

pytestmark = needs_gpu
SIZE = SIZES["A"]
STEPS, BATCHES, LR = 3 if TINY else 30, 2, 1e-3
# Relative: of losses, of how far weights have moved, of the share of firings that went to other latents.
# float32 is rounding only; bfloat16 rounds what gradients are made of to 2^-8.
APART = {None: (1e-4, 0.02, 1e-3), torch.bfloat16: (5e-3, 0.25, 0.03)}


@pytest.fixture(autouse=True)
def plain_memory() -> Iterator[None]:
    """Memory is not filled with NaN, which would take long; Triton runs everything."""
    torch.use_deterministic_algorithms(False)
    with use_backend("triton"):
        yield


def make_member(w: Tensor, k: int = SIZE.k, lr: float = LR) -> Member:
    """Weights near the dictionary of the rows; a tenth of the latents cannot fire, and count as dead."""
    sae = LinearConfig(d_sae=SIZE.f, activation=TopKConfig(k=k), input_scale="none", dead_after_tokens=SIZE.n)
    config = MemberConfig("main", "rows", 0, sae, OptimConfig(lr=lr, warmup=0.0, decay=0.0, clip=1.0))
    member = Member(config, SIZE.d, STEPS, 10**9, 0.0, torch.device(DEVICE))
    with torch.no_grad():
        noise = torch.randn(w.shape, generator=draws(7), device=DEVICE) * (0.3 / SIZE.d**0.5)
        for weight in (member.sae.w_enc, member.sae.w_dec):
            weight.copy_((w + noise) / (w + noise).norm(dim=1, keepdim=True))
        member.sae.b_enc[::10] = -100.0
    member.dead = torch.arange(0, SIZE.f, 10, device=DEVICE)
    return member


def train(member: Member, stepper: Stepper, w: Tensor) -> list[Step]:
    """The same batches in turns."""
    rows = [make_rows(SIZE, w, 10 + i) + 0.5 for i in range(BATCHES)]
    return [stepper.step(member, Batch(x, x)) for x in (rows[i % BATCHES] for i in range(STEPS))]


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
def test_fused_steps_at_real_size_are_those_of_autograd(autocast):
    of_loss, of_moves, of_firings = APART[autocast]
    w = dictionary(SIZE)
    one, two, before = make_member(w), make_member(w), make_member(w)
    want, got = train(one, AutogradStepper(autocast=autocast), w), train(two, FusedStepper(autocast), w)
    assert int(one.skipped) == int(two.skipped) == 0
    for number, (a, b) in enumerate(zip(want, got, strict=True)):
        assert a.losses.terms.keys() == b.losses.terms.keys() == {"mse", "auxk"}
        for name, term in a.losses.terms.items():
            assert float(b.losses.terms[name]) == pytest.approx(float(term), rel=of_loss), (number, name)
        assert float(b.grad_norm) == pytest.approx(float(a.grad_norm), rel=10 * of_loss), number
    first = got[(STEPS - 1) % BATCHES]  # on the same rows as the last one
    assert float(got[-1].losses.terms["mse"]) < float(first.losses.terms["mse"])
    for name in ("w_enc", "b_enc", "w_dec", "b_dec"):
        mine, other, old = (getattr(m.sae, name).detach() for m in (two, one, before))
        assert rms(other - old) > 0.1 * LR, name
        assert rms(mine - other) <= of_moves * rms(other - old), name
        states = [m.optimizer.state[getattr(m.sae, name)] for m in (two, one)]
        assert states[0]["step"] == states[1]["step"] == STEPS
        for key in ("exp_avg", "exp_avg_sq"):
            assert rms(states[0][key] - states[1][key]) <= 2 * of_moves * rms(states[1][key]), (name, key)
    moved = (one.sae.w_dec - before.sae.w_dec)[::10].detach()
    assert rms(moved) > 0, "AuxK reached no dead latent"
    for field in ("counts", "sums"):
        mine, other = getattr(two.stats, field), getattr(one.stats, field)
        assert int((mine - other).abs().sum()) <= of_firings * int(other.sum()) + 2, field
    assert one.stats.tokens == two.stats.tokens == STEPS * SIZE.n


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
def test_saes_that_share_launches_are_those_that_take_turns(autocast):
    """Each with a k and a learning rate of its own. Products and norms may be summed in another order."""
    _, of_moves, of_firings = APART[autocast]
    w = dictionary(SIZE)
    settings = [(SIZE.k, LR), (SIZE.k // 2, LR / 3), (SIZE.k - 1, LR)]
    alone, together = ([make_member(w, *each) for each in settings] for _ in "ab")
    before = make_member(w).sae.w_dec.detach()
    stepper = FusedStepper(autocast, len(settings))
    assert stepper.units(together) == [together]
    rows = [make_rows(SIZE, w, 10 + i) + 0.5 for i in range(BATCHES)]
    for i in range(STEPS):
        batch = Batch(rows[i % BATCHES], rows[i % BATCHES])
        want = [FusedStepper(autocast).step(member, batch) for member in alone]
        got = stepper.step_together(together, [batch] * len(together))
        for number, (a, b) in enumerate(zip(want, got, strict=True)):
            told = pytest.approx(float(a.losses.terms["mse"]), rel=APART[autocast][0])
            assert float(b.losses.terms["mse"]) == told, (i, number)
    for number, (one, two) in enumerate(zip(alone, together, strict=True)):
        moved = one.sae.w_dec.detach() - before
        assert rms(moved) > 0.1 * settings[number][1], number
        assert rms(two.sae.w_dec.detach() - one.sae.w_dec.detach()) <= of_moves * rms(moved), number
        mine, other = two.stats.counts, one.stats.counts
        assert int((mine - other).abs().sum()) <= of_firings * int(other.sum()) + 2, number


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
def test_two_fused_runs_have_the_same_bits(autocast):
    w = dictionary(SIZE)
    members = [make_member(w), make_member(w)]
    for member in members:
        train(member, FusedStepper(autocast), w)
    one, two = (m.sae.state_dict() for m in members)
    for name, tensor in one.items():
        assert torch.equal(tensor, two[name]), name
