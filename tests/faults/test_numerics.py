"""Numbers that go bad: rows, batches, gradients and counters at their limits, for every SAE and stepper.

Rows G1 to G9 of the fault matrix but for the spike guard, and E5, E6 and E12. Where a language model has to
fail it is a real one, with a forward hook that spoils what its layer gives.
"""

import copy
import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sae_train.activations.base import ACTIVATIONS
from sae_train.batch import Batch
from sae_train.cli import language_model
from sae_train.cli.main import main
from sae_train.harvest.corpus import is_held_out
from sae_train.log import read_metrics
from sae_train.metrics.base import METRICS, EvalBatch, MetricConfig
from sae_train.registry import discover
from sae_train.sae.base import SAES
from sae_train.stats import FeatureStats
from sae_train.train.fused import FusedStepper, cannot_fuse
from sae_train.train.members import Member, MemberConfig
from sae_train.train.optim import OptimConfig
from sae_train.train.resume import classify
from sae_train.train.stepper import AutogradStepper, Stepper

pytestmark = pytest.mark.usefixtures("one_thread")

for package in ("sae_train.activations", "sae_train.sae", "sae_train.metrics"):
    discover(package)

D, F, N, K = 12, 40, 64, 4
EPS = 2.0**-24
CPU = torch.device("cpu")
KINDS = [(sae, activation) for sae in SAES for activation in ACTIVATIONS]


def rows(n: int = N, seed: int = 0, d: int = D) -> Tensor:
    """Sparse structure with an offset and a scale of their own."""
    directions = torch.randn(24, d, generator=torch.Generator().manual_seed(99))
    draw = torch.Generator().manual_seed(seed)
    strengths = torch.rand(n, 24, generator=draw) * (torch.rand(n, 24, generator=draw) < 0.15)
    return 3 * strengths @ directions + 2 + 0.05 * torch.randn(n, d, generator=draw)


def make_member(kind: tuple[str, str], d: int = D, f: int = F, k: int = K, n: int = N) -> Member:
    options = {"k": k} if hasattr(ACTIVATIONS.config(kind[1])(), "k") else {}
    activation = ACTIVATIONS.config(kind[1])(**options)
    sae = SAES.config(kind[0])(d_sae=f, activation=activation, dead_after_tokens=4 * n)
    member = Member(MemberConfig("main", "h", 0, sae, OptimConfig(lr=1e-3)), d, 100, 10**6, 0.0, CPU)
    member.initialise({"h": rows(256, d=d)})
    return member


STEPPERS: dict[str, Callable[[], Stepper]] = {"autograd": AutogradStepper, "fused": FusedStepper}


def cases() -> list[Any]:
    """Every SAE of the registries with every stepper that can step it."""
    return [
        pytest.param((kind, stepper), id="-".join([*kind, stepper]))
        for kind in KINDS
        for stepper in STEPPERS
        if stepper == "autograd" or cannot_fuse(make_member(kind), 1) is None
    ]


@pytest.fixture(params=cases())
def case(request: pytest.FixtureRequest) -> tuple[Member, Stepper]:
    kind, stepper = request.param
    return make_member(kind), STEPPERS[stepper]()


def step(member: Member, stepper: Stepper, x: Tensor) -> Any:
    return stepper.step(member, Batch(x, x))


def tensors(member: Member) -> dict[str, Tensor]:
    """Weights, and the optimizer's moments and step counts."""
    out = {f"weight {name}": t for name, t in member.sae.state_dict().items()}
    for number, state in member.optimizer.state_dict()["state"].items():
        out |= {f"adam {name} {number}": t for name, t in state.items()}
    return {name: t.detach().clone() for name, t in out.items()}


def all_finite(member: Member) -> bool:
    stats = [t for t in member.stats.state_dict().values() if isinstance(t, Tensor)]
    return all(bool(torch.isfinite(t).all()) for t in [*tensors(member).values(), *stats])


# -- G2: batches that are not finite ---------------------------------------------------------------


@pytest.mark.parametrize(
    "bad", [math.nan, math.inf, -math.inf, 3e38], ids=["nan", "inf", "-inf", "overflows when scaled"]
)
@pytest.mark.parametrize("part", [slice(None), slice(5, 6)], ids=["whole batch", "one row"])
def test_a_step_on_bad_rows_changes_no_weight_moment_or_count_of_steps(case, bad, part):
    member, stepper = case
    for seed in (1, 2):
        step(member, stepper, rows(seed=seed))
    before, tokens = tensors(member), member.stats.tokens
    spoilt = rows(seed=3)
    spoilt[part] = bad
    with torch.no_grad():
        member.sae.input_scale.mul_(4)  # 3e38 is finite until it is scaled
        before["weight input_scale"] = member.sae.input_scale.clone()
    done = step(member, stepper, spoilt)
    assert not math.isfinite(float(done.grad_norm))
    assert int(member.skipped) == int(member.skipped_in_a_row) == 1
    after = tensors(member)
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        if name == "weight w_dec" and isinstance(stepper, AutogradStepper):
            # Its unit rows are normalised after every step, which may move their last bit.
            torch.testing.assert_close(after[name], tensor, rtol=4 * EPS, atol=0)
        else:
            assert torch.equal(after[name], tensor), name
    assert all_finite(member)
    assert member.stats.tokens == tokens + N
    assert bool((member.stats.sums >= 0).all()) and bool((member.stats.counts <= member.stats.tokens).all())
    with torch.no_grad():
        member.sae.input_scale.div_(4)
    step(member, stepper, rows(seed=4))
    assert int(member.skipped) == 1 and int(member.skipped_in_a_row) == 0
    assert all_finite(member)
    assert not torch.equal(tensors(member)["weight w_enc"], before["weight w_enc"])


# -- G5, G6, G7: batches that are finite and odd ---------------------------------------------------

AWKWARD: dict[str, Callable[[], Tensor]] = {
    "zeros": lambda: torch.zeros(N, D),
    "one constant": lambda: torch.full((N, D), 0.1),
    "one row again and again": lambda: rows(1).expand(N, D).contiguous(),
    "a single row": lambda: rows(1),
    "outliers of 1e4 times the norm": lambda: (
        rows() * torch.where(torch.arange(N) % 16 == 3, 1e4, 1.0)[:, None]
    ),
    "everything 1e4 times as large": lambda: rows() * 1e4,
    "subnormal": lambda: rows() * 1e-40,
}


@pytest.mark.parametrize("awkward", AWKWARD)
def test_awkward_batches_are_stepped_on_without_a_number_that_is_not_finite(case, awkward):
    member, stepper = case
    for dead in ([], [7], list(range(F))):
        member.dead = torch.tensor(dead, dtype=torch.int64)
        done = step(member, stepper, AWKWARD[awkward]())
        assert math.isfinite(float(done.losses.total.detach())) and math.isfinite(float(done.grad_norm)), dead
        assert int(member.skipped) == 0
        assert all_finite(member), dead
        assert bool((done.losses.codes.l0() <= F).all())


@pytest.mark.parametrize("initial", AWKWARD)
def test_weights_that_start_from_awkward_rows_train(case, initial):
    member, stepper = case
    member.initialise({"h": AWKWARD[initial]()})
    for seed in range(3):
        step(member, stepper, rows(seed=seed))
    assert all_finite(member) and float(member.sae.input_scale) > 0


@pytest.mark.parametrize("num_dead", [0, 1, F])
def test_steps_are_finite_with_auxk_whether_no_latent_is_dead_or_one_or_all_beyond_revival(case, num_dead):
    member, stepper = case
    dead = torch.arange(num_dead)
    with torch.no_grad():
        member.sae.b_enc[dead] = -1e6  # they can never fire by themselves
    member.dead = dead
    for seed in range(3):
        done = step(member, stepper, rows(seed=seed))
        assert math.isfinite(float(done.losses.total.detach()))
        assert ("auxk" in done.losses.terms) == (num_dead > 0)
        if num_dead == F:
            assert int(done.losses.codes.l0().sum()) == 0
    assert all_finite(member) and int(member.skipped) == 0


@pytest.mark.parametrize("kind", KINDS, ids="-".join)
def test_an_activation_that_asks_for_more_than_fires_leaves_empty_slots(kind):
    """E5: for those that share a budget over the batch too."""
    member = make_member(kind, k=F)
    with torch.no_grad():
        for name, bias in member.sae.named_parameters():
            if name in ("b_enc", "b_mag"):  # a gated latent has one for each of its paths
                bias.fill_(-1e6)
                bias[:2] = 1e6  # two latents fire on every row, and no other
    codes = member.sae.encode(rows())
    assert codes.l0().tolist() == [2] * N
    assert int(codes.counts().sum()) == 2 * N and codes.counts()[:2].tolist() == [N, N]
    assert bool(torch.isfinite(member.sae.decode(codes)).all())
    for stepper in [
        s() for name, s in STEPPERS.items() if name == "autograd" or cannot_fuse(member, 1) is None
    ]:
        other = copy.deepcopy(member)
        step(other, stepper, rows())
        assert all_finite(other)


@pytest.mark.parametrize("metric", list(METRICS))
@pytest.mark.parametrize("awkward", AWKWARD)
@pytest.mark.parametrize("kind", KINDS, ids="-".join)
def test_metrics_of_awkward_rows_are_defined(metric, awkward, kind):
    member, y = make_member(kind), AWKWARD[awkward]()
    measured = METRICS.build(MetricConfig(metric), D, F)
    codes = member.sae.encode(y)
    with torch.no_grad():
        measured.update(EvalBatch(y, member.sae.decode(codes), codes, torch.ones(len(y), dtype=torch.bool)))
    for name, value in measured.compute().items():
        assert not math.isnan(value), name
        assert name.startswith("relative") or math.isfinite(value), name


@pytest.mark.parametrize("constant", [0.0, 0.1, 1.0, 1e4, -3.7])
def test_fvu_of_a_constant_set_is_zero_if_it_is_exact_and_huge_if_it_is_not(constant):
    y = torch.full((1000, D), constant)
    everything = torch.ones(1000, dtype=torch.bool)
    for y_hat, low, high in ((y, 0.0, 0.0), (y + 1.0, 1e30, 3.5e38)):
        fvu = METRICS.build(MetricConfig("fvu"), D, F)
        for part in range(0, 1000, 300):
            some = slice(part, part + 300)
            codes = make_member(KINDS[0]).sae.encode(y[some])
            fvu.update(EvalBatch(y[some], y_hat[some], codes, everything[some]))
        for name in ("fvu", "fvu_all"):
            assert low <= fvu.compute()[name] <= high, name


# -- G8, G9: long runs, and threads ----------------------------------------------------------------


@pytest.mark.parametrize("start", [2**24, 2**31 - 5, 2**53])
def test_every_counter_is_exact_past_the_limits_of_float_and_int32(case, start):
    member, stepper = case
    late = copy.deepcopy(member)
    late.stats.tokens += start
    for name in ("counts", "sums", "last_fired"):
        getattr(late.stats, name).add_(start)
    late.skipped += start
    bad = rows(seed=9)
    bad[0] = math.nan
    for x in (rows(seed=1), bad, rows(seed=2)):
        step(member, stepper, x)
        step(late, stepper, x)
    assert late.stats.tokens == member.stats.tokens + start == start + 3 * N
    for name in ("counts", "sums"):
        assert torch.equal(getattr(late.stats, name), getattr(member.stats, name) + start), name
    fired = member.stats.last_fired > 0
    assert torch.equal(late.stats.last_fired[fired], member.stats.last_fired[fired] + start)
    assert bool((late.stats.last_fired[~fired] == start).all())
    assert int(late.skipped) == start + 1
    saved = FeatureStats(F)
    saved.load_state_dict(late.stats.state_dict())
    assert saved.tokens == late.stats.tokens and torch.equal(saved.counts, late.stats.counts)


@pytest.mark.parametrize("stepper", STEPPERS)
def test_one_thread_and_two_agree_to_1e_5_and_the_same_bits_are_not_promised(stepper):
    """What one number of threads promises is in the tests of resuming; changing it is only warned of."""
    assert classify("run.threads") == "warned"
    kind, n, d, f = KINDS[0], 512, 64, 512
    if stepper == "fused" and cannot_fuse(make_member(kind), 1) is not None:
        pytest.skip("the first SAE of the registry has no fused step")
    ends = []
    for threads in (1, 2, 1):
        torch.set_num_threads(threads)
        member, how = make_member(kind, d, f, 8, n), STEPPERS[stepper]()
        losses = [float(step(member, how, rows(n, seed, d)).losses.total.detach()) for seed in range(10)]
        ends.append((losses, tensors(member), member.stats.counts.clone()))
    (one, state_one, _), (two, state_two, _), (again, state_again, _) = ends
    assert one == again and all(torch.equal(state_one[name], state_again[name]) for name in state_one)
    for a, b in zip(one, two, strict=True):
        assert abs(a - b) <= 1e-5 * abs(a)
    for name, tensor in state_one.items():
        if name.startswith("weight"):
            apart = (state_two[name] - tensor).double().norm()
            assert float(apart) <= 1e-5 * float(tensor.double().norm()), name


# -- G1, G2, G3, G6, E12: a language model that gives bad rows -------------------------------------

RECIPE = [
    "hook=resid_post.1", "corpus.context_length=16", "corpus.holdout=0.25", "source.shard_tokens=256",
    "source.lanes=2", "sae.d_sae=48", "sae.activation.k=4", "train.batch_tokens=32", "eval.tokens=64",
    "eval.ce_tokens=0", "eval.every=0", "logger.every=5", "checkpoint.every=5", "run.threads=1",
    "corpus.shuffle_windows=8", "train.tokens=640000",
]  # fmt: skip
RARE = 127
"""Id of the word w123, which `write_corpus` puts where it is told to and nowhere else."""


def write_corpus(path: Path, documents: int, length: int, rare: set[int]) -> list[str]:
    """Documents of common words; those in `rare` have the rare word once, and are training documents."""
    texts = []
    odds = 1.0 / torch.arange(1, 100)
    for i in range(documents):
        draw = torch.Generator().manual_seed(i)
        drawn = [f"w{w}" for w in torch.multinomial(odds, length, True, generator=draw).tolist()]
        if i in rare:
            drawn[length // 2] = "w123"
            while is_held_out(" ".join(drawn), 0.25):
                drawn[0] = f"w{int(drawn[0][1:]) + 1}"
        texts.append(" ".join(drawn))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return texts


Harm = Callable[[Tensor, Tensor, int], Tensor]
"""(rows [B, T, D] of a layer, tokens [B, T], passes before) -> rows."""


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Harm | None], None]:
    """Put a hook on a layer of the model that the next runs load."""
    real, harms = language_model.load_model, {}

    def load(*args: Any, **kwargs: Any) -> Any:
        model, info = real(*args, **kwargs)
        now: dict[str, Any] = {"passes": 0}

        def before(module: Any, given: Any) -> None:
            now["tokens"] = given[0]
            now["passes"] += 1

        model.model.embed_tokens.register_forward_pre_hook(before)
        for layer, harm in harms.items():

            def after(module: Any, given: Any, out: Tensor, harm: Harm = harm) -> Tensor:
                return harm(out.clone(), now["tokens"], now["passes"])

            model.model.layers[layer].register_forward_hook(after)
        return model, info

    monkeypatch.setattr(language_model, "load_model", load)

    def set_harm(layer: int, harm: Harm | None) -> None:
        harms.pop(layer, None)
        if harm is not None:
            harms[layer] = harm

    return set_harm


@pytest.fixture
def train(
    tiny_model_dir: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Any]:
    """Run `train` on tmp_path/a.jsonl; asserts the exit code and one line that says all the words."""

    def run(folder: str, *overrides: str, code: int, says: tuple[str, ...] = ()) -> Path:
        capsys.readouterr()
        name, text = tiny_model_dir("llama"), tmp_path / "a.jsonl"
        args = [f"model.name={name}", f"corpus.name={text}", *RECIPE, f"run.dir={tmp_path / folder}"]
        got = main(["train", *args, *overrides])
        err = capsys.readouterr().err
        assert got == code, (got, err)
        assert "Traceback" not in err
        lines = [line for line in err.splitlines() if line.startswith("sae-train train: ")]
        assert len(lines) == (code != 0), err
        assert all(word in lines[0] for word in says), (says, lines)
        return tmp_path / folder

    return run


def saved_steps(run: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*"))


def last_state(run: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = load_file(
        run / "checkpoints" / f"step-{saved_steps(run)[-1]:08d}" / "state.safetensors"
    )
    return state


def counted(run: Path) -> dict[str, int]:
    """Tokens of the source by rule, as the last checkpoint has them."""
    path = run / "checkpoints" / f"step-{saved_steps(run)[-1]:08d}" / "state.json"
    counts: dict[str, int] = json.loads(path.read_text())["source"]["counts"]
    return counts


def test_rows_that_are_not_finite_at_1_in_10000_are_dropped_counted_and_hardly_change_the_loss(
    train, spoil, tmp_path
):
    rare = {5, 90, 200, 310}
    texts = write_corpus(tmp_path / "a.jsonl", 400, 120, rare)
    number = sum(not is_held_out(text, 0.25) for text in texts) * 120
    assert 0.5e-4 < len(rare) / number < 2e-4
    recipe = ("source.shard_tokens=8192", "train.batch_tokens=256", "logger.every=1", "checkpoint.every=20")

    def harm(x: Tensor, tokens: Tensor, passes: int) -> Tensor:
        for i, bad in enumerate((math.nan, math.inf, -math.inf)):
            x[..., i].masked_fill_(tokens == RARE, bad)
        return x

    done = {}
    for name in ("clean", "spoilt"):
        if name == "spoilt":
            spoil(1, harm)
        run = train(name, *recipe, code=2, says=("train.tokens",))
        losses = [record["main/loss"] for record in read_metrics(run) if "main/loss" in record]
        done[name] = counted(run), sum(losses) / len(losses)
    (clean, loss), (spoilt, spoilt_loss) = done["clean"], done["spoilt"]
    assert clean["nonfinite"] == 0 and spoilt["nonfinite"] == len(rare)
    assert spoilt["seen"] == clean["seen"] and spoilt["kept"] + spoilt["sink"] == (
        clean["kept"] + clean["sink"] - len(rare)
    )
    assert abs(spoilt_loss - loss) <= 0.01 * loss, (spoilt_loss, loss)


def test_more_bad_rows_than_1_in_1000_of_a_shard_end_the_run_by_hook_dtype_and_place(train, spoil, tmp_path):
    write_corpus(tmp_path / "a.jsonl", 200, 40, set())

    def harm(x: Tensor, tokens: Tensor, passes: int) -> Tensor:
        if passes > 25:
            x[0, 5, 7] = math.nan
        return x

    spoil(1, harm)
    says = ("resid_post.1: ", "of a shard's", "float32", "position 5", "filter.max_nonfinite=0.001")
    run = train("run", code=3, says=says)
    assert saved_steps(run)[-1] > 0
    assert all(bool(torch.isfinite(t).all()) for t in last_state(run).values() if t.is_floating_point())
    # It may be allowed, as long as the run is a new one.
    other = train("other", "filter.max_nonfinite=0.05", code=2, says=("train.tokens",))
    assert counted(other)["nonfinite"] > 0


def test_a_model_that_overflows_float16_is_told_to_use_float32_which_works(train, tiny_model_dir, tmp_path):
    write_corpus(tmp_path / "a.jsonl", 100, 40, set())
    model = tmp_path / "model"
    shutil.copytree(tiny_model_dir("llama"), model)
    weights = load_file(model / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    weights[name] = weights[name] * 1e5
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    args = (f"model.name={model}", "filter.sinks=false")
    train("half", *args, "model.dtype=float16", code=3, says=("float16", "try model.dtype=float32"))
    run = train("full", *args, "model.dtype=float32", code=2, says=("train.tokens",))
    assert counted(run)["nonfinite"] == 0
    last = [record for record in read_metrics(run) if "main/fvu" in record][-1]
    assert math.isfinite(last["main/loss"]) and last["main/skipped_steps"] == 0


def bad_between(first: int, last: float) -> Harm:
    def harm(x: Tensor, tokens: Tensor, passes: int) -> Tensor:
        return torch.full_like(x, math.nan) if first < passes <= last else x

    return harm


def test_bad_batches_that_reach_the_trainer_are_skipped_and_reported(train, spoil, tmp_path):
    write_corpus(tmp_path / "a.jsonl", 150, 40, set())
    spoil(1, bad_between(15, 16))  # one lane of one shard of 256 rows: every batch of that shard
    run = train("run", "filter.nonfinite=false", "logger.every=1", code=2, says=("train.tokens",))
    skipped = [record["main/skipped_steps"] for record in read_metrics(run) if "main/skipped_steps" in record]
    assert 7 <= skipped[-1] <= 10 and skipped[0] == 0
    assert skipped == sorted(skipped)
    state = last_state(run)
    assert all(bool(torch.isfinite(t).all()) for t in state.values() if t.is_floating_point())


def test_batches_that_stay_bad_end_the_run_and_it_goes_on_from_the_last_good_step_once_they_are_well(
    train, spoil, tmp_path
):
    write_corpus(tmp_path / "a.jsonl", 150, 40, set())
    args = ("filter.nonfinite=false",)
    whole = train("whole", *args, code=2, says=("train.tokens",))
    spoil(1, bad_between(25, math.inf))
    run = train("run", *args, code=3, says=("main", "not finite", "last good checkpoint is kept"))
    steps = saved_steps(run)
    assert len(steps) >= 2
    state = last_state(run)
    assert all(bool(torch.isfinite(t).all()) for t in state.values() if t.is_floating_point())
    assert not (run / "saes").exists()
    spoil(1, None)
    train("run", *args, code=2, says=("train.tokens",))
    continued = re.findall(r"continuing from step (\d+) of", (run / "train.log").read_text())
    assert [int(step) for step in continued] == [steps[-1]] and steps[-1] > 0
    assert saved_steps(run)[-1] == saved_steps(whole)[-1]


def test_of_several_hooks_a_bad_one_ends_the_run_by_name_and_the_others_train_without_it(
    train, spoil, tmp_path
):
    """E12. Rows are dropped for all hooks alike, so a hook that is bad throughout leaves nothing to any."""
    write_corpus(tmp_path / "a.jsonl", 100, 40, set())
    spoil(1, bad_between(5, math.inf))
    train("both", "hook=[resid_post.0,resid_post.1]", code=3, says=("resid_post.1:", "of a shard's"))
    run = train("one", "hook=resid_post.0", code=2, says=("train.tokens",))
    assert counted(run)["nonfinite"] == 0


def test_a_few_bad_rows_of_one_hook_are_dropped_for_every_hook(train, spoil, tmp_path):
    rare = {5, 30, 60}
    write_corpus(tmp_path / "a.jsonl", 100, 40, rare)

    def harm(x: Tensor, tokens: Tensor, passes: int) -> Tensor:
        x[tokens == RARE] = math.nan
        return x

    spoil(1, harm)
    hooks = ("hook=[resid_post.0,resid_post.1]", "filter.max_nonfinite=0.01")
    assert counted(train("both", *hooks, code=2, says=("train.tokens",)))["nonfinite"] == len(rare)


def test_with_the_rule_off_only_the_member_on_the_bad_hook_skips_and_it_ends_the_run_by_name(
    train, spoil, tmp_path
):
    write_corpus(tmp_path / "a.jsonl", 100, 40, set())
    spoil(1, bad_between(10, math.inf))
    args = ("hook=[resid_post.0,resid_post.1]", "filter.nonfinite=false", "logger.every=1")
    run = train("run", *args, code=3, says=("resid_post.1: gradients were not finite",))
    records = [record for record in read_metrics(run) if "resid_post.0/loss" in record]
    assert {record["resid_post.0/skipped_steps"] for record in records} == {0.0}
    assert records[-1]["resid_post.1/skipped_steps"] > 10


def test_a_tokenizer_without_any_special_token_trains(train, tiny_model_dir, tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    write_corpus(tmp_path / "a.jsonl", 60, 40, set())
    model = tmp_path / "model"
    shutil.copytree(tiny_model_dir("llama"), model)
    for path in [*model.glob("tokenizer*"), *model.glob("special_tokens*")]:
        path.unlink()
    backend = Tokenizer(models.WordLevel({f"w{i}": i for i in range(128)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(model)
    assert AutoTokenizer.from_pretrained(model).all_special_ids == []
    run = train("run", f"model.name={model}", code=2, says=("train.tokens",))
    counts = counted(run)
    assert counts["special"] == 0 and counts["kept"] > 1000
    assert saved_steps(run)[-1] > 20
