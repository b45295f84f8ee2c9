"""Harvesting: the rows are the model's own, each once, whatever ends a pass; then the filters."""

import dataclasses
import json
import threading
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sae_train.errors import InputError, NumericsError
from sae_train.harvest.corpus import CorpusConfig, Documents
from sae_train.harvest.filters import FilterConfig, compact, keep_mask
from sae_train.harvest.harvester import Harvester, check_sites
from sae_train.harvest.hooks import Site, resolve
from sae_train.harvest.stream import StreamRows
from sae_train.harvest.windows import Windows, WindowStream, special_ids

T = 12
SPECIAL = torch.tensor([0, 1, 2])


def make_windows(num_windows: int, padding: int = 0, seed: int = 0) -> Windows:
    """Windows of T tokens that begin with BOS (1); the last has `padding` invalid positions."""
    tokens = torch.randint(4, 128, (num_windows, T), generator=torch.Generator().manual_seed(seed))
    tokens[:, 0] = 1
    valid = torch.ones_like(tokens, dtype=torch.bool)
    if padding:
        valid[-1, -padding:] = False
        tokens[-1, -padding:] = 0
    return Windows(tokens, valid, tokens == 1, torch.arange(num_windows))


class ListStream:
    """A window stream over windows in memory."""

    def __init__(self, windows: Windows) -> None:
        self.windows, self.at = windows, 0

    def take(self, n: int) -> Windows | None:
        if self.at >= len(self.windows.tokens):
            return None
        part = slice(self.at, self.at + n)
        self.at = min(self.at + n, len(self.windows.tokens))
        w = self.windows
        return Windows(w.tokens[part], w.valid[part], w.starts[part], w.index[part])

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


def harvester_of(model: nn.Module, names: list[str], micro_batch: int | None = 2) -> Harvester:
    return Harvester(model, [resolve(n, model) for n in names], micro_batch, context_length=T)


def num_hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gpt_neox", "gemma2", "bert"])
def test_a_stopped_pass_gives_the_rows_of_a_whole_one(model_type, tiny_model):
    model = tiny_model(model_type)
    windows = make_windows(4)
    before = num_hooks(model)
    rows = harvester_of(model, ["resid_post.0", "mlp_out.1", "resid_pre.1"], micro_batch=4).rows(windows)
    assert num_hooks(model) == before
    with torch.no_grad():
        hidden = model(input_ids=windows.tokens, output_hidden_states=True).hidden_states
    assert torch.equal(rows["resid_post.0"], hidden[1])
    assert torch.equal(rows["resid_pre.1"], hidden[1])
    assert rows["mlp_out.1"].shape == (4, T, 32)


def test_nothing_above_the_last_hook_runs(tiny_model):
    model = tiny_model("llama")
    harvester = harvester_of(model, ["resid_post.1", "resid_pre.0"])
    ran = []
    handles = [
        module.register_forward_pre_hook(lambda module, args, name=name: ran.append(name))
        for name, module in model.named_modules()
    ]
    harvester.rows(make_windows(2))
    for handle in handles:
        handle.remove()
    assert "model.layers.1" in ran
    assert not [name for name in ran if name.startswith(("model.layers.2", "model.norm", "lm_head"))]


def test_rows_can_be_trained_on_and_are_not_changed_by_the_model_later(tiny_model):
    rows = harvester_of(tiny_model("llama"), ["resid_post.0"]).rows(make_windows(2))["resid_post.0"]
    weight = torch.ones(32, 1, requires_grad=True)
    (rows @ weight).sum().backward()
    assert weight.grad is not None
    drift = 24 * 2.0**-24 * rows.abs().sum(dim=(0, 1))  # a sum of 24 rows in another order
    assert ((weight.grad[:, 0] - rows.sum(dim=(0, 1))).abs() <= drift).all()


def test_hooks_are_removed_after_an_exception(tiny_model):
    model = tiny_model("llama")
    harvester = harvester_of(model, ["resid_post.1"])
    before = num_hooks(model)
    windows = make_windows(2)
    windows.tokens[0, 3] = 10**6
    with pytest.raises(IndexError):
        harvester.rows(windows)
    assert num_hooks(model) == before


def test_while_somebody_else_runs_the_model_no_pass_does(tiny_model):
    model, passed = tiny_model("llama"), threading.Event()
    harvester = harvester_of(model, ["resid_post.0"])

    def harvest() -> None:
        harvester.rows(make_windows(4))
        passed.set()

    with harvester.model_lock:
        thread = threading.Thread(target=harvest, daemon=True)
        thread.start()
        assert not passed.wait(0.2)
    assert passed.wait(20)


def test_padding_is_masked_from_attention(tiny_model):
    model = tiny_model("bert")  # an encoder: without the mask every position would see the padding
    windows = make_windows(1, padding=4)
    rows = harvester_of(model, ["resid_post.1"]).rows(windows)["resid_post.1"]
    windows.tokens[0, -4:] = 77
    assert torch.equal(
        rows[:, :-4], harvester_of(model, ["resid_post.1"]).rows(windows)["resid_post.1"][:, :-4]
    )


class Toy(nn.Module):
    """Three modules in a row, of which one gives what the test wants."""

    def __init__(self, output):
        super().__init__()
        self.config = SimpleNamespace(model_type="toy")
        self.embed = nn.Embedding(128, 6)
        self.odd = Odd(output)
        self.unused = nn.Linear(6, 6)
        self.twice = nn.Linear(6, 6)

    def forward(self, input_ids):
        x = self.embed(input_ids)
        self.odd(x)
        return self.twice(self.twice(x))


class Odd(nn.Module):
    def __init__(self, output):
        super().__init__()
        self.output = output

    def forward(self, x):
        return self.output(x)


@dataclasses.dataclass
class Out:
    hidden: torch.Tensor
    weights: torch.Tensor


@pytest.mark.parametrize(
    "output",
    [
        lambda x: x,
        lambda x: (x, None),
        lambda x: [x, x.sum()],
        lambda x: {"hidden": x, "weights": x.sum()},
        lambda x: Out(x, x.sum()),
    ],
    ids=["tensor", "tuple", "list", "dict", "dataclass"],
)
def test_the_first_tensor_of_whatever_a_module_gives_is_taken(output):
    model = Toy(output)
    windows = make_windows(2)
    rows = Harvester(model, [Site("odd", "odd", "odd", "out")], 2).rows(windows)
    assert torch.equal(rows["odd"], model.embed(windows.tokens))


@pytest.mark.parametrize(
    ("path", "output", "said"),
    [
        ("odd", lambda x: x.unflatten(-1, (2, 3)), "1x8x2x3"),
        ("odd", lambda x: x.sum(dim=-1), "1x8"),
        ("odd", lambda x: x.flatten(0, 1), "8x6"),
        ("odd", lambda x: (None, x), "tuple starting with NoneType"),
        ("odd", lambda x: None, "NoneType"),
        ("odd", lambda x: x.long(), "a tensor of int64"),
        ("unused", lambda x: x, "never runs"),
        ("twice", lambda x: x, "runs 2 times"),
    ],
)
def test_a_module_that_is_no_hook_is_refused_by_name(path, output, said):
    with pytest.raises(InputError, match=said) as caught:
        check_sites(Toy(output), [Site(path, path, path, "out")])
    assert repr(path) in str(caught.value)


def test_the_same_place_twice_is_refused(tiny_model):
    with pytest.raises(InputError, match="twice"):
        harvester_of(tiny_model("llama"), ["resid_post.1", "blocks.1.hook_resid_post"])


class Small(nn.Module):
    """A model that runs out of memory above `most` windows."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.config = SimpleNamespace(model_type="small")
        self.embed = nn.Embedding(128, 6)
        self.layer = nn.Linear(6, 6)
        self.most = most

    def forward(self, input_ids):
        if len(input_ids) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.layer(self.embed(input_ids))


@pytest.mark.parametrize(("most", "chosen"), [(1, 1), (2, 1), (5, 2), (16, 8), (100, 32)])
def test_the_micro_batch_is_half_of_what_memory_holds_up_to_a_limit(most, chosen):
    harvester = Harvester(Small(most), [Site("layer", "layer", "layer", "out")], micro_batch=1)
    assert harvester.probe(context_length=T, limit=32) == chosen


def test_running_out_of_memory_says_which_setting_to_lower():
    site = Site("layer", "layer", "layer", "out")
    with pytest.raises(InputError, match=r"model\.micro_batch=4"):
        Harvester(Small(3), [site], micro_batch=4).rows(make_windows(8))
    model = Small(1)
    harvester = Harvester(model, [site], micro_batch=1)
    model.most = 0
    with pytest.raises(InputError, match=r"corpus\.context_length=12"):
        harvester.probe(context_length=T, limit=8)


def test_on_a_cpu_a_pass_is_about_two_thousand_tokens(tiny_model):
    model = tiny_model("llama")
    sites = [resolve("resid_post.1", model)]
    assert Harvester(model, sites, context_length=256).micro_batch == 8
    assert Harvester(model, sites, context_length=4096).micro_batch == 1


def test_each_rule_counts_what_it_catches_first_and_the_counts_add_up():
    rows = torch.randn(3, T, 8, generator=torch.Generator().manual_seed(0))
    windows = make_windows(3, padding=2)
    rows[0, 0] *= 1e3  # BOS: counted as special, not as a sink
    rows[1, 4] *= 1e3  # a sink
    rows[1, 5, 3] = float("nan")
    rows[2, 6, 0] = float("inf")
    rows[2, -1] = float("nan")  # padding
    config = FilterConfig(max_nonfinite=0.1)
    mask, counts, medians = keep_mask({"h": rows}, windows.tokens, windows.valid, SPECIAL, config)
    expected = {"padding": 2, "special": 3, "nonfinite": 2, "sink": 1}
    assert counts == {"seen": 36, "kept": 28} | expected
    assert mask.sum() == 28
    assert not mask[1, 4]
    ordinary = mask.clone()
    ordinary[1, 4] = True  # the median is of what the earlier rules leave, sinks included
    assert medians["h"] == rows[ordinary].norm(dim=-1).median().item()


def test_a_row_that_one_hook_drops_is_dropped_for_all():
    a, b = torch.ones(1, T, 4), torch.ones(1, T, 6)
    b[0, 7] *= 100
    windows = make_windows(1)
    mask, counts, _ = keep_mask({"a": a, "b": b}, windows.tokens, windows.valid, SPECIAL, FilterConfig())
    assert not mask[0, 7]
    assert counts["sink"] == 1


@pytest.mark.parametrize(
    ("switched_off", "kept"),
    [({}, 9), ({"special_tokens": False}, 10), ({"nonfinite": False}, 10), ({"sinks": False}, 10)],
)
def test_every_rule_can_be_switched_off(switched_off, kept):
    rows = torch.ones(1, T, 4)
    rows[0, 3] *= 100
    rows[0, 5] = float("nan")
    windows = make_windows(1)
    config = FilterConfig(max_nonfinite=1.0, **switched_off)
    _, counts, medians = keep_mask({"h": rows}, windows.tokens, windows.valid, SPECIAL, config)
    assert counts["kept"] == kept
    assert medians["h"] == 2.0  # four ones; the NaN row has no part in it even when it is kept


def test_a_finite_row_whose_norm_overflows_is_a_sink_and_not_a_broken_row():
    rows = torch.ones(1, T, 4, dtype=torch.bfloat16)
    rows[0, 3] = 3e38
    windows = make_windows(1)
    _, counts, _ = keep_mask({"h": rows}, windows.tokens, windows.valid, SPECIAL, FilterConfig())
    assert (counts["sink"], counts["nonfinite"]) == (1, 0)


def test_too_many_broken_rows_stop_the_run_and_name_hook_dtype_and_place():
    rows = torch.ones(4, T, 4, dtype=torch.float16)
    rows[2, 5:10] = float("inf")
    windows = make_windows(4)
    with pytest.raises(
        NumericsError, match=r"resid_post\.9: 5 of a shard's 44 rows .*float16.*window 2, position 5"
    ):
        keep_mask({"resid_post.9": rows}, windows.tokens, windows.valid, SPECIAL, FilterConfig())


def test_a_shard_of_padding_alone_drops_everything_without_a_warning():
    windows = make_windows(1, padding=T)
    mask, counts, _ = keep_mask(
        {"h": torch.ones(1, T, 4)}, windows.tokens, windows.valid, SPECIAL, FilterConfig()
    )
    assert not mask.any()
    assert counts["padding"] == T


@pytest.mark.parametrize(
    ("field", "value"), [("sink_multiple", 1.0), ("sink_multiple", float("nan")), ("max_nonfinite", 2)]
)
def test_impossible_filter_settings_are_refused(field, value):
    with pytest.raises(InputError, match=f"filter.{field}"):
        FilterConfig(**{field: value})


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_compacting_in_place_is_indexing(chunk):
    rows = torch.randn(50, 3)
    mask = torch.rand(50) > 0.4
    want = rows[mask].clone()
    got = compact(rows, mask, chunk)
    assert torch.equal(got, want)
    assert got.data_ptr() == rows.data_ptr()


def stream_of(model: nn.Module, windows: Windows, lanes: int = 3, **settings) -> StreamRows:
    harvester = harvester_of(model, ["resid_post.0", "mlp_out.1"])
    config = FilterConfig(**settings)
    return StreamRows(ListStream(windows), harvester, config, SPECIAL, 6, lanes, {"model": "tiny"})


def test_a_shard_is_the_filtered_rows_of_its_windows_in_lane_order(tiny_model):
    model = tiny_model("llama")
    windows = make_windows(6)
    raw = stream_of(model, windows, sinks=False).next_rows()
    order = [0, 3, 1, 4, 2, 5]  # window j belongs to lane j % 3
    want = torch.cat([windows.index[j] * T + torch.arange(1, T) for j in order])  # position 0 is BOS
    assert torch.equal(raw.ids, want)
    assert raw.lane_rows == [22, 22, 22]
    assert raw.counts == {"seen": 72, "kept": 66, "padding": 0, "special": 6, "nonfinite": 0, "sink": 0}
    reference = harvester_of(model, ["resid_post.0"]).rows(windows)["resid_post.0"].flatten(0, 1)
    gap = (raw.rows["resid_post.0"] - reference[want]).abs().max()
    assert gap < 1e-5 * reference.abs().max()  # other micro-batches: same numbers, not the same bits
    assert raw.rows["mlp_out.1"].shape == (66, 32)


def test_a_lane_has_the_same_bits_whether_harvested_alone_or_with_others(tiny_model):
    model = tiny_model("llama")
    windows = make_windows(6)
    together = stream_of(model, windows, sinks=False).next_rows()
    alone = [
        stream_of(
            model, Windows(*(x[lane::3] for x in vars(windows).values())), lanes=1, sinks=False
        ).next_rows()
        for lane in range(3)
    ]
    for hook in together.rows:
        assert torch.equal(together.rows[hook], torch.cat([raw.rows[hook] for raw in alone]))


def test_a_shard_made_again_from_its_cursor_is_the_same_shard(tiny_model):
    model = tiny_model("llama")
    windows = make_windows(20, padding=5)
    stream = stream_of(model, windows)
    shards = list(iter(stream.next_rows, None))
    assert [shard.index for shard in shards] == [0, 1, 2, 3]
    assert [shard.counts["seen"] for shard in shards] == [72, 72, 72, 24]
    assert shards[3].counts["padding"] == 5
    for shard in reversed(shards):
        again = stream_of(model, windows)
        again.seek(json.loads(json.dumps(shard.cursor)))
        made = again.next_rows()
        assert made.index == shard.index
        assert made.lane_rows == shard.lane_rows
        assert torch.equal(made.ids, shard.ids)
        for hook, x in shard.rows.items():
            assert torch.equal(made.rows[hook], x)


def test_shards_over_a_corpus_on_disk_resume_where_they_were(tiny_model, tiny_tokenizer, tiny_corpus_dir):
    config = CorpusConfig(name=str(tiny_corpus_dir), context_length=T, shuffle_windows=8)

    def stream() -> StreamRows:
        windows = WindowStream(Documents(config, "train"), tiny_tokenizer, config, "train")
        harvester = harvester_of(tiny_model("llama"), ["resid_post.1"])
        return StreamRows(windows, harvester, FilterConfig(), special_ids(tiny_tokenizer), 12, 4, {})

    shards = list(iter(stream().next_rows, None))
    assert len(shards) > 5
    assert torch.cat([shard.ids for shard in shards]).unique().numel() == sum(
        s.counts["kept"] for s in shards
    )
    resumed = stream()
    resumed.seek(json.loads(json.dumps(shards[4].cursor)))
    for shard, again in zip(shards[4:], iter(resumed.next_rows, None), strict=True):
        assert torch.equal(again.ids, shard.ids)
        assert torch.equal(again.rows["resid_post.1"], shard.rows["resid_post.1"])


def test_broken_rows_injected_by_a_hook_are_dropped_and_counted(tiny_model):
    model = tiny_model("llama")

    def poison(module, args, output):
        hurt = output.clone()
        hurt[0, 5] = float("nan")
        return hurt

    handle = model.model.layers[1].mlp.register_forward_hook(poison)
    raw = stream_of(model, make_windows(6), max_nonfinite=0.1).next_rows()
    handle.remove()
    assert raw.counts["nonfinite"] == 3  # one per forward: 3 lanes of 2 windows, 2 windows a micro-batch
    assert raw.counts["kept"] + raw.counts["sink"] == 63
    assert all(x.isfinite().all() for x in raw.rows.values())


def test_the_fingerprint_names_everything_the_rows_depend_on(tiny_model):
    stream = stream_of(tiny_model("llama"), make_windows(6), sink_multiple=7.0)
    assert stream.fingerprint["model"] == "tiny"
    assert stream.fingerprint["hooks"] == "mlp_out.1 resid_post.0"
    assert "sink_multiple=7.0" in stream.fingerprint["filter"]
    assert stream.fingerprint["micro_batch"] == "2"
    assert stream.dims == {"resid_post.0": 32, "mlp_out.1": 32}


def test_lanes_must_divide_the_shard(tiny_model):
    with pytest.raises(InputError, match="lanes"):
        stream_of(tiny_model("llama"), make_windows(6), lanes=4)
