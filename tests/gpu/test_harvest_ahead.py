"""Shards harvested on a stream of their own, while the stream that trains is behind: no row is read too
early or overwritten too soon."""

import pytest
import torch
from torch import Tensor

from sae_train.harvest.filters import FilterConfig
from sae_train.harvest.harvester import Harvester
from sae_train.harvest.hooks import resolve
from sae_train.harvest.stream import StreamRows
from sae_train.harvest.windows import Windows
from sae_train.shards.ring import Prefetch
from sae_train.shards.shard import PermutedShards
from sae_train.shards.source import ShardSource

from .problem import DEVICE, TINY, needs_gpu

pytestmark = needs_gpu
LANES, SHARDS = 8, 6
WIDTH, LAYERS, LENGTH, WINDOWS, BATCH = (32, 2, 8, 16, 32) if TINY else (1024, 4, 256, 64, 2048)
BEHIND_CYCLES = 30_000_000
"""About 15 ms of a GPU's clock, in which it could harvest the next shard."""


class RandomWindows:
    """Tokens without end that are a function of how many were taken."""

    def __init__(self) -> None:
        self.taken = 0

    def take(self, n: int) -> Windows:
        tokens = torch.randint(1, 512, (n, LENGTH), generator=torch.Generator().manual_seed(self.taken))
        index = torch.arange(self.taken, self.taken + n)
        self.taken += n
        no = torch.zeros_like(tokens, dtype=torch.bool)
        return Windows(tokens, ~no, no, index)

    def state_dict(self) -> dict[str, int]:
        return {"taken": self.taken}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.taken = state["taken"]


@pytest.fixture(scope="module")
def harvester() -> Harvester:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=512,
        max_position_embeddings=LENGTH,
    )
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = LlamaForCausalLM(config).to(torch.float32 if TINY else torch.bfloat16).eval()
    sites = [resolve(f"resid_post.{layer}", model) for layer in range(LAYERS)]
    return Harvester(model, sites, context_length=LENGTH)


def batches(harvester: Harvester, prefetch: int) -> list[Tensor]:
    """Copies of the batches of SHARDS shards, made when the device comes to it: long after the host asked."""
    special = torch.zeros(1, dtype=torch.int64)
    rows = StreamRows(RandomWindows(), harvester, FilterConfig(), special, WINDOWS, LANES, {})
    ahead = Prefetch(PermutedShards(rows, 0, LANES), prefetch, DEVICE, rows.cancel)
    source = ShardSource(ahead, BATCH)
    out = []
    for _ in range(SHARDS * WINDOWS * LENGTH // BATCH):
        batch = source.next_batch()
        assert batch is not None
        if DEVICE == "cuda":
            torch.cuda._sleep(BEHIND_CYCLES)
        out.append(torch.stack([batch.rows[key] for key in sorted(batch.rows)]))
        del batch
    source.close()
    return out


@pytest.mark.parametrize("prefetch", [1, 3])
def test_rows_harvested_ahead_are_those_of_taking_turns(harvester, prefetch):
    in_turns, ahead = batches(harvester, 0), batches(harvester, prefetch)
    assert len(in_turns) == len(ahead) > SHARDS - 1
    assert all(bool(torch.isfinite(x).all()) and float(x.float().std()) > 0 for x in in_turns)
    assert [torch.equal(a, b) for a, b in zip(in_turns, ahead, strict=True)] == [True] * len(ahead)
