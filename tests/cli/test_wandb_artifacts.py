"""What a run with wandb leaves in its offline record: weights, statistics and the report, where they lie."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sae_train.cli.artifacts import artifact_name

TINY = [
    *("source=synthetic", "hook=auto", "source.synthetic.d=16", "source.synthetic.features=32"),
    *("source.synthetic.rows=1000", "source.synthetic.groups=4", "source.shard_tokens=128", "source.lanes=2"),
    *("train.tokens=256", "train.batch_tokens=32", "eval.tokens=64", "sae.d_sae=48", "sae.activation.k=4"),
    *("run.threads=1", "logger.wandb=true", "saes={a: {}, b: {sae: {activation: {k: 2}}}}"),
]

WITHOUT_PICTURES = """
import sys
from pathlib import Path
from matplotlib.figure import Figure
from sae_train.cli.main import main
Figure.savefig = lambda self, path, **kwargs: Path(path).touch()
sys.exit(main(sys.argv[1:]))
"""


def manifest(run: Path) -> dict[tuple[str, tuple[str, ...]], tuple[str, dict[str, str]]]:
    """(name, aliases) -> type, {name of a file: where it lies}, of each artifact in the offline record."""
    from unit.test_log import wandb_records

    (file,) = run.glob("wandb/offline-run-*/*.wandb")
    found = {}
    for record in wandb_records(file):
        logged = None
        if record.WhichOneof("record_type") == "artifact":
            logged = record.artifact
        elif record.request.WhichOneof("request_type") == "log_artifact":
            logged = record.request.log_artifact.artifact
        if logged is not None:
            contents = {entry.path: entry.local_path for entry in logged.manifest.contents}
            found[logged.name, tuple(logged.aliases)] = (logged.type, contents)
    return found


def test_an_offline_run_records_its_saes_their_sparsity_and_the_report(tmp_path):
    pytest.importorskip("wandb")
    run, home = tmp_path / "run", tmp_path / "home"
    home.mkdir()
    known = os.environ | {"HOME": str(home), "XDG_CACHE_HOME": str(home / "cache"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", WITHOUT_PICTURES, "train", *TINY, f"run.dir={run}"]
    done = subprocess.run(command, env=known, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "stopped" not in done.stderr and "left behind" not in done.stderr, done.stderr
    found = manifest(run)
    by_type: dict[str, list[str]] = {}
    for (name, aliases), (kind, contents) in found.items():
        by_type.setdefault(kind, []).append(name)
        for inside, place in contents.items():
            assert Path(place).is_file(), f"{name}: {inside} is not where the record says"
        if kind == "model":
            (alias,) = set(aliases) - {"latest"}
            assert contents["sae.safetensors"] == str(run / "saes" / alias / "sae.safetensors"), "not a copy"
            assert {"config.json", "features.safetensors", "metrics.json"} <= contents.keys()
        elif kind == "log_feature_sparsity":
            (alias,) = set(aliases) - {"latest"}
            rate = load_file(run / "saes" / alias / "features.safetensors")["train_density"].double()
            sparsity = load_file(contents["sparsity.safetensors"])["sparsity"]
            assert torch.allclose(sparsity.double(), (rate + 1e-10).log10(), atol=1e-6)
            assert bool((sparsity <= 0).all())
        else:
            assert contents == {"report.html": str(run / "report.html")}
    assert {kind: len(names) for kind, names in by_type.items()} == {
        "model": 2,
        "log_feature_sparsity": 2,
        "report": 1,
    }
    (name,) = set(by_type["model"])
    assert set(by_type["log_feature_sparsity"]) == {f"{name}_log_feature_sparsity"}
    assert name == artifact_name(json.loads((run / "saes/a/config.json").read_text()))
    assert not [path for path in home.rglob("*.safetensors")], "weights are not copied into the home folder"


@pytest.mark.parametrize(
    ("meta", "name"),
    [
        (
            {"model": "google/gemma-2b", "hook": "resid_post.6"},
            "sae_google__gemma-2b_blocks.6.hook_resid_post_48",
        ),
        ({"model": "/home/me/llama", "hook": "resid_post.6"}, "sae_llama_blocks.6.hook_resid_post_48"),
        ({"model": "gpt2", "hook": "mlp_in.1+mlp_out.1"}, "sae_gpt2_mlp_in.1_mlp_out.1_48"),
        ({"source": "synthetic", "hook": "auto"}, "sae_synthetic_auto_48"),
    ],
)
def test_an_artifact_is_named_as_saelens_names_it(meta, name):
    hooks = {"resid_post.6": {"transformer_lens": "blocks.6.hook_resid_post"}}
    assert artifact_name({"sae": {"d_sae": 48}, "meta": {"hooks": hooks} | meta}) == name
