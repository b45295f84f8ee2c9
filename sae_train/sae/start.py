"""Go on from a published SAE: its weights in the units of the rows at hand.

A published SAE takes raw activations; training works in scaled units (`sae.base`). Folding with the inverse
scales is the way back, so no architecture has to say how.
"""

import torch

from sae_train.errors import InputError
from sae_train.sae.base import SAE, per_column

FRAME = ("input_scale", "output_scale", "centre")
"""Buffers that say in which units an SAE trains."""


def check_start(sae: SAE, published: SAE, path: str) -> None:
    """Raises InputError if an SAE cannot start from a published one. Values are not looked at."""
    trained, given = (
        f"{one.config.name} {one.config.kind} with {one.config.activation.name}" for one in (sae, published)
    )
    if trained != given:
        raise InputError("start", path, f"an SAE of the kind that is trained, a {trained}, not a {given}")
    weights, own = published.state_dict(), sae.state_dict()
    for name in sorted(weights.keys() ^ own.keys()):
        raise InputError("start", path, f"an SAE with the same options; only one of the two has {name}")
    for name, tensor in weights.items():
        if tensor.shape != own[name].shape:
            shape = list(own[name].shape)
            raise InputError("start", path, f"{name} of shape {shape}, not {list(tensor.shape)}")


@torch.no_grad()
def take_over(sae: SAE, published: SAE, path: str) -> None:
    """Give an initialised SAE the weights of a published one; its own scales and centre stay.

    Args:
        sae: initialised with real rows. Afterwards sae.folded() computes what `published` does; of several
            hooks whose scales differ from those it was trained with, nearly so.
        published: of the same architecture, activation and shapes.
        path: where it is from, for messages.

    Raises:
        InputError: it is another kind of SAE.
    """
    check_start(sae, published, path)
    weights, own = published.state_dict(), sae.state_dict()
    frame = {name: own[name].clone() for name in FRAME if name in own}
    sae.load_state_dict(weights)
    here = sae.state_dict()  # the tensors themselves
    for name in frame.keys() & {"input_scale", "output_scale"}:
        here[name].copy_(1 / frame[name])
    if "centre" in frame:
        here["centre"].copy_(-frame["centre"] / per_column(frame["input_scale"], sae.widths.inputs))
    sae.fold_()
    for name, tensor in frame.items():
        here[name].copy_(tensor)
    # Rows of several hooks are unit vectors together only in the scales they were trained in, and those of
    # another library's SAE need not be. Their lengths go to the encoder and to thresholds of each latent; a
    # top-k, or a threshold that all latents share, sees the difference.
    norm = here["w_dec"].norm(dim=-1)
    norm = torch.where(norm > 0, norm, 1)
    here["w_dec"].div_(norm[:, None])
    here["w_enc"].mul_(norm[:, None])
    here["b_enc"].mul_(norm)
    for name in ("b_mag", "activation.threshold"):  # of a gated SAE's magnitudes, of a JumpReLU
        if name in here and here[name].shape == norm.shape:
            here[name].mul_(norm)
