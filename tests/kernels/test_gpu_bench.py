"""The benchmark for GPUs, tried without one: it checks, measures and reports, and times nothing wrong."""

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from sae_kernels import topk_encode, use_backend

BENCH = Path(__file__).parents[2] / "kernels" / "bench"
without_gpu = pytest.mark.skipif(
    torch.cuda.is_available(), reason="Triton compiles here: run the benchmark itself"
)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    """The benchmark's modules by name."""
    monkeypatch.syspath_prepend(str(BENCH))
    return {name: importlib.import_module(name) for name in ("gpu", "gpu_ours", "gpu_problem", "gpu_check")}


@without_gpu
@pytest.mark.timeout(600)
def test_a_dry_run_in_the_interpreter_checks_times_and_reports_every_part(tmp_path):
    report_file = tmp_path / "report.json"
    command = [sys.executable, str(BENCH / "gpu.py"), "--device", "cpu", "--quick", "--warmup", "0"]
    out = subprocess.run(
        [*command, "--repeats", "1", "--json", str(report_file)], capture_output=True, text=True
    )
    assert out.returncode == 0, out.stdout + out.stderr
    report = json.loads(report_file.read_text())
    assert report["about"]["device"] == "interpreter"
    ours, dense = report["results"]
    assert set(ours["errors"]) == {"topk_encode", "decode_residual", "latent_step"}
    assert ours["same_bits_twice"]
    assert set(ours["stages"]) == set(ours["stage_shares"]) == {"encode", "decode", "update"}
    assert ours["ms"]["median"] > 0 and ours["times_gemm"] > 0 and dense["ms"]["median"] > 0
    assert "ms in the interpreter" in out.stdout
    for row in ("ours split exact auto", "dense", "encode", "decode", "update"):
        assert any(line.strip().startswith(row) for line in out.stdout.splitlines()), row


def test_times_of_the_interpreter_are_kept_out_of_the_documentation(bench, monkeypatch, capsys):
    asked = ["gpu.py", "--device", "cpu", "--json", str(BENCH.parents[1] / "docs" / "benchmarks" / "x.json")]
    monkeypatch.setattr(sys, "argv", asked)
    with pytest.raises(SystemExit):
        bench["gpu"].main()
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
    problem, ours = bench["gpu_problem"], bench["gpu_ours"]
    p = problem.PROBLEMS["tiny"]
    batches = problem.make_batches(p, problem.dictionary(p, "cpu"))
    step = ours.OurStep
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
            return ours.check(p, "split", "exact", batches, problem.make_latents(p, "split", "cpu", True))

    run()
    spoilt = {"encode": encode, "decode": decode}.get(op)
    monkeypatch.setattr(step, op if spoilt else "update", spoilt or spoil_step(op))
    expected = {"encode": "topk_encode", "decode": "decode_residual"}.get(op, f"latent_step: .*{op}")
    with pytest.raises(bench["gpu_check"].Wrong, match=expected):
        run()


@pytest.mark.parametrize("fmt", ["fp32", "split", "bf16-moments", "lazy"])
def test_the_check_accepts_the_reference_in_every_format(bench, fmt):
    problem = bench["gpu_problem"]
    p = problem.PROBLEMS["tiny"]
    batches = problem.make_batches(p, problem.dictionary(p, "cpu"))
    for clip in ("exact", "lag1", "none"):
        with use_backend("reference"):
            latents = problem.make_latents(p, fmt, "cpu", True)
            errors = bench["gpu_ours"].check(p, fmt, clip, batches, latents)
        assert errors["latent_step"]["norm"] < 1e-5


@without_gpu
@pytest.mark.parametrize("name", ["trainer", "trainer_dead_10"])
def test_the_step_of_the_trainer_is_timed_too(bench, name):
    clock = importlib.import_module("gpu_timing").Clock("cpu", warmup=0, repeats=1)
    found = importlib.import_module("gpu_peers").run(bench["gpu_problem"].PROBLEMS["tiny"], name, clock)
    assert found["ms"]["median"] > 0
    assert 0 < found["loss"][0] < 10


def test_a_digest_sees_one_bit_and_the_order_of_equal_numbers(bench):
    digest = bench["gpu_problem"].digest
    one = torch.arange(1000, dtype=torch.float32)
    other = one.clone()
    other.view(torch.int32)[567] ^= 1
    assert digest([one]) == digest([one.clone()])
    assert len({digest([t]) for t in (one, other, one.flip(0))}) == 3
    assert digest([one, other]) != digest([other, one])


def test_rows_fire_busy_and_rare_latents(bench):
    problem = bench["gpu_problem"]
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
