"""A training step in four sparse ops instead of autograd, a clip and an optimizer: the same step, sooner.

    codes     topk_encode                  loss, residual    decode_residual
    AuxK      autograd over copies of the dead latents' rows, which are few
    the rest  latent_step: gradients of all parameters, unit rows, clipping, Adam, statistics, in place

It works on the SAE's own parameters and on the optimizer's own state tensors, so checkpoints are those
of any other step and a run may go on with either. `AutogradStepper` is the truth that this equals up to
the order of sums.

What `OptimConfig` has beyond Adam is kept in that state too, with w_enc: `grad_norm` [] by which the next
step clips if clipping is lagged, `last_step` [F] int32 in which each latent was last caught up if only
active rows are stepped. Saving does not settle those rows: that would round their second moments once more.
"""

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from sae_kernels import (
    AdamStep,
    Counters,
    DeadGrads,
    Latents,
    Weight,
    decode_residual,
    latent_step,
    topk_encode,
)
from torch import Tensor, nn

from sae_train.batch import Batch, RowBatch
from sae_train.codes import Codes
from sae_train.losses import Losses
from sae_train.sae.base import LinearLatents
from sae_train.train.members import Member
from sae_train.train.optim import OptimConfig
from sae_train.train.stepper import Step, autocast, count_skipped


def cannot_fuse(member: Member, accumulate: int, autocast: torch.dtype | None = None) -> str | None:
    """None, or the reason why steps of this member cannot be fused."""
    form, optimizer = member.sae.latents(), member.optimizer
    if not member.split.whole:
        return f"{member.name} is divided among processes"
    if accumulate != 1:
        return f"train.accumulate is {accumulate}, and one batch is one step"
    if autocast not in (None, torch.bfloat16):
        return f"matrix products are in {autocast}, and copies of weights only in bfloat16"
    if form is None:
        return f"{member.name} is not a linear SAE with top-k codes"
    own = {id(p) for p in (form.w_enc, form.b_enc, form.w_dec, form.b_dec)}
    groups = optimizer.param_groups
    if type(optimizer) is not torch.optim.Adam or len(groups) != 1:
        return f"{member.name} is not optimised by one plain Adam"
    if groups[0]["weight_decay"] or groups[0]["amsgrad"] or groups[0]["maximize"]:
        return f"the Adam of {member.name} decays weights, keeps maxima or maximises"
    trained = [p for p in member.sae.parameters() if p.requires_grad]
    if {id(p) for p in trained} != own or {id(p) for p in groups[0]["params"]} != own:
        return f"{member.name} trains other parameters than those of a linear SAE"
    wrong = [p for p in trained if p.dtype != torch.float32 or not p.is_contiguous()]
    return f"{member.name} has parameters that are not contiguous float32" if wrong else None


@dataclass
class _LowCopy:
    """A bfloat16 copy of a parameter, and the state (`_state`) of what it is a copy of."""

    tensor: Tensor
    state: tuple[int, int, int]


class FusedStepper:
    """Steps of members for which `cannot_fuse` has no reason.

    Args:
        autocast: bfloat16 keeps copies of both weight matrices in it, and rows and residuals too;
            None computes everything in float32. Masters are float32 either way.

    Raises:
        ValueError: another dtype.
    """

    def __init__(self, autocast: torch.dtype | None = None) -> None:
        if autocast not in (None, torch.bfloat16):
            raise ValueError(f"autocast is {autocast}: expected None or torch.bfloat16")
        self.autocast = autocast
        self._low: WeakKeyDictionary[Member, dict[str, _LowCopy]] = WeakKeyDictionary()

    def take(self, member: Member, rows: RowBatch) -> Batch:
        return member.batch(rows)

    def step(self, member: Member, batch: Batch) -> Step:
        form = member.sae.latents()
        assert form is not None, "cannot_fuse was not asked"
        with torch.no_grad():
            latents = self._latents(form, member)
            step = self._step(form, latents, member, batch)
            for parameter in (form.b_enc, form.w_dec, form.b_dec):
                member.optimizer.state[parameter]["step"].copy_(latents.step)
        count_skipped(member, step.grad_norm)
        member.schedule.step()
        self._remember(form, member)
        if member.average is not None:
            member.average.update_parameters(member.sae)
        return step

    def _step(self, form: LinearLatents, latents: Latents, member: Member, batch: Batch) -> Step:
        stats, config = member.stats, member.config.optim
        (n, d), dtype = batch.y.shape, self.autocast or torch.float32
        # With b_dec taken from the target instead of added to the output, an autoencoder's target is its
        # input: one tensor serves as both, and rounds distances from b_dec only.
        target = (batch.y.float() * form.scale_out - form.b_dec).to(dtype)
        if form.centred and batch.x is batch.y:
            x = target
        else:
            x = (batch.x.float() * form.scale_in - form.centre).to(dtype)
        w_enc, w_dec = latents.w_enc.product(), latents.w_dec.product()
        values, indices = topk_encode(x, w_enc, form.b_enc.detach(), form.k)
        no_bias = torch.zeros_like(form.b_dec)
        residual, loss, dots = decode_residual(values, indices, w_dec, no_bias, target)
        terms = {"mse": loss.mean() / d}
        dead = None
        if form.dead_loss is not None and len(member.dead) > 0:
            terms["auxk"], dead = self._dead(form, member.dead, residual, x)
        group = member.optimizer.param_groups[0]
        beta1, beta2 = group["betas"]
        kept = member.optimizer.state[form.w_enc]
        last_norm = kept.get("grad_norm") if config.clip_norm == "lagged" else None
        stats.tokens += n
        spike = member.spikes.judge(torch.stack([*terms.values()]).sum())
        kept_residual = residual[0, 0].clone()
        residual[0, 0] = torch.where(spike, torch.nan, kept_residual)  # one NaN has the whole step left out
        norm = latent_step(
            x,
            residual,
            values,
            indices,
            dots,
            latents,
            AdamStep(lr=group["lr"], beta1=beta1, beta2=beta2, eps=group["eps"]),
            scale=-2 / (n * d),
            centred=form.centred,
            unit_norm=form.unit_norm,
            clip=config.clip,
            clip_norm=last_norm,
            dead=dead,
            counters=Counters(stats.counts, stats.sums, stats.maxima, stats.last_fired, stats.tokens),
        )
        if config.clip_norm == "lagged":
            # A step that was skipped has no norm; after a first one like that the next is not clipped.
            other = torch.zeros_like(norm) if last_norm is None else last_norm
            kept["grad_norm"] = torch.where(torch.isfinite(norm), norm, other)
        residual[0, 0] = kept_residual
        y_hat = torch.addcdiv(batch.y.float(), residual.float(), form.scale_out, value=-1)
        return Step(Losses(terms, Codes(values, indices, len(w_enc)), y_hat), batch, norm)

    def _dead(
        self, form: LinearLatents, dead: Tensor, residual: Tensor, x: Tensor
    ) -> tuple[Tensor, DeadGrads]:
        """The loss of the dead latents, and its gradients in their rows. b_dec's follows from b_enc's."""
        assert form.dead_loss is not None
        with torch.enable_grad():
            rows = [w.detach()[dead].requires_grad_() for w in (form.w_enc, form.b_enc, form.w_dec)]
            with autocast(x.device, self.autocast):
                loss = form.dead_loss(residual, x, *rows)
            w_enc, b_enc, w_dec = torch.autograd.grad(loss, rows)
        return loss.detach(), DeadGrads(dead, w_enc, b_enc, w_dec)

    def _latents(self, form: LinearLatents, member: Member) -> Latents:
        """The parameters with the optimizer's state of them, which is made if this is the first step."""
        parameters = [form.w_enc, form.b_enc, form.w_dec, form.b_dec]
        state = member.optimizer.state
        if any(len(state[p]) == 0 for p in parameters):
            _start(member.optimizer, parameters, member.config.optim)
        low = self._low_copies(form, member)
        w_enc, b_enc, w_dec, b_dec = (
            Weight(p.detach(), state[p]["exp_avg"], state[p]["exp_avg_sq"], copy)
            for p, copy in zip(parameters, (low.get("w_enc"), None, low.get("w_dec"), None), strict=True)
        )
        of_all = state[form.w_enc]
        return Latents(w_enc, b_enc, w_dec, b_dec, step=of_all["step"], last_step=of_all.get("last_step"))

    def _low_copies(self, form: LinearLatents, member: Member) -> dict[str, Tensor]:
        """Copies of the weight matrices for products, made anew where someone else wrote to the parameter.

        latent_step keeps the copies up to date itself, and `_remember` notes how things stand after it.
        """
        if self.autocast is None:
            return {}
        copies = self._low.setdefault(member, {})
        for name, parameter in _matrices(form):
            now = _state(parameter, member)
            if name not in copies:
                copies[name] = _LowCopy(parameter.detach().to(self.autocast), now)
            elif copies[name].state != now:
                copies[name].tensor.copy_(parameter)
        return {name: copy.tensor for name, copy in copies.items()}

    def _remember(self, form: LinearLatents, member: Member) -> None:
        for name, parameter in _matrices(form) if member in self._low else ():
            self._low[member][name].state = _state(parameter, member)


def _matrices(form: LinearLatents) -> tuple[tuple[str, nn.Parameter], ...]:
    return ("w_enc", form.w_enc), ("w_dec", form.w_dec)


def _state(parameter: nn.Parameter, member: Member) -> tuple[int, int, int]:
    """Changes whenever the parameter does: where it is, writes to it, steps of the schedule.

    torch counts writes to a tensor, but fused Adam's own are not among them; every step moves the schedule.
    Nor are writes through `parameter.data`, in place: they go unseen. Write to the parameter under no_grad.
    """
    return parameter.data_ptr(), parameter._version, member.schedule.last_epoch


def _start(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], config: OptimConfig) -> None:
    """Give Adam the state that its own first step would give it, in the formats that were asked for."""
    optimizer.zero_grad(set_to_none=True)
    optimizer.step()  # does nothing without gradients, but the schedule looks whether it was called
    for parameter in parameters:
        # Biases' moments are a D-th of all: nothing to save there.
        small = config.moments == "bfloat16" and parameter.dim() == 2
        zeros = torch.zeros_like(parameter, dtype=torch.bfloat16 if small else torch.float32)
        optimizer.state[parameter].update(
            step=torch.zeros((), dtype=torch.float32, device=parameter.device),
            exp_avg=zeros,
            exp_avg_sq=zeros.clone(),
        )
    if config.rows == "active":
        w_enc = parameters[0]
        last_step = torch.zeros(len(w_enc), dtype=torch.int32, device=w_enc.device)
        optimizer.state[w_enc]["last_step"] = last_step
