"""Training through the language model: its loss is the one that evaluation reports, and steps lower it."""

import pytest
import torch

from sae_train.activations.topk import TopKConfig
from sae_train.batch import RowBatch
from sae_train.harvest.end_to_end import EndToEnd
from sae_train.harvest.filters import FilterConfig
from sae_train.harvest.harvester import Harvester
from sae_train.harvest.hooks import resolve
from sae_train.harvest.splice import cross_entropy
from sae_train.harvest.window_source import WindowSource
from sae_train.harvest.windows import Windows
from sae_train.places import Places
from sae_train.sae.linear import LinearConfig
from sae_train.train.end_to_end import EndToEndStepper
from sae_train.train.members import Member, MemberConfig
from sae_train.train.optim import OptimConfig

T, V, D = 12, 128, 32
SPECIAL = torch.tensor([0, 1, 2, 3])
FILTERS = FilterConfig()
CPU = torch.device("cpu")


class Counting:
    """A window stream that counts upwards for ever: window i is a function of i."""

    def __init__(self) -> None:
        self.at = 0

    def take(self, n: int) -> Windows | None:
        index = torch.arange(self.at, self.at + n)
        self.at += n
        generators = (torch.Generator().manual_seed(int(i) % 16) for i in index)
        tokens = torch.stack([torch.randint(4, V, (T,), generator=g) for g in generators])
        tokens[:, 0] = 1
        return Windows(tokens, torch.ones_like(tokens, dtype=torch.bool), tokens == 1, index)

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


def setting(tiny_model, hook: str, target: str | None, loss: str):
    """A model to train through, a source of windows, and the hooks by their keys."""
    model = tiny_model("llama")
    spelt = Places.parse(hook, target)
    sites = {name: resolve(name, model) for name in spelt.hooks}
    places = ["+".join(sites[name].key for name in names) for names in (spelt.inputs, spelt.targets)]
    by_key = {site.key: site for site in sites.values()}
    harvester = Harvester(model, list(by_key.values()), 4, context_length=T)
    source = WindowSource(Counting(), harvester, SPECIAL, FILTERS, 4, T, {})
    return EndToEnd(model, by_key, SPECIAL, FILTERS, loss, source.tally), source, places


def make_member(
    source: WindowSource, places: list[str], kind: str = "autoencoder", lr: float = 3e-3
) -> Member:
    sae = LinearConfig(kind=kind, d_sae=64, activation=TopKConfig(k=4))
    config = MemberConfig("main", places[0], 0, sae, OptimConfig(lr=lr, warmup=0, decay=0), places[1] or None)
    member = Member(config, config.places.widths(source.dims), 100, 10**6, 0.0, CPU)
    member.initialise(source.sample(400))
    return member


KINDS = [
    ("autoencoder", "resid_post.1", None),
    ("transcoder", "mlp_in.1", "mlp_out.1"),
    ("crosscoder", "resid_post.0+resid_post.2", None),
]


@pytest.mark.parametrize(("kind", "hook", "target"), KINDS)
@pytest.mark.parametrize("loss", ["kl", "ce"])
def test_the_loss_is_what_evaluation_measures(tiny_model, kind, hook, target, loss):
    model, source, places = setting(tiny_model, hook, target, loss)
    member = make_member(source, places, kind)
    windows = Counting().take(6)
    read = model.read(windows, member.places)
    with torch.no_grad():
        y_hat = member.sae(read.batch.x)
        found = float(model.loss(read, y_hat, member.sae.widths.outputs))
    parts = iter(y_hat.split(member.sae.widths.outputs, dim=-1))
    replace = {site: lambda rows, part=part: part for site, part in zip(read.outputs, parts, strict=True)}
    wanted = cross_entropy(model.model, windows, read.mask, replace, kl=True)
    # Float32 softmax of 128 logits, summed in another order.
    assert found == pytest.approx(wanted.kl if loss == "kl" else wanted.ce, rel=1e-5)
    assert found > 0.01


def test_its_gradient_is_that_of_a_finite_difference(tiny_model):
    model, source, places = setting(tiny_model, "resid_post.0", None, "kl")
    member = make_member(source, places)
    windows = Counting().take(2)
    read = model.read(windows, member.places)
    with torch.no_grad():
        y_hat = member.sae(read.batch.x)
    y_hat.requires_grad_()
    model.loss(read, y_hat, (D,)).backward()
    direction = y_hat.grad / y_hat.grad.norm()
    step = 3e-2
    with torch.no_grad():
        up, down = (float(model.loss(read, y_hat + sign * step * direction, (D,))) for sign in (1, -1))
    slope = (up - down) / (2 * step)
    # Central difference: third derivatives times step^2 / 6, and float32 noise of 1e-7 / step.
    assert slope == pytest.approx(float(y_hat.grad.norm()), rel=0.02)
    assert all(p.grad is None for p in model.model.parameters())


@pytest.mark.parametrize(("kind", "hook", "target"), KINDS)
def test_steps_through_the_model_lower_its_loss_more_than_steps_on_rows(tiny_model, kind, hook, target):
    after = {}
    for weight in (0.0, 1.0):
        model, source, places = setting(tiny_model, hook, target, "kl")
        member = make_member(source, places, kind)
        stepper = EndToEndStepper(model, weight, accumulate=2)
        for step in range(40):
            member.begin_step(step)
            rows = source.next_batch()
            done = stepper.step(member, stepper.take(member, rows))
            assert set(done.losses.terms) == {"mse"} | ({"kl"} if weight else set())
        read = model.read(Counting().take(16), member.places)
        with torch.no_grad():
            y_hat = member.sae(read.batch.x)
            after[weight] = float(model.loss(read, y_hat, member.sae.widths.outputs))
    assert after[1.0] < 0.95 * after[0.0]


def test_windows_that_a_micro_batch_takes_are_those_of_the_step(tiny_model):
    """Accumulated gradients of two halves are those of the whole: the mean over equally many predictions."""
    grads = {}
    for accumulate in (1, 2):
        model, source, places = setting(tiny_model, "resid_post.1", None, "ce")
        member = make_member(source, places)
        stepper = EndToEndStepper(model, 0.0, accumulate)
        stepper.step(member, stepper.take(member, source.next_batch()))
        grads[accumulate] = member.sae.w_enc.grad.clone()
    # Windows have 11 ordinary tokens each, unless a sink is among them: then shares differ a little.
    torch.testing.assert_close(grads[1], grads[2], rtol=0.2, atol=0.05 * float(grads[1].abs().max()))


def test_a_source_of_windows_goes_on_where_it_was_and_gives_every_token_once(tiny_model):
    _, source, _ = setting(tiny_model, "resid_post.1", None, "kl")
    first = source.next_batch()
    assert isinstance(first, RowBatch) and first.rows == {} and len(first.ids) == 4 * T
    state = source.state_dict()
    second = source.next_batch()
    source.load_state_dict(state)
    again = source.next_batch()
    assert torch.equal(second.windows.tokens, again.windows.tokens)
    assert second.ids.tolist() == again.ids.tolist() == list(range(4 * T, 8 * T))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_tokens_are_counted_once_however_many_saes_read_them(tiny_model, accumulate):
    model, source, places = setting(tiny_model, "resid_post.1", None, "kl")
    members = [make_member(source, places) for _ in range(2)]
    stepper = EndToEndStepper(model, 1.0, accumulate)
    kept = 0
    for _ in range(3):
        rows = source.next_batch()
        for member in members:
            stepper.step(member, stepper.take(member, rows))
        kept += int(model.read(rows.windows, members[0].places).mask.sum())
    assert source.counts["seen"] == 3 * 4 * T
    assert 0 < source.counts["kept"] < source.counts["seen"]  # special tokens are left out
    assert source.counts["kept"] == sum(member.stats.tokens for member in members) // 2
    if accumulate == 1:
        assert source.counts["kept"] == kept


def test_the_sample_is_of_windows_that_are_trained_on_all_the_same(tiny_model):
    _, source, _ = setting(tiny_model, "resid_post.1", None, "kl")
    (rows,) = source.sample(48).values()
    assert 30 < len(rows) <= 48 and rows.shape[1] == D
    assert source.next_batch().windows.index.tolist() == [0, 1, 2, 3]
