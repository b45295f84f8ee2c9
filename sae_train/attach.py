"""SAEs on a running Hugging Face model: hooks that record, replace and steer, as context managers.

    with attached(model, sae, "resid_post.12") as run:                       # run.codes of every forward pass
    with attached(model, sae, "resid_post.12", replace=True):                # goes on with the reconstruction
    with attached(model, sae, "resid_post.12", replace=True, use_error_term=True, edit=change):
    with steered(model, sae, "resid_post.12", {17: 8.0}):                    # x + 8 d_17
    with clamped(model, sae, "resid_post.12", {17: 8.0}):                    # x + (8 - z_17) d_17
    with ablated(model, sae, "resid_post.12", [17]):                         # x - z_17 d_17

z are codes and d_i = `sae.directions([i])`. In all but the second, what latents do not explain stays as the
model computed it: the error term is kept. Every forward pass inside the block is meant, those of
`model.generate` with a cache too; blocks can stand inside each other, for one SAE or several, and the hooks
of a block are gone after it, however it ends. A transcoder reads `hook` and changes `target`.

An SAE was trained on ordinary tokens alone. At the first position, special tokens and attention sinks its
reconstruction can be far off, and the model does not survive that: leave them out with `mask`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from sae_train.codes import Codes
from sae_train.errors import InputError
from sae_train.harvest.capture import Visit, hooked
from sae_train.harvest.hooks import Site, resolve
from sae_train.places import Places
from sae_train.sae.base import SAE

Edit = Callable[[Codes], Codes]
"""Codes [B, T, K] of a forward pass -> those to reconstruct from."""

Mask = Tensor | Callable[[Tensor], Tensor]
"""Positions that may change: [B, T] bool, or a function that gives it for a place's activations [B, T, D]."""


@dataclass
class Recording:
    """What an attached SAE saw.

    Attributes:
        hook: where.
        forwards: codes [B, T, K] of every forward pass so far, before any edit, in order. With a cache, T is
            1 in all but the first of those that `generate` makes.
    """

    hook: str
    forwards: list[Codes] = field(default_factory=list)

    @property
    def codes(self) -> Codes:
        """Of the latest forward pass. Raises InputError if there was none."""
        if not self.forwards:
            raise InputError("hook", self.hook, "a forward pass through it inside the `with` block first")
        return self.forwards[-1]


@contextmanager
def attached(
    model: nn.Module,
    sae: SAE,
    hook: str,
    *,
    target: str | None = None,
    replace: bool = False,
    use_error_term: bool = False,
    edit: Edit | None = None,
    mask: Mask | None = None,
) -> Iterator[Recording]:
    """Record the codes of an SAE in every forward pass, and let the model go on with its reconstruction.

    Args:
        model: a Hugging Face model.
        sae: takes raw activations of the hook, as `load_sae` gives it.
        hook: what it reads: "resid_post.12", "blocks.12.hook_resid_post", "model.layers.12:in"; a
            crosscoder's joined by "+".
        target: what a transcoder replaces; may be left out where it only records.
        replace: the model goes on with the reconstruction. Off: nothing is changed.
        use_error_term: add what the SAE's own reconstruction misses. Without `edit` that changes no bit of
            the model's outputs, and gradients of them reach `run.codes`. The error itself is a constant.
        edit: codes to reconstruct from instead of these.
        mask: positions to change; the others keep what the model computed.

    Yields:
        The recording: `run.codes` and `run.forwards`.

    Raises:
        InputError: no such hook, or not as many as the SAE has; the SAE cannot change what it has to read
            first; options that mean nothing together. In a forward pass: activations of another width than
            the SAE's, a mask of another shape than they, a target that is computed before the hook.
    """
    if not replace and (use_error_term or edit is not None):
        option = "edit" if edit is not None else "use_error_term"
        raise InputError(option, True if edit is None else "a function", "replace=True beside it")
    run = Recording(hook)

    def change(x: Tensor) -> Tensor | None:
        codes = sae.encode(x)
        run.forwards.append(codes)
        if not replace:
            return None
        own = sae.reconstruct(x, codes)
        new = own if edit is None else sae.reconstruct(x, edit(codes.clone()))  # which it may write to
        return new - own.detach() if use_error_term else new

    how = None if not replace else "beside a constant" if use_error_term else "instead"
    with hooked(model, _Splice(model, sae, hook, target, change, how, mask).visits()):
        yield run


@contextmanager
def steered(
    model: nn.Module,
    sae: SAE,
    hook: str,
    strengths: Mapping[int, float],
    *,
    target: str | None = None,
    maxima: Tensor | None = None,
    mask: Mask | None = None,
) -> Iterator[None]:
    """Add latents' directions to the model's activations, whether they are active or not.

    Args:
        strengths: latent -> how much of it.
        maxima: [F] largest activation of each latent; strengths are multiples of it then. A published SAE's
            are `train_max` in its features.safetensors.
        model, sae, hook, target, mask: as in `attached`. Nothing is read, so a crosscoder can steer too.

    Raises:
        InputError: as `attached`; or no such latent, or what is no finite number.
    """
    latents, values = _settings(sae, strengths, maxima)
    with torch.no_grad():
        delta = (values[:, None] * sae.directions(latents)).sum(dim=0)
    with hooked(model, _Splice(model, sae, hook, target, None, "beside", mask, delta).visits()):
        yield


@contextmanager
def clamped(
    model: nn.Module,
    sae: SAE,
    hook: str,
    values: Mapping[int, float],
    *,
    target: str | None = None,
    maxima: Tensor | None = None,
    mask: Mask | None = None,
) -> Iterator[None]:
    """Hold latents at values, whatever they would have been; all else stays as the model computed it.

    Args:
        values: latent -> its activation at every position.
        model, sae, hook, target, maxima, mask: as in `steered`.

    Raises:
        InputError: as `attached`; or no such latent, or what is no finite number.
    """
    latents, wanted = _settings(sae, values, maxima)

    def change(x: Tensor) -> Tensor:
        return (wanted - sae.encode_latents(x, latents)) @ sae.directions(latents).float()

    with hooked(model, _Splice(model, sae, hook, target, change, "beside", mask).visits()):
        yield


@contextmanager
def ablated(
    model: nn.Module,
    sae: SAE,
    hook: str,
    latents: Sequence[int] | Tensor,
    *,
    target: str | None = None,
    mask: Mask | None = None,
) -> Iterator[None]:
    """Take what latents contribute out of the model's activations: `clamped` at 0.

    Args and errors as there.
    """
    zeros = dict.fromkeys(sae.chosen(latents).tolist(), 0.0)
    with clamped(model, sae, hook, zeros, target=target, mask=mask):
        yield


def _settings(sae: SAE, numbers: Mapping[int, float], maxima: Tensor | None) -> tuple[Tensor, Tensor]:
    """[L] latents and [L] float32 values, on the device of the weights."""
    try:
        given = [float(number) for number in numbers.values()]
    except (AttributeError, TypeError, ValueError):
        raise InputError("latents", numbers, "latents with a number each: {17: 8.0}") from None
    latents = sae.chosen(list(numbers))
    values = torch.tensor(given, dtype=torch.float32, device=latents.device)
    if maxima is not None:
        if maxima.shape != (sae.d_sae,):
            raise InputError("maxima", list(maxima.shape), f"one number for each of {sae.d_sae} latents")
        values = values * maxima.to(values)[latents]
    if not bool(values.isfinite().all()):
        raise InputError("latents", numbers, "finite numbers, and maxima that are, if any are given")
    return latents, values


class _Splice:
    """What one block does at its hooks: gather what the SAE reads, compute from it, write the result.

    Args:
        change: rows of all hooks read, side by side [..., d_in] -> what to write [..., d_out], or None. None:
            nothing is read.
        how: "instead" of what the model computed; "beside" it, added; "beside a constant", added to it as if
            it had no gradient; None writes nothing.
        delta: [d_out] to write at every position, where nothing is read.
    """

    def __init__(
        self,
        model: nn.Module,
        sae: SAE,
        hook: str,
        target: str | None,
        change: Callable[[Tensor], Tensor | None] | None,
        how: str | None,
        mask: Mask | None,
        delta: Tensor | None = None,
    ) -> None:
        places = _places(sae, hook, target)
        self.sae, self.change, self.how, self.mask = sae, change, how, mask
        reads = _sites(places.inputs, model)
        self.reads = reads if change is not None else []
        if how is not None and sae.config.kind == "transcoder" and target is None:
            raise InputError("target", target, "the hook that the transcoder reconstructs, to change it")
        self.writes = _sites(places.outputs, model) if how is not None else []
        if len(self.reads) > 1 and set(self.reads) & set(self.writes):
            wanted = (
                "an SAE of one hook, or steered(): this one has to read places of which it changes the first"
            )
            raise InputError("hook", hook, wanted)
        self.seen: dict[Site, Tensor] = {}
        self.due = {} if delta is None else self._parts(delta)
        self.always = delta is not None

    def visits(self) -> dict[Site, Visit]:
        """What `hooked` takes; reading comes before writing at a place that has both."""
        return {site: partial(self._visit, site) for site in dict.fromkeys((*self.reads, *self.writes))}

    def _visit(self, site: Site, x: Tensor) -> Tensor | None:
        if site in self.reads:
            self._read(site, x)
        return self._written(site, x) if site in self.writes else None

    def _read(self, site: Site, x: Tensor) -> None:
        _check_width(site, x, self.sae.widths.inputs[self.reads.index(site)])
        self.seen[site] = x
        if len(self.seen) < len(self.reads) or self.change is None:
            return
        device = x.device
        rows = [self.seen[one].to(device) for one in self.reads]
        self.seen = {}
        made = self.change(rows[0] if len(rows) == 1 else torch.cat(rows, dim=-1))
        if made is not None:
            self.due = self._parts(made)

    def _parts(self, made: Tensor) -> dict[Site, Tensor]:
        """What goes to each place, out of [..., d_out]."""
        return dict(zip(self.writes, made.split(self.sae.widths.outputs, dim=-1), strict=True))

    def _written(self, site: Site, x: Tensor) -> Tensor:
        _check_width(site, x, self.sae.widths.outputs[self.writes.index(site)])
        made = self.due.get(site) if self.always else self.due.pop(site, None)
        if made is None:
            raise InputError("target", site.name, "a place that the model computes after all that are read")
        wide = torch.promote_types(x.dtype, torch.float32)
        made = made.to(x.device, wide)
        if self.how != "instead":
            made = (x.detach() if self.how == "beside a constant" else x).to(wide) + made
        made = made.to(x.dtype)
        if self.mask is None:
            return made
        mask = self.mask if isinstance(self.mask, Tensor) else self.mask(x)
        if mask.dtype != torch.bool or mask.shape != x.shape[:-1]:
            shape = list(x.shape[:-1])
            raise InputError("mask", f"{mask.dtype} {list(mask.shape)}", f"bool {shape} in this forward pass")
        return torch.where(mask.to(x.device)[..., None], made, x)


def _places(sae: SAE, hook: str, target: str | None) -> Places:
    """The names of the hooks that an SAE reads and writes, as many as it has."""
    if not isinstance(hook, str):
        raise InputError("hook", hook, "the name of a hook, such as resid_post.12")
    places = Places.parse(hook, target)
    transcodes = sae.config.kind == "transcoder"
    if len(places.inputs) != len(sae.widths.inputs):
        raise InputError(
            "hook", hook, f"as many hooks as the SAE reads, {len(sae.widths.inputs)}, joined by +"
        )
    if target is not None and not transcodes:
        raise InputError("target", target, f"none: this {sae.config.kind} reconstructs what it reads")
    if target is not None and len(places.targets) != len(sae.widths.targets):
        raise InputError(
            "target", target, f"as many hooks as the SAE reconstructs, {len(sae.widths.targets)}"
        )
    return places


def _sites(names: Sequence[str], model: nn.Module) -> list[Site]:
    if hasattr(model, "_orig_mod"):  # hooks would change what a graph has seen
        raise InputError("model", type(model).__name__, "the model that torch.compile was given")
    sites = [resolve(name, model) for name in names]
    for site in sites:
        if site.other:
            raise InputError("hook", site.name, "a hook of the model that is given; it has no @other")
    return sites


def _check_width(site: Site, x: Tensor, width: int) -> None:
    if x.shape[-1] != width:
        raise InputError(
            "hook", site.name, f"a place of width {width}, as the SAE's; this is {x.shape[-1]} wide"
        )
