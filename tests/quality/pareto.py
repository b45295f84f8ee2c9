"""What each kind of SAE trades, on the demo's rows: held-out FVU against L0, as a table and a picture.

    python tests/quality/pareto.py FOLDER [PICTURE]

The demo's text is harvested once into FOLDER, then SAEs of every kind are trained from it with the demo's
settings and 16, 32 and 64 active latents. What is there already is not done again.
"""

import argparse
import json
from pathlib import Path

from compare import sae_train

from sae_train.report import plots

DEMO = ["experiment=demo", "logger=none", "eval.every=0"]
RUNS = {
    "competing": "grid={activation: [topk, batch_topk, group_max], k: [16, 32, 64]}",
    "penalised": "grid={activation: [relu, jumprelu], target_l0: [16, 32, 64]}",
    "architectures": "grid={architecture: [gated, matryoshka], k: [16, 32, 64]}",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("picture", type=Path, nargs="?", default=Path("docs/images/pareto.png"))
    a = parser.parse_args()
    shards = a.folder.resolve() / "shards"
    if not shards.exists():
        sae_train("harvest", *DEMO, f"out={shards}")
    series: dict[str, dict[str, tuple[float, float]]] = {}
    print("| | FVU at L0 | | | dead |\n|---|---|---|---|---|")
    for name, grid in RUNS.items():
        run = a.folder.resolve() / name
        if not (run / "summary.json").exists():
            sae_train("train", *DEMO, "source=shards", f"source.path={shards}", grid, f"run.dir={run}")
        members = json.loads((run / "summary.json").read_text())["members"]
        of_kind: dict[str, list[dict[str, float]]] = {}
        for member, numbers in members.items():
            of_kind.setdefault(kind(run, member), []).append(numbers)
        for legend, found in of_kind.items():
            series[legend] = {str(i): (one["l0"], one["fvu"]) for i, one in enumerate(found)}
            cells = " | ".join(f"{one['fvu']:.4f} at {one['l0']:.1f}" for one in found)
            dead = ", ".join(f"{one['dead']:.1%}" for one in found)
            print(f"| {legend} | {cells} | {dead} |")
    print(plots.pareto(series, a.picture, "SAEs of the demo, held-out"))
    return 0


def kind(run: Path, member: str) -> str:
    config = json.loads((run / "run.json").read_text())["config"]["members"][member]["sae"]
    name, activation = config["name"], config["activation"]["name"]
    return activation if name == "linear" else f"{name}, {activation}"


if __name__ == "__main__":
    raise SystemExit(main())
