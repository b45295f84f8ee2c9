"""What a run says of a real GPU: its tensors' memory, and whether it has work."""

import gc
import time

import pytest
import torch

from sae_train.train import system
from sae_train.train.system import SystemMeter

from .problem import needs_gpu

pytestmark = needs_gpu


def test_memory_and_work_of_a_gpu_show(monkeypatch):
    monkeypatch.setattr(system, "READ_S", 0.0)
    meter = SystemMeter()
    x = torch.randn(256, 256, device="cuda")
    torch.mm(x, x)  # takes the library's workspace, which torch counts as a tensor's memory
    gc.collect()  # of earlier tests
    before = meter.read(0)["gpu_bytes"] - x.nbytes
    x = torch.randn(8192, 8192, device="cuda")
    y = torch.empty_like(x)
    deadline = time.monotonic() + 3
    while time.monotonic() < deadline:
        torch.mm(x, x, out=y)
        torch.cuda.synchronize()
    found = meter.read(0)
    assert found["gpu_bytes"] - before == pytest.approx(2 * 8192**2 * 4, rel=0.01)
    assert found["gpu_peak_bytes"] >= found["gpu_bytes"]
    assert found["gpu_busy"] > 0.5
