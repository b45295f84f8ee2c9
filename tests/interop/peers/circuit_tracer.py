"""circuit-tracer: its readers of sets and of Gemma Scope 2, in SAELens' environment.

By its own name, so that this file is not taken for it.
"""

import os
import sys
from pathlib import Path

sys.path = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]
sys.path.append(os.environ["CIRCUIT_TRACER"])
import torch  # noqa: E402
import yaml  # noqa: E402
from circuit_tracer.transcoder.single_layer_transcoder import (  # noqa: E402
    load_gemma_scope_2_transcoder,
    load_transcoder_set,
)

sys.path.append(str(Path(__file__).resolve().parent))
from work import Peer, work  # noqa: E402


def load(folder: Path) -> Peer:
    cpu = torch.device("cpu")
    if (folder / "params.safetensors").exists():
        sae = load_gemma_scope_2_transcoder(str(folder / "params.safetensors"), 0, cpu)
    else:
        config = yaml.safe_load((folder / "config.yaml").read_text())
        assert config["model_kind"] == "transcoder_set" and "scan" in config
        paths = {i: str(folder / f"layer_{i}.safetensors") for i in range(2)}
        hooks = {key: config[key] for key in ("feature_input_hook", "feature_output_hook")}
        whole = load_transcoder_set(paths, scan=config["scan"], device=cpu, dtype=torch.float32, **hooks)
        sae = whole[1]
    return sae.encode, lambda x, codes: sae.decode(codes, x)


def save(name: str, folder: Path) -> Peer:
    raise AssertionError("it trains none")


if __name__ == "__main__":
    work(load, save)
