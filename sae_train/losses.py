"""Loss terms, and the container in which an SAE hands them to the trainer.

An architecture composes its own loss from these; the trainer sums the terms and never looks inside.
Every logged term is one that was summed: nothing here is computed for show.
"""

from dataclasses import dataclass

import torch
from sae_kernels import dead_encode, sparse_decode
from torch import Tensor
from torch.nn.functional import pad

from sae_train.codes import Codes
from sae_train.split import WHOLE, Split

MAX_DENSE_DEAD = 2**16
"""Dead latents up to which AuxK uses dense products; k_aux is 512 or more at the widths where it matters."""
MAX_DENSE_ELEMENTS = 2**29
"""Elements of the largest [N, F_dead] tensor: 2 GiB of float32, of which three live in a backward pass."""
MAX_SPARSE_K = 512
"""Dead latents per row beyond those bounds; the k_aux of Gao et al. 2024."""


@dataclass(frozen=True, slots=True)
class Losses:
    """What one forward pass of an SAE gives the trainer.

    Attributes:
        terms: scalar loss terms by name, already weighted; their sum is what is minimised.
        codes: the codes of the batch.
        y_hat: [N, d_out] reconstruction of the target, in the target's own units.
    """

    terms: dict[str, Tensor]
    codes: Codes
    y_hat: Tensor

    @property
    def total(self) -> Tensor:
        return torch.stack(list(self.terms.values())).sum()


def fvu(y: Tensor, y_hat: Tensor) -> Tensor:
    """Fraction of variance unexplained by a reconstruction of one batch.

        fvu = sum |y - y_hat|^2 / sum |y - mean(y)|^2

    Dimensionless: 0 is perfect, 1 is no better than predicting the batch mean. A batch without
    variance gives 0 when reconstructed exactly and a huge finite number otherwise, never NaN.

    Args:
        y: [N, D] target, any float dtype.
        y_hat: [N, D] reconstruction.

    Returns:
        Scalar float32.

    Raises:
        ValueError: shapes differ.

    Source: the normalised MSE of Gao et al. 2024 (arXiv:2406.04093), with the batch mean as baseline.
    """
    if y.shape != y_hat.shape:
        raise ValueError(f"y is {tuple(y.shape)} but y_hat is {tuple(y_hat.shape)}")
    y, y_hat = y.float(), y_hat.float()
    total = (y - y.mean(dim=0)).square().sum()
    limits = torch.finfo(torch.float32)
    return ((y - y_hat).square().sum() / total.clamp_min(limits.tiny)).clamp_max(limits.max)


def auxk(residual: Tensor, explained: Tensor, split: Split = WHOLE) -> Tensor:
    """How badly the dead latents alone explain what the live ones missed.

    The squared error is divided by the residual's variance, so the term stays of order 1 while the main
    loss falls. The residual is a constant here; gradients reach what explains it and nothing else.

    Args:
        residual: [N, D] target minus reconstruction, any float dtype.
        explained: [N, D] what dead latents make of it (`dead_reconstruction`).
        split: where these rows are a part of a batch.

    Returns:
        Scalar float32; 0 when the residual has no variance.

    Source: AuxK of Gao et al. 2024 (arXiv:2406.04093), appendix A.2.
    """
    residual = residual.detach().float()
    error = split.mean((residual - explained).square().sum())
    variance = split.mean((residual - split.mean(residual.mean(dim=0))).square().sum())
    # Equal residuals (one row, a constant batch) have only rounding for variance: they teach nothing here.
    has_variance = variance > 1e-6 * split.mean(residual.square().sum())
    return error / torch.where(has_variance, variance, torch.inf)


def dead_reconstruction(
    x: Tensor, w_enc: Tensor, b_enc: Tensor, w_dec: Tensor, k_aux: int, split: Split = WHOLE
) -> Tensor:
    """What the k_aux most active of the dead latents add up to in each row.

    Dense products over the dead latents are faster than gathers until about 140 * k_aux latents are dead,
    but make [N, F_dead] tensors. So that these stay bounded, sparse codes take over where more than
    MAX_DENSE_DEAD latents are dead or the tensor would pass MAX_DENSE_ELEMENTS; they use at most
    MAX_SPARSE_K latents per row, since their cost grows with k_aux.

    Args:
        x: [N, D] what the encoder reads.
        w_enc, w_dec: [F_dead, D] rows of the dead latents. b_enc: [F_dead].
        k_aux: dead latents used per row; all of them when F_dead is smaller.
        split: where these latents are a slice of all dead ones. All processes have to call this.

    Returns:
        [N, D], differentiable in everything.
    """
    counts = split.counts(len(w_enc))
    if (missing := max(counts) - len(w_enc)) > 0:  # every slice offers as many; these have no activation
        w_enc, w_dec = (pad(w, (0, 0, 0, missing)) for w in (w_enc, w_dec))
        b_enc = pad(b_enc, (0, missing))
    num_dead = len(w_enc)
    if num_dead > MAX_DENSE_DEAD or len(x) * num_dead > MAX_DENSE_ELEMENTS:
        k_aux = min(k_aux, MAX_SPARSE_K, sum(counts))
        return split.total(sparse_decode(*split.topk_encode(x, w_enc, b_enc, k_aux), w_dec))
    z = dead_encode(x, w_enc, b_enc, k_aux)
    if k_aux < sum(counts) and len(counts) > 1:
        values, places = z.topk(min(k_aux, num_dead), dim=1)
        values = split.best(values, places + split.first(num_dead), k_aux)
        z = torch.zeros_like(z).scatter(1, places, values)
    return split.total(z @ w_dec)
