"""Our step on a GPU: checked against float64, run twice for its bits, then timed, whole and by stage."""

from collections.abc import Callable
from typing import Any

import torch
from gpu_check import StepCheck, Wrong, check_decode, check_encode
from gpu_problem import (
    NUM_BATCHES,
    Problem,
    adam_step,
    dictionary,
    digest,
    make_batches,
    make_counters,
    make_latents,
    set_encoder,
    tensors_of,
)
from gpu_timing import Clock
from sae_kernels import Counters, Latents, decode_residual, latent_step, topk_encode, use_backend
from sae_kernels.triton.recover import fallback_rows
from torch import Tensor

CLIPS = ("exact", "lag1", "none")
CLIP = 1e-3  # about the norm of the gradients here, so that it binds in some steps


class OurStep:
    """One training step: codes, residual, new weights. Called with the number of the step."""

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
        clip = None if self.clip == "none" else CLIP
        self.norm = latent_step(
            x,
            residual,
            values,
            indices,
            dots,
            self.latents,
            self.adam,
            self.scale,
            clip=clip,
            clip_norm=self.norm if self.clip == "lag1" else None,
            counters=self.counters,
        )
        return self.norm

    def __call__(self, i: int) -> Tensor:
        with torch.no_grad():
            x, values, indices = self.encode(i)
            residual, loss, dots = self.decode(i, values, indices)
            self.update(x, values, indices, residual, dots)
            return loss


def check(p: Problem, fmt: str, clip: str, batches: list[Tensor], latents: Latents) -> dict[str, Any]:
    """Errors of every op of one step at full size. Leaves `latents` a step further.

    Raises:
        Wrong: an op is off by more than rounding explains."""
    step = OurStep(p, fmt, clip, batches, latents, make_counters(p, batches[0].device.type))
    with torch.no_grad():
        x, values, indices = step.encode(0)
        found = {
            "topk_encode": check_encode(p, x, latents.w_enc.product(), latents.b_enc.value, values, indices)
        }
        out = step.decode(0, values, indices)
        w_dec, b_dec = latents.w_dec.product(), latents.b_dec.value
        found["decode_residual"] = check_decode(p, (values, indices), w_dec, b_dec, batches[0], out)
        want = StepCheck(p, x, out[0], values, indices, out[2], latents, step.scale)
        before = float(step.norm) if clip == "lag1" else None
        norm = step.update(x, values, indices, out[0], out[2])
        clip_at = None if clip == "none" else CLIP
        found["latent_step"] = want.compare(latents, step.adam, clip_at, norm, before)
        if not torch.equal(step.counters.counts, want.counts):
            raise Wrong("latent_step: counters differ from the codes")
    return found


def run(p: Problem, fmt: str, clip: str, encoder: str, clock: Clock, stages: bool) -> dict[str, Any]:
    """Everything about one configuration of ours at one shape."""
    set_encoder(encoder)
    device = clock.device
    with use_backend("triton"):
        w = dictionary(p, device)
        batches = make_batches(p, w)
        del w
        found: dict[str, Any] = {"errors": {}}
        latents = make_latents(p, fmt, device, noisy_moments=True)
        found["errors"] = check(p, fmt, clip, batches, latents)
        del latents

        digests = []
        for _ in range(2):
            latents, counters = make_latents(p, fmt, device), make_counters(p, device)
            step = OurStep(p, fmt, clip, batches, latents, counters)
            losses = [step(i) for i in range(min(3, clock.repeats))]
            counted = [counters.sums.view(torch.int32), counters.maxima]
            digests.append(digest([*tensors_of(latents), *losses, *counted]))
            if len(digests) == 1:
                del latents, step
        found["same_bits_twice"] = digests[0] == digests[1]
        if not found["same_bits_twice"]:
            raise Wrong("two runs of the same steps differ in their bits")
        found["loss"] = [float(loss.mean()) for loss in losses]

        if device == "cuda":
            found["host_waits"] = host_waits(step)
            torch.cuda.reset_peak_memory_stats()
        rows_before = count_fallback()
        found["ms"] = clock.measure(step)
        found["peak_bytes"] = torch.cuda.max_memory_allocated() if device == "cuda" else None
        found["fallback_rows"] = count_fallback() - rows_before
        found["active"] = float((step.counters.counts > 0).float().mean())
        found["busiest"] = int(step.encode(0)[2].reshape(-1).bincount(minlength=p.f).max())
        if stages:
            found["stages"] = time_stages(step, clock)
        if device == "cuda":
            found["graph_ms"] = time_graph(step, clock)
    return found


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


def time_stages(step: OurStep, clock: Clock) -> dict[str, dict[str, float]]:
    """Each part by itself, on inputs that take turns as in the step."""
    with torch.no_grad():
        codes = [step.encode(i) for i in range(NUM_BATCHES)]
        outs = [step.decode(i, *codes[i][1:]) for i in range(NUM_BATCHES)]

        def update(i: int) -> Tensor:
            x, values, indices = codes[i % NUM_BATCHES]
            residual, _, dots = outs[i % NUM_BATCHES]
            return step.update(x, values, indices, residual, dots)

        parts: dict[str, Callable[[int], object]] = {
            "encode": step.encode,
            "decode": lambda i: step.decode(i, *codes[i % NUM_BATCHES][1:]),
            "update": update,
        }
        return {name: clock.measure(part, limit_s=4.0) for name, part in parts.items()}


def time_graph(step: OurStep, clock: Clock) -> dict[str, float] | str:
    """The step captured once and replayed, or why it cannot be."""
    try:
        step.norm = step.norm.clone()
        graph = torch.cuda.CUDAGraph()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step(0)
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph):
            step(0)
        return clock.measure(lambda i: graph.replay(), limit_s=4.0)
    except RuntimeError as error:
        return f"cannot be captured: {str(error).splitlines()[0]}"
