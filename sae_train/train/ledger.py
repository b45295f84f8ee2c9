"""The row ledger: one number that stands for every row trained on, and for their order.

Two runs with equal ledgers saw the same rows in the same batches; a row left out, repeated or swapped
changes it (but for one chance in 2^64). It is kept on the device of the rows and never waits for it.
"""

import torch
from torch import Tensor

# splitmix64 (Steele et al. 2014), in wrapping signed arithmetic
_STEP = 0x9E3779B97F4A7C15 - 2**64
_MIX = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)


class RowLedger:
    """Fingerprint of a sequence of batches of row ids; starts at 0."""

    def __init__(self) -> None:
        self.value = torch.zeros((), dtype=torch.int64)

    def add(self, ids: Tensor) -> None:
        """Append a batch: ids [N] int64. A batch edge counts too."""
        place = torch.arange(1, len(ids) + 1, device=ids.device) * _STEP
        batch = _mix(_mix(ids) + place).sum()
        self.value = _mix(self.value.to(ids.device) * _STEP + batch)

    def hex(self) -> str:
        """The value as 16 hex digits; reads it from the device."""
        return f"{int(self.value) % 2**64:016x}"


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _MIX[0]
    x = (x ^ _shift(x, 27)) * _MIX[1]
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical shift to the right; torch's own copies the sign."""
    return (x >> bits) & (2 ** (64 - bits) - 1)
