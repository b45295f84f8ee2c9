"""Ten steps of ours against float64: masters and moments of some latents, and of b_dec, at real size.

The reference keeps its own float64 masters and moments over all steps. What it takes from ours is the
forward pass (rows, codes, residual, dots) and the gradient norm, which `gpu_check` has compared before.
"""

import torch
from gpu_check import BF16_EPS, refuse, rms
from gpu_problem import CHUNK, Problem
from gpu_state import master_rows
from sae_kernels import AdamStep, Latents
from torch import Tensor

LIMIT = 1e-3  # relative, of every moment and master
UPDATE_LIMIT = 0.05
"""Of how far the masters moved: Adam's first step goes by a gradient's sign, and an element whose gradient
is all rounding error then goes the other way. A wrong bias correction, rate or decay is off by more."""
NAMES = ("w_enc", "w_dec", "b_enc", "b_dec")


class AdamCheck:
    """Follow the steps of `latents`, all of whose moments are zero, in the latents `picked`."""

    def __init__(self, p: Problem, latents: Latents, adam: AdamStep, picked: Tensor) -> None:
        self.p, self.adam, self.picked, self.steps = p, adam, picked, 0
        self.bf16 = latents.w_enc.first.dtype == torch.bfloat16
        self.start = {name: self._master(latents, name) for name in NAMES}
        self.master = {name: value.clone() for name, value in self.start.items()}
        self.first, self.second = (
            {name: torch.zeros_like(value) for name, value in self.start.items()} for _ in "12"
        )
        self.removed = 0.0

    def before(
        self,
        x: Tensor,
        residual: Tensor,
        values: Tensor,
        indices: Tensor,
        dots: Tensor,
        latents: Latents,
        scale: float,
    ) -> None:
        """The gradients of the step that comes, from what it will be given."""
        p, device = self.p, x.device
        flat = indices.reshape(-1).long()
        z = values.reshape(-1).double()
        dz = torch.where(z != 0, scale * dots.reshape(-1).double(), 0)
        place = torch.full((p.f,), -1, dtype=torch.int64, device=device)
        place[self.picked] = torch.arange(len(self.picked), device=device)
        at = place[flat]
        d_enc, d_dec = (torch.zeros(len(self.picked), p.d, dtype=torch.float64, device=device) for _ in "ab")
        for part in (at >= 0).nonzero().squeeze(1).split(max(1, CHUNK // p.d)):
            row = part // p.k
            d_enc.index_add_(0, at[part], dz[part, None] * x[row].double())
            d_dec.index_add_(0, at[part], scale * z[part, None] * residual[row].double())
        d_b_enc = torch.zeros(p.f, dtype=torch.float64, device=device).index_add_(0, flat, dz)
        d_b_dec = scale * residual.double().sum(dim=0)
        step = max(1, CHUNK // p.d)
        for start in range(0, p.f, step):
            rows = slice(start, min(p.f, start + step))
            d_b_dec -= d_b_enc[rows] @ master_rows(latents.w_enc, rows)
        along = (d_dec * self.master["w_dec"]).sum(dim=1, keepdim=True) * self.master["w_dec"]
        d_dec -= along
        self.removed = max(self.removed, float(along.norm() / d_dec.norm().clamp_min(1e-30)))
        self.grads = {"w_enc": d_enc, "w_dec": d_dec, "b_enc": d_b_enc[self.picked], "b_dec": d_b_dec}

    def after(self, clip: float | None, norm: float) -> None:
        """Make the step; `norm` is what `clip` limited."""
        adam, factor = self.adam, 1.0 if clip is None else min(1.0, clip / (norm + 1e-6))
        self.steps += 1
        for name in NAMES:
            grad, first, second = self.grads[name] * factor, self.first[name], self.second[name]
            first.mul_(adam.beta1).add_(grad, alpha=1 - adam.beta1)
            second.mul_(adam.beta2).add_(grad.square(), alpha=1 - adam.beta2)
            root = second.sqrt() / (1 - adam.beta2**self.steps) ** 0.5 + adam.eps
            self.master[name] -= adam.lr / (1 - adam.beta1**self.steps) * first / root
            if name == "w_dec":
                self.master[name] /= self.master[name].norm(dim=1, keepdim=True)

    def compare(self, latents: Latents) -> dict[str, float]:
        """Relative errors after all steps; `latents` are settled.

        Raises:
            Wrong: a moment or master is off by more than 1e-3, or than its storage format explains."""
        coarse = 4 * BF16_EPS if self.bf16 else 0.0
        found = {}
        for name in NAMES:
            weight, rows = getattr(latents, name), slice(None) if name == "b_dec" else self.picked
            limit = LIMIT + (coarse if name in ("w_enc", "w_dec") else 0.0)
            # The part along a row may be taken from `dots`, which came of that row in bfloat16.
            limit += 4 * BF16_EPS * self.removed if name == "w_dec" else 0.0
            for which, want in (("first", self.first[name]), ("second", self.second[name])):
                found[f"{name}.{which}"] = rms(getattr(weight, which)[rows].double(), want)
                refuse(f"after {self.steps} steps: {which} moment of {name}", found[f"{name}.{which}"], limit)
            got, moved = self._master(latents, name), (self.master[name] - self.start[name]).norm()
            found[name] = float((got - self.master[name]).norm() / moved.clamp_min(1e-30))
            if float(moved) > 0:
                refuse(f"after {self.steps} steps: update of {name}", found[name], UPDATE_LIMIT + coarse)
        return found

    def _master(self, latents: Latents, name: str) -> Tensor:
        return master_rows(getattr(latents, name), slice(None) if name == "b_dec" else self.picked)
