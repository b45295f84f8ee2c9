"""Triton backend: CUDA and ROCm devices, or CPU tensors in Triton's interpreter (TRITON_INTERPRET=1).

One file per group of ops; `launch` holds what they share. Nothing else in the package imports Triton.
"""

from torch import Tensor

from sae_kernels.triton.compress import batch_topk_encode, threshold_encode
from sae_kernels.triton.dead import dead_encode
from sae_kernels.triton.decode import decode_residual, gather_dot, sparse_decode
from sae_kernels.triton.encode import topk_encode, topk_encode_many
from sae_kernels.triton.formats import settle
from sae_kernels.triton.launch import BY_NAME_ONLY, refusal
from sae_kernels.triton.step import latent_step, latent_step_many
from sae_kernels.triton.update import segment_rows, sparse_grad

__all__ = [
    "BY_NAME_ONLY",
    "batch_topk_encode",
    "dead_encode",
    "decode_residual",
    "gather_dot",
    "latent_step",
    "latent_step_many",
    "segment_rows",
    "settle",
    "sparse_decode",
    "sparse_grad",
    "supports",
    "threshold_encode",
    "topk_encode",
    "topk_encode_many",
]


def supports(op: str, *tensors: Tensor) -> str | None:
    """None, or the reason why Triton cannot take these tensors."""
    return refusal(*tensors)
