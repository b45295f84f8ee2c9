"""Codes: the sparse activations of an SAE, the currency between encoder, decoder, losses and statistics.

Top-k codes are `values [N, K]` with `indices [N, K]`; a dense activation has `indices=None` and
K = d_sae. A zero value is an empty slot, whatever its index. On the top-k path nothing of
shape [N, d_sae] is ever made; `dense()` exists for tests and analysis.

Rows may stand in any shape, as in [B, T, K] for what was read from a model: wherever this says N, that is
`shape`. Training and everything that counts it work on rows, [N, K], which `rows()` gives.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sae_train.ops import sparse_decode


@dataclass(frozen=True, slots=True)
class Codes:
    """Activations of N rows.

    Attributes:
        values: [N, K] float; zero means the slot is empty.
        indices: [N, K] int32 latent of each slot, or None when K is d_sae and slot j is latent j.
        d_sae: number of latents F.
        pre: [N, d_sae] pre-activations, kept only by dense activations whose penalty needs them.
    """

    values: Tensor
    indices: Tensor | None
    d_sae: int
    pre: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        """In which the rows stand: [N], or what goes before the width in what was encoded."""
        return self.values.shape[:-1]

    def reshape(self, shape: Sequence[int]) -> "Codes":
        """The same rows, standing in another shape."""
        values, indices, pre = (
            None if t is None else t.reshape(*shape, t.shape[-1])
            for t in (self.values, self.indices, self.pre)
        )
        assert values is not None
        return replace(self, values=values, indices=indices, pre=pre)

    def clone(self) -> "Codes":
        """The same codes in memory of their own, with the gradient of these."""
        copies = (None if t is None else t.clone() for t in (self.values, self.indices, self.pre))
        values, indices, pre = copies
        assert values is not None
        return replace(self, values=values, indices=indices, pre=pre)

    def rows(self) -> "Codes":
        """The same codes as [N, K]."""
        return self if self.values.dim() == 2 else self.reshape([self.shape.numel()])

    def decode(self, w: Tensor) -> Tensor:
        """[F, D] -> [N, D]: the sum of each row's active latents, without bias."""
        if self.indices is None:
            return self.values @ w.to(self.values.dtype)
        if self.values.dim() != 2:
            rows = self.rows()
            return rows.decode(w).reshape(*self.shape, w.shape[1])
        return sparse_decode(self.values, self.indices, w)

    def first(self, count: int) -> "Codes":
        """The same rows with only the first `count` latents."""
        return replace(self, values=self.values.where(self.latents() < count, 0))

    def active(self) -> Tensor:
        """[N, K] bool: slots that hold an active latent."""
        return self.values != 0

    def l0(self) -> Tensor:
        """[N] int64: number of active latents in each row."""
        return self.active().sum(dim=-1)

    def latents(self) -> Tensor:
        """[N, K] int64: the latent of each slot; empty slots name one that is in range."""
        if self.indices is None:
            return torch.arange(self.d_sae, device=self.values.device).expand_as(self.values)
        return self.indices.long()

    def counts(self) -> Tensor:
        """[F] int64: in how many rows each latent is active. Integer sums: exact and order-free."""
        out = torch.zeros(self.d_sae, dtype=torch.int64, device=self.values.device)
        if self.indices is None:
            return out.add_(self.rows().active().sum(dim=0))
        return out.index_add_(0, self.latents().flatten(), self.active().flatten().long())

    def dense(self) -> Tensor:
        """[N, d_sae]; for tests and analysis, not the hot path."""
        if self.indices is None:
            return self.values
        out = torch.zeros(*self.shape, self.d_sae, dtype=self.values.dtype, device=self.values.device)
        return out.scatter_add_(-1, self.latents(), self.values)
