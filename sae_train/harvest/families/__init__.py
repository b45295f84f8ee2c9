"""Where each model family keeps its residual stream: one file per layout, one entry per Hugging Face model
type.

A new family is one file here that calls `register(Family(...))`; the tests take their cases from `FAMILIES`.
"""

from sae_train.harvest.families.base import FAMILIES, SITES, Family, family_of, register
from sae_train.registry import discover

discover(__name__)

__all__ = ["FAMILIES", "SITES", "Family", "family_of", "register"]
