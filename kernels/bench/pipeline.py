"""Harvest and train on one device: rows per second of both together, of each alone, and where the time goes.

    python kernels/bench/pipeline.py --json docs/benchmarks/pipeline-h200.json --trace pipeline.json.gz
    python kernels/bench/pipeline.py --model 135m       what a CPU can do

A Llama with random weights reads random tokens (its speed depends on neither), and the residual stream after
--layer trains a TopK SAE with the parts and defaults of `sae-train train`; on a CPU the model is in float32.
Timed by turns, --rounds times:

    forward     the model up to that layer, and nothing else
    step        steps of the SAE on a shard that is there
    in turns    a shard is harvested, then trained on: source.prefetch=0
    ahead       the next shard is harvested meanwhile, on a stream of its own: source.prefetch=1

The two ways to train are first run for as many steps from the same start: rows do not depend on when they
are made, so weights that differ in a bit are an error, with exit status 1. "forward" is told in rows that the
filters would leave of its tokens. --trace profiles two shards of "ahead", writes what Perfetto draws, and
adds up when either side was at work. The file of --json is written after every round.
"""

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pipeline_trace
import torch
from gpu_problem import digest
from gpu_report import describe
from torch import nn
from torch.profiler import record_function

from sae_train.activations.topk import TopKConfig
from sae_train.devices import native_bfloat16
from sae_train.errors import InputError
from sae_train.files import write_bytes
from sae_train.harvest.filters import FilterConfig
from sae_train.harvest.harvester import Harvester, inputs
from sae_train.harvest.hooks import resolve
from sae_train.harvest.stream import StreamRows
from sae_train.harvest.windows import Windows
from sae_train.sae.linear import LinearConfig
from sae_train.shards.ring import Prefetch
from sae_train.shards.shard import PermutedShards, Shard
from sae_train.shards.source import ShardSource
from sae_train.train.clock import PRODUCER
from sae_train.train.kernels import KernelsConfig, choose_stepper
from sae_train.train.members import Member, MemberConfig
from sae_train.train.optim import OptimConfig

LANES = 8
WAYS = {"in turns": 0, "ahead": 1}  # source.prefetch
MEASURED = ("forward", "step", *WAYS)
INIT_ROWS = 32_768

LLAMAS: dict[str, dict[str, int]] = {
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128_256,
    },
    "135m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49_152,
    },
    "tiny": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 128,
    },
}
"""Sizes of Llama 3.2 1B, of SmolLM2 135M, and of one for tests."""

DEFAULTS: dict[str, dict[str, int]] = {
    "1b": {"layer": 8, "context": 1024, "shard": 65_536, "batch": 4096, "d_sae": 65_536, "k": 64},
    "135m": {"layer": 12, "context": 256, "shard": 8192, "batch": 2048, "d_sae": 4608, "k": 32},
    "tiny": {"layer": 0, "context": 16, "shard": 512, "batch": 64, "d_sae": 64, "k": 4},
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", choices=LLAMAS, default="1b" if torch.cuda.is_available() else "135m")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    for name, told in (
        ("layer", "the SAE reads the residual stream after it"),
        ("context", "tokens of a window"),
        ("shard", "tokens of a shard"),
        ("batch", "rows of a step"),
        ("d-sae", "latents"),
        ("k", "latents per row"),
    ):
        parser.add_argument(f"--{name}", type=int, help=f"{told}; default by model")
    parser.add_argument("--shards", type=int, default=10, help="timed in a round")
    parser.add_argument("--warmup", type=int, default=2, help="shards before")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--trace", type=Path, help="file for a profiler's trace; .gz is compressed")
    a = parser.parse_args()
    for name, value in DEFAULTS[a.model].items():
        if getattr(a, name) is None:
            setattr(a, name, value)
    for name in (*DEFAULTS[a.model], "shards", "warmup", "rounds"):
        if getattr(a, name) < (0 if name == "layer" else 1):
            parser.error(f"--{name.replace('_', '-')} {getattr(a, name)}: expected at least 1")
    if a.shard % (a.context * LANES):
        parser.error(f"--shard {a.shard}: expected a multiple of {LANES} windows of {a.context} tokens")
    if a.batch % LANES:
        parser.error(f"--batch {a.batch}: expected a multiple of {LANES}")
    return a


class RandomWindows:
    """Windows of random tokens; those of a seed are always the same."""

    def __init__(self, length: int, vocabulary: int) -> None:
        self.length, self.vocabulary, self.taken = length, vocabulary, 0

    def take(self, n: int) -> Windows:
        draw = torch.Generator().manual_seed(self.taken)
        tokens = torch.randint(self.vocabulary, (n, self.length), generator=draw)
        index = torch.arange(self.taken, self.taken + n)
        self.taken += n
        return Windows(
            tokens, torch.ones_like(tokens, dtype=torch.bool), torch.zeros_like(tokens).bool(), index
        )

    def state_dict(self) -> dict[str, Any]:
        return {"taken": self.taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.taken = state["taken"]


class Again:
    """The same shard for ever: what is left of a pipeline whose harvest costs nothing."""

    def __init__(self, shard: Shard) -> None:
        self.shard = dataclasses.replace(shard, seconds={})
        self.dims = {hook: x.shape[1] for hook, x in shard.rows.items()}
        self.fingerprint: dict[str, str] = {}
        self.lanes = LANES

    def next_shard(self) -> Shard:
        return self.shard

    def seek(self, cursor: dict[str, Any]) -> None:
        raise AssertionError("a benchmark does not go back")

    def close(self) -> None:
        """Nothing is held open."""


class Settled(PermutedShards):
    """Shards whose making begins when the device has done what it was given, so that its time is its own."""

    def next_shard(self) -> Shard | None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return super().next_shard()


class Reached(Exception):
    """The layer that rows come from is done."""


class Bench:
    """A model, its harvester, and what is measured of them."""

    def __init__(self, a: argparse.Namespace) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        self.a, self.device = a, torch.device(a.device)
        self.autocast = torch.bfloat16 if native_bfloat16(self.device) else None
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        torch.manual_seed(0)
        with torch.device(self.device):
            llama = LlamaForCausalLM(LlamaConfig(**LLAMAS[a.model], max_position_embeddings=a.context))
        self.model: nn.Module = llama.to(self.dtype).eval()
        self.site = resolve(f"resid_post.{a.layer}", self.model)
        self.harvester = Harvester(self.model, [self.site], context_length=a.context)
        first = PermutedShards(self.rows(), 0, LANES).next_shard()
        assert first is not None
        self.shard: Shard = first
        self.steps = max(1, round(a.shards * len(first) / a.batch))  # of a round

    def rows(self) -> StreamRows:
        windows = RandomWindows(self.a.context, LLAMAS[self.a.model]["vocab_size"])
        special = torch.zeros(1, dtype=torch.int64)  # one token of the vocabulary, as BOS is
        return StreamRows(
            windows, self.harvester, FilterConfig(), special, self.a.shard // self.a.context, LANES, {}
        )

    def source(self, prefetch: int) -> ShardSource:
        rows = self.rows()
        shards = (PermutedShards if prefetch else Settled)(rows, 0, LANES)
        return ShardSource(Prefetch(shards, prefetch, self.device, rows.cancel), self.a.batch)

    @contextmanager
    def training(self, source: ShardSource) -> Iterator[tuple[Member, Callable[[int], None]]]:
        """A fresh SAE, and what trains it for a number of steps as the trainer does."""
        sae = LinearConfig(d_sae=self.a.d_sae, activation=TopKConfig(k=self.a.k))
        config = MemberConfig("main", self.site.key, 0, sae, OptimConfig())
        member = Member(config, self.shard.rows[self.site.key].shape[1], 10**6, 10**12, 0.0, self.device)
        stepper = choose_stepper(KernelsConfig(), [member], 1, self.autocast)
        done = 0

        def run(steps: int) -> None:
            nonlocal done
            for _ in range(steps):
                rows = source.next_batch()
                assert rows is not None, "random tokens do not end"
                with record_function(pipeline_trace.MARK):
                    member.begin_step(done)
                    stepper.step_together([member], [stepper.take(member, rows.widened())])
                done += 1

        try:
            member.initialise(source.sample(INIT_ROWS))
            yield member, run
        finally:
            source.close()

    def bits(self, prefetch: int) -> int:
        """Digest of the weights after training on a shard and a half, so that two were harvested."""
        with self.training(self.source(prefetch)) as (member, run):
            run(-(-3 * len(self.shard) // (2 * self.a.batch)))
            return digest([p.detach() for p in member.sae.parameters()])

    def forward(self) -> dict[str, Any]:
        """Of the model up to the layer, in the harvester's micro-batches."""
        windows = RandomWindows(self.a.context, LLAMAS[self.a.model]["vocab_size"])
        count = self.a.shard // self.a.context

        def stop(*_: object) -> None:
            raise Reached

        def shards(number: int) -> None:
            for _ in range(number):
                for lane in windows.take(count).tokens.split(count // LANES):
                    for tokens in lane.split(self.harvester.micro_batch):
                        with suppress(Reached):
                            self.model(**inputs(self.model, tokens, torch.ones_like(tokens).bool()))

        handle = self.model.get_submodule(self.site.path).register_forward_hook(stop)
        try:
            with torch.no_grad():
                shards(self.a.warmup)
                seconds = self.seconds(lambda: shards(self.a.shards))
        finally:
            handle.remove()
        return {"rows_per_s": self.a.shards * len(self.shard) / seconds, "seconds": seconds}

    def train(self, source: ShardSource) -> dict[str, Any]:
        """Of training; of `seconds`, what the harvest spent on what and how long its rows were waited for."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        with self.training(source) as (_, run):
            run(-(-self.a.warmup * len(self.shard) // self.a.batch))
            before = dict(source.seconds)
            seconds = self.seconds(lambda: run(self.steps))
            spent = {name: s - before.get(name, 0.0) for name, s in source.seconds.items()}
        found = {"rows_per_s": self.steps * self.a.batch / seconds, "seconds": seconds, "spent": spent}
        if self.device.type == "cuda":
            found["peak_bytes"] = torch.cuda.max_memory_allocated(self.device)
        return found

    def measure(self, name: str) -> dict[str, Any]:
        if name == "forward":
            return self.forward()
        return self.train(
            self.source(WAYS[name]) if name in WAYS else ShardSource(Again(self.shard), self.a.batch)
        )

    def trace(self, file: Path) -> dict[str, float]:
        """Profiles two shards of "ahead"."""
        with self.training(self.source(WAYS["ahead"])) as (_, run):
            run(-(-self.a.warmup * len(self.shard) // self.a.batch))
            return pipeline_trace.record(lambda: run(2 * len(self.shard) // self.a.batch), file, self.device)

    def seconds(self, run: Callable[[], object]) -> float:
        self.wait()
        start = time.perf_counter()
        run()
        self.wait()
        return time.perf_counter() - start

    def wait(self) -> None:
        """For this thread's own stream: a harvest ahead goes on."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()


def summary(rounds: list[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """Medians over rounds, and ratios taken within each of them."""
    rate = {name: statistics.median(one[name]["rows_per_s"] for one in rounds) for name in MEASURED}
    ratios: dict[str, list[float]] = {"in turns": [], "ahead": []}
    for one in rounds:
        slower = min(one["forward"]["rows_per_s"], one["step"]["rows_per_s"])
        for way in WAYS:
            ratios[way].append(one[way]["rows_per_s"] / slower)
    return {"rows_per_s": rate, "of_the_slower": {way: statistics.median(of) for way, of in ratios.items()}}


def table(report: dict[str, Any]) -> str:
    """What was found, for people."""
    rates, slower = report["rows_per_s"], report["of_the_slower"]
    last = report["rounds"][-1]
    lines = [f"{report['about']['device']}, {report['problem']}", ""]
    lines += [f"{'':10}  {'rows/s':>12}  of the slower  GiB at most"]
    for name in MEASURED:
        share = f"{slower[name]:>13.0%}" if name in slower else " " * 13
        peak = f"{last[name]['peak_bytes'] / 2**30:>11.1f}" if "peak_bytes" in last[name] else ""
        lines.append(f"{name:10}  {rates[name]:>12,.0f}  {share}  {peak}".rstrip())
    turns, ahead = last["in turns"], last["ahead"]
    stages = {told: turns["spent"].get(name, 0.0) / turns["seconds"] for name, told in PRODUCER.items()}
    stages["training"] = 1 - sum(stages.values())
    lines += ["", "in turns: " + ", ".join(f"{told} {share:.1%}" for told, share in stages.items())]
    lines += [f"ahead: waited for rows {ahead['spent']['wait'] / ahead['seconds']:.1%}"]
    if "trace" in report:
        shares = ", ".join(f"{name} {x:.0%}" for name, x in report["trace"].items() if name != "seconds")
        lines += [f"at work in {report['trace']['seconds']:.2f} s of the trace: {shares}"]
    return "\n".join(lines)


def main() -> int:
    a = parse()
    try:
        bench = Bench(a)
    except InputError as error:
        print(f"pipeline.py: {error}", file=sys.stderr)
        return 2
    report: dict[str, Any] = {
        "about": describe(bench.device.type, "cpu") | {"unit": "rows/s"},
        "problem": {name: getattr(a, name) for name in ("model", *DEFAULTS[a.model])}
        | {"dtype": str(bench.dtype), "kept": len(bench.shard) / a.shard},
        "arguments": " ".join(sys.argv[1:]),
    }
    bits = {way: bench.bits(prefetch) for way, prefetch in WAYS.items()}
    if len(set(bits.values())) > 1:
        print(f"pipeline.py: weights differ between the ways to train: {bits}", file=sys.stderr)
        return 1
    report["bits"] = "same"
    rounds: list[dict[str, dict[str, Any]]] = []
    for number in range(a.rounds):
        rounds.append({name: bench.measure(name) for name in MEASURED})
        report |= {"rounds": rounds} | summary(rounds)
        told = ", ".join(f"{name} {x['rows_per_s']:,.0f}" for name, x in rounds[-1].items())
        print(f"round {number + 1} of {a.rounds}, rows/s: {told}", file=sys.stderr)
        write(a.json, report)
    if a.trace is not None:
        report["trace"] = bench.trace(a.trace)
        write(a.json, report)
    print(table(report))
    return 0


def write(file: Path | None, report: dict[str, Any]) -> None:
    if file is not None:
        write_bytes(file, (json.dumps(report, indent=1) + "\n").encode())


if __name__ == "__main__":
    sys.exit(main())
