"""Which device and which precision a name in the configuration means on this machine."""

import torch

from sae_train.errors import InputError


def pick_device(name: str, key: str = "model.device") -> torch.device:
    """The device that auto, cpu, cuda or cuda:N means; auto is CUDA where there is one.

    Raises:
        InputError: not a device, or CUDA where torch finds none.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise InputError(key, name, "one of auto, cpu, cuda, cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        found = f"torch finds {torch.cuda.device_count()} CUDA devices here"
        raise InputError(key, name, f"auto or cpu: {found}")
    return device


def native_bfloat16(device: torch.device) -> bool:
    """Whether the hardware multiplies bfloat16 itself; elsewhere it is emulated, slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
