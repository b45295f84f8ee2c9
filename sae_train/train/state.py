"""Everything a resume needs, and nothing else."""

import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from sae_train.batch import ActivationSource
from sae_train.train.ledger import RowLedger
from sae_train.train.members import Member


@dataclass
class TrainState:
    """Members, the position in the data, and how far the run is."""

    members: list[Member]
    source: ActivationSource
    step: int = 0
    tokens: int = 0
    ledger: RowLedger = field(default_factory=RowLedger)
    """Of every row trained on so far."""
    extra: dict[str, Any] = field(default_factory=dict)
    """JSON-able state of the run's other parts by name: clock, log, producer; and the step last judged."""

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "tokens": self.tokens,
            "ledger": self.ledger.value,
            # Processes that differ in rows only have the same state of an SAE: one of them says it.
            "members": {m.name: m.state_dict() for m in self.members if m.split.rows.index == 0},
            "source": self.source.state_dict(),
            "rng": rng_state(),
            "extra": self.extra,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if "ledger" in state:  # older checkpoints have none: it is then of later rows only
            self.ledger.value = state["ledger"]
        self.step, self.tokens = int(state["step"]), int(state["tokens"])
        for member in self.members:
            member.load_state_dict(state["members"][member.name])
        self.source.load_state_dict(state["source"])
        set_rng_state(state["rng"])
        self.extra = dict(state["extra"])


def seed_rng(seed: int) -> None:
    """Seed the generators that `rng_state` reads.

    Nothing of ours draws from them; what a plug-in draws is then a function of the seed too.
    """
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def rng_state() -> dict[str, Any]:
    """States of the generators of torch (CPU and every CUDA device), numpy and Python, without pickles."""
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    assert not isinstance(keys, str)
    version, words, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": {
            "kind": kind,
            "keys": torch.from_numpy(keys.astype(np.int64)),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "cached": float(cached),
        },
        "python": {"version": version, "words": list(words), "gauss": gauss},
    }


def set_rng_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"][: torch.cuda.device_count()])
    n = state["numpy"]
    np.random.set_state(
        (n["kind"], n["keys"].numpy().astype(np.uint32), n["position"], n["has_gauss"], n["cached"])
    )
    p = state["python"]
    random.setstate((p["version"], tuple(p["words"]), p["gauss"]))
