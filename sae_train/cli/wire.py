"""Wiring: the one place that knows which parts a source of rows is made of.

Everything cheap is checked before anything expensive is loaded: the model's configuration, hook
names, context length, tokenizer and the corpus first, weights last.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import compress
from math import ceil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae_train.batch import RowProducer
from sae_train.cli.language_model import CheckWidths, load_language_model
from sae_train.cli.unused import shards_in, warn_of_unused
from sae_train.config import Config
from sae_train.demo import resolve as demo
from sae_train.errors import InputError
from sae_train.evaluate import HeldOut, Splice, StandIn, collect, ordinary_rows
from sae_train.harvest.corpus import Documents
from sae_train.harvest.end_to_end import EndToEnd
from sae_train.harvest.filters import keep_mask
from sae_train.harvest.harvester import Harvester
from sae_train.harvest.hooks import OTHER, is_other
from sae_train.harvest.kinds import is_causal_lm
from sae_train.harvest.splice import Spliced, SpliceResult, splice_reports
from sae_train.harvest.stream import StreamRows
from sae_train.harvest.window_source import WindowSource
from sae_train.harvest.windows import Windows, WindowStream
from sae_train.ranks import ALONE, Ranks
from sae_train.registry import nearest
from sae_train.shards.disk import DiskShards
from sae_train.shards.ring import Prefetch
from sae_train.shards.shard import PermutedShards, ShardStream
from sae_train.shards.source import ShardSource
from sae_train.shards.synthetic import SyntheticRows
from sae_train.shards.tensors import TensorRows

HELDOUT = "heldout"
"""Folder of the held-out shards inside a harvest."""


@dataclass
class Wired:
    """A source of rows with everything that came along.

    Attributes:
        shards: the shards of the training rows (what `harvest` writes).
        source: batches of them; closed by whoever asked for it.
        key: a hook as the user spelt it -> the name its rows travel under.
        heldout: harvests or reads the rows that training never sees.
        splice: cross-entropy with an SAE in the model's place; None where there is no language model.
        heldout_shards: the held-out rows as shards, outlier tokens included.
        description: facts about model and data for a published SAE.
        most_rows: training rows over all epochs, or None where only reading the text would tell.
    """

    shards: ShardStream
    source: ShardSource | WindowSource
    key: Callable[[str], str]
    heldout: Callable[[], HeldOut]
    splice: Splice | None
    heldout_shards: Callable[[], ShardStream]
    description: dict[str, Any]
    most_rows: int | None = None
    through: EndToEnd | None = None
    """The language model to train through, if `train.loss` is its own; batches are then of windows."""


def wire(
    config: Config,
    hooks: list[str],
    device: torch.device,
    chosen: dict[str, Any],
    check_widths: CheckWidths,
    ranks: Ranks = ALONE,
) -> Wired:
    """Build the source that `source.name` asks for.

    Args:
        config: the whole configuration.
        hooks: hooks in use, as the user spelt them; repeats allowed.
        device: where rows are wanted.
        chosen: values chosen automatically in an earlier leg of the run; read, and filled in when absent.
        check_widths: called before any weights are read.
        ranks: the processes that share the model's work; every one of them gets all rows.

    Raises:
        InputError: anything the user gave that cannot work.
    """
    _check_second(config, hooks)
    if config.train.loss != "rows" and config.source.name != "stream":
        raise InputError("train.loss", config.train.loss, "rows, or source=stream: it needs the model")
    hooks = list(dict.fromkeys(hooks))
    if config.source.name == "stream":
        return _stream(config, hooks, device, chosen, check_widths, ranks)
    wirings = {"shards": _shards, "tensors": _tensors, "synthetic": _synthetic}
    return wirings[config.source.name](config, hooks, device, chosen, check_widths)


def _check_second(config: Config, hooks: list[str]) -> None:
    """Raises InputError if a second model is named and no hook of the run is in it, or the other way round.

    `hooks` may be fewer than the run's: evaluation of one SAE reads its hooks only.
    """
    model = config.model
    second_hook = next((hook for hook in hooks if is_other(hook)), None)
    if second_hook and model.other is None and config.source.name == "stream":
        wanted = f"the second model, which hook={second_hook} is in: model.other=HUB_ID or a folder"
        raise InputError("model.other", None, wanted)
    if model.other is not None and OTHER not in str((config.hook, config.target, config.saes, config.grid)):
        wanted = f"null, or a hook in the second model, which ends in {OTHER}: hook=NAME+NAME{OTHER}"
        raise InputError("model.other", model.other, wanted)


def _stream(
    config: Config,
    hooks: list[str],
    device: torch.device,
    chosen: dict[str, Any],
    check_widths: CheckWidths,
    ranks: Ranks,
) -> Wired:
    corpus = replace(config.corpus, name=demo(config.corpus.name) if config.corpus.name else None)
    other_name = demo(config.model.other) if config.model.other else None
    model_config = replace(config.model, name=demo(config.model.name), other=other_name)
    source, length = config.source, corpus.context_length
    # Whole lanes of windows, so that the held-out shard of a harvest holds the rows that a live run judges.
    ce_tokens = max(config.eval.ce_tokens, config.eval.interval_ce_tokens)
    heldout_windows = ceil(config.eval.tokens / (length * source.lanes)) * source.lanes
    windows: dict[str, WindowStream] = {}
    judged: list[Windows] = []

    def open_corpus(tokenizer: Any) -> None:
        few = replace(corpus, shuffle_windows=1)
        first = WindowStream(Documents(few), tokenizer, few).take(source.lanes)
        if first is None or len(first.tokens) < source.lanes:
            found = 0 if first is None else len(first.tokens)
            raise InputError(
                "corpus.name",
                config.corpus.name,
                f"at least {source.lanes} training windows of {length} tokens, one per lane, not {found}; "
                "add text, or lower corpus.context_length or source.lanes",
            )
        for split in ("train", HELDOUT):
            windows[split] = WindowStream(Documents(corpus, split), tokenizer, corpus)
        taken = windows[HELDOUT].take(max(heldout_windows, ceil(ce_tokens / length)))
        if taken is None:
            raise InputError("corpus.holdout", corpus.holdout, "enough held-out text for one window")
        judged.append(taken)

    lm = load_language_model(model_config, corpus, hooks, check_widths, open_corpus)
    micro_batch = chosen.get("micro_batch", config.model.micro_batch)
    harvester = Harvester(lm.model, lm.sites, micro_batch, context_length=length, other=lm.other)
    harvester.micro_batch = min(ranks.gather(harvester.micro_batch))  # devices may be unequal; rows are not
    chosen["micro_batch"] = harvester.micro_batch
    shard_windows = max(1, round(source.shard_tokens / (length * source.lanes))) * source.lanes
    identity = windows["train"].fingerprint() | lm.fingerprint | {"model": config.model.name}
    if lm.other is not None:
        identity["other_model"] = str(config.model.other)
    producer = StreamRows(
        windows["train"],
        harvester,
        config.filter,
        lm.special,
        shard_windows,
        source.lanes,
        identity,
        ranks.apart(),
        config.mesh.harvesters(ranks.size),
    )
    shards = PermutedShards(producer, source.seed, source.lanes)
    ahead = Prefetch(shards, source.prefetch, device, producer.cancel)
    masks: list[Tensor] = []
    ablated: dict[int, dict[tuple[str, ...], SpliceResult]] = defaultdict(dict)
    causal = {False: is_causal_lm(lm.model), True: lm.other is not None and is_causal_lm(lm.other)}

    def heldout() -> HeldOut:
        taken = judged[0]
        rows = harvester.rows(taken)
        mask, _, _ = keep_mask(rows, taken.tokens, taken.valid, lm.special, config.filter)
        with_sinks, _, _ = keep_mask(
            rows, taken.tokens, taken.valid, lm.special, replace(config.filter, sinks=False)
        )
        masks[:] = [mask]
        with_sinks[heldout_windows:] = False
        whole = {key: x[with_sinks] for key, x in rows.items()}
        if not bool(with_sinks.any()):
            raise InputError("corpus.holdout", corpus.holdout, "held-out text with ordinary tokens in it")
        return HeldOut(
            whole, {key: ordinary_rows(x, config.eval.outlier_multiple) for key, x in whole.items()}
        )

    def splice(stand_ins: Sequence[StandIn], tokens: int) -> list[dict[str, float]]:
        sites = {site.key: site for site in lm.sites}
        saes = [
            Spliced(
                [sites[key] for key in one.places.inputs],
                [sites[key] for key in one.places.outputs],
                one.reconstruct,
                one.means,
            )
            for one in stand_ins
        ]
        can = [any(causal[site.other] for site in sae.outputs) for sae in saes]
        count = ceil(tokens / length)
        w, mask = judged[0], masks[0]
        some = Windows(w.tokens[:count], w.valid[:count], w.starts[:count], w.index[:count])
        with harvester.model_lock:
            reports = iter(
                splice_reports(
                    lm.model, some, mask[:count], list(compress(saes, can)), lm.other, ablated[count]
                )
            )
        return [next(reports) if able else {} for able in can]

    def heldout_shards() -> ShardStream:
        keep_sinks = replace(config.filter, sinks=False)
        again = WindowStream(Documents(corpus, HELDOUT), lm.tokenizer, corpus)
        rows = StreamRows(again, harvester, keep_sinks, lm.special, heldout_windows, source.lanes, identity)
        return PermutedShards(rows, source.seed, source.lanes)

    canonical = {site.name: site.key for site in lm.sites}
    through: EndToEnd | None = None
    batches: ShardSource | WindowSource = ShardSource(ahead, config.train.batch_tokens)
    if config.train.loss != "rows":
        if not causal[False] or lm.other is not None:
            wanted = "rows, or one causal language model to train through"
            raise InputError("train.loss", config.train.loss, wanted)
        by_key = {site.key: site for site in lm.sites}
        count = config.train.batch_tokens // length
        batches = WindowSource(
            windows["train"], harvester, lm.special, config.filter, count, length, identity
        )
        through = EndToEnd(lm.model, by_key, lm.special, config.filter, config.train.loss, batches.tally)
    return Wired(
        shards,
        batches,
        lambda hook: canonical[hook],
        heldout,
        splice if any(causal.values()) else None,
        heldout_shards,
        lm.description | {"corpus": config.corpus.name, "fingerprint": identity},
        through=through,
    )


def _shards(
    config: Config, hooks: list[str], device: torch.device, chosen: dict[str, Any], check_widths: CheckWidths
) -> Wired:
    assert config.source.path is not None, "SourceConfig checks this"
    folder = Path(config.source.path).expanduser()
    wanted = None if hooks == ["auto"] else hooks
    shards = DiskShards(folder, wanted, config.source.epochs, config.source.seed, device)
    warn_of_unused(config, shards_in(folder), shards.harvest)
    check_widths(shards.dims)
    heldout = folder / HELDOUT
    wired = _without_model(
        config,
        shards,
        lambda: DiskShards(heldout, list(shards.dims), device=device),
        device,
        shards.most_rows,
    )
    return replace(wired, description=shards.harvest.describe(shards.dims) | wired.description)


def _tensors(
    config: Config, hooks: list[str], device: torch.device, chosen: dict[str, Any], check_widths: CheckWidths
) -> Wired:
    source = config.source

    def rows(split: str) -> TensorRows:
        return TensorRows(
            source.paths,
            source.key,
            source.shard_tokens,
            source.lanes,
            source.seed,
            source.holdout,
            split,
            source.epochs,
            device,
        )

    warn_of_unused(config, "rows of source=tensors are taken as they are")
    return _producer(config, rows, device, check_widths)


def _synthetic(
    config: Config, hooks: list[str], device: torch.device, chosen: dict[str, Any], check_widths: CheckWidths
) -> Wired:
    source = config.source

    def rows(split: str) -> SyntheticRows:
        return SyntheticRows(
            source.synthetic,
            source.shard_tokens,
            source.lanes,
            seed=source.seed,
            holdout=source.holdout,
            split=split,
            epochs=source.epochs,
            device=device,
        )

    wired = _producer(config, rows, device, check_widths)

    def heldout() -> HeldOut:
        judged = wired.heldout()  # first: it refuses an empty held-out set
        return replace(judged, truth=rows(HELDOUT).truth_along(wired.heldout_shards(), config.eval.tokens))

    return replace(wired, heldout=heldout)


def _producer(
    config: Config,
    rows: Callable[[str], TensorRows | SyntheticRows],
    device: torch.device,
    check_widths: CheckWidths,
) -> Wired:
    def shards(producer: RowProducer) -> ShardStream:
        return PermutedShards(producer, config.source.seed, config.source.lanes)

    train = rows("train")
    check_widths(train.dims)
    return _without_model(config, shards(train), lambda: shards(rows(HELDOUT)), device, train.most_rows)


def _without_model(
    config: Config,
    shards: ShardStream,
    heldout_shards: Callable[[], ShardStream],
    device: torch.device,
    most_rows: int,
) -> Wired:
    def key(hook: str) -> str:
        if hook == "auto" and len(shards.dims) == 1:
            return next(iter(shards.dims))
        if hook not in shards.dims:
            raise InputError("hook", hook, nearest(hook, list(shards.dims)))
        return hook

    def parts() -> Iterator[dict[str, Tensor]]:
        stream = heldout_shards()
        while (shard := stream.next_shard()) is not None:
            yield shard.rows

    return Wired(
        shards,
        ShardSource(Prefetch(shards, config.source.prefetch, device), config.train.batch_tokens),
        key,
        lambda: collect(parts(), config.eval.tokens, config.eval.outlier_multiple),
        None,
        heldout_shards,
        {"source": config.source.name, "fingerprint": dict(shards.fingerprint)},
        most_rows,
    )
