"""On a GPU `auto` takes Triton for everything, and says so once where it cannot."""

import os
import subprocess
import sys

import pytest
import torch
from sae_kernels import dispatch

from .problem import DEVICE, TINY, needs_gpu

pytestmark = needs_gpu
OPS = ("topk_encode", "batch_topk_encode", "threshold_encode", "dead_encode", "sparse_decode", "gather_dot")
OPS += ("decode_residual", "segment_rows", "sparse_grad", "latent_step", "settle")


@pytest.mark.parametrize("op", OPS)
def test_auto_takes_triton_for_every_op(op):
    name = dispatch.select(op, "auto", torch.zeros(1, device=DEVICE))[0]
    assert name == ("cpu" if TINY else "triton")  # what is interpreted is not chosen


def test_a_cache_that_cannot_be_written_is_one_warning_and_torch_runs(tmp_path):
    (tmp_path / "file").touch()
    code = f"""
import logging, torch
from sae_kernels import sparse_decode
logging.basicConfig(format="%(levelname)s %(message)s")
for _ in range(2):
    codes = torch.ones(2, 3, device="{DEVICE}"), torch.zeros(2, 3, dtype=torch.int32, device="{DEVICE}")
    print(sparse_decode(*codes, torch.ones(5, 4, device="{DEVICE}")).sum().item())
"""
    env = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path / "file" / "cache")}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
    assert out.stdout.split() == ["24.0", "24.0"]
    warned = out.stderr.count("WARNING Triton is not used: a test kernel failed with")
    assert warned == (0 if TINY else 1)  # the interpreter has no cache
