"""Starting points for weights: random unit rows and robust centres of real activations."""

import torch
from torch import Tensor


def unit_rows(num_rows: int, width: int, generator: torch.Generator) -> Tensor:
    """[num_rows, width] float32 random directions, drawn on the CPU so that every device starts alike."""
    return torch.nn.functional.normalize(torch.randn(num_rows, width, generator=generator), dim=-1)


def geometric_median(rows: Tensor, max_steps: int = 100, tolerance: float = 1e-5) -> Tensor:
    """The point with the least summed distance to the rows: a centre that outliers cannot drag away.

    Args:
        rows: [R, D] float.
        max_steps: Weiszfeld iterations at most.
        tolerance: stop when a step moves less than this fraction of the mean distance.

    Returns:
        [D] float32.

    Source: Weiszfeld's algorithm with the guard of Vardi & Zhang 2000 reduced to a floor on distances.
    """
    rows = rows.float()
    centre = rows.mean(dim=0)
    for _ in range(max_steps):
        distance = (rows - centre).norm(dim=-1)
        mean_distance = distance.mean()
        if mean_distance == 0:
            return centre
        weight = 1 / distance.clamp_min(1e-6 * mean_distance)
        moved = (weight[:, None] * rows).sum(dim=0) / weight.sum()
        step = (moved - centre).norm()
        centre = moved
        if step <= tolerance * mean_distance:
            break
    return centre


def mean_targets(x: Tensor, y: Tensor, w_enc: Tensor, block: int = 1024) -> Tensor:
    """[F, d_out]: the sum of targets where a latent is active, each weighted by how much it is.

    Args:
        x: [R, d_in] encoder inputs. y: [R, d_out] centred targets. w_enc: [F, d_in]; no bias.
        block: rows at a time; bounds the [block, F] temporary.
    """
    total = torch.zeros(len(w_enc), y.shape[-1], device=y.device)
    for rows, targets in zip(x.split(block), y.split(block), strict=True):
        total += torch.relu(rows @ w_enc.T).T @ targets
    return total
