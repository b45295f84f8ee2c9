"""Which kernels, stepper and optimizer states a run uses: asked for, refused, logged, changed on resume."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sae_train import load_sae
from sae_train.cli.main import main
from sae_train.train.members import Member

TINY = [
    "hook=resid_post.1",
    "corpus.context_length=16",
    "corpus.holdout=0.25",
    "source.shard_tokens=256",
    "source.lanes=2",
    "sae.d_sae=48",
    "sae.activation.k=4",
    "train.tokens=320",
    "train.batch_tokens=32",
    "eval.tokens=100",
    "eval.ce_tokens=0",
    "run.threads=1",
]


@pytest.fixture
def tiny(tiny_model_dir, tiny_corpus_dir, no_pictures) -> list[str]:
    return [f"model.name={tiny_model_dir('llama')}", f"corpus.name={tiny_corpus_dir}", *TINY]


def said(run: Path) -> list[str]:
    """What the log says of the choice of a stepper."""
    lines = (run / "train.log").read_text().splitlines()
    return [line for line in lines if "steps are fused" in line or "steps go through autograd" in line]


def stop_after(patch: pytest.MonkeyPatch, steps: int) -> None:
    """A real SIGTERM in the step after which the run is to stop."""
    refresh = Member.begin_step
    sent = []  # a second one would end the process at once

    def refresh_and_stop(member: Member, step: int) -> None:
        if step == steps - 1 and not sent:
            sent.append(step)
            os.kill(os.getpid(), signal.SIGTERM)
        refresh(member, step)

    patch.setattr(Member, "begin_step", refresh_and_stop)


def test_steps_are_fused_by_default_and_end_where_those_of_autograd_do(tiny, tmp_path):
    saes = []
    exact = "train.autocast=float32"  # in bfloat16 a difference in the last bit may become one of 2^-9
    for name, option in (("fused", []), ("autograd", ["kernels.stepper=autograd"])):
        run = tmp_path / name
        assert main(["train", *tiny, *option, exact, f"run.dir={run}"]) == 0
        (line,) = said(run)
        assert name in line
        saes.append(load_sae(run / "saes" / "main"))
    for one, two in zip(saes[0].parameters(), saes[1].parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4)


def test_what_cannot_be_fused_says_why_in_the_log_or_in_the_refusal(tiny, tmp_path, capsys):
    run = tmp_path / "run"
    assert main(["train", *tiny, "train.accumulate=2", f"run.dir={run}"]) == 0
    (line,) = said(run)
    assert "autograd" in line and "train.accumulate is 2" in line
    capsys.readouterr()
    refused = ["train.accumulate=2", "kernels.stepper=fused", f"run.dir={tmp_path / 'other'}"]
    assert main(["train", *tiny, *refused]) == 2
    error = capsys.readouterr().err
    assert (
        "kernels.stepper='fused'" in error and "train.accumulate is 2" in error and "Traceback" not in error
    )


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("kernels.backend=tritn", "did you mean triton"),
        ("kernels.stepper=fast", "auto, autograd or fused"),
        ("kernels.together=sometimes", "auto, always or never"),
        ("kernels=tritn", "did you mean triton"),
    ],
)
def test_unknown_kernels_are_refused_with_what_is_known(tiny, tmp_path, capsys, option, words):
    assert main(["train", *tiny, option, f"run.dir={tmp_path / 'run'}"]) == 2
    error = capsys.readouterr().err
    assert words in error and "Traceback" not in error


def test_a_run_may_go_on_with_other_kernels_and_is_warned(tiny, tmp_path, monkeypatch, capsys):
    run, save = tmp_path / "run", "checkpoint.every=5"
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        assert main(["train", *tiny, save, f"run.dir={run}"]) == 75
    again = ["kernels.stepper=autograd", "kernels.backend=reference", f"run.dir={run}"]
    assert main(["train", *tiny, save, *again]) == 0
    first, second = said(run)
    assert "fused" in first and "autograd" in second
    assert "kernels.stepper was 'auto' and is now 'autograd'" in capsys.readouterr().err


def test_saes_of_different_kinds_share_a_harvest_go_on_bit_for_bit_and_fuse_what_can_be(
    tiny, tmp_path, monkeypatch
):
    kinds = (
        "saes={a: {}, b: {sae: {activation: {name: jumprelu, target_l0: 4}}}, "
        "c: {sae: {name: matryoshka}}, d: {optim: {name: muon}}}"
    )
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert main(["train", *tiny, kinds, f"run.dir={whole}"]) == 0
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        assert main(["train", *tiny, kinds, f"run.dir={cut}"]) == 75
    assert main(["train", *tiny, kinds, f"run.dir={cut}"]) == 0
    for name in "abcd":
        one, other = (load_file(run / "saes" / name / "sae.safetensors") for run in (whole, cut))
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one), name
    log = (whole / "train.log").read_text()
    assert "steps of a are fused, the others go through autograd: b is not a linear SAE" in log
    # what a trains to does not depend on who trains beside it
    alone = tmp_path / "alone"
    assert main(["train", *tiny, f"run.dir={alone}"]) == 0
    one, other = (load_file(path / "sae.safetensors") for path in (whole / "saes/a", alone / "saes/main"))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_saes_of_a_grid_that_share_launches_end_with_the_bits_of_those_that_take_turns(
    tiny, tmp_path, monkeypatch
):
    grid, together = "grid={k: [2, 4], lr: [1e-3, 3e-3]}", "kernels.together=always"
    apart, cut = tmp_path / "apart", tmp_path / "cut"
    assert main(["train", *tiny, grid, f"run.dir={apart}"]) == 0
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        assert main(["train", *tiny, grid, together, f"run.dir={cut}"]) == 75
    assert main(["train", *tiny, grid, together, f"run.dir={cut}"]) == 0
    assert "share launches" not in (apart / "train.log").read_text()
    assert (cut / "train.log").read_text().count("4 SAEs share launches") == 2
    for sae in sorted((apart / "saes").iterdir()):
        one, other = (load_file(run / "saes" / sae.name / "sae.safetensors") for run in (apart, cut))
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one), sae.name


def test_rows_of_a_hook_are_cast_once_for_all_saes_that_read_it(tiny, tmp_path, monkeypatch):
    kinds = "saes={a: {}, b: {sae: {activation: {name: jumprelu, target_l0: 4}}}}"
    batch, seen = Member.batch, []

    def noted(member: Member, rows):
        seen.append(batch(member, rows))
        return seen[-1]

    monkeypatch.setattr(Member, "batch", noted)
    assert main(["train", *tiny, kinds, "model.dtype=bfloat16", f"run.dir={tmp_path / 'run'}"]) == 0
    assert len(seen) == 2 * 10 and {x.dtype for x, _ in seen} == {torch.float32}
    places = [x.data_ptr() for x, _ in seen]  # all are held, so no two are in one place
    assert len(set(places)) == 10 and all(x is y for x, y in seen)


STATES = ["optim.moments=bfloat16", "optim.clip_norm=lagged", "optim.rows=active", "optim.beta1=0"]


def test_a_run_with_every_optimizer_state_goes_on_bit_for_bit_and_with_no_other(
    tiny, tmp_path, monkeypatch, capsys
):
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    assert main(["train", *tiny, *STATES, f"run.dir={straight}"]) == 0
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        assert main(["train", *tiny, *STATES, f"run.dir={stopped}"]) == 75
    state = load_file(stopped / "checkpoints/step-00000005/state.safetensors")
    kept = {name.rsplit("/", 1)[-1]: t for name, t in state.items() if "/optimizer/state/#0/" in name}
    assert {name: t.dtype for name, t in kept.items()} == {
        "step": torch.float32,
        "exp_avg": torch.bfloat16,
        "exp_avg_sq": torch.bfloat16,
        "last_step": torch.int32,
        "grad_norm": torch.float32,
    }
    capsys.readouterr()
    for key, value in (("moments", "float32"), ("clip_norm", "exact"), ("rows", "all")):
        assert main(["train", *tiny, *STATES, f"optim.{key}={value}", f"run.dir={stopped}"]) == 2
        assert f"optim.{key}='{value}'" in capsys.readouterr().err
    assert main(["train", *tiny, *STATES, f"run.dir={stopped}"]) == 0
    one, two = (load_file(run / "saes/main/sae.safetensors") for run in (straight, stopped))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["optim.rows=active"], "optim.rows='active': expected all, or optim.beta1=0 instead of 0.9"),
        (["optim.moments=int8"], "optim.moments='int8': expected float32 or bfloat16"),
        (
            ["optim.clip_norm=lagged", "kernels.stepper=autograd"],
            "optim.clip_norm='lagged': expected exact, or fused steps, which cannot be had: "
            "kernels.stepper=autograd",
        ),
        (
            ["saes={a: {}, b: {optim: {moments: bfloat16}}}", "train.accumulate=2"],
            "optim.moments='bfloat16': expected float32, or fused steps, which cannot be had: "
            "train.accumulate is 2",
        ),
    ],
)
def test_optimizer_states_that_cannot_be_had_are_refused_in_one_line(tiny, tmp_path, capsys, options, words):
    assert main(["train", *tiny, *options, f"run.dir={tmp_path / 'run'}"]) == 2
    error = capsys.readouterr().err
    assert words in error and "Traceback" not in error


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="where there is a GPU, Triton does not take CPU tensors"
)
def test_rows_that_the_kernels_had_to_encode_again_are_in_the_log(tmp_path, no_pictures):
    # A row of zeros has the same pre-activation in every latent: more candidates than there is room for.
    rows = torch.randn(512, 8, generator=torch.Generator().manual_seed(0))
    rows[::4] = 0
    save_file({"rows": rows}, tmp_path / "rows.safetensors")
    source = ["source=tensors", f"source.paths=[{tmp_path / 'rows.safetensors'}]", "source.key=rows"]
    sizes = ["source.shard_tokens=32", "train.tokens=16", "train.batch_tokens=8", "eval.tokens=8"]
    sae = ["sae.d_sae=72", "sae.activation.k=1", "sae.b_dec_init=zeros"]
    run = [
        "kernels.backend=triton",
        "kernels.stepper=autograd",
        "logger.every=1",
        "run.threads=1",
        f"run.dir={tmp_path / 'run'}",
    ]
    assert main(["train", *source, *sizes, *sae, *run]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    logged = {
        line["step"]: line["kernels/fallback_rows"] for line in lines if "kernels/fallback_rows" in line
    }
    # Shards are shuffled, so the first batch has some of the zeros; then biases differ, and nothing is amiss.
    assert logged.keys() == {1, 2} and 1 <= logged[1] <= 8 and logged[2] == 0


def test_what_was_encoded_again_is_told_per_op_and_asking_does_not_import_triton():
    program = """
        import sys
        import torch
        from sae_kernels import batch_topk_encode, fallbacks, topk_encode, use_backend
        x, w, b = torch.zeros(20, 4), torch.randn(96, 4), torch.zeros(96)
        topk_encode(x, w, b, 1)
        assert fallbacks() == {} and "triton" not in sys.modules
        with use_backend("triton"):
            topk_encode(torch.randn(5, 4), w, b, 1)
            assert fallbacks() == {"fallback_rows": 0}
            topk_encode(x, w, b, 1)
            assert fallbacks() == {"fallback_rows": 20}
            from sae_kernels.triton import compress
            compress.batch_topk_encode(torch.randn(20, 4), w, b, 2, guess=1e9)
            assert fallbacks() == {"fallback_rows": 20, "fallback_batches": 1}
        from sae_kernels import cpu, cpu_bf16
        cpu.NATIVE_BF16, cpu_bf16.AGAIN = True, 1
        cpu.topk_encode(torch.zeros(7, 4).bfloat16(), w.bfloat16(), b, 1)
        assert fallbacks() == {"fallback_rows": 27, "fallback_batches": 1}
    """
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True, env=environment, timeout=110)
