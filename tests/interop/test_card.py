"""What the card of a published repository tells its readers to type is typed, in each library's environment.

The repository is put on a server on this machine by `sae-train publish`; the libraries read it with the hub's
own client.
"""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from faults.tools import TINY
from hub_server import HubServer
from interop.environments import agree, do, python_of
from safetensors.torch import load_file, save_file

from sae_train import load_sae
from sae_train.cli.main import main

pytestmark = [pytest.mark.interop, pytest.mark.timeout(900), pytest.mark.usefixtures("one_thread")]

REPO = "repo=me/saes"
PEER_OF = {"sae_train": "ours", "sae_lens": "saelens", "sparsify": "sparsify"}
"""What a snippet imports -> whose environment it runs in."""
TRANSCODER = [
    *("hook=mlp_in.1", "target=mlp_out.1", "sae.kind=transcoder", "sae.skip=true", "sae/activation=jumprelu"),
    "~sae.activation.k",
]
RUNS = {
    "a top-k SAE": ([], ["saelens", "sparsify"]),
    "BatchTopK with Matryoshka prefixes": (["sae=matryoshka", "sae/activation=batch_topk"], ["saelens"]),
    "a skip transcoder of JumpReLU": (TRANSCODER, ["saelens"]),
    "a top-k skip transcoder": (TRANSCODER[:4], ["sparsify"]),
}


@pytest.mark.parametrize("name", RUNS)
def test_the_snippets_of_a_card_run_as_they_stand_and_compute_what_we_do(
    name: str, tiny_model_dir: Callable[[str], Path], tiny_corpus_dir: Path, tmp_path: Path
) -> None:
    overrides, formats = RUNS[name]
    for peer in formats:
        python_of(peer)
    run, home = tmp_path / "run", tmp_path / "home"
    source = [f"model.name={tiny_model_dir('llama')}", f"corpus.name={tiny_corpus_dir}", *TINY]
    short = ["train.tokens=640", "checkpoint.every=50", "eval.every=0", f"run.dir={run}"]
    kept = [key for key in (*source, *short) if f"~{key.partition('=')[0]}" not in overrides]
    assert main(["train", *kept, *(key for key in overrides if not key.startswith("~"))]) == 0
    with HubServer() as hub:
        asked = ["publish", f"run={run}", REPO, f"formats=[own,{','.join(formats)}]"]
        told = hub.environment(home)
        known = os.environ | told | {"OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "sae_train", *asked]
        done = subprocess.run(command, env=known, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        files = hub.repos["me/saes"].files()
        assert files is not None
        codes = re.findall(r"```python\n(.*?)```", files["README.md"].decode(), re.DOTALL)
        by_peer = {PEER_OF[code.split()[1]]: code for code in codes}
        assert len(codes) == len(by_peer) and set(by_peer) == {"ours", *formats}
        x = 2 * torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
        save_file({"rows": x}, tmp_path / "rows.safetensors")
        sae = load_sae(run / "saes" / "main")
        for peer, code in by_peer.items():
            file, out = tmp_path / f"{peer}.py", tmp_path / f"{peer}.out"
            file.write_text(code)
            job = {"do": "run", "code": str(file), "rows": str(tmp_path / "rows.safetensors")}
            do(
                peer,
                [job | {"out": str(out)}],
                tmp_path,
                **told | {"HF_HOME": str(tmp_path / f"home-{peer}")},
            )
            apart = agree(sae, x, load_file(out))
            print(f"{name}, {peer}: codes {apart[0]:.1e}, reconstruction {apart[1]:.1e}")
