"""Evaluation on held-out rows: documents that training never sees, harvested once and kept."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sae_train import stop
from sae_train.errors import InputError
from sae_train.metrics.base import METRICS, EvalBatch, Metric, MetricConfig
from sae_train.metrics.fvu import FVU
from sae_train.metrics.recovery import Recovery, decoder_directions
from sae_train.places import Places
from sae_train.registry import nearest
from sae_train.sae.base import SAE
from sae_train.shards.synthetic import Truth


@dataclass(frozen=True)
class StandIn:
    """What goes into the model in place of its own rows.

    Attributes:
        places: where.
        reconstruct: [n, d_in] -> [n, d_out], the SAE.
        means: [D] mean row of each output.
    """

    places: Places
    reconstruct: Callable[[Tensor], Tensor]
    means: list[Tensor]


Splice = Callable[[Sequence[StandIn], int], list[dict[str, float]]]
"""(one for each SAE, tokens) -> the cross-entropies of each."""


@dataclass
class EvalConfig:
    """When and on how much held-out data the members are judged."""

    every: int | None = None
    """Steps between evaluations while training. Unset: a quarter of the run. 0: only at the end."""
    tokens: int = 32_768
    """Held-out tokens for reconstruction metrics, at the end."""
    interval_tokens: int = 8_192
    """The same for evaluations while training: the first of them."""
    ce_tokens: int = 8_192
    """Held-out tokens for cross-entropy with the SAE spliced into the model, at the end. 0 is off."""
    interval_ce_tokens: int = 2_048
    """The same for evaluations while training. 0 is off. One forward pass of the model serves all SAEs; each
    then needs one of the layers above it."""
    batch_tokens: int = 2_048
    metrics: list[str] = field(default_factory=lambda: ["fvu", "l0", "fidelity", "density"])
    outlier_multiple: float = 10.0
    """Rows whose norm is above this multiple of the median are outliers: counted in fvu_all only."""

    def __post_init__(self) -> None:
        if self.every is not None and self.every < 0:
            raise InputError("eval.every", self.every, "a number of steps, 0 for only at the end, or null")
        for key in ("tokens", "interval_tokens", "batch_tokens"):
            if getattr(self, key) < 1:
                raise InputError(f"eval.{key}", getattr(self, key), "a whole number of at least 1")
        for key in ("ce_tokens", "interval_ce_tokens"):
            if getattr(self, key) < 0:
                raise InputError(f"eval.{key}", getattr(self, key), "a whole number of at least 0")
        if not self.outlier_multiple > 1:
            raise InputError("eval.outlier_multiple", self.outlier_multiple, "a number above 1")


@dataclass(frozen=True)
class HeldOut:
    """Rows that training never sees.

    Attributes:
        rows: hook -> [R, D], outlier tokens included.
        ordinary: hook -> [R] bool, False for outlier tokens.
    """

    rows: dict[str, Tensor]
    ordinary: dict[str, Tensor]
    truth: Truth | None = None
    """The features that the rows are really made of, where somebody knows them (source=synthetic)."""
    whole: "HeldOut | None" = None
    """What these are the first of."""

    def first(self, tokens: int) -> "HeldOut":
        """The first of them, and no copy; means stay those of all, so that ablations are the same ones."""
        return HeldOut(
            {hook: x[:tokens] for hook, x in self.rows.items()},
            {hook: x[:tokens] for hook, x in self.ordinary.items()},
            self.truth,
            self,
        )

    def mean(self, hook: str) -> Tensor:
        """[D] float32 mean of the ordinary rows."""
        if self.whole is not None:
            return self.whole.mean(hook)
        return self.rows[hook][self.ordinary[hook]].double().mean(dim=0).float()


def collect(parts: Iterable[Mapping[str, Tensor]], tokens: int, outlier_multiple: float) -> HeldOut:
    """Concatenate held-out rows until there are `tokens` of them, and mark the outliers.

    Raises:
        InputError: there is no held-out row at all.
    """
    taken: list[Mapping[str, Tensor]] = []
    rows = 0
    for part in parts:
        taken.append(part)
        rows += len(next(iter(part.values())))
        if rows >= tokens:
            break
    if rows == 0:
        raise InputError(
            "source.holdout", 0, "at least one held-out row for evaluation; raise the held-out share"
        )
    whole = {hook: torch.cat([part[hook] for part in taken])[:tokens] for hook in taken[0]}
    return HeldOut(whole, {hook: ordinary_rows(x, outlier_multiple) for hook, x in whole.items()})


def ordinary_rows(rows: Tensor, multiple: float) -> Tensor:
    """[R] bool: rows [R, D] whose norm is at most `multiple` times the median norm."""
    norm = rows.float().norm(dim=-1)
    return norm <= multiple * norm.median()


def build_metrics(names: list[str], d_in: int, d_sae: int) -> list[Metric]:
    known = list(METRICS)
    for name in names:
        if name not in known:
            raise InputError("eval.metrics", name, nearest(name, known))
    return [METRICS.build(MetricConfig(name), d_in, d_sae) for name in names]


@torch.no_grad()
def evaluate(
    saes: Sequence[tuple[SAE, Places]],
    heldout: HeldOut,
    config: EvalConfig,
    splice: Splice | None = None,
    ce_tokens: int = 0,
) -> list[tuple[dict[str, float], list[Metric]]]:
    """Judge SAEs. Those judged together share the language model's passes as far as they can.

    Args:
        saes: each of any architecture, in training or published form, and which held-out rows it reads and
            reconstructs.
        heldout: the rows.
        config: metrics and batch size.
        splice: measures cross-entropy with an SAE in the layer's place; None leaves that out.
        ce_tokens: on how many held-out tokens; 0 leaves it out.

    Returns:
        Of each, numbers by name, and the metric objects (histograms, held-out counts) behind them.
    """
    results = [_reconstruction(sae, places, heldout, config) for sae, places in saes]
    if splice is not None and ce_tokens > 0:
        means = {hook: heldout.mean(hook) for hook in {h for _, places in saes for h in places.outputs}}
        stand_ins = [
            StandIn(places, _forward(sae), [means[hook] for hook in places.outputs]) for sae, places in saes
        ]
        for (numbers, _), costs in zip(results, splice(stand_ins, ce_tokens), strict=True):
            numbers |= costs
    return results


def _forward(sae: SAE) -> Callable[[Tensor], Tensor]:
    """The SAE on rows of another device and dtype."""
    device = sae.input_scale.device
    return lambda x: sae(x.to(device)).to(x.device, x.dtype)


def _reconstruction(
    sae: SAE, places: Places, heldout: HeldOut, config: EvalConfig
) -> tuple[dict[str, float], list[Metric]]:
    """What can be told from the rows alone."""
    metrics = build_metrics(config.metrics, sae.d_out, sae.d_sae)
    # One number over hooks of different norms says little about the smaller ones.
    several = places.outputs if len(places.outputs) > 1 else ()
    widths = sae.widths.outputs
    by_hook = [FVU(MetricConfig("fvu"), width, sae.d_sae) for _, width in zip(several, widths, strict=False)]
    first = {count: FVU(MetricConfig("fvu"), sae.d_out, sae.d_sae) for count in sae.first_latents()}
    recovery = None if heldout.truth is None else Recovery(decoder_directions(sae), heldout.truth)
    for x, batch in _batches(sae, places, heldout, config.batch_tokens):
        stop.check()
        if recovery is not None:
            recovery.update(batch.codes)
        for metric in metrics:
            metric.update(batch)
        parts = zip(batch.y.split(widths, dim=-1), batch.y_hat.split(widths, dim=-1), strict=True)
        for metric, (y, y_hat) in zip(by_hook, parts, strict=False):
            metric.update(EvalBatch(y, y_hat, batch.codes, batch.ordinary))
        for count, metric in first.items():
            y_hat = sae.reconstruct(x, batch.codes.first(count))
            metric.update(EvalBatch(batch.y, y_hat, batch.codes, batch.ordinary))
    numbers: dict[str, float] = {}
    for metric in metrics:
        numbers |= metric.compute()
    if recovery is not None:
        numbers |= recovery.compute()
    numbers |= {f"fvu/{hook}": m.compute()["fvu"] for hook, m in zip(several, by_hook, strict=True)}
    numbers |= {f"fvu_first/{count}": metric.compute()["fvu"] for count, metric in first.items()}
    return numbers, metrics


def _batches(
    sae: SAE, places: Places, heldout: HeldOut, batch_tokens: int
) -> Iterator[tuple[Tensor, EvalBatch]]:
    """Held-out rows as the SAE reads them, and what it makes of them; a token is ordinary where
    it is so at every hook."""
    device = sae.input_scale.device
    ordinary = torch.stack([heldout.ordinary[hook] for hook in places.hooks]).all(dim=0)
    for start in range(0, len(ordinary), batch_tokens):
        part = slice(start, start + batch_tokens)
        x, y = places.batch({hook: heldout.rows[hook][part] for hook in places.hooks})
        x = x.to(device).float()
        y = y.to(device).float() if places.targets else x
        codes = sae.encode(x)
        yield x, EvalBatch(y, sae.reconstruct(x, codes), codes, ordinary[part].to(device))
