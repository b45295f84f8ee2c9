"""Proof of an export: what was written, read back by itself, does on rows what the original does.

Codes, which latents are active, and reconstructions are compared. Forms that compute the same round
differently (a pre-bias inside b_enc, a gate as a threshold), and a latent within rounding of where it turns
on may be on in one and off in the other: then neither is wrong. Such ties are told from differences by how
far from the edge the latent is, in units of the rounding of its own product; they are counted, left out, and
must stay few. What was found lies beside the weights as `export.json`.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from sae_train.errors import InputError
from sae_train.formats.plain import Plain, of_sae
from sae_train.formats.reference import Active, active_of, encode, read_rows, reconstruct
from sae_train.sae.base import SAE

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2.0**-5}
"""Largest relative difference, by the dtype that was written: bfloat16 keeps 8 bits of every weight."""
ROUNDING = {torch.float32: 2.0**-17, torch.bfloat16: 2.0**-6}
"""How near its edge a latent is tied, as a share of the lengths of its weights and its row."""
MOST_TIES = {torch.float32: 0.01, torch.bfloat16: 0.2}
"""Share of what is active."""
ROWS = 512
"""At a time."""
PROOF = "export.json"
"""The file that says so, beside what was written."""


@dataclass(frozen=True)
class Proof:
    """What a comparison found.

    Attributes:
        rows, active: how many rows were compared, and latents active on them in the original.
        l0: active per row in the original.
        codes, reconstruction: relative difference, sqrt(sum of squares of differences / of the original); the
            reconstruction's around b_dec.
        ties: latents on in one and off in the other, within rounding of their edge.
        differing: the same, not within rounding: there must be none.
    """

    rows: int
    active: int
    l0: float
    codes: float
    reconstruction: float
    ties: int
    differing: int
    tolerance: float

    @property
    def holds(self) -> bool:
        return (
            self.active > 0 and self.differing == 0 and max(self.codes, self.reconstruction) <= self.tolerance
        )

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"holds": self.holds}


@torch.no_grad()
def compare(original: SAE | Plain, back: Plain, x: Tensor, dtype: torch.dtype) -> Proof:
    """Compare an SAE with what was read back.

    Args:
        original: an SAE encodes and decodes with its own code; a plain one, for what memory does not hold,
            in blocks.
        back: what was read.
        x: [N, d_in] raw rows.
        dtype: that was written.
    """
    plain = of_sae(original) if isinstance(original, SAE) else original
    squares = torch.zeros(4, dtype=torch.float64)
    active = ties = differing = 0
    for part in x.split(ROWS):
        if isinstance(original, SAE):
            codes = original.encode(part)
            ours, y = active_of(codes), original.reconstruct(part, codes).float()
        else:
            ours = encode(plain, part)
            y = reconstruct(plain, part, ours)
        theirs = encode(back, part)
        y_back = reconstruct(back, part, theirs)
        tied, wrong = _flips(plain, ours, theirs, part, ROUNDING[dtype])
        same = torch.ones(len(part), dtype=torch.bool)
        same[tied // plain.d_sae] = False
        mine, other = (_values(one, ours, theirs, tied) for one in (ours, theirs))
        centred = (y - plain.b_dec)[same].double()
        squares += torch.stack(
            [
                (mine - other).square().sum(),
                mine.square().sum(),
                (y - y_back)[same].double().square().sum(),
                centred.square().sum(),
            ]
        )
        active, ties, differing = active + len(ours.keys), ties + len(tied), differing + wrong
    codes_apart, rows_apart = (squares[0] / squares[1]).sqrt(), (squares[2] / squares[3]).sqrt()
    most = MOST_TIES[dtype] * active
    return Proof(
        rows=len(x),
        active=active,
        l0=active / max(1, len(x)),
        codes=_number(codes_apart),
        reconstruction=_number(rows_apart),
        ties=ties,
        differing=differing if ties <= most else differing + ties,
        tolerance=TOLERANCE[dtype],
    )


def as_record(
    format_name: str, dtype: torch.dtype, rows_from: str, saes: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """What `export.json` holds.

    Args:
        format_name: that was written.
        dtype: of its weights.
        rows_from: "held-out" or "random", what was compared on.
        saes: name of each SAE -> its proof as JSON, with whatever else is to be said of it.
    """
    known = str(dtype).removeprefix("torch.")
    return {"format": format_name, "dtype": known, "rows_from": rows_from, "saes": dict(saes)}


def _number(value: Tensor) -> float:
    return float(value) if bool(torch.isfinite(value)) else 1e30


def _values(one: Active, ours: Active, theirs: Active, tied: Tensor) -> Tensor:
    """[M] float64 values of all latents that are active in either, ties left out."""
    keys = torch.cat([ours.keys, theirs.keys]).unique()
    keys = keys[~torch.isin(keys, tied)]
    if len(one.keys) == 0:
        return torch.zeros(len(keys), dtype=torch.float64)
    at = torch.searchsorted(one.keys, keys).clamp(max=len(one.keys) - 1)
    return torch.where(one.keys[at] == keys, one.values[at], 0).double()


def _flips(plain: Plain, ours: Active, theirs: Active, x: Tensor, near: float) -> tuple[Tensor, int]:
    """Keys that are active in one only and within rounding of their edge; how many are not."""
    flipped = torch.cat([ours.keys, theirs.keys])
    found, count = flipped.unique(return_counts=True)
    flipped = found[count == 1]
    if len(flipped) == 0:
        return flipped, 0
    rows, latents = flipped // plain.d_sae, flipped % plain.d_sae
    weights = torch.cat([plain.w_enc.rows(f, f + 1) for f in latents.tolist()]).double()
    read = read_rows(plain, x)[rows].double()
    h = (weights * read).sum(dim=-1) + plain.b_enc[latents].double()
    edge = _edges(plain, ours, rows, latents)
    length = x[rows].double().norm(dim=-1) + plain.b_dec.double().norm() * plain.pre_bias
    size = weights.norm(dim=-1) * length + plain.b_enc[latents].double().abs()
    apart = (h - edge).abs()
    if plain.gate is not None:  # magnitudes have an edge of their own
        gain = plain.gate.r_mag[latents].double().exp()
        h_mag = gain * (h - plain.b_enc[latents].double()) + plain.gate.b_mag[latents].double()
        apart = torch.minimum(apart, h_mag.abs() / gain)
        size = size + plain.gate.b_mag[latents].double().abs() / gain
    tied = apart <= near * size
    return flipped[tied], int((~tied).sum())


def _edges(plain: Plain, ours: Active, rows: Tensor, latents: Tensor) -> Tensor:
    """What the pre-activation of each (row, latent) has to exceed."""
    rule = plain.rule
    if rule.name in ("relu", "threshold"):
        return rule.level(plain.d_sae)[latents].double()
    # The smallest that the row kept, or what its group kept; 0 where it kept fewer than k.
    assert rule.k is not None
    places = rows if rule.name == "topk" else rows * rule.k + latents * rule.k // plain.d_sae
    held = ours.rows if rule.name == "topk" else ours.rows * rule.k + ours.latents * rule.k // plain.d_sae
    count = int(torch.cat([places, held]).max()) + 1
    kept = torch.full((count,), torch.inf, dtype=torch.float64)
    kept.scatter_reduce_(0, held, ours.values.double(), reduce="amin")
    number = torch.bincount(held, minlength=count)
    full = number >= (rule.k if rule.name == "topk" else 1)
    return torch.where(full, kept, 0.0)[places]


def require(proof: Proof, where: str, format_name: str) -> None:
    """Raises InputError unless the proof holds."""
    if not proof.holds:
        raise InputError(
            "format",
            format_name,
            f"an export that does the same as {where}, within {proof.tolerance:.0e} on {proof.rows} rows; "
            f"read back, codes differ by {proof.codes:.1e}, reconstructions by {proof.reconstruction:.1e}, "
            f"{proof.differing} of {proof.active} active latents",
        )
