"""Feature statistics: how often, how strongly and how recently each latent fired.

All counters are int64 and all sums are integers (activations in fixed point), so that any order of
addition on any number of devices gives the same bits and nothing saturates in a long run.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ReduceOp

from sae_train.codes import Codes
from sae_train.files import write_tensors
from sae_train.split import Axis

FIXED_POINT = 2**20
"""Activation sums count in units of 2^-20; int64 then holds 8.8e12 units of activation per latent."""

DENSE = 0.1
"""A latent that fires on more than this share of tokens is listed as dense (the usual convention)."""


ALONE = Axis()


class FeatureStats:
    """Counters of one SAE over the tokens it has seen.

    Attributes:
        tokens: rows seen so far.
        counts: [F] int64 rows on which each latent fired.
        sums: [F] int64 summed activation in fixed point.
        maxima: [F] float32 largest activation.
        last_fired: [F] int64 value of `tokens` after the batch in which each latent last fired, 0 if never.
    """

    def __init__(self, d_sae: int, device: torch.device | str = "cpu") -> None:
        self.tokens = 0
        self.counts = torch.zeros(d_sae, dtype=torch.int64, device=device)
        self.sums = torch.zeros(d_sae, dtype=torch.int64, device=device)
        self.maxima = torch.zeros(d_sae, dtype=torch.float32, device=device)
        self.last_fired = torch.zeros(d_sae, dtype=torch.int64, device=device)

    @torch.no_grad()
    def update(self, codes: Codes, rows: Axis = ALONE) -> None:
        """Count one batch of codes, of which these may be a part. Never synchronises with the host."""
        if rows.size > 1:
            batch = FeatureStats(codes.d_sae, codes.values.device)
            batch.update(codes)
            batch.tokens *= rows.size
            batch.counts, batch.sums = rows.sum(batch.counts), rows.sum(batch.sums)
            batch.maxima = rows.sum(batch.maxima, ReduceOp.MAX)
            self.merge(batch)
            self.last_fired.masked_fill_(batch.counts > 0, self.tokens)
            return
        codes = codes.rows()
        values = codes.values.detach()
        # The optimizer skips a batch with non-finite codes; they must not stay here for ever either.
        values = torch.where(torch.isfinite(values), values, 0)
        codes = Codes(values, codes.indices, codes.d_sae)
        fired = codes.counts()
        self.tokens += len(values)
        self.counts += fired
        fixed = (values.double() * FIXED_POINT).round().long()
        if codes.indices is None:
            self.sums += fixed.sum(dim=0)
            self.maxima = torch.maximum(self.maxima, values.float().amax(dim=0))
        else:
            latents = codes.latents().flatten()
            self.sums.index_add_(0, latents, fixed.flatten())
            self.maxima.scatter_reduce_(0, latents, values.float().flatten(), reduce="amax")
        self.last_fired.masked_fill_(fired > 0, self.tokens)

    def dead(self, after_tokens: int) -> Tensor:
        """[F] bool: latents that have not fired for more than `after_tokens` tokens."""
        return self.tokens - self.last_fired > after_tokens

    def density(self) -> Tensor:
        """[F] float64: share of tokens on which each latent fired."""
        return self.counts.double() / max(self.tokens, 1)

    def mean_activation(self) -> Tensor:
        """[F] float64: mean activation over the tokens on which the latent fired; 0 if it never did."""
        return self.sums.double() / FIXED_POINT / self.counts.clamp_min(1)

    def merge(self, other: "FeatureStats") -> None:
        """Add counts of another part of the same data; `last_fired` keeps this part's clock."""
        self.tokens += other.tokens
        self.counts += other.counts
        self.sums += other.sums
        self.maxima = torch.maximum(self.maxima, other.maxima)

    def state_dict(self) -> dict[str, Any]:
        return {
            "tokens": self.tokens,
            "counts": self.counts,
            "sums": self.sums,
            "maxima": self.maxima,
            "last_fired": self.last_fired,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.tokens = int(state["tokens"])
        for name in ("counts", "sums", "maxima", "last_fired"):
            mine = getattr(self, name)
            if state[name].shape != mine.shape or state[name].dtype != mine.dtype:
                raise ValueError(f"statistics {name}: saved {state[name].dtype} {tuple(state[name].shape)}")
            mine.copy_(state[name])


def write_features(
    path: Path,
    train: FeatureStats,
    heldout: FeatureStats | None,
    input_scale: float,
    dead_after_tokens: int,
    more: Mapping[str, Tensor] | None = None,
) -> None:
    """Write features.safetensors: statistics of a published SAE, in the units of its folded codes.

    Tensors, F each unless said otherwise: `train_counts`, `train_density`, `train_mean`, `train_max`,
    `train_last_fired`, `train_tokens` [1]; all but `last_fired` with `heldout_` too, if there was a pass;
    `dead` and `dense` are int64 lists of latents: dead did not fire for `dead_after_tokens` tokens at
    the end of training, dense fire on more than a tenth of the tokens. `more` is written beside them.
    """
    out: dict[str, Tensor] = dict(more or {})
    for prefix, stats in (("train", train), ("heldout", heldout)):
        if stats is None:
            continue
        out[f"{prefix}_tokens"] = torch.tensor([stats.tokens])
        out[f"{prefix}_counts"] = stats.counts
        out[f"{prefix}_density"] = stats.density().float()
        out[f"{prefix}_mean"] = (stats.mean_activation() / input_scale).float()
        out[f"{prefix}_max"] = stats.maxima / input_scale
    out["train_last_fired"] = train.last_fired
    out["dead"] = train.dead(dead_after_tokens).nonzero().flatten()
    out["dense"] = (train.density() > DENSE).nonzero().flatten()
    write_tensors(path, {name: tensor.cpu() for name, tensor in out.items()})
