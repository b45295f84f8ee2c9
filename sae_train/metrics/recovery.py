"""How much of a known dictionary an SAE has found: directions, and when they fire.

Reconstruction does not tell. On synthetic rows the features are known, so the latents can be compared
with them, by the cosine of decoder rows with true features and by when the two fire.

    mmcs        mean over true features of the largest cosine with any latent
                (mean max cosine similarity; Sharkey et al. 2022)
    above_0.9   share of true features whose largest cosine is above 0.9: recovered
    rare        the same over the least frequent third of the features, common over the most frequent
    mcc         mean cosine of the best one-to-one match of features and latents (`matching.match`)
    f1          mean over true features of the F1 with which the matched latent's firing detects theirs:
                2 both / (latent fires + feature fires), rows counted
    duplicates  of the latents that fire, the share whose nearest true feature is also the nearest of
                another one that is nearer: 1 - distinct nearest features / latents
    silent      true features that are off in all held-out rows, a number: f1 leaves them out

Cosines are signed, since codes are not negative: the opposite of a feature does not recover it. A
decoder row of zeros has cosine 0 with everything. A feature that no latent is left for counts as 0 in mcc
and f1. Latents that never fire take part in every number but duplicates: what is learned is their row, and
a random one is nowhere near 0.9. Codes count as firing or not, so their scale is of no account.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from sae_train.codes import Codes
from sae_train.metrics.matching import match
from sae_train.sae.base import SAE
from sae_train.shards.synthetic import Truth

RECOVERED = 0.9
"""Cosine above which a feature counts as found. With true features at least 52 degrees (cosine 0.62) apart,
as the default ones are, one latent cannot have found two."""
ONE_BY_ONE = 4096
"""Latents whose directions are read at a time."""


class Recovery:
    """Scores of one SAE on rows whose truth is known.

    Args:
        directions: [F, D] what one unit of each latent adds to a reconstruction; any length.
        truth: of the held-out rows, in the order in which their codes will come.
    """

    def __init__(self, directions: Tensor, truth: Truth) -> None:
        assert directions.shape[1] == truth.features.shape[1], (directions.shape, truth.features.shape)
        self.truth = truth
        num_features, num_latents = len(truth.features), len(directions)
        self.cosines = truth.features.double() @ _unit(directions).T  # [T, F]
        self.latent = match(self.cosines)
        self._feature = torch.full((num_latents,), num_features)  # number T: of no feature
        matched = self.latent >= 0
        self._feature[self.latent[matched]] = matched.nonzero().flatten()
        self.rows = 0
        self.fired = torch.zeros(num_latents, dtype=torch.int64)
        self.claimed, self.on, self.both = torch.zeros(3, num_features, dtype=torch.int64)

    def update(self, codes: Codes) -> None:
        """Compare the codes of the next rows with the truth. Nothing wider than [N, T] is made."""
        n, num_features = len(codes.values), len(self.on)
        answer = self.truth.codes
        assert self.rows + n <= len(answer.values), f"{self.rows + n} rows, {len(answer.values)} known"
        rows = slice(self.rows, self.rows + n)
        self.rows += n
        self.fired += codes.counts().cpu()
        on = _firing(answer.values[rows] != 0, answer.latents()[rows], num_features)
        claimed = _firing(codes.active().cpu(), self._feature[codes.latents().cpu()], num_features)
        self.on += on.sum(dim=0)
        self.claimed += claimed.sum(dim=0)
        self.both += (on & claimed).sum(dim=0)

    def compute(self) -> dict[str, float]:
        """The numbers of the module's header, under recovery/NAME; finite whatever was given."""
        best = self.cosines.amax(dim=1)
        order = self.truth.frequencies.argsort(descending=True, stable=True)
        third = max(1, len(order) // 3)
        paired = self.cosines.gather(1, self.latent.clamp_min(0)[:, None])[:, 0]
        seen = self.on > 0
        f1 = 2 * self.both.double() / (self.on + self.claimed).clamp_min(1)
        alive = (self.fired > 0) & (self.cosines != 0).any(dim=0)
        nearest = self.cosines[:, alive].argmax(dim=0)
        numbers = {
            "mmcs": best.mean(),
            "above_0.9": _share(best > RECOVERED),
            "rare": _share(best[order[-third:]] > RECOVERED),
            "common": _share(best[order[:third]] > RECOVERED),
            "mcc": torch.where(self.latent >= 0, paired, 0).mean(),
            "f1": f1[seen].sum() / seen.sum().clamp_min(1),
            "duplicates": (len(nearest) - len(nearest.unique())) / max(1, len(nearest)),
            "silent": (~seen).sum(),
        }
        return {f"recovery/{name}": float(value) for name, value in numbers.items()}


def recovery(directions: Tensor, codes: Iterable[Codes], truth: Truth) -> dict[str, float]:
    """All scores at once: `Recovery` over batches of codes that together belong to the truth's rows."""
    scores = Recovery(directions, truth)
    for batch in codes:
        scores.update(batch)
    return scores.compute()


@torch.no_grad()
def decoder_directions(sae: SAE) -> Tensor:
    """[F, D] what one unit of each latent adds to a reconstruction, for any affine decoder."""
    like = sae.input_scale
    parts = []
    for latents in torch.arange(sae.d_sae, dtype=torch.int32, device=like.device).split(ONE_BY_ONE):
        on = torch.ones(len(latents), 1, device=like.device)
        one, none = (sae.decode(Codes(values, latents[:, None], sae.d_sae)) for values in (on, 0 * on))
        parts.append((one - none).cpu())
    return torch.cat(parts)


def _unit(rows: Tensor) -> Tensor:
    """Float64 unit rows on the CPU; rows that are zero, or not finite, become zero."""
    rows = rows.detach().double().cpu()
    rows = torch.where(torch.isfinite(rows).all(dim=1, keepdim=True), rows, 0)
    return rows / rows.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)


def _firing(active: Tensor, features: Tensor, num_features: int) -> Tensor:
    """[N, T] bool from [N, K] slots; empty slots and feature number T are dropped."""
    out = torch.zeros(len(active), num_features + 1, dtype=torch.bool)
    # Empty slots name latents too; sent to the spare column, they cannot wipe out a full one.
    return out.scatter_(1, torch.where(active, features, num_features), True)[:, :num_features]


def _share(which: Tensor) -> Tensor:
    return which.double().mean()
