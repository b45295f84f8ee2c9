"""Loss terms, and the container in which an SAE hands them to the trainer.

An architecture composes its own loss from these; the trainer sums the terms and never looks inside.
Every logged term is one that was summed: nothing here is computed for show.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sae_train.codes import Codes


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


def auxk(residual: Tensor, pre_dead: Tensor, w_dec_dead: Tensor, k_aux: int) -> Tensor:
    """How badly the dead latents alone explain what the live ones missed.

    The k_aux largest pre-activations of dead latents reconstruct the residual; the squared error is
    divided by the residual's variance, so the term stays of order 1 while the main loss falls. The
    residual is a constant here; gradients reach encoder and decoder of dead latents and nothing else.

    Args:
        residual: [N, D] target minus reconstruction.
        pre_dead: [N, F_dead] pre-activations of the dead latents only.
        w_dec_dead: [F_dead, D] their decoder rows.
        k_aux: dead latents used per row; all of them when F_dead is smaller.

    Returns:
        Scalar float32; 0 when there is no dead latent or the residual has no variance.

    Source: AuxK of Gao et al. 2024 (arXiv:2406.04093), appendix A.2.
    """
    num_dead = pre_dead.shape[-1]  # everything below is [N, F_dead] or [N, D]: it grows with the dead alone
    if num_dead == 0:
        return residual.new_zeros(())
    residual = residual.detach()
    acts = torch.relu(pre_dead)
    if num_dead > k_aux:
        smallest_kept = acts.detach().topk(k_aux, dim=-1, sorted=False).values.amin(dim=-1, keepdim=True)
        acts = acts * (acts.detach() >= smallest_kept)
    error = (residual - acts @ w_dec_dead).square().sum()
    variance = (residual - residual.mean(dim=0)).square().sum()
    # Equal residuals (one row, a constant batch) have only rounding for variance: they teach nothing here.
    has_variance = variance > 1e-6 * residual.square().sum()
    return error / torch.where(has_variance, variance, torch.inf)
