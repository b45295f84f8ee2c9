"""Our step on a GPU: compared with float64, tried with hostile inputs, run twice for its bits; then parts
of it to time: the whole step, its stages, and the step replayed from a graph."""

from typing import Any

import gpu_reference
import torch
from gpu_adam import AdamCheck
from gpu_adversarial import TRIALS, extra_bytes
from gpu_check import StepCheck, Wrong, check_decode, check_encode, pick
from gpu_problem import NUM_BATCHES, Problem, dictionary, digest, make_batches
from gpu_state import (
    FORMATS,
    adam_step,
    make_counters,
    make_latents,
    set_encoder,
    tensors_of,
)
from gpu_timing import Part, Prepared, peak_bytes
from sae_kernels import Counters, DeadGrads, Latents, decode_residual, latent_step, settle, topk_encode
from sae_kernels.triton.recover import fallback_rows
from torch import Tensor

CLIPS = ("exact", "lag1", "none")
CLIP = 1e-3  # about the norm of the gradients here, so that it binds in some steps
BITS_STEPS = 3  # after which two runs are compared


class OurStep:
    """One training step: codes, residual, new weights. Called with the number of the step."""

    dead: DeadGrads | None = None

    def __init__(
        self, p: Problem, fmt: str, clip: str, batches: list[Tensor], latents: Latents, counters: Counters
    ):
        self.p, self.fmt, self.clip, self.batches = p, fmt, clip, batches
        self.latents, self.counters, self.adam = latents, counters, adam_step(fmt)
        self.scale = -2.0 / (p.n * p.d)
        self.norm = torch.full((), 2 * CLIP, device=batches[0].device)  # "lag1" clips by half at first

    def encode(self, i: int) -> tuple[Tensor, Tensor, Tensor]:
        """The centred rows and their codes."""
        lat = self.latents
        x = self.batches[i % len(self.batches)]
        x = (x - lat.b_dec.value).to(x.dtype)
        values, indices = topk_encode(x, lat.w_enc.product(), lat.b_enc.value, self.p.k)
        return x, values, indices

    def decode(self, i: int, values: Tensor, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y, lat = self.batches[i % len(self.batches)], self.latents
        return decode_residual(values, indices, lat.w_dec.product(), lat.b_dec.value, y)

    def update(self, x: Tensor, values: Tensor, indices: Tensor, residual: Tensor, dots: Tensor) -> Tensor:
        self.norm = latent_step(
            x,
            residual,
            values,
            indices,
            dots,
            self.latents,
            self.adam,
            self.scale,
            clip=self.clip_at,
            clip_norm=self.norm if self.clip == "lag1" else None,
            dead=self.dead,
            counters=self.counters,
        )
        return self.norm

    @property
    def clip_at(self) -> float | None:
        return None if self.clip == "none" else CLIP

    def __call__(self, i: int) -> Tensor:
        with torch.no_grad():
            x, values, indices = self.encode(i)
            residual, loss, dots = self.decode(i, values, indices)
            self.update(x, values, indices, residual, dots)
            return loss


def check(
    p: Problem,
    fmt: str,
    clip: str,
    batches: list[Tensor],
    latents: Latents,
    dead: DeadGrads | None = None,
    encoder_only: bool = False,
) -> dict[str, Any]:
    """Errors of every op of one step at full size. Leaves `latents` a step further.

    Raises:
        Wrong: an op is off by more than rounding explains."""
    step = OurStep(p, fmt, clip, batches, latents, make_counters(p, batches[0].device.type))
    step.dead = dead
    with torch.no_grad():
        x, values, indices = step.encode(0)
        found = {
            "topk_encode": check_encode(p, x, latents.w_enc.product(), latents.b_enc.value, values, indices)
        }
        if encoder_only:
            return found
        out = step.decode(0, values, indices)
        w_dec, b_dec = latents.w_dec.product(), latents.b_dec.value
        found["decode_residual"] = check_decode(p, (values, indices), w_dec, b_dec, batches[0], out)
        want = StepCheck(p, x, out[0], values, indices, out[2], latents, step.scale, dead)
        before = float(step.norm) if clip == "lag1" else None
        norm = step.update(x, values, indices, out[0], out[2])
        found["latent_step"] = want.compare(latents, step.adam, step.clip_at, norm, before)
        if not torch.equal(step.counters.counts, want.counts):
            raise Wrong("latent_step: counters differ from the codes")
    return found


def adversarial(p: Problem, fmt: str, clip: str, x: Tensor, names: list[str], encoder_only: bool) -> dict:
    """The largest error of each trial, or why it was not made.

    Raises:
        Wrong: which trial, and what is off."""
    found: dict[str, Any] = {}
    for name in names:
        if encoder_only and name.endswith("dead"):
            continue
        if x.is_cuda:
            torch.cuda.empty_cache()  # so that what is free shows, to the check and to the other processes
        try:
            found[name] = _survive(p, fmt, clip, x, name, encoder_only)
        except Wrong as error:
            raise Wrong(f"{name}: {error}") from error
        except torch.OutOfMemoryError:
            found[name] = "not run: out of memory"
    return found


def _survive(p: Problem, fmt: str, clip: str, x: Tensor, name: str, encoder_only: bool) -> float | str:
    """The largest error of a trial; what it takes is free again when this returns."""
    latents = make_latents(p, fmt, x.device.type, noisy_moments=True)
    if x.is_cuda and extra_bytes(p, name) > 0.8 * torch.cuda.mem_get_info()[0]:
        return f"not run: takes {extra_bytes(p, name) / 1e9:.0f} GB more"
    rows, dead = TRIALS[name](p, latents, x)
    errors = check(p, fmt, clip, [rows], latents, dead, encoder_only)
    return max(v for op in errors.values() for v in op.values())


def ten_steps(p: Problem, fmt: str, clip: str, batches: list[Tensor], steps: int) -> dict[str, Any]:
    """Errors of masters and moments after `steps` steps, and the bits, loss and moment of the first ones.

    Raises:
        Wrong: a moment or master is off."""
    device = batches[0].device.type
    latents, counters = make_latents(p, fmt, device), make_counters(p, device)
    step = OurStep(p, fmt, clip, batches, latents, counters)
    follow, found, losses = None, {}, []
    with torch.no_grad():
        for i in range(steps):
            x, values, indices = step.encode(i)
            if follow is None:
                counts = indices[values > 0].bincount(minlength=p.f)
                follow = AdamCheck(p, latents, step.adam, pick(counts))
            residual, loss, dots = step.decode(i, values, indices)
            follow.before(x, residual, values, indices, dots, latents, step.scale)
            lagged = float(step.norm)
            norm = step.update(x, values, indices, residual, dots)
            follow.after(step.clip_at, lagged if clip == "lag1" else float(norm))
            losses.append(loss)
            if i == 0:
                found["mse"] = float(loss.mean()) / p.d
                found["moment"] = latents.w_enc.first.clone()
            if i + 1 == min(BITS_STEPS, steps):
                found["bits"] = _bits(latents, counters, losses)
        settle(latents, step.adam)
        found["errors"] = follow.compare(latents) if follow is not None else {}
    return found


def prepare(p: Problem, case: dict[str, Any], device: str, job: dict[str, Any]) -> Prepared:
    """Check one configuration of ours and have it ready. `job` says how thoroughly (`gpu_plan.COMMON`)."""
    fmt, clip = case["format"], case["clip"]
    set_encoder(case["encoder"])
    batches = make_batches(p, dictionary(p, device))
    products = {"rows": "bf16", "products": "bf16, fp32 sums", "backend": job["backend"]}
    found: dict[str, Any] = {"state": products | FORMATS[fmt]}
    if not case.get("checked"):
        latents = make_latents(p, fmt, device, noisy_moments=True)
        found["errors"] = check(p, fmt, clip, batches, latents)
        del latents
        trials = job["adversarial"] if case["adversarial"] else []
        found["adversarial"] = adversarial(p, fmt, clip, batches[0], trials, case["adversarial"] == "encoder")
        ten = ten_steps(p, fmt, clip, batches, job["adam_steps"])
        found["errors"][f"after {job['adam_steps']} steps"] = ten["errors"]
        found["first_step"] = gpu_reference.compare(job["reference"], ten["mse"], ten.pop("moment"))
    latents, counters = make_latents(p, fmt, device), make_counters(p, device)
    step = OurStep(p, fmt, clip, batches, latents, counters)
    if not case.get("checked"):
        losses = [step(i) for i in range(min(BITS_STEPS, job["adam_steps"]))]
        if _bits(latents, counters, losses) != ten["bits"]:
            raise Wrong("two runs of the same steps differ in their bits")
        found["bits"] = "same"
    if device == "cuda":
        found["host_waits"] = host_waits(step)
    found["peak_bytes"] = peak_bytes(step, device)
    rows_before = count_fallback()
    parts: dict[str, Part] = {"step": step}
    if case["stages"]:
        parts |= stages(step)
    if device == "cuda":
        graph = capture(step)
        found["graph"] = "captured" if callable(graph) else graph
        parts |= {"graph": graph} if callable(graph) else {}

    def finish() -> dict[str, Any]:
        busy = step.encode(0)[2].reshape(-1).bincount(minlength=p.f)
        return {
            "fallback_rows": count_fallback() - rows_before,
            "active": float((busy > 0).float().mean()),
            "busiest": int(busy.max()),
        }

    return Prepared(parts, found, finish)


def _bits(latents: Latents, counters: Counters, losses: list[Tensor]) -> int:
    return digest([*tensors_of(latents), *losses, counters.sums, counters.maxima])


def count_fallback() -> int:
    return sum(int(rows) for rows in fallback_rows().values())


def host_waits(step: OurStep) -> str | None:
    """None, or what in a step makes the host wait for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(0)
    except RuntimeError as error:
        return str(error).splitlines()[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return None


def stages(step: OurStep) -> dict[str, Part]:
    """Each part by itself, on inputs that take turns as in the step; made when first asked for."""
    made: list[tuple[tuple[Tensor, ...], tuple[Tensor, ...]]] = []

    def inputs(i: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        while not made:
            codes = [step.encode(j) for j in range(NUM_BATCHES)]
            made.extend((c, step.decode(j, *c[1:])) for j, c in enumerate(codes))
        return made[i % NUM_BATCHES]

    def encode(i: int) -> object:
        with torch.no_grad():
            return step.encode(i)

    def decode(i: int) -> object:
        with torch.no_grad():
            return step.decode(i, *inputs(i)[0][1:])

    def update(i: int) -> object:
        with torch.no_grad():
            (x, values, indices), (residual, _, dots) = inputs(i)
            return step.update(x, values, indices, residual, dots)

    return {"encode": encode, "decode": decode, "update": update}


def capture(step: OurStep) -> Part | str:
    """Replays of the step captured once, or why it cannot be."""
    stream, norm = torch.cuda.current_stream(), step.norm.clone()
    try:
        graph = torch.cuda.CUDAGraph()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step(0)
        torch.cuda.current_stream().wait_stream(side)
        step.norm = norm  # read and written where it lies: each replay clips by the norm of the one before
        with torch.cuda.graph(graph):
            step(0)
            norm.copy_(step.norm)
    except RuntimeError as error:
        torch.cuda.set_stream(stream)  # a capture that breaks may leave its own behind
        return f"cannot be captured: {str(error).splitlines()[0]}"
    finally:
        step.norm = norm

    def replay(i: int) -> Tensor:
        graph.replay()
        return norm  # which lives as long as this

    return replay
