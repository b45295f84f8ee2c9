"""What a run says of its machine is what the operating system says, and nothing where nobody says it."""

import os
import time
from pathlib import Path

import psutil
import pytest
import torch

from sae_train.train import system
from sae_train.train.system import WORST, SystemMeter, worst


@pytest.fixture
def meter(monkeypatch: pytest.MonkeyPatch) -> SystemMeter:
    """One that reads anew at every call."""
    monkeypatch.setattr(system, "READ_S", 0.0)
    return SystemMeter()


def test_memory_that_is_taken_and_work_that_is_done_show(meter):
    meter.read(0)
    block = bytearray(os.urandom(1)) * (256 << 20)
    before = os.times()
    while (after := os.times()).user + after.system - before.user - before.system < 0.3:
        sum(range(10_000))
    found = meter.read(1000)
    with_block = found["rss_bytes"]
    assert len(block) == 256 << 20
    del block
    freed = with_block - meter.read(1000)["rss_bytes"]
    assert freed == pytest.approx(256 << 20, rel=0.1)
    elapsed = after.elapsed - before.elapsed
    assert 0 < found["cpu_cores"] <= os.cpu_count() + 1
    assert found["cpu_cores"] * elapsed == pytest.approx(0.3, rel=0.9)
    assert 0 <= found["host_cpu"] <= 1
    assert found["host_free_bytes"] == pytest.approx(psutil.virtual_memory().available, rel=0.5)


def test_the_rate_is_that_since_the_last_reading(meter):
    began = time.monotonic()
    assert "tokens_per_s" not in meter.read(5000), "those of earlier legs are no rate"
    time.sleep(0.2)
    rate = meter.read(6000)["tokens_per_s"]
    assert 1000 / (time.monotonic() - began) <= rate <= 1000 / 0.2


def test_within_a_second_nothing_is_read_again():
    meter = SystemMeter()
    first = meter.read(0)
    assert meter.read(10**9) is first


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_said_of_one(meter):
    assert meter.read(0).keys() == {"rss_bytes", "cpu_cores", "host_cpu", "host_free_bytes"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_driver_that_cannot_be_asked_is_left_out_and_said_once(meter, monkeypatch, caplog):
    """A GPU that torch sees, on a machine where the driver's library cannot be loaded."""
    caplog.set_level("INFO", logger="sae_train.train")
    meter._busy_known = True
    assert meter._gpu_busy() is None and meter._gpu_busy() is None
    assert caplog.text.count("system/gpu_busy is left out") == 1


def test_of_several_processes_the_worst_is_told():
    one = {"rss_bytes": 5.0, "host_free_bytes": 7.0, "gpu_busy": 0.9, "tokens_per_s": 10.0}
    other = {"rss_bytes": 6.0, "host_free_bytes": 9.0, "gpu_busy": 0.2}
    assert worst([one, other]) == {
        "system/rss_bytes": 6.0,
        "system/host_free_bytes": 7.0,
        "system/gpu_busy": 0.2,
        "system/tokens_per_s": 10.0,
    }


def test_the_page_has_every_reading():
    page = Path(__file__).resolve().parents[2] / "docs" / "cluster.md"
    rows = [line for line in page.read_text().splitlines() if line.startswith("| `")]
    for name, pick in WORST.items():
        (row,) = [row for row in rows if f"`{name}`" in row.split("|")[1]]
        assert row.rstrip(" |").endswith("most" if pick is max else "least"), row
