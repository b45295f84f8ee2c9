"""Where in a model an SAE reads, and what it reconstructs there or elsewhere.

    hook="resid_post.5"                          an autoencoder
    hook="mlp_in.5" target="mlp_out.5"           a transcoder
    hook="resid_post.3+resid_post.6"             a crosscoder: rows of several hooks side by side

The rows of several hooks are one row, in the order in which the hooks are written.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sae_train.batch import Batch
from sae_train.errors import InputError


@dataclass(frozen=True)
class Widths:
    """Widths of the activations that an SAE reads and reconstructs, one number per hook."""

    inputs: tuple[int, ...]
    targets: tuple[int, ...] = ()
    """Empty: it reconstructs what it reads."""

    @property
    def outputs(self) -> tuple[int, ...]:
        return self.targets or self.inputs


@dataclass(frozen=True)
class Places:
    """The hooks of one SAE, by the names under which their rows travel."""

    inputs: tuple[str, ...]
    targets: tuple[str, ...] = ()
    """Empty: it reconstructs what it reads."""

    @classmethod
    def parse(cls, hook: str, target: str | None = None) -> "Places":
        """Hooks as a configuration writes them, several joined by `+`.

        Raises:
            InputError: an empty name, or a hook twice on one side.
        """
        sides = {"hook": hook.split("+"), "target": target.split("+") if target else []}
        for key, names in sides.items():
            if not all(names) or len(set(names)) < len(names):
                wanted = "hook names such as resid_post.12, each once, several joined by +"
                raise InputError(key, "+".join(names), wanted)
        return cls(tuple(sides["hook"]), tuple(sides["target"]))

    @property
    def outputs(self) -> tuple[str, ...]:
        return self.targets or self.inputs

    @property
    def hooks(self) -> tuple[str, ...]:
        """Every hook once, inputs first."""
        return tuple(dict.fromkeys((*self.inputs, *self.targets)))

    def widths(self, dims: Mapping[str, int]) -> Widths:
        """The widths of these hooks, given every hook's."""
        return Widths(tuple(dims[h] for h in self.inputs), tuple(dims[h] for h in self.targets))

    def batch(self, rows: Mapping[str, Tensor]) -> Batch:
        """What an SAE reads and reconstructs, out of hook -> [N, D]; an autoencoder's y is its x itself."""
        x = _together([rows[hook] for hook in self.inputs])
        return Batch(x, _together([rows[hook] for hook in self.targets]) if self.targets else x)


def _together(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
