"""What a plain SAE computes, in dense products over blocks of latents: slow, and bounded in memory.

It shares no code with the encoders that people use, so that it can judge an export read back from a file of
any size; and it never holds more than one block of weights.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from sae_train.codes import Codes
from sae_train.errors import InputError
from sae_train.formats.plain import Plain, Rule


@dataclass(frozen=True)
class Active:
    """The active latents of N rows, in the order of `keys`.

    Attributes:
        keys: [M] int64, row * d_sae + latent, rising.
        values: [M] float32.
    """

    keys: Tensor
    values: Tensor
    d_sae: int

    @property
    def rows(self) -> Tensor:
        return self.keys // self.d_sae

    @property
    def latents(self) -> Tensor:
        return self.keys % self.d_sae


def active_of(codes: Codes) -> Active:
    """Codes of any layout."""
    mask = codes.active()
    keys = torch.arange(len(mask))[:, None] * codes.d_sae + codes.latents()
    return _sorted(keys[mask], codes.values[mask].float(), codes.d_sae)


def _sorted(keys: Tensor, values: Tensor, d_sae: int) -> Active:
    keys, order = keys.sort()
    return Active(keys, values[order], d_sae)


def read_rows(plain: Plain, x: Tensor) -> Tensor:
    """Raw rows as the encoder takes them."""
    return x.float() - plain.b_dec if plain.pre_bias else x.float()


def encode(plain: Plain, x: Tensor) -> Active:
    """x [N, d_in] raw rows -> what is active."""
    read, rule = read_rows(plain, x), plain.rule
    if rule.name in ("topk", "group_max"):
        gates = _largest(plain, read) if rule.name == "topk" else _of_groups(plain, read)
    else:
        keys, values = [], []
        level = rule.level(plain.d_sae)
        for first, block in plain.w_enc.blocks():
            last = first + len(block)
            h = functional.linear(read, block, plain.b_enc[first:last])
            row, latent = (h > level[first:last]).nonzero(as_tuple=True)
            keys.append(row * plain.d_sae + latent + first)
            values.append(h[row, latent])
        gates = _sorted(torch.cat(keys), torch.cat(values), plain.d_sae)
    if plain.gate is None:
        return gates
    f = gates.latents
    values_now = plain.gate.r_mag[f].exp() * (gates.values - plain.b_enc[f]) + plain.gate.b_mag[f]
    on = values_now > 0
    return Active(gates.keys[on], values_now[on], plain.d_sae)


def _largest(plain: Plain, read: Tensor) -> Active:
    k = plain.rule.k
    assert k is not None
    values = torch.zeros(len(read), 0)
    latents = torch.zeros(len(read), 0, dtype=torch.int64)
    for first, block in plain.w_enc.blocks():
        last = first + len(block)
        h = torch.relu(functional.linear(read, block, plain.b_enc[first:last]))
        best, place = h.topk(min(k, last - first), dim=-1)
        values, latents = torch.cat([values, best], dim=-1), torch.cat([latents, place + first], dim=-1)
        values, place = values.topk(min(k, values.shape[-1]), dim=-1)
        latents = latents.gather(-1, place)
    return active_of(Codes(values, latents.int(), plain.d_sae))


def _of_groups(plain: Plain, read: Tensor) -> Active:
    assert plain.rule.k is not None
    size = plain.d_sae // plain.rule.k
    values, latents = [], []
    for first, block in plain.w_enc.blocks(size):
        last = first + len(block)
        h = torch.relu(functional.linear(read, block, plain.b_enc[first:last]))
        best, place = h.unflatten(-1, (-1, size)).max(dim=-1)
        values.append(best)
        latents.append(place + torch.arange(first, last, size))
    return active_of(Codes(torch.cat(values, dim=-1), torch.cat(latents, dim=-1).int(), plain.d_sae))


def reconstruct(plain: Plain, x: Tensor, active: Active) -> Tensor:
    """[N, d_out] from rows and what is active on them."""
    y = plain.b_dec.expand(len(x), -1).clone()
    if plain.w_skip is not None:
        y += x.float() @ plain.w_skip.T
    rows, latents = active.rows, active.latents
    order = latents.argsort()
    rows, latents, values = rows[order], latents[order], active.values[order]
    for first, block in plain.w_dec.blocks():
        a, b = torch.searchsorted(latents, torch.tensor([first, first + len(block)])).tolist()
        if b - a > len(x) * len(block) // 8:  # dense: one product is cheaper than adding rows up
            dense = torch.zeros(len(x), len(block))
            dense[rows[a:b], latents[a:b] - first] = values[a:b]
            y += dense @ block
            continue
        for part in range(a, b, 4096):
            some = slice(part, min(part + 4096, b))
            y.index_add_(0, rows[some], values[some, None] * block[latents[some] - first])
    return y


def calibrated(plain: Plain, x: Tensor) -> Plain:
    """The same latents with one threshold: as many are active on rows x in all as with top-k or group-max, or
    as a threshold was learned for (BatchTopK).

    Codes are other codes then: a row with much in it has more of them, one with little fewer.

    Raises:
        InputError: nothing is active on these rows, so there is nothing to go by.
    """
    if plain.rule.name == "threshold" and plain.rule.k:
        kept = plain.rule.k * len(x)
    else:
        kept = len(encode(Plain(**{**vars(plain), "gate": None}), x).keys)
    read, best = read_rows(plain, x), torch.zeros(0)
    for first, block in plain.w_enc.blocks():
        h = functional.linear(read, block, plain.b_enc[first : first + len(block)]).flatten()
        best = torch.cat([best, h[h > 0]])
        best = best.topk(min(kept + 1, len(best))).values
    if kept == 0:
        raise InputError("tokens", len(x), "rows on which latents are active, to find thresholds with")
    # Half way between the last that stays and the first that goes.
    level = best[kept - 1 : kept + 1].mean() if len(best) > kept else best[-1] / 2
    return Plain(
        **{**vars(plain), "rule": Rule("threshold", plain.rule.k, level.expand(plain.d_sae).clone())}
    )


def rows_for(plain: Plain, count: int, seed: int = 0) -> Tensor:
    """[count, d_in] random rows on which latents are active: sums of encoder directions of a few hundred."""
    generator = torch.Generator().manual_seed(seed)
    step = max(1, plain.d_sae // 512)
    chosen = torch.arange(0, plain.d_sae, step)
    directions = torch.cat([plain.w_enc.rows(int(f), int(f) + 1) for f in chosen])
    norm = directions.norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
    over = (plain.rule.level(plain.d_sae) - plain.b_enc)[chosen].clamp_min(0)
    # In units of the row: what makes the latent active, and as much again as a random row of unit entries.
    strength = (over / norm + plain.d_in**0.5) * torch.rand(count, len(chosen), generator=generator)
    few = torch.rand(count, len(chosen), generator=generator) < 4 / len(chosen)
    rows = (2 * strength * few) @ (directions / norm[:, None])
    rows += 0.1 * torch.randn(count, plain.d_in, generator=generator)
    return rows + plain.b_dec if plain.pre_bias else rows
