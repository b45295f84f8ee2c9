"""Forward passes of which only the layers above some sites are run: those below give what they gave before.

What a site's tensor is replaced by changes nothing below it. Where the same tokens go through a model again
and again, with this or that in the place of a site, the layers below it need to be run once. Nothing else
differs: the layers above get the same tensors, so a pass gives the same bits as a whole one.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from sae_train.harvest.capture import first_tensor, with_first_tensor
from sae_train.harvest.families import FAMILIES, family_of
from sae_train.harvest.hooks import Site


class Above:
    """The part of a model above the lowest of some sites.

        above = Above(model, sites)
        with above.remembering(): model(**inputs)
        with above.alone(): model(**inputs)        # as often as wanted, with the same inputs

    Of a model of an unknown family, or with a site outside its layers, the part is the whole model.

    Args:
        model: not hooked at its layers' outputs by anything that has to see those below again.
        sites: places of this model.
    """

    def __init__(self, model: nn.Module, sites: Sequence[Site]) -> None:
        self.skipped = _below(model, sites)
        """Layers that need not be run again, in order."""
        self.site = sites[0] if sites else None
        self._gave: Any = None

    @contextmanager
    def remembering(self) -> Iterator[None]:
        """A pass in which the model runs as it is; the layers below give their results to keep."""
        if not self.skipped:
            yield
            return
        handle = self.skipped[-1].register_forward_hook(lambda _, args, gave: self._keep(gave))
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Passes in which the layers below are not run."""
        # accelerate puts a forward on the layer itself
        own = [vars(layer).get("forward") for layer in self.skipped]
        try:
            for layer in self.skipped:
                layer.forward = lambda *args, **kwargs: self._again()
            yield
        finally:
            for layer, forward in zip(self.skipped, own, strict=True):
                if forward is None:
                    del layer.forward
                else:
                    layer.forward = forward

    def _keep(self, gave: Any) -> None:
        self._gave = gave
        self._gave = self._again()

    def _again(self) -> Any:
        """What the highest layer below gave, in a tensor of its own: the model may go on to change it in
        place. For the layers below that one it is as good as anything, as none of them looks at it."""
        assert self.site is not None and self._gave is not None, "remembering() comes before alone()"
        return with_first_tensor(self._gave, first_tensor(self._gave, self.site).clone())


def _below(model: nn.Module, sites: Sequence[Site]) -> list[nn.Module]:
    """Layers whose results no site's replacement can change; a layer at whose output a site is, is one."""
    family = family_of(model)
    if family is None or getattr(model.config, "model_type", "") not in FAMILIES:
        return []
    path = family.layers_path(model)
    layers = list(model.get_submodule(path).children())
    counts = []
    for site in sites:
        if not site.path.startswith(f"{path}."):
            return []
        number, _, inside = site.path.removeprefix(f"{path}.").partition(".")
        counts.append(int(number) + (not inside and site.side == "out"))
    return layers[: min(counts, default=0)]
