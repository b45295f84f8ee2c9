"""Adam with both moments in 8 bits: a quarter of their memory, by torchao.

Blocks of 256 numbers share a scale, and each number is one of 256 values, denser near zero (Dettmers et al.
2021, arXiv:2110.02861). Tensors of fewer than 4,096 numbers, or of no whole number of blocks, keep float32.

In a block of numbers of very different sizes, small second moments round to zero, and first moments do not.
A latent that is not active has no gradient, so its step would then be its first moment divided by eps alone:
with 96 rows a step and 16 latents to a block, eps=1e-8 ended with an FVU of 3.7 where 1e-7 and Adam had 0.27.

torchao holds such a state in a tensor class of its own, which is saved as the plain tensors it is made of. It
compiles its step. That is left to it on a GPU; on a CPU, where it would take most of a minute and a C++
compiler, the same step runs uncompiled: correct, and slow (2.4 s for 4,608 x 576 on one thread, against 13 ms
of fused Adam).
"""

import contextlib
import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sae_train.errors import InputError
from sae_train.train.optimizers.base import Composed

NOISY = ("torchao", "torch.utils._pytree")
"""Loggers that warn, when torchao is imported, of kernels for other GPUs that this optimizer does not use."""
LEAST_EPS = 1e-7
"""See above. It changes the steps of wide SAEs little: a gradient of norm 0.1 over 131,072 latents of width
4,096 still has a root mean square of 3e-6."""
PARTS = ("codes", "scale", "qmap")
"""What a quantised tensor is made of: [*shape] uint8, a float32 per block, the 256 values of the codes."""


def imported() -> Any:
    """The class of the library.

    Raises:
        InputError: it is not installed.
    """
    try:
        with _quiet():
            from torchao.optim import Adam8bit as Theirs
    except ImportError as error:
        wanted = f"another optimizer, or pip install 'sae-train[optim]' ({error})"
        raise InputError("optim.name", "adam8bit", wanted) from None
    return Theirs


class Adam8bit(Composed):
    """torchao.optim.Adam8bit, with a learning rate that is a number and a state that can be saved."""

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float, betas: tuple[float, float], eps: float
    ) -> None:
        super().__init__([imported()(params, lr=lr, betas=betas, eps=eps)])
        for group in self.param_groups:
            group["lr"] = lr

    def _step_part(self, part: torch.optim.Optimizer) -> None:
        # A tensor, or its compiled step would be compiled again for every learning rate.
        part.param_groups = [{**group, "lr": torch.tensor(group["lr"])} for group in part.param_groups]
        on_cpu = all(p.device.type == "cpu" for group in part.param_groups for p in group["params"])
        with torch.compiler.set_stance("force_eager") if on_cpu else contextlib.nullcontext():
            part.step()

    def state_dict(self) -> dict[str, Any]:
        """Like any optimizer's, of plain tensors: a quantised one is a dict of its parts."""
        whole = super().state_dict()
        whole["state"] = {
            number: {name: _packed(value) for name, value in state.items()}
            for number, state in whole["state"].items()
        }
        return whole

    def unpack(self) -> None:
        for parameter, state in self.state.items():
            for name, value in state.items():
                if isinstance(value, Mapping):
                    state[name] = _unpacked(value, parameter, name)

    @torch.no_grad()
    def restart_rows(self, parameter: Tensor, rows: Tensor) -> None:
        # Code 0 stands for -1 in a signed tensor. Scales stay: blocks may reach into other rows.
        for value in self.state.get(parameter, {}).values():
            if hasattr(value, "codes"):
                value.codes.index_fill_(0, rows, int((value.qmap == 0).nonzero()))
            elif value.shape == parameter.shape:
                value.index_fill_(0, rows, 0)


def _packed(value: Any) -> Any:
    if not hasattr(value, "codes"):
        return value
    return {name: getattr(value, name) for name in PARTS} | {"signed": value.signed}


def _unpacked(saved: Mapping[str, Any], parameter: Tensor, name: str) -> Tensor:
    """A quantised tensor from its parts. Raises ValueError if they make none of the parameter's shape."""
    from torchao.optim.subclass_8bit import OptimState8bit

    parts = [saved[part].to(parameter.device) for part in PARTS]
    codes, scale, qmap = parts
    fits = codes.shape == parameter.shape and qmap.shape == (256,) and scale.ndim == 1
    if not fits or len(scale) == 0 or codes.numel() % len(scale):
        raise ValueError(f"{name} of a parameter {list(parameter.shape)} has codes {list(codes.shape)}")
    quantised: Tensor = OptimState8bit(*parts, saved["signed"], dtype=parameter.dtype)
    return quantised


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in NOISY]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
