"""Triton backend: CUDA and ROCm devices, or CPU tensors in Triton's interpreter (TRITON_INTERPRET=1).

One file per group of ops; `launch` holds what they share. Nothing else in the package imports Triton.
"""

from torch import Tensor

from sae_kernels.triton.launch import refusal

__all__ = [
    "supports",
]


def supports(op: str, *tensors: Tensor) -> str | None:
    """None, or the reason why Triton cannot take these tensors."""
    return refusal(*tensors)
