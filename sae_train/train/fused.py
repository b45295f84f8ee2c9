"""A training step in four sparse ops instead of autograd, a clip and an optimizer: the same step, sooner.

    codes     topk_encode                  loss, residual    decode_residual
    AuxK      autograd over copies of the dead latents' rows, which are few
    the rest  latent_step: gradients of all parameters, unit rows, clipping, Adam, statistics, in place

It works on the SAE's own parameters and on the optimizer's own state tensors, so checkpoints are those
of any other step and a run may go on with either. `AutogradStepper` is the truth that this equals up to
the order of sums.

Several members of one shape may step at once (`step_together`): their tensors then lie in stacks, and what a
step launches, they share. A single member is a stack of one.

What `OptimConfig` has beyond Adam is kept in that state too, with w_enc: `grad_norm` [] by which the next
step clips if clipping is lagged, `last_step` [F] int32 in which each latent was last caught up if only
active rows are stepped. Saving does not settle those rows: that would round their second moments once more.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from sae_kernels import (
    AdamStep,
    Counters,
    DeadGrads,
    Latents,
    Weight,
    decode_residual,
    latent_step_many,
    numbered,
    topk_encode_many,
)
from torch import Tensor, nn

from sae_train.batch import Batch, RowBatch
from sae_train.codes import Codes
from sae_train.losses import Losses
from sae_train.sae.base import LinearLatents
from sae_train.train.low_copies import LowCopies
from sae_train.train.members import Member
from sae_train.train.optim import OptimConfig
from sae_train.train.spikes import judge
from sae_train.train.stacked import Stacks
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


def alike(member: Member) -> tuple[object, ...]:
    """Equal for members that may step together: shapes, and what a step does but for k and learning rate."""
    form, group, config = _form(member), member.optimizer.param_groups[0], member.config.optim
    shapes = (form.w_enc.shape, form.scale_in.shape, form.scale_out.shape)
    how = (form.centred, form.unit_norm, member.places.targets == ())
    adam = (*group["betas"], group["eps"], config.clip, config.clip_norm, config.moments, config.rows)
    return *shapes, *how, *adam


class FusedStepper:
    """Steps of members for which `cannot_fuse` has no reason.

    Args:
        autocast: bfloat16 keeps copies of both weight matrices in it, and rows and residuals too;
            None computes everything in float32. Masters are float32 either way.
        at_once: most members that step together.
        only_dead: under autocast are only products of dead latents; there are no copies. They cost a CPU
            more than they gain: its sparse ops compute in float32, and its encoder multiplies bfloat16 by
            itself where that is faster.

    Raises:
        ValueError: another dtype.
    """

    def __init__(
        self, autocast: torch.dtype | None = None, at_once: int = 1, only_dead: bool = False
    ) -> None:
        if autocast not in (None, torch.bfloat16):
            raise ValueError(f"autocast is {autocast}: expected None or torch.bfloat16")
        self.autocast, self.at_once = autocast, at_once
        self.low = None if only_dead else autocast
        self._copies = LowCopies(self.low)
        self._stacks: dict[tuple[str, ...], Stacks] = {}

    def take(self, member: Member, rows: RowBatch) -> Batch:
        return member.batch(rows)

    def units(self, members: Sequence[Member]) -> list[list[Member]]:
        found: dict[tuple[object, ...], list[list[Member]]] = {}
        for member in members:
            of_kind = found.setdefault(alike(member), [[]])
            if of_kind[-1] and len(of_kind[-1]) == self.at_once:
                of_kind.append([])
            of_kind[-1].append(member)
        return [unit for of_kind in found.values() for unit in of_kind]

    def step(self, member: Member, batch: Batch) -> Step:
        return self.step_together([member], [batch])[0]

    def step_together(self, members: Sequence[Member], batches: Sequence[Batch]) -> list[Step]:
        """One step of each of M members that are `alike`. Rows that are one tensor for all are cast once."""
        forms = [_form(member) for member in members]
        with torch.no_grad():
            stacks = self._stacks.setdefault(tuple(member.name for member in members), Stacks())
            latents = self._stack(forms, members, stacks)
            done = self._step(forms, latents, members, batches, stacks)
            for name in ("b_enc", "w_dec", "b_dec"):  # w_enc's has been counted
                each = zip(members, forms, strict=True)
                states = [m.optimizer.state[getattr(form, name)] for m, form in each]
                steps = stacks.of(f"step of {name}", [s["step"] for s in states], _entry(states, "step"))
                steps.copy_(latents.step)
        for form, member in zip(forms, members, strict=True):
            member.schedule.step()
            self._copies.remember(form, member)
            if member.average is not None:
                member.average.update_parameters(member.sae)
        return done

    def _step(
        self,
        forms: Sequence[LinearLatents],
        latents: Latents,
        members: Sequence[Member],
        batches: Sequence[Batch],
        stacks: Stacks,
    ) -> list[Step]:
        first, config = forms[0], members[0].config.optim
        n, d = batches[0].y.shape
        y, scale_out = _shared([b.y for b in batches]), _scales([form.scale_out for form in forms])
        x, target = self._operands(forms, latents.b_dec.value, batches, y, scale_out)
        w_enc, w_dec, ks = latents.w_enc.product(), latents.w_dec.product(), [form.k for form in forms]
        values, indices = topk_encode_many(x, w_enc, latents.b_enc.value, ks)
        d_sae = w_enc.shape[1]
        no_bias = torch.zeros_like(latents.b_dec.value[0])
        residual, loss, dots = (
            t.unflatten(0, (len(forms), n))
            for t in decode_residual(
                values.flatten(0, 1),
                numbered(indices, d_sae),
                w_dec.flatten(0, 1),
                no_bias,
                target.flatten(0, 1),
            )
        )
        mse = loss.mean(dim=1) / d
        terms = [{"mse": own} for own in mse]
        dead: list[DeadGrads | None] = [None] * len(forms)
        totals = mse
        for number, (form, member) in enumerate(zip(forms, members, strict=True)):
            if form.dead_loss is not None and len(member.dead) > 0:
                terms[number]["auxk"], dead[number] = self._dead(
                    form, member.dead, residual[number], x[number]
                )
        if any(dead):
            totals = torch.stack([torch.stack([*own.values()]).sum() for own in terms])
        spikes = self._spikes(members, totals, stacks)
        kept_residuals = residual[:, 0, 0].clone()
        # One NaN has the whole step of its SAE left out.
        residual[:, 0, 0] = torch.where(spikes, torch.nan, kept_residuals)
        kept = [member.optimizer.state[form.w_enc] for form, member in zip(forms, members, strict=True)]
        last_norms = None
        if config.clip_norm == "lagged" and all("grad_norm" in own for own in kept):
            last_norms = torch.stack([own["grad_norm"] for own in kept])
        norms = latent_step_many(
            x,
            residual,
            values,
            indices,
            dots,
            latents,
            [_adam(member.optimizer.param_groups[0]) for member in members],
            scale=-2 / (n * d),
            centred=first.centred,
            unit_norm=first.unit_norm,
            clip=config.clip,
            clip_norms=last_norms,
            dead=dead,
            counters=self._counters(members, n, stacks),
        )
        if config.clip_norm == "lagged":
            # A step that was skipped has no norm; after a first one like that the next is not clipped.
            other = torch.zeros_like(norms) if last_norms is None else last_norms
            for own, norm in zip(kept, torch.where(torch.isfinite(norms), norms, other), strict=True):
                own["grad_norm"] = norm
        skipped, in_a_row = (
            stacks.of(name, [getattr(m, name) for m in members], _attribute(members, name))
            for name in ("skipped", "skipped_in_a_row")
        )
        count_skipped(skipped, in_a_row, norms)
        residual[:, 0, 0] = kept_residuals
        y_hat = torch.addcdiv(y, residual.float(), scale_out, value=-1)
        return [
            Step(
                Losses(terms[m], Codes(values[m, :, :k], indices[m, :, :k], d_sae), y_hat[m]),
                batches[m],
                norms[m],
            )
            for m, k in enumerate(ks)
        ]

    def _operands(
        self,
        forms: Sequence[LinearLatents],
        b_dec: Tensor,
        batches: Sequence[Batch],
        y: Tensor,
        scale_out: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """What is encoded, and what codes alone have to reconstruct, of targets y and their scale. [M, N, D].

        With b_dec taken from the target instead of added to the output, an autoencoder's target is its
        input: one tensor serves as both, and rounds distances from b_dec only.
        """
        dtype = self.low or torch.float32
        target = torch.addcmul(-b_dec.unsqueeze(1), y, scale_out).to(dtype)
        if forms[0].centred and batches[0].x is batches[0].y:
            return target, target
        centre = torch.stack([form.centre for form in forms]).unsqueeze(1)
        x = _shared([b.x for b in batches]) * _scales([form.scale_in for form in forms])
        return (x - centre).to(dtype), target

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

    def _stack(self, forms: Sequence[LinearLatents], members: Sequence[Member], stacks: Stacks) -> Latents:
        """The latents of all, every tensor with their number before its shape."""
        each = [self._latents(form, member) for form, member in zip(forms, members, strict=True)]
        copies = [self._copies.of(form, member) for form, member in zip(forms, members, strict=True)]

        def weight(name: str) -> Weight:
            parameters = [getattr(form, name) for form in forms]
            own = [getattr(latents, name) for latents in each]
            states = [m.optimizer.state[p] for m, p in zip(members, parameters, strict=True)]
            low = None
            if own[0].low is not None:
                of_name = [of_member[name] for of_member in copies]
                low = stacks.of(f"low {name}", [w.low for w in own], _attribute(of_name, "tensor"))
            return Weight(
                stacks.of(name, [w.value for w in own], _attribute(parameters, "data")),
                stacks.of(f"exp_avg of {name}", [w.first for w in own], _entry(states, "exp_avg")),
                stacks.of(f"exp_avg_sq of {name}", [w.second for w in own], _entry(states, "exp_avg_sq")),
                low,
            )

        w_enc, b_enc, w_dec, b_dec = (weight(name) for name in ("w_enc", "b_enc", "w_dec", "b_dec"))
        of_all = [m.optimizer.state[form.w_enc] for m, form in zip(members, forms, strict=True)]
        last_step = None
        if "last_step" in of_all[0]:
            last_step = stacks.of("last_step", [s["last_step"] for s in of_all], _entry(of_all, "last_step"))
        step = stacks.of("step", [s["step"] for s in of_all], _entry(of_all, "step"))
        if len(members) > 1:  # where weights were moved into stacks, their copies are as good as before
            for form, member in zip(forms, members, strict=True):
                self._copies.remember(form, member)
        return Latents(w_enc, b_enc, w_dec, b_dec, step, last_step)

    @staticmethod
    def _spikes(members: Sequence[Member], losses: Tensor, stacks: Stacks) -> Tensor:
        guards = [member.spikes for member in members]
        state = [
            stacks.of(f"spikes {name}", [getattr(g, name) for g in guards], _attribute(guards, name))
            for name in ("losses", "seen", "streak", "spikes")
        ]
        return judge(losses, guards[0].sds, *state)

    @staticmethod
    def _counters(members: Sequence[Member], rows: int, stacks: Stacks) -> Counters:
        stats = [member.stats for member in members]
        for own in stats:
            own.tokens += rows
        assert len({own.tokens for own in stats}) == 1, "SAEs of one run have seen the same number of rows"
        counts, sums, maxima, last_fired = (
            stacks.of(name, [getattr(own, name) for own in stats], _attribute(stats, name))
            for name in ("counts", "sums", "maxima", "last_fired")
        )
        return Counters(counts, sums, maxima, last_fired, stats[0].tokens)

    def _latents(self, form: LinearLatents, member: Member) -> Latents:
        """The parameters with the optimizer's state of them, which is made if this is the first step."""
        parameters = [form.w_enc, form.b_enc, form.w_dec, form.b_dec]
        state = member.optimizer.state
        if any(len(state[p]) == 0 for p in parameters):
            _start(member.optimizer, parameters, member.config.optim)
        copies = self._copies.of(form, member)
        low = [
            copies[name].tensor if name in copies else None for name in ("w_enc", "b_enc", "w_dec", "b_dec")
        ]
        w_enc, b_enc, w_dec, b_dec = (
            Weight(p.detach(), state[p]["exp_avg"], state[p]["exp_avg_sq"], copy)
            for p, copy in zip(parameters, low, strict=True)
        )
        of_all = state[form.w_enc]
        return Latents(w_enc, b_enc, w_dec, b_dec, step=of_all["step"], last_step=of_all.get("last_step"))


def _form(member: Member) -> LinearLatents:
    form = member.sae.latents()
    assert form is not None, "cannot_fuse was not asked"
    return form


def _shared(rows: Sequence[Tensor]) -> Tensor:
    """Rows of M members as [M, N, D] float32: of all at once, cast once, where they are the same tensor."""
    if all(one is rows[0] for one in rows):
        return rows[0].float().expand(len(rows), -1, -1)
    return torch.stack([one.float() for one in rows])


def _scales(scales: Sequence[Tensor]) -> Tensor:
    """Scalars or [D] of M members, as [M, 1, 1] or [M, 1, D]."""
    return torch.stack(list(scales)).reshape(len(scales), 1, -1)


def _adam(group: dict[str, Any]) -> AdamStep:
    beta1, beta2 = group["betas"]
    return AdamStep(lr=group["lr"], beta1=beta1, beta2=beta2, eps=group["eps"])


def _attribute(owners: Sequence[object], name: str) -> Callable[[int, Tensor], None]:
    return lambda number, tensor: setattr(owners[number], name, tensor)


def _entry(owners: Sequence[dict[str, Any]], name: str) -> Callable[[int, Tensor], None]:
    return lambda number, tensor: owners[number].__setitem__(name, tensor)


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
