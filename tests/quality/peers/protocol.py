"""How `compare.py` has another library train an SAE: one process, in the environment of that library.

A trainer is started as `python -m peers.NAME JOB` in the folder tests/quality. It reads rows from a
safetensors file, has the library's own trainer train on them in their order, and writes the SAE in one form:

    codes = activation((x - b_dec) w_enc^T + b_enc)        x_hat = codes w_dec + b_dec

with a sample of rows and of what the library itself makes of them, so that the reader can tell whether he
has understood. Imports nothing but torch and safetensors, which every environment has.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

SAMPLE = 512


@dataclass(frozen=True)
class Job:
    """What every trainer is told."""

    rows: str
    """safetensors file with `rows` [N, D] float32."""
    out: str
    """safetensors file to write."""
    d_sae: int
    k: int
    activation: str
    """topk, batch_topk or jumprelu."""
    batch: int
    seed: int
    variant: str
    """default, tuned, or tuned_small, which is tuned in small batches."""
    lr: float
    """Learning rate of the tuned variant."""

    @property
    def tuned(self) -> bool:
        return self.variant != "default"

    def batches(self) -> list[Tensor]:
        """The rows, whole batches of them, in their order."""
        with safe_open(self.rows, framework="pt") as file:
            rows = file.get_tensor("rows")
        return [part for part in rows.split(self.batch) if len(part) == self.batch]


@dataclass(frozen=True)
class Trained:
    """w_enc [F, D], b_enc [F], w_dec [F, D], b_dec [D]; threshold [F], or [] where all latents share one."""

    w_enc: Tensor
    b_enc: Tensor
    w_dec: Tensor
    b_dec: Tensor
    forward: Callable[[Tensor], Tensor]
    """What the library itself reconstructs, at inference, from rows [N, D]."""
    threshold: Tensor | None = None


def work(package: str, train: Callable[[Job, list[Tensor]], Trained]) -> None:
    job = Job(**json.loads(sys.argv[1]))
    batches = job.batches()
    x = batches[0][:SAMPLE].clone()  # before a trainer has scaled it in place
    torch.manual_seed(job.seed)
    trained = train(job, batches)
    tensors = {"w_enc": trained.w_enc, "b_enc": trained.b_enc, "w_dec": trained.w_dec, "b_dec": trained.b_dec}
    if trained.threshold is not None:
        tensors["threshold"] = trained.threshold
    with torch.no_grad():
        tensors |= {"sample": x, "reconstruction": trained.forward(x)}
    about = {"trainer": f"{package} {version(package)}"}
    save_file({name: t.detach().float().contiguous().clone() for name, t in tensors.items()}, job.out, about)
