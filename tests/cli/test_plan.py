"""`sae-train plan` beside what runs really take, and the refusal of what cannot fit."""

import json
import os
import subprocess
import sys

import pytest

from sae_train.cli import fit
from sae_train.cli.main import main
from sae_train.config import Config
from sae_train.harvest.model import ModelConfig
from sae_train.plan import MARGIN
from sae_train.plan_job import GIB

ROWS = ["source=synthetic", "hook=auto", "source.synthetic.d=256", "source.shard_tokens=8192"]
ROWS += ["eval.tokens=1024", "run.threads=1", "checkpoint.every=2"]
FUSED = ["sae.d_sae=32768", "train.batch_tokens=256"]
DENSE = ["sae.d_sae=8192", "sae/activation=jumprelu", "train.batch_tokens=1024"]


def told(capsys: pytest.CaptureFixture[str], *args: str) -> dict:
    assert main(["plan", *args, "format=json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    "args",
    [
        pytest.param(FUSED, id="fused steps and a checkpoint beside them"),
        pytest.param(DENSE, id="dense codes through autograd", marks=pytest.mark.slow),
    ],
)
def test_the_planned_memory_is_within_the_margin_of_a_real_run(args, tmp_path, capsys):
    """In a process of its own, as resident memory is; with a checkpoint and an evaluation half way."""
    batch = int(args[-1].partition("=")[2])
    keys = [*ROWS, *args, f"train.tokens={4 * batch}", "eval.every=3"]
    plan = told(capsys, *keys)
    run = [sys.executable, "-m", "sae_train", "train", *keys, f"run.dir={tmp_path / 'run'}"]
    done = subprocess.run(
        run, capture_output=True, text=True, timeout=110, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    measured = json.loads((tmp_path / "run" / "summary.json").read_text())["peak_rss_bytes"]
    sae = sum(
        plan["parts"][f"SAEs, {part}"]["training"] for part in ("weights", "optimizer state", "gradients")
    )
    step = plan["parts"]["SAEs, activations of a step"]["training"]
    assert sae + step > measured / 5  # else it would be the libraries that are planned so well
    assert abs(plan["peak_bytes"] / measured - 1) < MARGIN, (plan["peak_bytes"], measured, plan["parts"])


def test_a_plan_of_a_language_model_needs_no_weights_and_no_text(tiny_model_dir, tmp_path, capsys):
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_bytes((tiny_model_dir("llama") / "config.json").read_bytes())
    keys = [f"model.name={bare}", "corpus.name=nowhere", "hook=resid_post.1", "corpus.context_length=16"]
    plan = told(capsys, *keys, "sae.d_sae=48", "sae.activation.k=4", "train.tokens=4096")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir("llama"))
    weights = sum(p.numel() for p in model.parameters())
    assert plan["parts"]["language model, weights"]["training"] in (4 * weights, 2 * weights)
    assert plan["parts"]["SAEs, weights"]["training"] == 4 * (2 * 48 * 32 + 48 + 32) + 4
    deeper = told(
        capsys, *keys, "hook=resid_post.2", "sae.d_sae=48", "sae.activation.k=4", "train.tokens=4096"
    )
    assert deeper["rows_per_s"] < plan["rows_per_s"]
    assert main(["plan", *keys, "hook=resid_post.99"]) == 2
    assert "resid_post.99" in capsys.readouterr().err


@pytest.mark.parametrize(("model_type", "experts"), [("mixtral", 6), ("qwen3_moe", 5), ("gpt_oss", 4)])
def test_a_token_goes_through_the_experts_that_it_is_sent_to(model_type, experts, tmp_path):
    from transformers import AutoConfig

    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "vocab_size": 64, "head_dim": 8}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts_per_tok": 2}
    sizes |= {"intermediate_size": 40, "moe_intermediate_size": 40, "num_local_experts": experts}
    AutoConfig.for_model(model_type, pad_token_id=0, bos_token_id=1, eos_token_id=2, **sizes).save_pretrained(
        tmp_path
    )
    config = Config(model=ModelConfig(name=str(tmp_path)))
    shape, dims = fit.model_shape(config, ["resid_post.1"], low=False)
    attention, router, expert = 2 * 32 * 32 + 2 * 32 * 16, 32 * experts, 3 * 32 * 40
    assert shape.used == 2 * (attention + router + 2 * expert)
    assert shape.widest == 2 * 2 * 40
    assert dims == {"resid_post.1": 32}


def test_a_plan_says_what_does_not_fit_and_what_would_help(capsys):
    keys = [*ROWS, "sae.d_sae=1_048_576", "train.tokens=10_000_000"]
    assert main(["plan", *keys, "device=h100", "device_gib=4"]) == 0
    out = capsys.readouterr().out
    assert "does not fit: needs" in out and "the largest part is" in out and "mesh.feature=8" in out
    assert "computed, not measured" in out
    assert main(["plan", *keys, "device=h100", "processes=8", "mesh.feature=8"]) == 0
    assert "\nfits: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["processes=0"], "processes=0: expected a number of processes"),
        (["processes=many"], "processes='many': expected a whole number"),
        (["device=tpu"], "device='tpu': expected cpu, a100"),
        (["device_gib=-1"], "device_gib=-1.0: expected a number of GiB"),
        (["format=xml"], "format='xml': expected table or json"),
        (["processes=3", "mesh.feature=2"], "processes=3: expected a multiple"),
        (["sae.d_sea=4"], "sae.d_sea"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_plan_of_what_cannot_be_is_refused_in_one_line(args, named, capsys):
    assert main(["plan", *ROWS, "sae.d_sae=512", *args]) == 2
    told = capsys.readouterr().err
    assert named in told and told.count("\n") == 1


@pytest.mark.usefixtures("no_pictures")
def test_a_run_that_cannot_fit_is_refused_with_the_numbers_before_it_starts(tmp_path, capsys, monkeypatch):
    keys = [
        *ROWS,
        "sae.d_sae=4096",
        "train.tokens=1024",
        "train.batch_tokens=512",
        f"run.dir={tmp_path / 'run'}",
    ]
    monkeypatch.setattr(fit, "device_bytes", lambda device, processes: GIB // 8)
    assert main(["train", *keys]) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert "memory='0." in told and "at most 0.1 GiB" in told and "the largest part is" in told
    assert not (tmp_path / "run" / "checkpoints").exists()
    monkeypatch.setattr(fit, "device_bytes", lambda device, processes: None)
    assert main(["train", *keys, "eval.every=0"]) == 0  # where memory cannot be known nothing is refused


def test_a_container_s_limit_counts_where_it_is_less_than_the_machine_s(tmp_path, monkeypatch):
    import torch

    limit = tmp_path / "memory.max"
    limit.write_text(f"{GIB}\n")
    monkeypatch.setattr(fit, "CGROUP_LIMITS", (str(limit), str(tmp_path / "none")))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert fit.device_bytes(torch.device("cpu"), 1) == GIB
    assert fit.device_bytes(torch.device("cpu"), 4) == GIB // 4
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert fit.device_bytes(torch.device("cpu"), 4) == GIB // 2
    limit.write_text("max\n")
    assert fit.device_bytes(torch.device("cpu"), 4) > GIB // 2
