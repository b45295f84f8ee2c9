"""Sources: every row once, in order, from any position; from shards, tensors and a known dictionary."""

import json
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sae_train.batch import RawRows
from sae_train.errors import InputError
from sae_train.shards.disk import DiskShards, ShardWriter
from sae_train.shards.ring import Prefetch
from sae_train.shards.shard import PermutedShards
from sae_train.shards.source import ShardSource, SourceConfig
from sae_train.shards.synthetic import SyntheticConfig, SyntheticRows, frequencies, true_features
from sae_train.shards.tensors import TensorRows

LANES = 4
SIZES = (40, 8, 0, 100, 36, 4)
"""Rows per shard: batches of 24 cross edges, span three shards, meet an empty one and leave 20 rows."""


class Rows:
    """Shards of given sizes; the ids run through all of them, a row is its id twice."""

    def __init__(self, sizes: Sequence[int] = SIZES, fail_once_at: int | None = None) -> None:
        self.dims, self.fingerprint = {"a": 2, "b": 3}, {"rows": "test"}
        self.sizes, self.fail_once_at = sizes, fail_once_at
        self.next = 0

    def next_rows(self) -> RawRows | None:
        if self.next == self.fail_once_at:
            self.fail_once_at = None
            raise ConnectionError("the line is down")
        if self.next == len(self.sizes):
            return None
        index, size = self.next, self.sizes[self.next]
        self.next += 1
        ids = torch.arange(size) + sum(self.sizes[:index])
        rows = {"a": ids[:, None].float().repeat(1, 2), "b": -ids[:, None].float().repeat(1, 3)}
        counts = {"seen": size + 1, "kept": size, "special": 1}
        return RawRows(index, rows, ids, [size // LANES] * LANES, counts, {"shard": index}, {"forward": 0.25})

    def seek(self, cursor: dict) -> None:
        self.next = cursor["shard"]


def source(batch_rows: int = 24, prefetch: int = 0, **kwargs) -> ShardSource:
    return ShardSource(Prefetch(PermutedShards(Rows(**kwargs), 0, LANES), prefetch), batch_rows)


def batches(of: ShardSource) -> list:
    return list(iter(of.next_batch, None))


def same(a, b) -> bool:
    rows = a.rows.keys() == b.rows.keys() and all(torch.equal(a.rows[hook], b.rows[hook]) for hook in a.rows)
    return rows and torch.equal(a.ids, b.ids)


def test_batches_are_the_concatenation_of_the_shards_cut_in_pieces():
    of = source()
    got = batches(of)
    shards = list(iter(PermutedShards(Rows(), 0, LANES).next_shard, None))
    ids = torch.cat([shard.ids for shard in shards])
    assert len(got) == of.batches == 7
    assert all(len(batch.ids) == 24 for batch in got)
    assert torch.equal(torch.cat([batch.ids for batch in got]), ids[: 7 * 24])
    for batch in got:
        assert torch.equal(batch.rows["a"][:, 1].long(), batch.ids)
        assert torch.equal(-batch.rows["b"][:, 2].long(), batch.ids)
    total = sum(SIZES)
    assert of.counts == {"seen": total + 6, "kept": total, "special": 6, "unaligned": 0, "tail": 20}
    assert of.seconds["forward"] == 6 * 0.25
    assert of.seconds["wait"] > 0
    assert of.next_batch() is None
    assert of.counts["tail"] == 20


def test_row_i_of_every_batch_belongs_to_lane_i_mod_lanes():
    # Lane l of a shard of q * LANES rows holds ids first + [l * q, (l + 1) * q).
    shards = list(iter(PermutedShards(Rows(), 0, LANES).next_shard, None))
    lane_of = {}
    for index, shard in enumerate(shards):
        first, q = sum(SIZES[:index]), len(shard) // LANES
        lane_of.update({first + i: i // q for i in range(len(shard))})
    for batch in batches(source()):
        assert [lane_of[i] for i in batch.ids.tolist()] == list(range(LANES)) * 6


@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_run_resumed_at_any_batch_gives_the_remaining_batches_and_counts(prefetch):
    whole = source()
    want, states = [], [json.dumps(whole.state_dict())]
    while (batch := whole.next_batch()) is not None:
        want.append(batch)
        states.append(json.dumps(whole.state_dict()))
    for position, state in enumerate(states):
        again = source(prefetch=prefetch)
        again.load_state_dict(json.loads(state))
        assert again.batches == position
        got = batches(again)
        assert len(got) == len(want) - position, position
        assert all(map(same, got, want[position:])), position
        assert again.counts == whole.counts, position
        again.close()


def test_three_resumes_in_a_chain_give_every_batch_once():
    want = batches(source())
    got, state = [], None
    for steps in (1, 2, 1, 10):
        leg = source(prefetch=1)
        if state is not None:
            leg.load_state_dict(json.loads(json.dumps(state)))
        for _ in range(steps):
            if (batch := leg.next_batch()) is not None:
                got.append(batch)
        state = leg.state_dict()
        leg.close()
    assert len(got) == len(want)
    assert all(map(same, got, want))


def test_a_used_source_can_be_taken_back_to_its_very_beginning():
    of = source(prefetch=1)
    start = of.state_dict()
    want = batches(of)
    of.load_state_dict(start)
    assert all(map(same, batches(of), want))
    of.close()


def test_when_a_shard_fails_in_the_middle_of_a_batch_no_row_is_lost():
    want = batches(source())
    of = source(fail_once_at=1)
    got = [of.next_batch()]
    with pytest.raises(ConnectionError):
        of.next_batch()
    of.load_state_dict(of.state_dict())
    got += batches(of)
    assert len(got) == len(want)
    assert all(map(same, got, want))


def test_a_sample_is_the_start_of_the_current_shard_and_consumes_nothing():
    want = batches(source())
    of = source()
    sample = of.sample(10)
    assert {hook: tuple(x.shape) for hook, x in sample.items()} == {"a": (10, 2), "b": (10, 3)}
    assert torch.equal(of.sample(1000)["a"][:10], sample["a"])
    assert len(of.sample(1000)["a"]) == SIZES[0]
    got = batches(of)
    assert torch.equal(got[0].rows["a"][:10], sample["a"])
    assert all(map(same, got, want))


def test_a_batch_that_is_no_multiple_of_the_lanes_or_never_fills_is_refused():
    with pytest.raises(InputError, match=r"train.batch_tokens=10: .*source.lanes=4"):
        source(batch_rows=10)
    with pytest.raises(InputError, match=r"ended after 188 usable ones \(kept 188, seen 194, special 6"):
        source(batch_rows=192).next_batch()
    with pytest.raises(InputError, match="ended after 0 usable ones"):
        source(sizes=()).sample(5)


def test_a_run_from_disk_gets_the_batches_of_a_run_from_the_producer(tmp_path):
    stream = PermutedShards(Rows(), 0, LANES)
    writer = ShardWriter(tmp_path, stream)
    for shard in iter(stream.next_shard, None):
        writer.write(shard)
    writer.finish()
    live, disk = source(), ShardSource(DiskShards(tmp_path), 24)
    assert live.fingerprint == disk.fingerprint
    first = [disk.next_batch() for _ in range(3)]
    again = ShardSource(Prefetch(DiskShards(tmp_path), 1), 24)
    again.load_state_dict(json.loads(json.dumps(disk.state_dict())))
    got = first + batches(again)
    want = batches(live)
    assert len(got) == len(want)
    assert all(map(same, got, want))
    assert again.counts == live.counts
    again.close()


def test_close_leaves_no_thread_behind():
    before = threading.active_count()
    of = source(prefetch=2)
    of.next_batch()
    of.close()
    assert threading.active_count() == before


BAD_CONFIGS = {
    "source.name": {"name": "steam"},
    "source.path": {"name": "shards"},
    "source.paths": {"name": "tensors"},
    "source.lanes": {"lanes": 0},
    "source.shard_tokens": {"shard_tokens": 7},
    "source.prefetch": {"prefetch": -1},
    "source.epochs": {"epochs": 2},
    "source.holdout": {"holdout": 1.0},
}


@pytest.mark.parametrize("field", BAD_CONFIGS)
def test_a_source_configuration_that_cannot_work_is_refused(field):
    with pytest.raises(InputError) as error:
        SourceConfig(**BAD_CONFIGS[field])
    assert error.value.field == field


# ---- tensors ------------------------------------------------------------------------------------


def write_rows(path: Path, first: int, rows: int, d: int = 4, dtype: torch.dtype = torch.float32) -> Path:
    ids = torch.arange(first, first + rows)
    save_file({"activations": ids[:, None].repeat(1, d).to(dtype), "other": torch.zeros(3)}, path)
    return path


def tensor_rows(paths: list[Path], **kwargs) -> TensorRows:
    return TensorRows(paths, **{"key": "activations", "shard_tokens": 100, "lanes": LANES, **kwargs})


def drain(rows) -> list[RawRows]:
    return list(iter(rows.next_rows, None))


def two_files(folder: Path) -> list[Path]:
    return [write_rows(folder / "a.safetensors", 0, 700), write_rows(folder / "b.safetensors", 700, 333)]


def test_tensors_give_every_row_once_per_epoch_and_hold_some_out(tmp_path):
    paths = two_files(tmp_path)
    train = drain(tensor_rows(paths, epochs=2, holdout=0.1))
    heldout = drain(tensor_rows(paths, split="heldout", epochs=2, holdout=0.1))
    ids = torch.cat([raw.ids for raw in train])
    once, held = ids.unique(), torch.cat([raw.ids for raw in heldout])
    assert len(ids) == 2 * len(once)
    assert torch.equal(torch.cat([once, held]).sort().values, torch.arange(1033))
    # A tenth of the chunks of at most 4 rows, two of which (the files' ends) are shorter.
    assert 90 <= len(held) <= 105
    assert not torch.equal(ids[: len(once)], ids[len(once) :]), "each epoch has an order of its own"
    assert [raw.index for raw in train] == list(range(len(train)))
    for raw in train:
        assert torch.equal(raw.rows["activations"][:, 0].long(), raw.ids)
        assert max(raw.lane_rows) - min(raw.lane_rows) <= 1
        assert sum(raw.lane_rows) == len(raw.ids) <= 100
    # A shard samples the whole set: 25 chunks spread over 1033 rows reach both of its halves.
    assert all(raw.ids.min() < 516 < raw.ids.max() for raw in train if len(raw.ids) > 50)


def test_tensors_continue_from_the_cursor_of_any_shard(tmp_path):
    paths = two_files(tmp_path)
    want = drain(tensor_rows(paths, epochs=2))
    for position, raw in enumerate(want):
        again = tensor_rows(paths, epochs=2)
        again.seek(json.loads(json.dumps(raw.cursor)))
        got = drain(again)
        assert [r.index for r in got] == [r.index for r in want[position:]]
        assert all(torch.equal(a.ids, b.ids) for a, b in zip(got, want[position:], strict=True))


def test_tensors_keep_their_dtype_and_their_fingerprint_follows_the_bytes(tmp_path):
    path = write_rows(tmp_path / "a.safetensors", 0, 300, dtype=torch.bfloat16)
    rows = tensor_rows([path])
    assert rows.dims == {"activations": 4}
    assert rows.next_rows().rows["activations"].dtype == torch.bfloat16
    assert rows.fingerprint == tensor_rows([path]).fingerprint
    before = rows.fingerprint
    write_rows(path, 1, 300, dtype=torch.bfloat16)
    assert tensor_rows([path]).fingerprint != before
    assert tensor_rows([path], seed=1).fingerprint != tensor_rows([path]).fingerprint


def test_a_few_non_finite_rows_are_dropped_and_counted_and_many_are_refused(tmp_path):
    x = torch.randn(3000, 4)
    x[17, 2] = torch.nan
    x[1200, 0] = torch.inf
    save_file({"activations": x}, tmp_path / "a.safetensors")
    raws = drain(tensor_rows([tmp_path / "a.safetensors"], shard_tokens=5000, holdout=0.0))
    assert raws[0].counts == {"seen": 3000, "kept": 2998, "nonfinite": 2}
    assert not {17, 1200} & set(raws[0].ids.tolist())
    x[:10] = torch.nan
    save_file({"activations": x}, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match="finite rows; 12 of 3000 are not"):
        drain(tensor_rows([tmp_path / "a.safetensors"], shard_tokens=5000, holdout=0.0))


def test_tensor_files_that_cannot_work_are_refused_by_name(tmp_path):
    good = write_rows(tmp_path / "good.safetensors", 0, 100)
    wide = write_rows(tmp_path / "wide.safetensors", 0, 100, d=5)
    half = write_rows(tmp_path / "half.safetensors", 0, 100, dtype=torch.float16)
    empty = write_rows(tmp_path / "empty.safetensors", 0, 0)
    (tmp_path / "torn.safetensors").write_bytes(good.read_bytes()[:50])
    with pytest.raises(InputError, match=r"gone.safetensors.*exists"):
        tensor_rows([tmp_path / "gone.safetensors"])
    with pytest.raises(InputError, match=r"source.key='activation'.*activations, other"):
        tensor_rows([good], key="activation")
    with pytest.raises(InputError, match=r"not \[3\] in F32"):
        tensor_rows([good], key="other")
    with pytest.raises(InputError, match=r"wide.safetensors.*width 4"):
        tensor_rows([good, wide])
    with pytest.raises(InputError, match=r"half.safetensors.*F32"):
        tensor_rows([good, half])
    with pytest.raises(InputError, match=r"torn\.safetensors"):
        tensor_rows([tmp_path / "torn.safetensors"])
    with pytest.raises(InputError, match="more rows: 0"):
        tensor_rows([empty])


# ---- synthetic ----------------------------------------------------------------------------------


def test_synthetic_shards_are_a_pure_function_of_seed_and_index():
    config = SyntheticConfig(rows=2500)
    rows = SyntheticRows(config, 1000, LANES, seed=5)
    shards = drain(rows)
    assert [len(raw.ids) for raw in shards] == [1000, 1000, 500]
    again = SyntheticRows(config, 1000, LANES, seed=5)
    again.seek(shards[1].cursor)
    assert torch.equal(again.next_rows().rows["synthetic"], shards[1].rows["synthetic"])
    other = SyntheticRows(config, 1000, LANES, seed=6)
    assert torch.equal(other.features, rows.features), "the dictionary has a seed of its own"
    assert not torch.equal(other.next_rows().rows["synthetic"], shards[0].rows["synthetic"])


def test_synthetic_epochs_repeat_the_rows_and_a_seek_finds_any_of_them():
    rows = SyntheticRows(SyntheticConfig(rows=900), 400, LANES, epochs=2)
    shards = drain(rows)
    assert [raw.index for raw in shards] == [0, 1, 2, 3, 4, 5]
    assert [len(raw.ids) for raw in shards] == [400, 400, 100, 400, 400, 100]
    assert torch.equal(shards[4].rows["synthetic"], shards[1].rows["synthetic"])
    rows.seek(shards[5].cursor)
    assert torch.equal(rows.next_rows().ids, shards[2].ids)


def test_held_out_synthetic_rows_are_none_of_the_training_rows():
    config = SyntheticConfig(rows=2000)
    train = torch.cat([raw.rows["synthetic"] for raw in drain(SyntheticRows(config, 500, LANES))])
    heldout = drain(SyntheticRows(config, 500, LANES, split="heldout", holdout=0.1))
    held = torch.cat([raw.rows["synthetic"] for raw in heldout])
    assert len(held) == 200
    assert torch.cdist(train, held).min() > 0.01


def test_the_synthetic_distribution_is_the_one_described():
    config = SyntheticConfig()
    rows = SyntheticRows(config, 65536, LANES)
    p = frequencies(config)
    assert float(p[0]) == pytest.approx(0.064, rel=0.01)
    assert float(p[-1]) == pytest.approx(0.005, rel=0.01)
    assert float(p.sum()) == pytest.approx(4.0)
    x, codes = rows.make(0, 65536)
    on = (codes > 0).double()
    # A frequency over n rows has standard deviation sqrt(p (1 - p) / n); 5 of them for 256 features.
    assert ((on.mean(0) - p).abs() < 5 * (p * (1 - p) / len(x)).sqrt()).all()
    noise = x - codes @ rows.features - rows.bias
    assert float(noise.std()) == pytest.approx(config.noise, rel=0.01)
    # Amplitudes: mean 1, standard deviation sqrt(exp(s^2) - 1) = 0.53; 260,000 of them.
    assert float(codes[codes > 0].mean()) == pytest.approx(1.0, abs=5 * 0.53 / 260_000**0.5)
    group = rows._group == 0
    together = on[:, group].T @ on[:, group] / len(x)
    lift = together / (on[:, group].mean(0)[:, None] * on[:, group].mean(0))
    assert lift.min() > 5, "members of a group fire together far more often than by chance"


def test_true_features_are_unit_vectors_kept_apart():
    features = true_features(SyntheticConfig())
    assert torch.allclose(features.norm(dim=1), torch.ones(256), atol=1e-6)
    assert float((features @ features.T).fill_diagonal_(0).abs().max()) < 0.18 + 1e-6
    with pytest.raises(InputError, match=r"source\.synthetic\.max_cosine"):
        true_features(SyntheticConfig(features=8, d=2, groups=1, group_size=2, l0=0.5, max_cosine=0.2))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("d", 0),
        ("rows", 0),
        ("groups", 33),
        ("cofire", 0.0),
        ("l0", -1.0),
        ("l0", 90.0),
        ("noise", -0.1),
        ("zipf_offset", 0.0),
        ("max_cosine", 0.0),
    ],
)
def test_a_synthetic_configuration_that_cannot_work_is_refused(key, value):
    with pytest.raises(InputError, match=rf"source\.synthetic\.{key}="):
        SyntheticConfig(**{key: value})
