"""SAEs of ours and of other libraries, trained on the same rows and judged by the same judge.

    make bench-quality ARGS="prose FOLDER"        SmolLM2-135M after block 12, prose of eight kinds
    make bench-quality ARGS="synthetic FOLDER"    a known dictionary in superposition

FOLDER gets everything; what is there already is not done again, so an interrupted call goes on. Rows are
harvested once; ours trains from them with its defaults, each other library with its own trainer in an
environment of its own, with its defaults and with settings that suit the budget (see peers/), in batches of
2,048 rows of prose or 512 synthetic ones. Each SAE is
brought to one form, held against what its library itself reconstructs, and judged on held-out documents by
`sae-train eval`. Every SAE gets the rows in the same order; seeds decide on its first weights.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from sae_train.activations.base import ActivationConfig
from sae_train.activations.batch_topk import BatchTopKConfig
from sae_train.activations.jumprelu import JumpReLUConfig
from sae_train.activations.topk import TopKConfig
from sae_train.files import write_json, write_tensors
from sae_train.sae.io import save_sae
from sae_train.sae.linear import LinearConfig, LinearSAE
from sae_train.shards.disk import DiskShards

HERE = Path(__file__).parent
RECIPES = {
    "topk": ("sae/activation=topk", "sae.activation.k={k}"),
    "batch_topk": ("sae/activation=batch_topk", "sae.activation.k={k}"),
    "jumprelu": ("sae/activation=jumprelu", "sae.activation.target_l0={k}"),
    "matryoshka": ("sae=matryoshka", "sae/activation=topk", "sae.activation.k={k}"),
}
"""Of ours; everything that is not said here is a default."""
PEERS = {
    "topk": ("sparsify", "dictionary_learning", "saelens"),
    "batch_topk": ("dictionary_learning",),
    "jumprelu": ("dictionary_learning",),
}
VARIANTS = ("default", "tuned", "tuned_small")
SMALL_BATCH = 512
"""Of the variant tuned_small: as many rows as ours chooses for this budget."""
TOLERANCE = 1e-4
"""Largest relative difference between what a library reconstructs and what its weights, as read here, do."""
PROSE = [
    *(
        "model=smollm2",
        "model.dtype=float32",
        "corpus=any",
        "hook=resid_post.12",
        "corpus.context_length=256",
    ),
    *("corpus.holdout=0.08", "corpus.shuffle_windows=1024"),
    *("eval.tokens=50_000", "eval.ce_tokens=12_288", "eval.every=0"),
]
SYNTHETIC = ["source=synthetic", "source.holdout=0.02", "eval.tokens=20_000", "eval.every=0"]
"""With its defaults: 256 features in 64 dimensions, in groups of 8, four of them in a row on average."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("kind", choices=("prose", "synthetic"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokens", type=int, help="default 803,000 of prose, 1,000,000 synthetic")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--recipes", nargs="+", default=["topk"], choices=tuple(RECIPES))
    parser.add_argument("--variants", nargs="+", default=["default", "tuned"], choices=VARIANTS)
    parser.add_argument("--peers", nargs="*", default=list(PEERS["topk"]))
    parser.add_argument("--peer-python", action="append", default=[], metavar="NAME=PATH")
    parser.add_argument("--json", type=Path, help="write all numbers here too")
    a = parser.parse_args()
    bench = Bench(a.kind, a.folder.resolve(), a.tokens or (803_000 if a.kind == "prose" else 1_000_000))
    bench.harvest()
    bench.start_judge()
    # Absolute, for they are started from another folder; links are kept: what they lead to has no packages.
    named = (item.split("=", 1) for item in a.peer_python)
    pythons = {name: str(Path(path).absolute()) for name, path in named}
    for seed in a.seeds:
        for recipe in a.recipes:
            bench.ours(recipe, seed)
            for peer in (p for p in PEERS.get(recipe, ()) if p in pythons and p in a.peers):
                for variant in a.variants:
                    bench.peer(pythons[peer], peer, recipe, variant, seed)
    results = bench.judge()
    print(table(results))
    if a.json:
        write_json(
            a.json, {"kind": a.kind, "tokens": bench.tokens, "torch": torch.__version__, "saes": results}
        )
    return 0


class Bench:
    """The steps of a comparison; each leaves a file or folder behind, and is done once."""

    def __init__(self, kind: str, folder: Path, tokens: int) -> None:
        self.folder, self.tokens = folder, tokens
        if kind == "prose":
            self.where = [*PROSE, f"corpus.name={folder / 'prose' / 'text'}"]
            self.k, self.d_sae, self.batch, self.lr = 32, 4608, 2048, 1e-3
        else:
            self.where = [*SYNTHETIC, f"source.synthetic.rows={tokens}"]
            self.k, self.d_sae, self.batch, self.lr = 4, 256, 512, 2e-3
        self.kind = kind
        self.shards, self.rows = folder / "shards", folder / "rows.safetensors"
        self.judging = folder / "judge"

    def harvest(self) -> None:
        if self.kind == "prose" and not (self.folder / "prose" / "text").exists():
            call(sys.executable, str(HERE / "prose.py"), str(self.folder / "prose"))
        if self.rows.exists():
            return
        sae_train("harvest", *self.where, f"train.tokens={self.tokens}", f"out={self.shards}")
        shards, parts = DiskShards(self.shards), []
        while (shard := shards.next_shard()) is not None:
            parts.append(shard.rows[shards.hooks[0]].float())
        write_tensors(self.rows, {"rows": torch.cat(parts)[: self.tokens].contiguous()})

    def start_judge(self) -> None:
        """A run with whose held-out rows, and model, all is judged; what it trains is thrown away."""
        if (self.judging / "summary.json").exists():
            return
        short = ["train.tokens=20_480", "train.batch_tokens=1024", "logger=none", "sae.expansion=1"]
        sae_train("train", *self.where, *short, f"run.dir={self.judging}")
        shutil.rmtree(self.judging / "saes" / "main")

    def ours(self, recipe: str, seed: int) -> None:
        name = f"ours-{recipe}-default-s{seed}"
        if (self.judging / "saes" / name).exists():
            return
        run = self.folder / "runs" / name
        keys = [key.format(k=self.k) for key in RECIPES[recipe]] + [f"sae.d_sae={self.d_sae}"]
        keys += ["source=shards", f"source.path={self.shards}", f"run.seed={seed}", f"run.dir={run}"]
        sae_train("train", *keys, f"train.tokens={self.tokens}", "train.autocast=float32", "logger=none")
        shutil.copytree(run / "saes" / "main", self.judging / "saes" / name)

    def peer(self, python: str, peer: str, activation: str, variant: str, seed: int) -> None:
        name = f"{peer}-{activation}-{variant}-s{seed}"
        folder, out = self.judging / "saes" / name, self.folder / f"{name}.safetensors"
        if folder.exists():
            return
        batch = SMALL_BATCH if variant == "tuned_small" else self.batch
        job = {"rows": str(self.rows), "out": str(out), "d_sae": self.d_sae, "k": self.k, "batch": batch}
        job |= {"activation": activation, "variant": variant, "seed": seed, "lr": self.lr}
        call(python, "-m", f"peers.{peer}", json.dumps(job), cwd=HERE)
        tensors = load_file(out)
        sae = read(tensors, activation, self.k)
        found = sae.decode(sae.encode(tensors["sample"]))
        error = float((found - tensors["reconstruction"]).norm() / tensors["reconstruction"].norm())
        if not error < TOLERANCE:
            raise SystemExit(f"compare.py: {name}: its weights, as read here, give other rows ({error:.1e})")
        folder.mkdir(parents=True)
        meta = json.loads((self.judging / "run.json").read_text())
        save_sae(sae, folder, {"hook": meta["config"]["hook"], "trainer": name})
        out.unlink()

    def judge(self) -> dict[str, dict[str, float]]:
        sae_train("eval", f"run={self.judging}")
        results = {}
        for path in sorted((self.judging / "saes").glob("*/eval.json")):
            results[path.parent.name] = json.loads(path.read_text())
        return results


def read(tensors: dict[str, Tensor], activation: str, k: int) -> LinearSAE:
    """An SAE in our form from the weights that a trainer in peers/ wrote."""
    config: ActivationConfig
    if activation == "topk":
        config = TopKConfig(k=k)
    elif activation == "batch_topk":
        config = BatchTopKConfig(k=k)
    else:
        config = JumpReLUConfig(target_l0=float(k))
    d_sae, d_in = tensors["w_enc"].shape
    sae = LinearSAE(LinearConfig(d_sae=d_sae, activation=config), d_in).eval().requires_grad_(False)
    names = ("w_enc", "b_enc", "w_dec", "b_dec")
    missing, _ = sae.load_state_dict({name: tensors[name] for name in names}, strict=False)
    if activation != "topk":
        sae.activation.fold_(torch.ones(()))
        sae.activation.threshold.copy_(tensors["threshold"].clamp_min(0))
    assert all(name.startswith(("activation", "input_scale")) for name in missing), missing
    return sae


COLUMNS: dict[str, tuple[str, Callable[[dict[str, float]], float | None]]] = {
    "FVU": ("{:.4f}", lambda m: m.get("fvu")),
    "L0": ("{:.1f}", lambda m: m.get("l0")),
    "CE increase": ("{:.3f}", lambda m: m["ce_sae"] - m["ce_clean"] if "ce_sae" in m else None),
    "silent %": ("{:.1f}", lambda m: 100 * m["silent"]),
    "mcc": ("{:.3f}", lambda m: m.get("recovery/mcc")),
    "f1": ("{:.3f}", lambda m: m.get("recovery/f1")),
    "rare %": ("{:.1f}", lambda m: None if "recovery/rare" not in m else 100 * m["recovery/rare"]),
}


def table(results: dict[str, dict[str, Any]]) -> str:
    """Means over seeds, and their range where there is more than one."""
    groups: dict[str, list[dict[str, float]]] = {}
    for name, numbers in results.items():
        groups.setdefault(name.rsplit("-s", 1)[0], []).append(numbers)
    columns = {c: how for c, how in COLUMNS.items() if any(how[1](m) is not None for m in results.values())}
    lines = ["| SAE | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, members in sorted(groups.items()):
        cells = []
        for form, value in columns.values():
            found = [x for x in map(value, members) if x is not None]
            cell = form.format(statistics.mean(found)) if found else ""
            if len(found) > 1:
                cell += f" ({form.format(min(found))} to {form.format(max(found))})"
            cells.append(cell)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def sae_train(*args: str) -> None:
    call(sys.executable, "-m", "sae_train", *args)


def call(*command: str, cwd: Path | None = None) -> None:
    print("$", *(part if len(part) < 200 else "..." for part in command), flush=True)
    subprocess.run(command, cwd=cwd, check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    sys.exit(main())
