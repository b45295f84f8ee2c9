"""Shards: permuted whole, stored whole, made ahead in order."""

import os
import shutil
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
import torch

from sae_train.batch import RawRows
from sae_train.errors import InputError
from sae_train.files import digest
from sae_train.seeds import stable_seed
from sae_train.shards.disk import DiskShards, ShardWriter
from sae_train.shards.ring import Prefetch
from sae_train.shards.shard import PermutedShards, Shard, permute
from sae_train.shards.synthetic import SyntheticConfig, SyntheticRows

LANES = 4


def make_raw(index: int = 0, lane_rows: tuple[int, ...] = (30, 33, 31, 40)) -> RawRows:
    """Rows whose values tell lane and place: id = 1000 * lane + row."""
    ids = torch.cat([1000 * lane + torch.arange(rows) for lane, rows in enumerate(lane_rows)])
    two = ids[:, None] * torch.tensor([1.0, -1.0])
    rows = {"resid_post.1": two, "mlp out/2": ids[:, None] + torch.zeros(3)}
    counts = {"seen": sum(lane_rows) + 5, "kept": sum(lane_rows), "special": 5}
    return RawRows(index, rows, ids, list(lane_rows), counts, {"window": 8 * index}, {"forward": 0.5})


class Rows:
    """A producer of `shards` shards; the lanes' lengths differ from shard to shard."""

    def __init__(self, shards: int = 5, delay_s: float = 0.0, fail_at: int | None = None) -> None:
        self.dims = {"resid_post.1": 2, "mlp out/2": 3}
        self.fingerprint = {"model": "tiny"}
        self.shards, self.delay_s, self.fail_at = shards, delay_s, fail_at
        self.next = 0
        self.made: list[int] = []

    def next_rows(self) -> RawRows | None:
        if self.next == self.fail_at:
            raise ConnectionError(f"shard {self.next} cannot be made")
        if self.next == self.shards:
            return None
        time.sleep(self.delay_s)
        self.made.append(self.next)
        self.next += 1
        return make_raw(self.next - 1, tuple(30 + (3 * lane + self.next) % 7 for lane in range(LANES)))

    def seek(self, cursor: dict) -> None:
        self.next = cursor["window"] // 8


def stream(**kwargs) -> PermutedShards:
    return PermutedShards(Rows(**kwargs), seed=3, lanes=LANES)


def drain(shards) -> list[Shard]:
    return list(iter(shards.next_shard, None))


def same(a: Shard, b: Shard) -> bool:
    hooks = a.rows.keys() == b.rows.keys() and all(torch.equal(a.rows[hook], b.rows[hook]) for hook in a.rows)
    return hooks and torch.equal(a.ids, b.ids) and (a.index, a.counts) == (b.index, b.counts)


def test_row_i_belongs_to_lane_i_mod_lanes_and_only_unaligned_rows_are_dropped():
    shard = permute(make_raw(), seed=0, lanes=LANES)
    assert len(shard) == 30 * LANES
    assert torch.equal(shard.ids // 1000, torch.arange(LANES).repeat(30))
    assert len(shard.ids.unique()) == len(shard)
    assert torch.equal(shard.ids[0::LANES].sort().values, torch.arange(30)), "the shortest lane loses no row"
    assert shard.counts == {"seen": 139, "kept": 134, "special": 5, "unaligned": 14}
    for rows in shard.rows.values():
        assert torch.equal(rows[:, 0].long(), shard.ids), "every hook has the same row at the same place"


def test_order_depends_on_seed_and_index_alone_and_a_lane_on_no_other_lane():
    shard = permute(make_raw(), seed=0, lanes=LANES)
    assert same(shard, permute(make_raw(), seed=0, lanes=LANES))
    assert not torch.equal(shard.ids, permute(make_raw(), seed=1, lanes=LANES).ids)
    assert not torch.equal(shard.ids, permute(make_raw(index=1), seed=0, lanes=LANES).ids)
    other = permute(make_raw(lane_rows=(30, 40, 50, 60)), seed=0, lanes=LANES)
    assert torch.equal(shard.ids[0::LANES], other.ids[0::LANES])


def test_rows_are_mixed_over_the_whole_shard():
    # Place and id are independent: their correlation has standard deviation 1/sqrt(n) = 0.005; 5 sigma.
    rows = 10_000
    ids = permute(make_raw(lane_rows=(rows,) * LANES), seed=0, lanes=LANES).ids[0::LANES].double()
    correlation = torch.corrcoef(torch.stack([ids, torch.arange(rows).double()]))[0, 1]
    assert abs(correlation) < 5 / rows**0.5


def test_a_shard_with_an_empty_lane_has_no_rows_and_counts_them():
    shard = permute(make_raw(lane_rows=(5, 0, 5, 5)), seed=0, lanes=LANES)
    assert len(shard) == 0
    assert shard.rows["resid_post.1"].shape == (0, 2)
    assert shard.counts["unaligned"] == 15


def test_seeds_are_stable_across_versions():
    assert stable_seed(0, 1, "x") == stable_seed(0, 1, "x")
    assert stable_seed(0, 1, 2) == 8576482083239710738, "stored runs could not be resumed any more"
    assert stable_seed(1, 12) != stable_seed(11, 2)


# ---- on disk ------------------------------------------------------------------------------------


def harvest(folder: Path, **kwargs) -> ShardWriter:
    source = stream(**kwargs)
    writer = ShardWriter(folder, source)
    writer.resume(source)
    for shard in iter(source.next_shard, None):
        writer.write(shard)
    writer.finish()
    return writer


def contents(folder: Path) -> dict[str, str]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): digest(path) for path in files}


def test_shards_from_disk_are_those_of_the_stream(tmp_path):
    writer = harvest(tmp_path)
    disk = DiskShards(tmp_path)
    live = drain(stream())
    back = drain(disk)
    assert len(back) == len(live) == 5
    assert all(map(same, live, back))
    assert (disk.dims, disk.lanes, disk.fingerprint) == (stream().dims, LANES, stream().fingerprint)
    assert writer.rows == sum(map(len, live))
    assert writer.counts["seen"] == sum(shard.counts["seen"] for shard in live)


def test_a_harvest_that_was_cut_off_goes_on_and_ends_with_the_same_bytes(tmp_path):
    harvest(tmp_path / "whole")
    for fail_at in (1, 3):
        with pytest.raises(ConnectionError):
            harvest(tmp_path / "cut", fail_at=fail_at)
        with pytest.raises(InputError, match="a finished harvest"):
            DiskShards(tmp_path / "cut")
    producer = Rows()
    source = PermutedShards(producer, seed=3, lanes=LANES)
    writer = ShardWriter(tmp_path / "cut", source)
    assert (writer.shards, writer.complete) == (3, False)
    writer.resume(source)
    for shard in iter(source.next_shard, None):
        writer.write(shard)
    writer.finish()
    assert producer.made == [2, 3, 4], "of the whole shards only the last is made again, to compare"
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    assert ShardWriter(tmp_path / "cut", stream()).complete


def test_a_harvest_of_something_else_is_refused_in_the_same_folder(tmp_path):
    harvest(tmp_path)
    other = stream()
    other.fingerprint = {**other.fingerprint, "model": "huge"}
    with pytest.raises(InputError, match="model 'tiny', this one 'huge'"):
        ShardWriter(tmp_path, other)
    with pytest.raises(InputError, match="order 'seed 3, 4 lanes'"):
        ShardWriter(tmp_path, PermutedShards(Rows(), seed=4, lanes=LANES))


def test_rows_that_do_not_come_again_bit_for_bit_stop_a_resumed_harvest(tmp_path):
    with pytest.raises(ConnectionError):
        harvest(tmp_path, fail_at=2)
    source = stream()
    writer = ShardWriter(tmp_path, source)
    writer.resume(source)
    shard = source.next_shard()
    shard.rows["mlp out/2"][3, 0] += 1e-3
    with pytest.raises(InputError, match="again bit for bit"):
        writer.write(shard)


def swap_two(folder: Path) -> None:
    (folder / "shard-00000002").rename(folder / "x")
    (folder / "shard-00000001").rename(folder / "shard-00000002")
    (folder / "x").rename(folder / "shard-00000001")


def flip(folder: Path) -> None:
    path = folder / "shard-00000002" / "rows.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(data)


DAMAGE = {
    "flip": flip,
    "truncate": lambda folder: os.truncate(folder / "shard-00000002" / "rows.safetensors", 500),
    "swap": swap_two,
    "no manifest": lambda folder: (folder / "shard-00000002" / "MANIFEST.json").unlink(),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_shard_is_named_never_skipped_and_healed_by_harvesting_again(tmp_path, how):
    harvest(tmp_path)
    before = contents(tmp_path)
    disk = DiskShards(tmp_path)
    DAMAGE[how](tmp_path)
    with pytest.raises(InputError, match=r"shard-0000000[12].*run the same harvest command again"):
        drain(disk)
    harvest(tmp_path)
    assert contents(tmp_path) == before


def test_a_missing_shard_and_a_missing_harvest_are_refused_at_the_start(tmp_path):
    with pytest.raises(InputError, match=r"harvest\.json"):
        DiskShards(tmp_path)
    harvest(tmp_path)
    shutil.rmtree(tmp_path / "shard-00000003")
    with pytest.raises(InputError, match="shard-00000003"):
        DiskShards(tmp_path)


def test_only_the_hooks_asked_for_are_read_and_an_unknown_one_is_refused(tmp_path):
    harvest(tmp_path)
    shard = DiskShards(tmp_path, hooks=["mlp out/2"]).next_shard()
    assert set(shard.rows) == {"mlp out/2"}
    with pytest.raises(InputError, match=r"resid_post\.1"):
        DiskShards(tmp_path, hooks=["resid_post.2"])


def test_later_epochs_go_through_all_shards_in_an_order_of_their_own(tmp_path):
    harvest(tmp_path, shards=6)
    shards = drain(DiskShards(tmp_path, epochs=3, seed=1))
    assert [shard.index for shard in shards] == list(range(18))
    epochs = [[int(shard.rows["mlp out/2"].sum()) for shard in shards[i : i + 6]] for i in (0, 6, 12)]
    assert epochs[0] == [int(shard.rows["mlp out/2"].sum()) for shard in drain(stream(shards=6))]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
    assert len({tuple(epoch) for epoch in epochs}) == 3
    disk = DiskShards(tmp_path, epochs=3, seed=1)
    disk.seek(shards[9].cursor)
    assert same(disk.next_shard(), shards[9])


KILL_SCRIPT = """
    import os, subprocess, sys, time
    from pathlib import Path
    import torch
    from sae_train.shards.disk import ShardWriter
    from sae_train.shards.shard import PermutedShards
    from sae_train.shards.synthetic import SyntheticConfig, SyntheticRows

    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    config = SyntheticConfig(d=16, features=32, groups=4, rows=2400)

    def harvest():
        stream = PermutedShards(SyntheticRows(config, 400, 4), 0, 4)
        writer = ShardWriter(folder, stream)
        writer.resume(stream)
        for shard in iter(stream.next_shard, None):
            writer.write(shard)
        writer.finish()

    for call, point in [("fsync", 3), ("fsync", 10), ("rename", 6), ("none", 1)]:
        child = os.fork()
        if child == 0:
            while call != "none" and "TracerPid:\\t0" in Path("/proc/self/status").read_text():
                time.sleep(0.005)
            harvest()
            os._exit(0)
        if call != "none":
            subprocess.run(["strace", "-p", str(child), "-o", "/dev/null", "-e", f"trace={call}", "-e",
                            f"inject={call}:signal=KILL:when={point}"], stderr=subprocess.DEVNULL)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), len(list(folder.glob("shard-*"))))
"""


def test_a_harvest_killed_again_and_again_ends_with_the_same_bytes(tmp_path):
    config = SyntheticConfig(d=16, features=32, groups=4, rows=2400)
    whole = PermutedShards(SyntheticRows(config, 400, 4), 0, 4)
    writer = ShardWriter(tmp_path / "whole", whole)
    for shard in iter(whole.next_shard, None):
        writer.write(shard)
    writer.finish()
    if shutil.which("strace") is None:
        pytest.skip("strace is missing")
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILL_SCRIPT), str(tmp_path / "killed")],
        capture_output=True,
        text=True,
        timeout=110,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    codes = [line.split()[0] for line in done.stdout.splitlines()]
    if codes[0] == "0":
        pytest.skip("strace may not attach to a process here")
    assert codes == ["-9", "-9", "-9", "0"], done.stdout
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


# ---- made ahead ---------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_prefetched_shards_are_the_streams_own_in_its_order(depth):
    ahead = Prefetch(stream(), depth)
    got = drain(ahead)
    assert all(map(same, got, drain(stream())))
    assert len(got) == 5
    assert ahead.next_shard() is None
    assert all(shard.seconds["produce"] > 0 and shard.seconds["forward"] == 0.5 for shard in got)
    ahead.seek(got[1].cursor)
    assert [shard.index for shard in drain(ahead)] == [1, 2, 3, 4]
    ahead.close()


@pytest.mark.parametrize("depth", [1, 2])
def test_no_more_than_depth_shards_are_made_ahead(depth):
    inner = stream()
    ahead = Prefetch(inner, depth)
    ahead.next_shard()
    deadline = time.monotonic() + 10
    while len(inner.producer.made) < 1 + depth and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)  # time enough for one too many
    assert len(inner.producer.made) == 1 + depth
    ahead.close()


def test_an_error_in_the_thread_comes_out_where_the_shard_is_asked_for_and_stays():
    ahead = Prefetch(stream(fail_at=2), depth=2)
    assert [ahead.next_shard().index, ahead.next_shard().index] == [0, 1]
    for _ in range(2):
        with pytest.raises(ConnectionError, match="shard 2"):
            ahead.next_shard()
    ahead.stream.producer.fail_at = None
    ahead.seek({"window": 16})
    assert [shard.index for shard in drain(ahead)] == [2, 3, 4]
    ahead.close()


def test_seek_in_the_middle_throws_away_what_was_made_ahead():
    ahead = Prefetch(stream(delay_s=0.01), depth=2)
    first = ahead.next_shard()
    for _ in range(3):
        ahead.seek(first.cursor)
        assert same(ahead.next_shard(), first)
    ahead.close()


def test_making_a_shard_overlaps_with_using_one():
    ahead = Prefetch(stream(shards=5, delay_s=0.1), depth=1)
    start = time.monotonic()
    while ahead.next_shard() is not None:
        time.sleep(0.1)
    # One after the other takes 5 * (0.1 + 0.1) s; overlapped about 0.6 s.
    assert time.monotonic() - start < 0.9
    ahead.close()


def test_close_ends_the_thread_soon_even_when_a_shard_takes_long():
    before = threading.active_count()
    ahead = Prefetch(stream(shards=50, delay_s=0.02), depth=2)
    ahead.next_shard()
    ahead.close()
    assert threading.active_count() == before
    slow = Prefetch(stream(delay_s=2.0), depth=1)
    slow._start()
    start = time.monotonic()
    slow.close(timeout_s=0.1)
    assert time.monotonic() - start < 1.0
    assert slow.next_shard() is None
    slow._thread.join()
