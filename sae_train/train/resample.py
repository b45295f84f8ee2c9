"""Resampling: dead latents start anew from rows that are reconstructed badly. An alternative to AuxK.

    decoder row <- direction of a row drawn with probability ~ (its squared error)^2        b_enc <- 0
    encoder row <- the same direction, 0.2 times as long as live encoder rows are on average

and the optimizer forgets what it knew of them. Everything else keeps its bits. A latent's other parameters
(thresholds, gates) become the mean of the live ones. A transcoder's encoder row is the direction of what it
reads, its decoder row that of the target.

0.2 was found for ReLU, where any positive pre-activation fires. Where latents compete (top-k) it never would:
a latent that does not fire on its own row gets an encoder row as long as live ones are.

Source: Bricken et al. 2023, "Towards Monosemanticity", appendix "Neuron Resampling". Departures: rows are
those of one batch instead of 819,200, and none is drawn twice, for two latents that are equal stay so.
"""

import torch
from torch import Tensor, nn

from sae_train.batch import Batch
from sae_train.codes import Codes
from sae_train.errors import InputError
from sae_train.sae.linear import LinearSAE
from sae_train.seeds import stable_seed
from sae_train.train.members import Member
from sae_train.train.optim import restart_rows
from sae_train.train.stepper import Step

ENCODER_SHARE = 0.2
"""Length of a new encoder row as a share of that of live ones, as in Bricken et al."""


@torch.no_grad()
def resample_member(member: Member, done: Step, step: int) -> Tensor:
    """Resample the dead latents of a member after a step, from the rows of that step.

    They count as fired now, so they have as long as any other until they are dead; an average of weights
    starts anew in their rows.

    Args:
        done: what step number `step` left behind.

    Returns:
        The latents, [R] int64: as many as are dead, or as there are rows with an error.

    Raises:
        InputError: the architecture is not a linear SAE or made of one.
    """
    sae = member.sae
    if not isinstance(sae, LinearSAE):
        raise InputError("train.resample_every", step + 1, f"0: {member.name} is not a linear SAE")
    dead = member.stats.dead(member.dead_after_tokens).nonzero().flatten()  # host synchronisation
    error = (done.batch.y - done.losses.y_hat).float() * sae.scale_out()
    generator = torch.Generator().manual_seed(stable_seed("resample", member.config.seed, step))
    chosen = resample(sae, member.optimizer, dead, done.batch, error.square().sum(dim=-1), generator)
    member.stats.last_fired[chosen] = member.stats.tokens
    if member.average is not None:
        averaged = dict(member.average.module.named_parameters())
        for name, parameter in per_latent(sae).items():
            averaged[name][chosen] = parameter[chosen]
    return chosen


@torch.no_grad()
def resample(
    sae: LinearSAE,
    optimizer: torch.optim.Optimizer,
    dead: Tensor,
    batch: Batch,
    losses: Tensor,
    generator: torch.Generator,
) -> Tensor:
    """Start dead latents anew, in place.

    Args:
        sae: in training form.
        optimizer: of its parameters; any kind.
        dead: [R] int64 latents, each once.
        batch: raw rows to take directions from.
        losses: [N] squared error of each row. Rows where it is not finite are not drawn, nor is a row
            without a direction, because it is the centre.
        generator: seeded, on the CPU; the only source of chance.

    Returns:
        [R'] int64: the first of `dead`, for which there were rows.
    """
    x, target = sae.inputs_and_targets(batch)
    directed = (x.norm(dim=-1) > 0) & (target.norm(dim=-1) > 0) & torch.isfinite(losses)
    weight = torch.where(directed, losses.double(), 0).cpu()
    weight = (weight / weight.max().clamp_min(torch.finfo(torch.float64).tiny)).square()  # of any size
    count = min(len(dead), int((weight > 0).sum()))
    if count == 0:
        return dead[:0]
    rows = torch.multinomial(weight, count, replacement=False, generator=generator).to(x.device)
    chosen = dead[:count]
    live = torch.ones(sae.d_sae, dtype=torch.bool, device=dead.device)
    live[dead] = False
    if not bool(live.any()):
        live[:] = True
    length = ENCODER_SHARE * sae.w_enc[live].norm(dim=-1).mean()
    parameters = per_latent(sae)
    for name, parameter in parameters.items():
        if name == "w_enc":
            parameter[chosen] = length * nn.functional.normalize(x[rows], dim=-1)
        elif name == "w_dec":
            parameter[chosen] = nn.functional.normalize(target[rows], dim=-1)
        elif name == "b_enc":
            parameter[chosen] = 0
        else:
            parameter[chosen] = parameter[live].mean(dim=0)
    w_enc, fires = parameters["w_enc"], _fire(sae.encode(batch.x[rows]), chosen)
    w_enc[chosen] = torch.where(fires[:, None], w_enc[chosen], w_enc[chosen] / ENCODER_SHARE)
    for parameter in parameters.values():
        restart_rows(optimizer, parameter, chosen)
    return chosen


def _fire(codes: Codes, latents: Tensor) -> Tensor:
    """[R] bool: whether in the codes of R rows the latent of each row is active."""
    if codes.indices is None:
        return codes.values.gather(1, latents[:, None]).squeeze(1) > 0
    return ((codes.indices == latents[:, None]) & (codes.values > 0)).any(dim=1)


def per_latent(sae: LinearSAE) -> dict[str, nn.Parameter]:
    """The parameters that have a row for each latent, those of the activation too."""
    names = sae.of_latents()
    return {name: parameter for name, parameter in sae.named_parameters() if name in names}
