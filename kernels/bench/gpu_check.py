"""Before anything is timed: our step at its real size against float64.

The encoder is checked on a slice of rows over all latents, decoder and loss on the same rows, the gradient
norm over everything, and the Adam step in rows of latents that fire often, rarely and never. A bfloat16
operand is taken as the number it is: products of two are exact in float32, whose sums of m terms drift by
at most about m * EPS of the sum of magnitudes. Tensor cores may cut where a CPU rounds: twice that.
"""

import torch
from gpu_problem import CHUNK, Problem
from gpu_state import master_rows
from sae_kernels import AdamStep, DeadGrads, Latents
from torch import Tensor

EPS = 2.0**-24
BF16_EPS = 2.0**-8
SLICE = 256
PICKED = 64  # latents whose Adam step is checked, of each kind


class Wrong(Exception):
    """An op whose result is off: it must not be timed."""


def pick(counts: Tensor) -> Tensor:
    """Latents that fire often, now and then, and hardly or never, from their counts [F]."""
    often = counts.argsort(descending=True, stable=True)
    middle = int((counts > 0).sum()) // 2
    return torch.cat([often[:PICKED], often[middle : middle + PICKED], often[-PICKED:]]).unique()


def check_encode(
    p: Problem, x: Tensor, w: Tensor, b: Tensor, values: Tensor, indices: Tensor
) -> dict[str, float]:
    """Largest error, as a share of what rounding can do: of values, and of the choice of latents."""
    rows = torch.arange(0, p.n, max(1, p.n // SLICE), device=x.device)
    xs, got, chosen = x[rows].double(), values[rows].double(), indices[rows].long()
    ordered = chosen.sort(dim=1).values
    if not (int(ordered.min()) >= 0 and int(ordered.max()) < p.f and bool((ordered.diff(dim=1) > 0).all())):
        raise Wrong("topk_encode: indices repeat within a row or are out of range")
    best = torch.full((len(rows), p.k), -torch.inf, dtype=torch.float64, device=x.device)
    longest = 0.0
    for start in range(0, p.f, max(1, CHUNK // p.d)):
        part = slice(start, start + max(1, CHUNK // p.d))
        exact = w[part].double()
        longest = max(longest, float(exact.norm(dim=1).max()))
        best = torch.cat([best, xs @ exact.T + b[part].double()], dim=1).topk(p.k, dim=1).values
    kth = best[:, -1:].clamp_min(0)
    scores = torch.einsum("nd,nkd->nk", xs, w[chosen].double()) + b[chosen].double()
    limit = 2 * p.d * EPS * (xs.norm(dim=1, keepdim=True) * longest + b.abs().max().double())
    off = float(((got - scores.clamp_min(0)).abs() / limit).max())
    worse = float(((kth - scores.clamp_min(0)) / limit).max())  # a chosen latent below the k-th best
    refuse("topk_encode: a value", off, 1.0)
    refuse("topk_encode: a chosen latent is below the k-th largest", worse, 2.0)
    return {"values": off, "choice": max(0.0, worse)}


def check_decode(
    p: Problem,
    codes: tuple[Tensor, Tensor],
    w: Tensor,
    b: Tensor,
    y: Tensor,
    out: tuple[Tensor, Tensor, Tensor],
) -> dict[str, float]:
    """Relative root mean square errors of residual and dots, largest relative error of the loss."""
    rows = torch.arange(0, p.n, max(1, p.n // SLICE), device=y.device)
    values, gathered = codes[0][rows].double(), w[codes[1][rows].long()].double()
    exact = y[rows].double() - torch.einsum("nk,nkd->nd", values, gathered) - b.double()
    residual, loss, dots = (t[rows].double() for t in out)
    want_dots = torch.einsum("nd,nkd->nk", residual, gathered)  # of the residual as it was rounded
    terms = max(p.k, p.d)
    found = {
        "residual": rms(residual, exact),
        "loss": float(((loss - exact.square().sum(dim=1)) / exact.square().sum(dim=1)).abs().max()),
        "dots": rms(dots, want_dots),
    }
    # What is subtracted is larger than what remains: errors of the sums grow by the ratio of their norms.
    growth = float(y[rows].double().norm() / exact.norm())
    refuse("decode_residual: residual", found["residual"], BF16_EPS + 4 * p.k * EPS * (1 + growth))
    refuse("decode_residual: loss", found["loss"], 8 * terms * EPS * (1 + growth))
    dots_growth = float(residual.norm() * gathered.norm() / len(rows) ** 0.5 / want_dots.norm())
    refuse("decode_residual: dots", found["dots"], 4 * terms * EPS * (1 + dots_growth))
    return found


class StepCheck:
    """What `latent_step` should do, in float64, computed before it: `of_norm` and rows of some latents."""

    def __init__(
        self,
        p: Problem,
        x: Tensor,
        residual: Tensor,
        values: Tensor,
        indices: Tensor,
        dots: Tensor,
        latents: Latents,
        scale: float,
        dead: DeadGrads | None = None,
    ) -> None:
        self.p = p
        device = x.device
        flat, row = indices.reshape(-1).long(), torch.arange(p.n, device=device).repeat_interleave(p.k)
        z, live = values.reshape(-1).double(), values.reshape(-1) != 0
        dz = torch.where(live, scale * dots.reshape(-1).double(), 0)
        self.counts = torch.bincount(flat[live], minlength=p.f)
        self.picked = pick(self.counts)
        self.active = self.counts > 0  # what a lazy step may not leave alone
        d_b_enc = torch.zeros(p.f, dtype=torch.float64, device=device).index_add_(0, flat, dz)
        if dead is not None:
            d_b_enc.index_add_(0, dead.latents, dead.b_enc.double())
            self.active[dead.latents] = True
        total = d_b_enc.square().sum()
        removed = along_picked = torch.zeros_like(total)
        d_b_dec = scale * residual.double().sum(dim=0)
        self.d_enc, self.d_dec = (
            torch.zeros(len(self.picked), p.d, dtype=torch.float64, device=device) for _ in "ab"
        )
        self.d_b_enc = d_b_enc[self.picked]
        step = max(1, CHUNK // p.d)
        order = flat.argsort(stable=True)
        ends = torch.bincount(flat, minlength=p.f).cumsum(0)
        for start in range(0, p.f, step):
            stop = min(p.f, start + step)
            first = int(ends[start - 1]) if start else 0
            slots = order[first : int(ends[stop - 1])]
            enc, dec = (torch.zeros(stop - start, p.d, dtype=torch.float64, device=device) for _ in "ab")
            for part in slots.split(step):
                at, of = flat[part] - start, row[part]
                enc.index_add_(0, at, dz[part, None] * x[of].double())
                dec.index_add_(0, at, scale * z[part, None] * residual[of].double())
            if dead is not None:
                here = ((dead.latents >= start) & (dead.latents < stop)).nonzero().squeeze(1)
                enc.index_add_(0, dead.latents[here] - start, dead.w_enc[here].double())
                dec.index_add_(0, dead.latents[here] - start, dead.w_dec[here].double())
            w_enc, w_dec = (master_rows(w, slice(start, stop)) for w in (latents.w_enc, latents.w_dec))
            d_b_dec -= d_b_enc[start:stop] @ w_enc
            along = (dec * w_dec).sum(dim=1, keepdim=True) * w_dec
            removed = removed + along.square().sum()
            dec -= along
            total = total + enc.square().sum() + dec.square().sum()
            here = ((self.picked >= start) & (self.picked < stop)).nonzero().squeeze(1)
            along_picked = along_picked + along[self.picked[here] - start].square().sum()
            self.d_enc[here], self.d_dec[here] = (
                enc[self.picked[here] - start],
                dec[self.picked[here] - start],
            )
        self.d_b_dec = d_b_dec
        # The part along a row may be taken from `dots`, which came of that row in bfloat16.
        self.removed = float((along_picked / self.d_dec.square().sum().clamp_min(1e-30)).sqrt())
        self.norm = float((total + d_b_dec.square().sum()).sqrt())
        self.leftover = BF16_EPS**2 * float(removed) / max(self.norm**2, 1e-30)  # orthogonal to the rest
        self.kept = {name: self._rows(latents, name) for name in ("w_enc", "w_dec", "b_enc", "b_dec")}
        self.step = float(latents.step)

    def _rows(self, latents: Latents, name: str) -> tuple[Tensor, Tensor, Tensor]:
        weight, rows = getattr(latents, name), slice(None) if name == "b_dec" else self.picked
        return master_rows(weight, rows), weight.first[rows].double(), weight.second[rows].double()

    def compare(
        self,
        latents: Latents,
        adam: AdamStep,
        clip: float | None,
        norm: Tensor,
        clip_norm: float | None = None,
    ) -> dict[str, float]:
        """Relative root mean square errors of the updates, moments and norm, after `latent_step`."""
        p = self.p
        busiest = int(self.counts.max())
        terms = max(busiest, p.d)
        found = {"norm": abs(float(norm) / self.norm - 1)}
        refuse("latent_step: gradient norm", found["norm"], 16 * terms * EPS + self.leftover)
        limited = self.norm if clip_norm is None else clip_norm
        factor = 1.0 if clip is None else min(1.0, clip / (limited + 1e-6))
        step = self.step + 1
        for name, grad in (
            ("w_enc", self.d_enc),
            ("w_dec", self.d_dec),
            ("b_enc", self.d_b_enc),
            ("b_dec", self.d_b_dec),
        ):
            master, first, second = self.kept[name]
            grad = grad * factor
            want_first = adam.beta1 * first + (1 - adam.beta1) * grad
            want_second = adam.beta2 * second + (1 - adam.beta2) * grad.square()
            root = want_second.sqrt() / (1 - adam.beta2**step) ** 0.5 + adam.eps
            want = master - adam.lr / (1 - adam.beta1**step) * want_first / root
            if name == "w_dec":
                want = want / want.norm(dim=1, keepdim=True)
            still = latents.last_step is not None and name != "b_dec"
            if still:  # rows that were not active are left as they are
                idle = ~self.active[self.picked]
                idle = idle.unsqueeze(1) if grad.dim() == 2 else idle
                want, want_first, want_second = (
                    torch.where(idle, a, b)
                    for a, b in ((master, want), (first, want_first), (second, want_second))
                )
            got = self._rows(latents, name)
            coarse = BF16_EPS if getattr(latents, name).first.dtype == torch.bfloat16 else 0.0
            # A gradient's terms may cancel, and its moments then keep more of their rounding than of itself.
            limit = 64 * terms * EPS + 2 * coarse
            limit += 4 * BF16_EPS * self.removed if name == "w_dec" else 0.0
            moved = float((want - master).norm())
            found[name] = float((got[0] - want).norm()) / max(moved, 1e-30)
            # The parameter itself is rounded to float32 after the update.
            rounding = EPS * float(want.norm()) / max(moved, 1e-30)
            refuse(f"latent_step: update of {name}", found[name], limit + 4 * rounding)
            for which, a, b in (("first", got[1], want_first), ("second", got[2], want_second)):
                found[f"{name}.{which}"] = rms(a, b)
                refuse(f"latent_step: {which} moment of {name}", found[f"{name}.{which}"], limit)
        return found


def rms(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm().clamp_min(1e-30))


def refuse(what: str, off: float, limit: float) -> None:
    if not off <= limit:
        raise Wrong(f"{what} is off by {off:.2e}, where {limit:.2e} is allowed")
