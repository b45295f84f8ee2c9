"""One SAE over several processes, its latents in slices and its rows in parts, is the SAE of one process.

Sums are taken in another order, so losses and weights differ by rounding. Which latents are selected does
not: counters are equal to the last one.
"""

import json
import math
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from faults.tools import DYING, at_step, call, differences, final_state, send

from sae_train.checkpoint import Checkpointer, Slice
from sae_train.errors import InputError
from sae_train.log import read_metrics
from sae_train.sae.io import load_sae

EPS = 2.0**-24
AUTOGRAD = "kernels.stepper=autograd"
D, F, N, K = 24, 96, 64, 4
"""Of every_kind.py."""
SHORT = ["train.tokens=1280", "eval.every=20", "checkpoint.every=10"]
"""40 steps."""
EXACT = "train.autocast=float32"
"""In bfloat16 a difference in the last bit may become one of 2^-9, and then another latent."""


def each(launch: Any, tmp_path: Path, data: int, feature: int, **more: str) -> dict[str, Any]:
    """What every_kind.py found in a group of so many processes."""
    out, script = tmp_path / "found.json", Path(__file__).with_name("every_kind.py")
    env = {"DATA": str(data), "FEATURE": str(feature), "OUT": str(out)} | more
    run = f"import runpy; runpy.run_path({str(script)!r}, run_name='__main__')"
    launch(data * feature, "train", before=run, env=env).wait(0)
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def sent(found: dict[str, int], name: str, data: int, feature: int) -> dict[str, int]:
    """The formula of docs/scaling.md, in bytes, for top-k with dead latents; for others what was found."""
    n, own = N // data, F // feature
    if name != "linear, topk":
        return found
    gathered = n * K * 8 + 2 * 8 if feature > 1 else 0
    reduced = 2 * n * D * 4 + D * 4 + 4 if feature > 1 else 0
    if data > 1:
        reduced += (2 * own * D + own + D) * 4 + own * (8 + 8 + 4) + 4 * 4 + D * 4
    every = {"all_gather": gathered, "all_reduce": reduced, "broadcast": D * 4 if feature > 1 else 0}
    return {kind: count for kind, count in every.items() if count}


SLOW = pytest.mark.slow  # the others cover each axis, and both


@pytest.mark.parametrize(
    ("data", "feature"),
    [(2, 2), pytest.param(1, 2, marks=SLOW), pytest.param(2, 1, marks=SLOW), pytest.param(1, 4, marks=SLOW)],
)
def test_every_kind_of_sae_trains_divided_as_it_does_whole(data, feature, launch, tmp_path):
    answer = each(launch, tmp_path, data, feature)
    found = answer["kinds"]
    assert len(found) > 20
    for name, one in found.items():
        assert one["start"] == 0, (name, "starts with other weights")
        assert one["moved"] > 1e-3, (name, "learned nothing: a check of nothing")
        assert one["counters"], (name, "other latents were selected")
        assert one["losses"] < 64 * EPS, (name, one)
        assert one["weights"] < 1e-3, (name, one)
        assert one["bytes"] == sent(one["bytes"], name, data, feature), name
    # 7 of 5 in each slice; 2 in each of 4 rows, of 6 in each slice
    assert answer["ties"]["first row"] == [min(5, max(0, 7 - 5 * i)) for i in range(feature)] * data
    line, budget = 6 * feature, 2 * 4 * data
    kept = [
        [sum(line * row + 6 * i + j < budget for j in range(6)) for i in range(feature)]
        for row in range(4 * data)
    ]
    wanted = [
        sum(kept[row][i] for row in range(4 * p, 4 * p + 4)) for p in range(data) for i in range(feature)
    ]
    assert answer["ties"]["batch"] == wanted and sum(wanted) == budget
    assert found["more dead than k_aux"]["dead"] > 6 and found["linear, topk"]["dead"] > 0


def test_under_autocast_shares_are_added_up_in_one_dtype(launch, tmp_path):
    """Codes without a latent in a slice, and dense ones, come in bfloat16, sparse ones in float32."""
    only = ["matryoshka, topk", "matryoshka, relu", "sampled prefixes", "linear, relu", "gated, jumprelu"]
    found = each(launch, tmp_path, 1, 2, AUTOCAST="bfloat16", ONLY="|".join(only))["kinds"]
    assert found.keys() == set(only)
    for name, one in found.items():
        assert one["start"] == 0 and one["moved"] > 1e-3, name
        assert one["losses"] < 0.05, (name, one)  # a near tie rounded the other way is another latent


def close(one: dict[str, Any], two: dict[str, Any]) -> list[str]:
    """Paths of two runs' states at which they differ by more than rounding; whole numbers by anything,
    but for sums of activations, which are rounded to whole numbers."""
    assert one.keys() == two.keys()
    pairs = ((path, [x.double() if "/sums" in path else x for x in (one[path], two[path])]) for path in one)
    return [path for path, (a, b) in pairs if "/rng/" not in path and not alike(a, b)]


def alike(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        if a.shape != b.shape or a.dtype != b.dtype:
            return False
        far = (a.double() - b.double()).abs().max() if a.numel() else torch.zeros(())
        return bool(far <= (1e-4 * a.double().abs().max() if a.is_floating_point() else 0))
    return bool(a == pytest.approx(b, rel=1e-4)) if isinstance(a, float) else repr(a) == repr(b)


@pytest.mark.parametrize(
    ("size", "mesh"),
    [
        pytest.param(2, ["mesh.feature=2"], marks=SLOW),
        pytest.param(2, ["mesh.data=2"], marks=SLOW),
        pytest.param(4, ["mesh.feature=2"], marks=SLOW),
        (4, ["mesh.data=2", "mesh.feature=2"]),
    ],
    ids=["latents", "rows", "latents and members", "both"],
)
def test_a_run_of_divided_saes_ends_as_that_of_one_process(size, mesh, launch, zygote, tiny, tmp_path):
    args = [*tiny, *SHORT, *DYING, "grid={k: [2, 4]}", AUTOGRAD, EXACT]
    zygote.run("train", *args, f"run.dir={tmp_path / 'one'}", plots=False)
    launch(size, "train", *args, *mesh, f"run.dir={tmp_path / 'split'}").wait(0)
    assert close(final_state(tmp_path / "one"), final_state(tmp_path / "split")) == []
    summaries = [json.loads((tmp_path / run / "summary.json").read_text()) for run in ("one", "split")]
    assert summaries[0]["row_ledger"] == summaries[1]["row_ledger"]
    for name, numbers in summaries[0]["members"].items():
        got, want = (
            {key: math.nan if number is None else number for key, number in found.items()}
            for found in (summaries[1]["members"][name], numbers)
        )
        assert got == pytest.approx(want, rel=1e-3, abs=1e-5, nan_ok=True)
        whole = load_sae(tmp_path / "split" / "saes" / name)
        assert whole.d_sae == 96 and whole.w_enc.shape[0] == 96
    logged = [[r for r in read_metrics(tmp_path / run) if "k2/loss" in r] for run in ("one", "split")]
    assert len(logged[0]) == len(logged[1]) > 3
    for before, after in zip(*logged, strict=True):
        for key in ("k2/loss", "k2/fvu", "k2/l0", "k2/dead", "k2/grad_norm", "k2/lr"):
            assert after[key] == pytest.approx(before[key], rel=1e-4), key


def test_a_divided_run_is_the_same_to_the_bit_however_often_it_is_interrupted(launch, tiny, tmp_path):
    args = [*tiny, *SHORT, *DYING, "mesh.feature=2", "optim.name=adam", "train.ema=0.9"]
    launch(2, "train", *args, f"run.dir={tmp_path / 'whole'}").wait(0)
    stopped = [*args, f"run.dir={tmp_path / 'stopped'}"]
    for step in (9, 23):
        launch(2, "train", *stopped, before={1: at_step(step, send(signal.SIGTERM))}).wait(75)
    launch(2, "train", *stopped).wait(0)
    assert differences(final_state(tmp_path / "whole"), final_state(tmp_path / "stopped")) == []


def test_a_checkpoint_of_one_mesh_goes_on_on_any_other(launch, zygote, tiny, tmp_path):
    args = [*tiny, *SHORT, *DYING, AUTOGRAD, EXACT, "sae/activation=batch_topk", "sae.activation.k=2"]
    zygote.run("train", *args, f"run.dir={tmp_path / 'one'}", plots=False)
    run = [*args, f"run.dir={tmp_path / 'moved'}"]
    legs = [
        (2, "mesh.feature=2", 8),
        (4, "mesh.data=4", 14),
        (1, "mesh.data=1", 20),
        (3, "mesh.feature=3", 27),
    ]
    for size, mesh, step in legs:
        before = {size - 1: at_step(step, send(signal.SIGTERM))}
        launch(size, "train", *run, mesh, before=before).wait(75)
        parts = {p.name for p in Checkpointer(tmp_path / "moved" / "checkpoints").path(step).iterdir()}
        assert len([name for name in parts if name.endswith(".safetensors")]) == size
    texts = launch(4, "train", *run, "mesh.feature=4").wait(0)
    assert "mesh.feature was 3 and is now 4: results may differ in their last bits" in texts[0]
    assert close(final_state(tmp_path / "one"), final_state(tmp_path / "moved")) == []
    told = [json.loads((tmp_path / r / "summary.json").read_text())["row_ledger"] for r in ("one", "moved")]
    assert told[0] == told[1]


NEVER = call("sae_train.harvest.stream:StreamRows._harvest", "if args[0].ranks.size > 1:\n    os._exit(9)")


@pytest.mark.parametrize(
    "mesh", [pytest.param([], marks=SLOW, id="members"), pytest.param(["mesh.feature=2"], id="latents")]
)
def test_processes_that_only_harvest_leave_the_rest_to_those_that_only_train(
    mesh, launch, zygote, tiny, tmp_path
):
    args = [*tiny, *SHORT, *DYING, "source.lanes=4", "grid={k: [2, 4]}"]
    alone = 2 if mesh else 1  # the same mesh without a harvester
    launch(alone, "train", *args, *mesh, f"run.dir={tmp_path / 'one'}").wait(0)
    run = f"run.dir={tmp_path / 'two'}"
    launch(4, "train", *args, *mesh, "mesh.harvest=2", run, before={0: NEVER, 1: NEVER}).wait(0)
    assert differences(final_state(tmp_path / "one"), final_state(tmp_path / "two")) == []


def test_a_checkpoint_that_lacks_a_slice_is_damaged(tmp_path):
    part = Slice(torch.arange(6.0).reshape(2, 3), 1, 2)
    Checkpointer(tmp_path / "checkpoints").save(1, {"members": {"main": {"w_enc": part}}}, {})
    with pytest.raises(InputError, match=r"all 1 are damaged"):
        Checkpointer(tmp_path / "checkpoints").load()
    with pytest.raises(InputError, match=r"slices \[1\] of 2"):
        Checkpointer(tmp_path / "checkpoints").load(tmp_path / "checkpoints" / "step-00000001")


@pytest.mark.parametrize(
    ("mesh", "dtype"),
    [("mesh.feature=2", "float32"), ("mesh.feature=2", "bfloat16"), ("mesh.data=2", "float32")],
)
def test_rows_that_are_not_finite_in_one_process_leave_the_step_out_in_all(
    mesh, dtype, launch, tiny, tmp_path
):
    """The NaN of a row is negative once it has been a bfloat16."""
    run = tmp_path / "run"
    spoil = call(
        "sae_train.train.stepper:AutogradStepper.take",
        "for x in args[2].rows.values():\n    x[-1, 0] = float('nan')",
        nth=12,
    )
    args = [*tiny, *SHORT, "logger.every=1", mesh, f"train.autocast={dtype}", f"run.dir={run}"]
    launch(2, "train", *args, before={1: spoil}).wait(0)
    skipped = {r["step"]: r["main/skipped_steps"] for r in read_metrics(run) if "main/skipped_steps" in r}
    assert [skipped[step] for step in (11, 12, 40)] == [0, 1, 1]
    state = final_state(run)
    assert all(bool(torch.isfinite(x).all()) for x in state.values() if isinstance(x, torch.Tensor))


@pytest.mark.parametrize(
    ("size", "args", "field"),
    [
        (1, ["mesh.feature=2"], "mesh.data x mesh.feature"),
        (3, ["mesh.data=2"], "mesh.data x mesh.feature"),
        (2, ["mesh.feature=2", "sae.d_sae=47"], "mesh.feature"),
        (2, ["mesh.feature=2", "sae/activation=group_max", "sae.activation.k=3"], "mesh.feature"),
        (2, ["mesh.feature=2", "optim=muon"], "optim.name"),
        (2, ["mesh.data=2", "train.resample_every=5", "sae.auxk_coefficient=0"], "train.resample_every"),
        (2, ["mesh.feature=2", "train.loss=kl"], "train.loss"),
        (4, ["mesh.data=4", "train.batch_tokens=30", "train.tokens=300"], "mesh.data"),
        (2, ["mesh.feature=2", "kernels.stepper=fused"], "kernels.stepper"),
        (2, ["mesh.feature=0"], "mesh.feature"),
        (2, ["mesh.harvest=2"], "mesh.harvest"),
    ],
)
def test_what_cannot_be_divided_is_refused_in_one_line(size, args, field, launch, tiny, tmp_path):
    texts = launch(size, "train", *tiny, *args, f"run.dir={tmp_path / 'run'}").wait(2)
    for text in texts:
        assert f"{field}=" in text and "Traceback" not in text, text
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
