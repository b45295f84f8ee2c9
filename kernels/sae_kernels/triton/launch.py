"""What every kernel file shares: is Triton usable here, and what the compile gate compiles.

`TRITON_INTERPRET=1`, set before the first import, runs kernels on CPU tensors in Python: slow, and the
way they are tested without a GPU. In the interpreter bfloat16 arithmetic is wrong (values are held as
uint16) and storing bfloat16 truncates, so kernels convert to float32 as they load, and operands of
`tl.dot` are upcast when the constexpr INTERPRETING is set.
"""

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_log = logging.getLogger("sae_kernels")

INTERPRETING: bool = triton.knobs.runtime.interpret
BY_NAME_ONLY = "Triton interprets here, which is for tests" if INTERPRETING else None
"""Why `auto` should pass Triton by although it would do."""


def _let_loops_have_tensor_bounds() -> None:
    """Triton 3.6 interprets a `range` with a computed bound in a way that NumPy 2.4 refuses; 3.7 does not.

    https://github.com/triton-lang/triton/issues/9171"""
    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = patched


if INTERPRETING:
    from triton.runtime import interpreter  # it needs NumPy, which kernels do without

    _let_loops_have_tensor_bounds()


@dataclass(frozen=True)
class Shape:
    """A size of problem that kernels are compiled and measured at."""

    name: str
    n: int
    d: int
    f: int
    k: int


SHAPES = (
    Shape("A", 8192, 768, 24576, 32),
    Shape("B", 8192, 2304, 65536, 64),
    Shape("C", 8192, 4096, 131072, 64),
    Shape("D", 4096, 4096, 1048576, 64),
)


@dataclass(frozen=True)
class Case:
    """One compilation of a kernel as it would be launched at some shape.

    Attributes:
        kernel: the @triton.jit function.
        types: argument name -> Triton type ("*fp32", "*bf16", "i32", "i64", "fp32",
            "tensordesc<bf16[64,64]>"); pointers and i32 are taken as divisible by 16 unless named in `odd`.
        constants: constexpr name -> value.
        num_warps, num_stages: launch options.
        tensor_cores: there must be matrix instructions (those of warp groups on sm_90).
        max_registers: per thread, on NVIDIA.
        odd: arguments that are not divisible by 16.
        archs: where it runs; all three by default.
        vector_loads: there must be loads of 16 bytes per thread.
        register_limit: launch option maxnreg, on NVIDIA.
    """

    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    tensor_cores: bool = False
    max_registers: int = 255
    odd: tuple[str, ...] = ()
    archs: tuple[str, ...] = field(default=("sm_80", "sm_90", "gfx942"))
    vector_loads: bool = False
    register_limit: int | None = None


def limited(registers: int | None) -> dict[str, int]:
    """The launch option that allows a thread so many registers, which NVIDIA's compiler alone takes.

    Left to itself, ptxas may aim at a round number (96, 128) and store the two or four that are over."""
    return {} if registers is None or torch.version.hip is not None else {"maxnreg": registers}


def on_device(numbers: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A vector of numbers, by launches that hold them: a CUDA graph would read memory of the host again."""
    if len(set(numbers)) == 1:
        return torch.full((len(numbers),), numbers[0], dtype=dtype, device=device)
    found = torch.zeros(len(numbers), dtype=dtype, device=device)
    torch._foreach_add_(found.unbind(), list(numbers))
    return found


def refusal(*tensors: Tensor) -> str | None:
    """None, or why Triton cannot take these tensors."""
    where = "cpu" if INTERPRETING else "cuda"
    for tensor in tensors:
        if tensor.device.type != where:
            why = "Triton interprets here, on CPU tensors" if INTERPRETING else "Triton runs on CUDA and ROCm"
            return f"a tensor is on {tensor.device}, and {why}"
        if tensor.dtype == torch.float64:
            return "a tensor is float64, and the kernels sum in float32"
    return broken()


@functools.cache
def broken() -> str | None:
    """None, or why no kernel can be compiled and run here; looked at once, with one warning."""
    try:
        out = torch.empty(1, dtype=torch.float32, device="cpu" if INTERPRETING else "cuda")
        _probe[(1,)](out)
        if float(out) == 42.0:
            return None
        reason = f"a test kernel stored {float(out)} where it should store 42"
    except Exception as error:  # whatever a missing compiler, a read-only cache or an old driver raises
        first_line = (str(error).strip().splitlines() or [""])[0]
        reason = f"a test kernel failed with {type(error).__name__}: {first_line}"
    _log.warning("Triton is not used: %s", reason)
    return reason


@triton.jit
def _probe(out):
    tl.store(out, 42.0)


def cases(shape: Shape) -> list[Case]:
    return [Case(_probe, types={"out": "*fp32"}, constants={}, num_warps=1)]
