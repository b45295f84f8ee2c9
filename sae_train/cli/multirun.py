"""Hydra's flag for many runs, -m, which makes `train` a sweep."""

from collections.abc import Sequence

MULTIRUN = ("-m", "--multirun")
HYDRAS = ("hydra.", "hydra/")
"""What keys of Hydra's own begin with. With such a key, -m is Hydra's own multirun."""


def is_sweep(args: Sequence[str]) -> bool:
    """Whether arguments of `train` ask for a sweep."""
    return bool(set(MULTIRUN) & set(args)) and not any(arg.startswith(HYDRAS) for arg in args)
