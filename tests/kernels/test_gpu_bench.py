"""The benchmark for GPUs, tried without one: it checks, measures and reports, and times nothing wrong."""

import importlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sae_kernels import topk_encode, use_backend
from safetensors.torch import save_file

BENCH = Path(__file__).parents[2] / "kernels" / "bench"
MODULES = (
    "adversarial",
    "check",
    "curve",
    "ours",
    "peers",
    "plan",
    "problem",
    "reference",
    "report",
    "rounds",
    "state",
)
without_gpu = pytest.mark.skipif(
    torch.cuda.is_available(), reason="Triton compiles here: run the benchmark itself"
)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """The benchmark's modules, each under what comes after gpu_ in its name; one thread: all is tiny here."""
    monkeypatch.syspath_prepend(str(BENCH))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield SimpleNamespace(
        main=importlib.import_module("gpu"),
        **{name: importlib.import_module(f"gpu_{name}") for name in MODULES},
    )
    torch.set_num_threads(threads)


@pytest.fixture
def job(bench: SimpleNamespace, tmp_path: Path) -> dict[str, Any]:
    """What a worker is told, with the interpreter's shape in float64; ours on the fast backend."""
    reference = tmp_path / "reference.pt"
    bench.reference.write(bench.problem.PROBLEMS["tiny"], "cpu", reference)
    trials = list(bench.adversarial.TRIALS)
    return {"backend": "cpu", "adam_steps": 10, "adversarial": trials, "reference": str(reference)}


def main_case(bench: SimpleNamespace) -> dict[str, Any]:
    return bench.plan.cases("tiny", True, ["ours"])[0][0]


@without_gpu
@pytest.mark.timeout(600)
def test_a_dry_run_in_the_interpreter_checks_times_and_reports_every_part(tmp_path):
    report_file = tmp_path / "report.json"
    few = ["--warmup", "0", "--repeats", "1", "--rounds", "1", "--adam-steps", "1", "--adversarial"]
    command = [sys.executable, str(BENCH / "gpu.py"), "--device", "cpu", "--quick", *few]
    out = subprocess.run(
        [*command, "--curve-steps", "0", "--json", str(report_file)], capture_output=True, text=True
    )
    assert out.returncode == 0, out.stdout + out.stderr
    report = json.loads(report_file.read_text())
    assert report["about"]["device"] == "interpreter"
    assert report["ceilings"]["before"].keys() == report["ceilings"]["after"].keys()
    assert report["elapsed_s"] > 0
    ours, dense = report["results"]
    assert set(ours["errors"]) == {"topk_encode", "decode_residual", "latent_step", "after 1 steps"}
    assert ours["bits"] == dense["bits"] == "same"
    assert set(ours["stages"]) == set(ours["stage_shares"]) == {"encode", "decode", "update"}
    assert ours["times_gemm"] > 0 and ours["times_ours"] == 1 and ours["wave"] == dense["wave"]
    for result in (ours, dense):
        assert len(result["ms"]["rounds"]) == 1 and result["ms"]["median"] > 0
        assert result["first_step"]["loss"] < 0.01 and result["first_step"]["gradient"] < 0.05
        assert {"rows", "masters", "moments", "products"} <= set(result["state"])
    together = report["together"]
    assert together["saes"] == 2 and together["off"] < 0.01 and min(together["ms"].values()) > 0
    assert "ms in the interpreter" in out.stdout and "2 SAEs of" in out.stdout
    for row in ("ours split exact auto", "dense, eager, fp32 rows", "encode", "decode", "update"):
        assert any(line.strip().startswith(row) for line in out.stdout.splitlines()), row


def test_times_of_the_interpreter_are_kept_out_of_the_documentation(bench, monkeypatch, capsys):
    asked = ["gpu.py", "--device", "cpu", "--json", str(BENCH.parents[1] / "docs" / "benchmarks" / "x.json")]
    monkeypatch.setattr(sys, "argv", asked)
    with pytest.raises(SystemExit):
        bench.main.main()
    assert "do not belong in docs" in capsys.readouterr().err


def spoil_step(field: str):
    """A `latent_step` that leaves one number of one tensor wrong."""

    def spoilt(step, *args):
        norm = step.true_update(*args)
        weight = getattr(step.latents, field)
        (weight.first if weight.first.dim() == 1 else weight.first[:, 0]).mul_(1.5)
        return norm

    return spoilt


@pytest.mark.parametrize("op", ["encode", "decode", "w_enc", "w_dec", "b_enc", "b_dec"])
def test_a_wrong_op_is_found_before_it_is_timed(bench, monkeypatch, op):
    p = bench.problem.PROBLEMS["tiny"]
    batches = bench.problem.make_batches(p, bench.problem.dictionary(p, "cpu"))
    step = bench.ours.OurStep
    true_encode, true_decode = step.encode, step.decode
    monkeypatch.setattr(step, "true_update", step.update, raising=False)

    def encode(self, i):  # the second best in place of the best
        x, _, _ = true_encode(self, i)
        more, latents = topk_encode(x, self.latents.w_enc.product(), self.latents.b_enc.value, self.p.k + 1)
        order = more.argsort(dim=1, descending=True)[:, 1:]
        return x, more.gather(1, order), latents.gather(1, order)

    def decode(self, i, values, indices):
        residual, loss, dots = true_decode(self, i, values, indices)
        return residual * 1.01, loss, dots

    def run():
        with use_backend("cpu"):  # the same code on what is fast here: only the check is under test
            return bench.ours.check(
                p, "split", "exact", batches, bench.state.make_latents(p, "split", "cpu", True)
            )

    run()
    spoilt = {"encode": encode, "decode": decode}.get(op)
    monkeypatch.setattr(step, op if spoilt else "update", spoilt or spoil_step(op))
    expected = {"encode": "topk_encode", "decode": "decode_residual"}.get(op, f"latent_step: .*{op}")
    with pytest.raises(bench.check.Wrong, match=expected):
        run()


@pytest.mark.parametrize(
    ("fmt", "ten_clip"), [("fp32", "exact"), ("split", "lag1"), ("bf16-moments", "none"), ("lazy", "lag1")]
)
def test_one_step_and_ten_of_the_reference_are_accepted_in_every_format(bench, fmt, ten_clip):
    p = bench.problem.PROBLEMS["tiny"]
    batches = bench.problem.make_batches(p, bench.problem.dictionary(p, "cpu"))
    with use_backend("reference"):
        for clip in ("exact", "lag1", "none"):
            latents = bench.state.make_latents(p, fmt, "cpu", True)
            errors = bench.ours.check(p, fmt, clip, batches, latents)
            assert errors["latent_step"]["norm"] < 1e-5
        ten = bench.ours.ten_steps(p, fmt, ten_clip, batches, 10)
    limit = 0.02 if fmt == "bf16-moments" else 1e-3  # of moments that are rounded ten times
    assert max(v for k, v in ten["errors"].items() if k.startswith(("w_enc.", "b_"))) < limit


@pytest.mark.parametrize("wrong", ["beta2", "step count"])
def test_an_optimizer_that_is_right_for_one_step_only_is_found_after_ten(bench, monkeypatch, wrong):
    p = bench.problem.PROBLEMS["tiny"]
    batches = bench.problem.make_batches(p, bench.problem.dictionary(p, "cpu"))
    update = bench.ours.OurStep.update

    def spoilt(step, *args):
        done = int(step.latents.step)
        if done > 0 and wrong == "beta2":
            step.latents.w_enc.second.mul_(0.99)
        if done > 0 and wrong == "step count":
            step.latents.step.fill_(1)
        return update(step, *args)

    monkeypatch.setattr(bench.ours.OurStep, "update", spoilt)
    with use_backend("cpu"), pytest.raises(bench.check.Wrong, match=r"after 10 steps: .* w_enc"):
        bench.ours.ten_steps(p, "split", "exact", batches, 10)


def test_every_hostile_input_is_survived_and_checked_in_full(bench, job):
    found = bench.ours.prepare(bench.problem.PROBLEMS["tiny"], main_case(bench), "cpu", job).found
    assert set(found["adversarial"]) == set(bench.adversarial.TRIALS)
    assert all(isinstance(error, float) for error in found["adversarial"].values())
    assert found["bits"] == "same"
    assert found["first_step"]["gradient"] < 0.05


@pytest.mark.parametrize("fmt", ["fp32", "split"])
def test_hostile_weights_are_written_in_parts(bench, monkeypatch, fmt):
    """With a part of three latents, which does not divide the groups of two that tie."""
    p = bench.problem.PROBLEMS["tiny"]
    x = bench.problem.make_batches(p, bench.problem.dictionary(p, "cpu"))[0]
    before = bench.state.make_latents(p, fmt, "cpu").w_enc.master()
    monkeypatch.setattr(bench.adversarial, "CHUNK", 3 * p.d)
    equal, tied = (bench.state.make_latents(p, fmt, "cpu") for _ in "ab")
    bench.adversarial.equal_latents(p, equal, x)
    assert torch.equal(equal.w_enc.master(), before[:1].expand_as(before))
    bench.adversarial.ties_at_k(p, tied, x)
    assert p.k == 3 and torch.equal(
        tied.w_enc.master(), before[torch.arange(p.f) // 2 * 2].bfloat16().float()
    )
    assert torch.equal(tied.w_enc.product().float(), tied.w_enc.master())


def test_a_report_is_whole_after_every_addition(bench, tmp_path):
    file = tmp_path / "docs" / "report.json"
    p = bench.plan.problem("tiny")
    report = bench.report.Report(file, "cpu", "cpu", {"tiny": p})
    top = {f"{what}_tiny_{unit}": 2.0 for what, unit in (("gather_x", "gb_s"), ("gather_w", "gb_s"))}
    top |= {"gemm_tiny_tflops": 2.0, "copy_gb_s": 2.0}
    report.ceilings("before", {"ceilings": top})
    timed = {"impl": "dense", "shape": "tiny", "ms": {"median": 5.0}}
    report.add([timed, {"impl": "ours", "shape": "tiny", "failed": "wrong: w_dec"}])
    first = json.loads(file.read_text())
    assert first["results"][0]["times_gemm"] > 0 and first["ceilings"] == {"before": top}
    report.ceilings("after", {"ceilings": {name: 2 * each for name, each in top.items()}})
    last = json.loads(file.read_text())
    assert last["results"][0]["times_gemm"] == pytest.approx(1.5 * first["results"][0]["times_gemm"])
    assert [path.name for path in file.parent.iterdir()] == ["report.json"]
    report.ceilings("after", {"failed": "ended with 1"})
    assert report.all["results"][0]["times_gemm"] == pytest.approx(first["results"][0]["times_gemm"])


def test_a_reference_that_could_not_be_made_is_told_and_others_are_compared_without(
    bench, monkeypatch, tmp_path
):
    def full(p: Any, device: str, path: str) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    worker = importlib.import_module("gpu_worker")
    monkeypatch.setattr(bench.reference, "write", full)
    file = str(tmp_path / "none.pt")
    case = {"impl": "reference", "shapes": ["tiny"]}
    told = worker.special({"case": case, "device": "cpu", "rows": "", "references": {"tiny": file}})
    assert told == {"failed": "tiny takes more memory than there is"}
    report = {"results": [], "ceilings": {}, "references": told}
    assert bench.main.failures(report) == [f"float64 references: {told['failed']}"]
    assert bench.reference.compare(file, 1.0, None) == {}


@pytest.mark.parametrize(
    ("trial", "spoil"),
    [
        ("all dead", lambda step: setattr(step, "dead", None)),
        ("negative", lambda step: step.latents.b_enc.value.zero_()),
        ("huge row", lambda step: setattr(step, "scale", step.scale * 1.001)),
        ("one everywhere", lambda step: step.counters.counts.add_(1)),
    ],
)
def test_a_step_that_does_not_survive_a_hostile_input_is_named(bench, monkeypatch, trial, spoil):
    p = bench.problem.PROBLEMS["tiny"]
    x = bench.problem.make_batches(p, bench.problem.dictionary(p, "cpu"))[0]
    update = bench.ours.OurStep.update

    def spoilt(step, *args):
        spoil(step)
        return update(step, *args)

    monkeypatch.setattr(bench.ours.OurStep, "update", spoilt)
    with use_backend("cpu"), pytest.raises(bench.check.Wrong, match=f"{trial}: latent_step"):
        bench.ours.adversarial(p, "split", "exact", x, [trial], encoder_only=False)


def test_two_runs_that_differ_in_one_bit_are_not_timed(bench, job, monkeypatch):
    make, made = bench.ours.make_latents, []

    def flipped(*args, **options):
        latents = make(*args, **options)
        made.append(latents)
        if len(made) == 3:  # the first is checked, the second followed over ten steps
            latents.w_enc.remainder.view(-1)[7] ^= 1
        return latents

    monkeypatch.setattr(bench.ours, "make_latents", flipped)
    with pytest.raises(bench.check.Wrong, match="differ in their bits"):
        bench.ours.prepare(bench.problem.PROBLEMS["tiny"], main_case(bench), "cpu", job | {"adversarial": []})


@pytest.mark.parametrize(
    ("impl", "variant", "rows"),
    [("trainer", "no dead", "fp32"), ("trainer", "10% dead", "fp32"), ("dense", "eager", "bf16")],
)
def test_a_peer_starts_from_the_same_weights_and_its_first_step_is_compared(bench, job, impl, variant, rows):
    case = {"impl": impl, "variant": variant, "rows": rows, "shape": "tiny"}
    prepared = bench.peers.prepare(bench.problem.PROBLEMS["tiny"], case, "cpu", job)
    prepared.parts["step"](0)
    assert prepared.found["first_step"]["loss"] < 0.01
    assert prepared.found["first_step"].get("gradient", 0.0) < 0.05
    assert ("gradient" in prepared.found["first_step"]) == (variant != "10% dead")
    assert prepared.found["bits"] == "same" and prepared.found["runs_differ_by"] == 0
    assert prepared.found["state"]["rows"] == rows


def test_a_gradient_that_points_the_other_way_shows_beside_the_reference(bench, job):
    want = torch.load(job["reference"])
    moment = torch.zeros(30, 20, dtype=torch.float64)
    moment[want["picked"]] = -want["d_w_enc"]
    assert bench.reference.compare(job["reference"], want["mse"], moment) == {
        "loss": 0.0,
        "gradient": pytest.approx(0.0, abs=1e-9),
    }
    assert bench.reference.compare(job["reference"], want["mse"], -3 * moment)["gradient"] == pytest.approx(2)


@pytest.mark.parametrize(("factor", "agree"), [(1.0, True), (1.1, False)])
def test_our_loss_curve_ends_where_that_of_float32_does_unless_a_step_is_wrong(
    bench, monkeypatch, factor, agree
):
    trainer = importlib.import_module("gpu_trainer")
    build = trainer.trainer
    monkeypatch.setattr(trainer, "trainer", lambda *a, lr: build(*a, lr=lr * factor))
    found = bench.curve.run("cpu", 40, "cpu")
    assert len(found["fvu"]["ours"]) == len(found["fvu"]["dense"]) == 4
    assert found["fvu"]["ours"][-1] < 0.95 * found["fvu"]["ours"][0]
    assert ("wrong" not in found) == agree, found["off"]


def test_waves_fit_the_memory_and_have_our_main_case_beside_the_others(bench):
    plan, free = bench.plan, 140e9
    for shape in plan.SHAPES:
        p = plan.problem(shape)
        levels = plan.cases(shape, False, None)
        assert [c["impl"] for c in levels[0]] == ["ours", "ours", "trainer", "dense", "sparsify"]
        for level in levels:
            fits = [c for c in level if plan.least_bytes(p, c) <= 0.97 * free]
            waves = plan.waves(p, fits, free)
            timed = [c for wave in waves for c in wave if not c.get("anchor")]
            assert timed == [c for c in fits if not c.get("anchor")]
            for wave in waves:
                held = sum(plan.held_bytes(p, c) for c in wave)
                assert len(wave) == 1 or held + plan.CHECK_BYTES < 0.93 * free
                if shape in ("A", "S"):
                    assert wave[0]["impl"] == "ours" and wave[0]["encoder"] == "auto"


@without_gpu
def test_a_worker_that_dies_is_reported_and_the_wave_goes_on(bench, tmp_path, job):
    rounds = bench.rounds
    cases = [c for c in bench.plan.cases("tiny", False, ["dense", "sparsify"])[0]]
    job |= {"device": "cpu", "warmup": 0, "rows": ""}
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho the first line\necho an error\nexit 1\n")
    broken.chmod(0o755)
    session = rounds.Session(job, time.perf_counter() + 3000, tmp_path, {"sparsify": str(broken)}, 3, 4)
    session.reference("tiny").write_bytes(Path(job.pop("reference")).read_bytes())
    dense, sparsify = session.wave(cases)
    assert sparsify["failed"] == "ended with 1: an error"
    assert sparsify["log"] == "the first line\nan error\n"
    assert len(dense["ms"]["rounds"]) == 3 and dense["ms"]["repeats"] == 6


def test_recorded_rows_are_used_at_the_shape_of_their_width(bench, tmp_path):
    file = tmp_path / "rows.safetensors"
    save_file({"rows": (torch.randn(700, 768) + 5).bfloat16()}, file)
    assert bench.plan.recorded_shapes(file, ["A", "B"]) == ["A+rows"]
    with pytest.raises(ValueError, match="width 768: expected that of a shape, A 768"):
        bench.plan.recorded_shapes(file, ["B"])
    p = bench.plan.problem("A+rows", str(file))
    p = bench.problem.Problem(p.name, 256, p.d, 512, 8, p.rows)
    w = bench.problem.dictionary(p, "cpu")
    batches = bench.problem.make_batches(p, w)
    assert torch.allclose(w.norm(dim=1), torch.ones(512))
    assert [tuple(x.shape) for x in batches] == [(256, 768)] * bench.problem.NUM_BATCHES
    seen = torch.cat(batches[:2]).float()  # rows are centred, and none comes twice while others are left
    assert seen.mean().abs() < 0.01
    assert len(seen.unique(dim=0)) == 512


def test_rows_are_recorded_from_a_harvest(bench, tmp_path, capsys):
    from sae_train.cli.main import main  # Hydra: only this test needs it

    rows = "source=synthetic source.synthetic={d:24,features:32,groups:4,group_size:4,l0:2,rows:2000}"
    rows += " model=any model.name=none source.shard_tokens=64 train.batch_tokens=32"
    asked = ["harvest", *rows.split(), "train.tokens=256", "eval.tokens=64", f"out={tmp_path / 'shards'}"]
    assert main(asked) == 0, capsys.readouterr().err
    record = importlib.import_module("record_rows")
    file = tmp_path / "rows.safetensors"
    assert record.record(tmp_path / "shards", file, rows=100) == (100, 24)
    p = bench.plan.problem("tiny+rows", str(file))
    assert p.d == 24
    assert bench.problem.recorded_rows(p, "cpu").norm(dim=1).mean() == pytest.approx((2 * p.k) ** 0.5)


def test_a_digest_sees_one_bit_and_the_order_of_equal_numbers(bench):
    digest = bench.problem.digest
    one = torch.arange(1000, dtype=torch.float32)
    other = one.clone()
    other.view(torch.int32)[567] ^= 1
    assert digest([one]) == digest([one.clone()])
    assert len({digest([t]) for t in (one, other, one.flip(0))}) == 3
    assert digest([one, other]) != digest([other, one])


def test_rows_fire_busy_and_rare_latents(bench):
    problem = bench.problem
    p = problem.Problem("test", 512, 64, 4096, 32)
    w = problem.dictionary(p, "cpu")
    batches = problem.make_batches(p, w)
    assert [tuple(x.shape) for x in batches] == [(512, 64)] * problem.NUM_BATCHES
    assert not torch.equal(batches[0], batches[1])
    with use_backend("cpu"):
        _, indices = topk_encode(batches[0].float(), w, torch.zeros(p.f), p.k)
    counts = indices.flatten().bincount(minlength=p.f)
    assert counts.max() > 10 * counts.float().mean()
    assert 0.05 < (counts == 0).float().mean() < 0.9
