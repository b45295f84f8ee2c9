"""Which rows are worth training on. Every rule can be switched off, and every dropped row is counted.

Rules, in this order; the first that catches a row counts it:

    padding     positions after the end of the corpus (always dropped)
    special     the token is a special one (BOS, EOS, chat marks)
    nonfinite   some hook's row has a NaN or an infinity
    sink        some hook's row is an attention sink: its norm is above `sink_multiple` times the median

A row dropped for one hook is dropped for all, so hooks stay aligned; a hook with too many non-finite rows
stops the run for all of them, by name: leave it out of `hook`, or raise `max_nonfinite`, to train the others.

The median is that of the shard's own rows left by the earlier rules, per hook, so what is dropped is a
function of the shard alone and a resumed run drops the same. (A median that runs along the stream would
depend on where the run started.)

Why sinks: in SmolLM2-135M a few rows in ten thousand have 150 times the ordinary norm and carry 95 % of the
variance at layer 12; an SAE that learns nothing else then scores an FVU near 0.05.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sae_train.errors import InputError, NumericsError

RULES = ("padding", "special", "nonfinite", "sink")


@dataclass
class FilterConfig:
    """Which rows are dropped before training; padding always is."""

    special_tokens: bool = True
    """Drop rows at special tokens (BOS, EOS, padding and whatever else the tokenizer declares)."""
    nonfinite: bool = True
    """Drop rows with a NaN or an infinity. Off: they reach the SAE."""
    sinks: bool = True
    """Drop attention sinks: rows whose norm is far above the median."""
    sink_multiple: float = 10.0
    """A row is a sink if its norm is above this many times the median norm of its shard."""
    max_nonfinite: float = 0.001
    """Largest share of non-finite rows in a shard, for each hook; above it the run stops, because something
    is broken."""

    def __post_init__(self) -> None:
        if not self.sink_multiple > 1:
            raise InputError("filter.sink_multiple", self.sink_multiple, "a number above 1")
        if not 0 <= self.max_nonfinite <= 1:
            raise InputError("filter.max_nonfinite", self.max_nonfinite, "a share from 0 to 1")


@dataclass(frozen=True)
class Measured:
    """What the rules need to know of one hook's rows: small enough to keep for a whole shard."""

    norms: Tensor
    """[B, T] float32 Euclidean norm; inf where it overflows, NaN where the row has one."""
    finite: Tensor
    """[B, T] bool: every element is finite."""
    dtype: torch.dtype


def measure(rows: Tensor) -> Measured:
    """Norm and finiteness of rows [B, T, D], window by window so that no second copy of the rows is made."""
    norms = torch.empty(rows.shape[:-1], dtype=torch.float32, device=rows.device)
    finite = torch.empty(rows.shape[:-1], dtype=torch.bool, device=rows.device)
    for window, norm, fine in zip(rows, norms, finite, strict=True):
        torch.linalg.vector_norm(window, dim=-1, dtype=torch.float32, out=norm)
        fine.copy_(torch.isfinite(window).all(dim=-1))
    return Measured(norms, finite, rows.dtype)


def keep_mask(
    rows: Mapping[str, Tensor], tokens: Tensor, valid: Tensor, special_ids: Tensor, config: FilterConfig
) -> tuple[Tensor, dict[str, int], dict[str, float]]:
    """Which positions of a shard are ordinary rows. Training and evaluation use this same function.

    Args:
        rows: hook -> [B, T, D] of one shard (or one evaluation set), any float dtype.
        tokens: [B, T] int64.
        valid: [B, T] bool, False at padding.
        special_ids: [S] int64.

    Returns:
        mask [B, T] bool on the device of the rows; counts of "seen", "kept" and each rule (they add up);
        hook -> median norm of the ordinary rows, NaN where there were none.

    Raises:
        NumericsError: more than `max_nonfinite` of a hook's rows are not finite.
    """
    return decide({hook: measure(x) for hook, x in rows.items()}, tokens, valid, special_ids, config)


def decide(
    measured: Mapping[str, Measured], tokens: Tensor, valid: Tensor, special_ids: Tensor, config: FilterConfig
) -> tuple[Tensor, dict[str, int], dict[str, float]]:
    """`keep_mask` on rows already measured."""
    device = next(iter(measured.values())).norms.device
    keep = valid.to(device)
    dropped = {"padding": ~keep}
    if config.special_tokens:
        special = torch.isin(tokens, special_ids.to(tokens.device)).to(device)
        dropped["special"] = keep & special
        keep = keep & ~special
    if config.nonfinite:
        finite = torch.ones_like(keep)
        for hook, m in measured.items():
            _check_share(hook, m, keep, config.max_nonfinite)
            finite &= m.finite
        dropped["nonfinite"] = keep & ~finite
        keep = keep & finite
    medians = {}
    sink = torch.zeros_like(keep)
    for hook, m in measured.items():
        ordinary = m.norms[keep & m.finite]
        medians[hook] = float(ordinary.median()) if len(ordinary) else float("nan")
        sink |= m.norms > config.sink_multiple * medians[hook]
    if config.sinks:
        dropped["sink"] = keep & sink
        keep = keep & ~sink
    counts = {"seen": keep.numel(), "kept": int(keep.sum())}
    counts |= {rule: int(dropped[rule].sum()) if rule in dropped else 0 for rule in RULES}
    return keep, counts, medians


def _check_share(hook: str, m: Measured, keep: Tensor, limit: float) -> None:
    bad = keep & ~m.finite
    num_bad, num_rows = int(bad.sum()), int(keep.sum())
    if num_bad > limit * num_rows:
        window, position = bad.nonzero()[0].tolist()
        dtype = str(m.dtype).removeprefix("torch.")
        raise NumericsError(
            f"{hook}: {num_bad} of a shard's {num_rows} rows ({num_bad / num_rows:.2%}) are not finite in "
            f"{dtype}, first at window {window}, position {position}; filter.max_nonfinite={limit:g} "
            "(try model.dtype=float32)"
        )


def compact(rows: Tensor, mask: Tensor, chunk: int = 8192) -> Tensor:
    """The rows [R, D] that mask [R] keeps, moved to the front of the same memory; returns a view of them.

    In place and in chunks, because a shard is the largest thing in memory and a copy would double it.
    """
    kept = 0
    for start in range(0, len(rows), chunk):
        part = rows[start : start + chunk][mask[start : start + chunk]]
        rows[kept : kept + len(part)] = part
        kept += len(part)
    return rows[:kept]
