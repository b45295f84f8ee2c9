"""A run that is interrupted, however and however often, ends with the bits of one that is not."""

import random
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from faults.tools import (
    DYING,
    ROWS,
    SYNTHETIC,
    WINDOWS,
    WITHOUT_MODEL,
    Zygote,
    at_step,
    call,
    differences,
    final_state,
    kill_once_saved,
    kill_soon,
    newest,
    read_rows,
    resumed_at,
    send,
    told,
)
from safetensors.torch import save_file

from sae_train.activations.base import ACTIVATIONS
from sae_train.registry import discover
from sae_train.sae.base import SAES

discover("sae_train.activations")
discover("sae_train.sae")

SHORT = ["train.tokens=1280", "checkpoint.every=5", "eval.every=10"]
"""40 steps."""


class Legs:
    """One run in several processes, with the proof that each continued what the one before it had saved."""

    def __init__(self, zygote: Zygote, run: Path, args: list[str]) -> None:
        self.zygote, self.run, self.args = zygote, run, [*args, f"run.dir={run}"]
        self.starts: list[int] = []
        self.rows: list[list[tuple[int, ...]]] = []

    def leg(self, code: int, before: str | None = None) -> str:
        """Run until something ends it with this exit code."""
        saved = newest(self.run)
        rows = self.run.with_name(f"{self.run.name}-{len(self.starts)}.rows")
        text = self.zygote.run("train", *self.args, code=code, rows=rows, before=before, plots=False)
        if saved is None:
            assert resumed_at(text) is None, text
        else:
            assert resumed_at(text) == saved, text
            assert f"continuing from step {saved} of" in (self.run / "train.log").read_text()
            now = newest(self.run)
            assert now is not None and now >= saved
        self.starts.append(saved or 0)
        self.rows.append(read_rows(rows) if rows.exists() else [])
        return text

    def sewn(self) -> list[tuple[int, ...]]:
        """The batches trained on, each leg's up to the step that the next one started from."""
        out = list(self.rows[-1])
        for i in reversed(range(len(self.rows) - 1)):
            kept = self.starts[i + 1] - self.starts[i]
            assert kept <= len(self.rows[i]), "a step was saved that was not trained"
            out = self.rows[i][:kept] + out
        return out


def uninterrupted(zygote: Zygote, run: Path, args: list[str]) -> Legs:
    whole = Legs(zygote, run, args)
    whole.leg(0)
    return whole


def assert_same(one: Legs, two: Legs) -> None:
    assert differences(final_state(one.run), final_state(two.run)) == []
    assert one.sewn() == two.sewn()
    assert told(one.run) == told(two.run)
    seen = [record["step"] for record in told(one.run)]
    assert seen == sorted(seen)


def interrupted_twice(
    zygote: Zygote, tmp_path: Path, args: list[str], seed: str, batches: tuple[str, str] = ROWS
) -> None:
    """Kill a run once and stop it once, at seeded steps, and compare it with one left alone."""
    choose = random.Random(seed)
    whole = uninterrupted(zygote, tmp_path / "whole", args)
    broken = Legs(zygote, tmp_path / "broken", args)
    broken.leg(-signal.SIGKILL, kill_once_saved(broken.run, choose.randint(8, 19), batches))
    stopped = choose.randint(28, 38)
    broken.leg(75, at_step(stopped, send(signal.SIGTERM), batches))
    assert newest(broken.run) == stopped
    broken.leg(0)
    assert broken.starts[1] > 0 and broken.starts[2] == stopped
    assert_same(whole, broken)


def test_two_uninterrupted_runs_end_with_the_same_bits(zygote, tiny, tmp_path):
    one, two = (uninterrupted(zygote, tmp_path / name, [*tiny, *SHORT]) for name in ("a", "b"))
    assert_same(one, two)
    assert len(one.sewn()) == 40


@pytest.mark.timeout(600)  # 22 processes, and a machine may be ten times as slow as usual
def test_a_run_killed_20_times_ends_with_the_bits_and_the_rows_of_one_left_alone(zygote, tiny, tmp_path):
    args = [*tiny, *DYING, "checkpoint.every=5", "train.ema=0.9"]
    whole = uninterrupted(zygote, tmp_path / "whole", args)
    broken = Legs(zygote, tmp_path / "broken", args)
    choose = random.Random(20)
    broken.leg(-signal.SIGKILL, kill_once_saved(broken.run, choose.randint(6, 10)))
    for _ in range(19):
        saved = newest(broken.run)
        assert saved is not None and 0 < saved < 186
        # In a step, or anywhere within some steps of it: in a save, in a harvest, in an evaluation.
        how = choose.choice([send(signal.SIGKILL), kill_soon(round(choose.uniform(0, 0.03), 4))])
        broken.leg(-signal.SIGKILL, at_step(saved + choose.randint(1, 12), how))
    broken.leg(0)
    assert len(broken.starts) == 21
    assert broken.starts == sorted(broken.starts) and all(start > 0 for start in broken.starts[1:])
    assert_same(whole, broken)
    assert len(broken.sewn()) == 200 and sum(map(len, broken.rows)) > 200, "no leg lost a step to its kill"


def every_kind() -> str:
    """SAEs among which each architecture and each activation is, side by side in one run."""
    saes = list(SAES)
    members = [
        f"m{i}: {{sae: {{name: {saes[i % len(saes)]}, activation: {{name: {name}}}}}}}"
        for i, name in enumerate(ACTIVATIONS)
    ]
    assert len(members) >= len(saes)
    return f"saes={{{', '.join(members)}}}"


@pytest.mark.timeout(400)  # seven processes
@pytest.mark.parametrize("source", ["stream", "disk"])
def test_a_chain_of_five_stops_is_one_run_for_every_architecture_and_activation(
    zygote, source, request, tmp_path
):
    args = [*arguments(source, request, zygote, tmp_path), *SHORT, *DYING, every_kind()]
    whole = uninterrupted(zygote, tmp_path / "whole", args)
    broken = Legs(zygote, tmp_path / "broken", args)
    stops = sorted(random.Random(source).sample(range(3, 38), 5))
    for step in stops:
        broken.leg(75, at_step(step, send(signal.SIGTERM)))
        assert newest(broken.run) == step
    broken.leg(0)
    assert broken.starts == [0, *stops]
    assert sum(map(len, broken.rows)) == 40, "a stop repeats no step"
    assert_same(whole, broken)


def test_kills_right_after_the_resume_lose_neither_steps_nor_checkpoints(zygote, tiny, tmp_path):
    args = [*tiny, *SHORT]
    whole = uninterrupted(zygote, tmp_path / "whole", args)
    broken = Legs(zygote, tmp_path / "broken", args)
    broken.leg(-signal.SIGKILL, kill_once_saved(broken.run, 12))
    saved, folders = newest(broken.run), sorted(p.name for p in broken.run.glob("checkpoints/step-*"))
    assert saved is not None
    for _ in range(5):
        broken.leg(-signal.SIGKILL, at_step(saved + 1, send(signal.SIGKILL)))
        assert sorted(p.name for p in broken.run.glob("checkpoints/step-*")) == folders
    broken.leg(0)
    assert_same(whole, broken)


def combinations(stepper: str) -> list[tuple[str, str]]:
    """Every architecture with every activation that can be stepped so."""
    out = []
    for sae in SAES:
        for activation in ACTIVATIONS:
            options = {"k": 2} if hasattr(ACTIVATIONS.config(activation)(), "k") else {}
            config = SAES.config(sae)(d_sae=96, activation=ACTIVATIONS.config(activation)(**options))
            if stepper == "autograd" or SAES.build(config, 16).latents() is not None:
                out.append((sae, activation))
    return out


@pytest.mark.parametrize("stepper", ["autograd", "fused"])
def test_every_architecture_and_activation_resumes_exactly(zygote, stepper, tmp_path):
    """Side by side in one run: as each has a state of its own, that is as strict as a run for each."""
    kinds = combinations(stepper)
    assert kinds
    members = [
        f"{sae}_{activation}: {{sae: {{name: {sae}, activation: {{name: {activation}}}}}}}"
        for sae, activation in kinds
    ]
    own = [f"saes={{{', '.join(members)}}}", f"kernels.stepper={stepper}", "train.ema=0.9"]
    interrupted_twice(zygote, tmp_path, [*SYNTHETIC, *DYING, *SHORT, *own], stepper)


CHANGING = """saes={
    sampled: {sae: {name: matryoshka, sampled: 3}},
    annealed: {sae: {activation: {k_start: 8, k_steps: 0.8, multi: 0.125}}},
    bent: {sae: {activation: {name: relu, p_end: 0.5}}}
}""".replace("\n", "")
"""What is drawn anew at every step, or changes over the run."""


@pytest.mark.parametrize(
    "options",
    [
        ["optim.clip_norm=lagged", "optim.moments=bfloat16", "optim.rows=active", "optim.beta1=0"],
        ["saes={a: {}, b: {seed: 7, optim: {lr: 0.01}, sae: {activation: {k: 3}}}}"],
        ["train.accumulate=2", "sae.b_dec_init=mean", "sae.input_scale=none"],
        ["saes={a: {optim: {name: muon}}, b: {optim: {name: schedule_free, decay: 0}}}"],
        ["train.resample_every=5", "sae.auxk_coefficient=0"],
        [CHANGING],
    ],
    ids=["approximate Adam", "two members", "micro-batches", "other optimizers", "resampling", "schedules"],
)
def test_every_way_to_train_resumes_exactly(zygote, options, tmp_path):
    interrupted_twice(zygote, tmp_path, [*SYNTHETIC, *DYING, *SHORT, *options], options[0])


@pytest.mark.parametrize("loss", ["kl", "ce"])
def test_training_through_the_model_resumes_exactly(zygote, tiny, loss, tmp_path):
    interrupted_twice(zygote, tmp_path, [*tiny, *DYING, *SHORT, f"train.loss={loss}"], loss, WINDOWS)


@pytest.mark.parametrize("source", ["stream", "stream ahead", "disk", "tensors", "two hooks"])
def test_every_source_of_rows_resumes_exactly(zygote, source, request, tmp_path):
    args = arguments(source, request, zygote, tmp_path)
    interrupted_twice(zygote, tmp_path, [*args, *DYING, *SHORT], source)


def arguments(source: str, request: Any, zygote: Zygote, folder: Path) -> list[str]:
    """Arguments of a run on rows of some kind; makes the files they come from."""
    if source == "tensors":
        rows = torch.randn(1500, 16, generator=torch.Generator().manual_seed(0))
        save_file({"activations": rows}, folder / "rows.safetensors")
        files = ["source=tensors", f"source.paths=[{folder / 'rows.safetensors'}]"]
        return [*files, "source.holdout=0.1", "source.epochs=4", *WITHOUT_MODEL]
    tiny: list[str] = request.getfixturevalue("tiny")
    if source == "disk":
        zygote.run("harvest", *tiny, "train.tokens=640", f"out={folder / 'shards'}")
        return ["source=shards", f"source.path={folder / 'shards'}", "source.epochs=3", *WITHOUT_MODEL]
    more = {
        "stream": ["source.prefetch=0"],
        "stream ahead": ["source.prefetch=2"],
        "two hooks": ["hook=[resid_post.0,resid_post.1]"],
    }
    return [*tiny, *more[source]]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_evaluation_is_done_once_and_told_once(zygote, tiny, number, tmp_path):
    args = [*tiny, *SHORT]
    whole = uninterrupted(zygote, tmp_path / "whole", args)
    broken = Legs(zygote, tmp_path / "broken", args)
    in_second = call("sae_train.cli.train:evaluate", send(number), nth=2)
    if number == signal.SIGKILL:
        broken.leg(-signal.SIGKILL, kill_once_saved(broken.run, 8))
        saved = newest(broken.run)
        assert saved is not None
        broken.leg(-signal.SIGKILL, call("sae_train.cli.train:evaluate", send(number), nth=1 + (saved < 10)))
    else:
        text_of_stop = broken.leg(75, in_second)
        assert "saved at step 20" in text_of_stop and newest(broken.run) == 20
        assert [r["step"] for r in told(broken.run) if "main/heldout/fvu" in r] == [10]
    broken.leg(0)
    assert_same(whole, broken)
    assert [r["step"] for r in told(broken.run) if "main/heldout/fvu" in r] == [10, 20, 30, 40]
