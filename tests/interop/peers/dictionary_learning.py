"""dictionary_learning: load_dictionary; by its own name, so that this file is not taken for it."""

import json
import sys
from pathlib import Path

sys.path = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]
import torch  # noqa: E402
from dictionary_learning import dictionary  # noqa: E402
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE  # noqa: E402
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE  # noqa: E402
from dictionary_learning.trainers.top_k import AutoEncoderTopK  # noqa: E402
from dictionary_learning.utils import load_dictionary  # noqa: E402

sys.path.append(str(Path(__file__).resolve().parent))
from work import Peer, randomise, work  # noqa: E402

D, F, K = 12, 40, 5


def load(folder: Path) -> Peer:
    sae, _ = load_dictionary(str(folder), "cpu")
    return sae.encode, lambda x, codes: sae.decode(codes)


def save(name: str, folder: Path) -> Peer:
    if name in ("AutoEncoder", "AutoEncoderNew", "GatedAutoEncoder", "JumpReluAutoEncoder"):
        sae = getattr(dictionary, name)(D, F)
    elif name == "AutoEncoderTopK":
        sae = AutoEncoderTopK(D, F, K)
    elif name == "BatchTopKSAE":
        sae = BatchTopKSAE(D, F, K)
    else:
        sae = MatryoshkaBatchTopKSAE(D, F, K, [10, 12, 18])
    randomise(sae)
    if "BatchTopK" in name:
        sae.threshold.fill_(0.3)
    torch.save(sae.state_dict(), folder / "ae.pt")
    trainer = {"dict_class": name, "activation_dim": D, "dict_size": F, "k": K, "layer": 1, "lm_name": "m/m"}
    (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {}}))
    return load(folder)  # as its own users get it, renormalised where it does that


if __name__ == "__main__":
    work(load, save)
