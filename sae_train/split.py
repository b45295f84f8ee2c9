"""One SAE over several processes: its latents in slices, the rows of a step in parts.

    mesh.feature=2 mesh.data=2        latents 0 .. F/2        latents F/2 .. F
        rows of the first half            process 0               process 1
        rows of the second half           process 2               process 3

Every process of such a group computes the loss of the whole batch under all latents, and the gradients of its
own latents from its own rows. What crosses between them, with N rows of width D in a process:

    slices   reconstructions are summed [N, D]; top-k candidates compared [N, k]; the gradient that the shared
             bias has through encoders is summed [D]
    parts    gradients are averaged [F / slices, 2 D]; numbers of the whole batch (loss, L0) likewise [1]

An operation that sums values hands its gradient on as it is: the loss behind it is the same number in all
processes, once. Selections are exact. Each slice offers its own k best, among which the best of all must be;
they are compared as whole numbers, (value, lower latent first), so that every process draws the same line
through ties. DTensor's topk would gather all pre-activations [N, F] to do that.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from sae_kernels import batch_topk_encode
from torch import Tensor

from sae_train import ops
from sae_train.errors import InputError
from sae_train.ranks import MeshConfig, Ranks, answered

T = TypeVar("T")

HIGHEST = 2**32 - 1
"""A latent's place in a key: the lowest number is the highest."""


@dataclass(frozen=True)
class Axis:
    """Processes each of which has one part of something, and this one's place among them."""

    index: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None
    ranks: tuple[int, ...] = (0,)
    """Numbers in the run, by index."""

    def sum(self, tensor: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
        """The sum over the processes, or what else `op` makes; the same bits in all of them."""
        if self.size == 1:
            return tensor
        tensor = tensor.detach().clone(memory_format=torch.contiguous_format)
        with answered():
            dist.all_reduce(tensor, op=op, group=self.group)
        return tensor

    def all(self, flag: Tensor) -> Tensor:
        """0-dim bool: whether it is so in every process."""
        return self.sum(flag.int(), dist.ReduceOp.MIN).bool()

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """Everybody's, by index; all have the same shape."""
        if self.size == 1:
            return [tensor]
        tensor = tensor.detach().contiguous()
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        with answered():
            dist.all_gather(parts, tensor, group=self.group)
        return parts

    def spread_(self, tensor: Tensor) -> None:
        """Overwrite it with that of the first process."""
        if self.size > 1:
            with answered():
                dist.broadcast(tensor, src=self.ranks[0], group=self.group)

    def part(self, tensor: Tensor) -> Tensor:
        """This process's rows of what all have whole; a view."""
        return tensor if self.size == 1 else tensor.tensor_split(self.size)[self.index]


@dataclass(frozen=True)
class Split:
    """How one SAE is divided, as one of its processes sees it. `WHOLE` is not divided, and costs nothing.

    Attributes:
        rows: processes with the same latents and other rows of a step.
        latents: processes with the same rows and other latents.
        all: both, by (rows, latents).
        group, groups: which group of processes this one is in, of how many with SAEs of their own; None for
            one that only harvests.
    """

    rows: Axis = field(default_factory=Axis)
    latents: Axis = field(default_factory=Axis)
    all: Axis = field(default_factory=Axis)
    group: int | None = 0
    groups: int = 1

    def __deepcopy__(self, memo: dict[int, Any]) -> "Split":
        return self  # copies of an SAE are divided among the same processes

    @property
    def whole(self) -> bool:
        return self.all.size == 1

    @property
    def lead(self) -> bool:
        """Whether this process says what is to be said of the SAEs of its group."""
        return self.all.index == 0

    def mine(self, things: Sequence[T]) -> list[T]:
        """What this process's group trains; every thing is one group's."""
        return [] if self.group is None else list(things[self.group :: self.groups])

    def enter(self, shared: Tensor) -> Tensor:
        """What all slices read, once, where it gets a gradient from each of them."""
        return shared if self.latents.size == 1 else _Enter.apply(shared, self.latents)

    def total(self, share: Tensor) -> Tensor:
        """The sum of what every slice adds to something, from which all go on alike; in float32, as shares
        may be of several dtypes: autocast rounds those of dense codes, which codes without a latent are."""
        return share if self.latents.size == 1 else _Reduce.apply(share.float(), self.latents, 1)

    def mean(self, share: Tensor) -> Tensor:
        """The mean over the parts of a batch, of numbers that are means over as many rows in each."""
        return share if self.rows.size == 1 else _Reduce.apply(share, self.rows, self.rows.size)

    def finite(self, x: Tensor) -> Tensor:
        """0-dim bool: whether all rows of the batch are."""
        return self.rows.all(torch.isfinite(x.sum()))

    def counts(self, own: int) -> list[int]:
        """A number of every slice. Not through the device: nothing waits for it."""
        if self.latents.size == 1:
            return [own]
        return [int(n) for n in self.latents.gather(torch.tensor(own))]

    def first(self, own: int) -> int:
        """The first of this process's latents, with `own` of them in every slice."""
        return self.latents.index * own

    def topk_encode(self, x: Tensor, w: Tensor, b: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """`sae_kernels.topk_encode` of all latents, of which w [F / slices, D] and b are this process's.

        Returns:
            values [N, min(k, F / slices)] and int32 indices into w; 0 where a latent of another slice took
            the place.
        """
        if self.latents.size == 1:
            return ops.topk_encode(x, w, b, k)
        values, indices = ops.topk_encode(x, w, b, min(k, len(w)))
        return self.best(values, indices + self.first(len(w)), k), indices

    def best(self, values: Tensor, latents: Tensor, k: int) -> Tensor:
        """Values [N, K] >= 0 where they are among the k largest of their row in all slices, 0 elsewhere.

        Args:
            latents: [N, K], below 2^32: whose they are, counted over all slices; lower ones win ties.
        """
        keys = _keys(values, latents)
        offered = torch.cat(self.latents.gather(keys), dim=1)
        if offered.shape[1] <= k:
            return values
        return values.where(keys >= offered.topk(k, dim=1).values[:, -1:], 0)

    def batch_topk_encode(self, x: Tensor, w: Tensor, b: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """`sae_kernels.batch_topk_encode` of all rows of the batch and all latents.

        Returns:
            values [M], indices [M] into w, and offsets [N + 1]: the slots of this process's rows and latents
            only, M of them; host synchronisation.
        """
        if self.whole:
            return batch_topk_encode(x, w, b, k)
        budget = k * len(x) * self.rows.size
        values, indices, offsets = batch_topk_encode(x, w, b, min(k * self.rows.size, len(w)))
        row = torch.arange(len(x), device=x.device)
        row = row.repeat_interleave(offsets.diff(), output_size=len(values))
        place = (row + self.rows.index * len(x)) * (len(w) * self.latents.size)
        place = place + indices + self.first(len(w))
        offered, order = torch.cat(self.all.gather(place)).sort()
        sizes = torch.cat(self.all.gather(values))[order]
        last = sizes.sort(descending=True, stable=True).indices[min(budget, len(sizes)) - 1]
        least, until = sizes[last], offered[last]
        kept = ((values > least) | ((values == least) & (place <= until))).nonzero().flatten()
        ends = torch.zeros(len(x) + 1, dtype=torch.int64, device=x.device)
        ends.index_add_(0, row[kept] + 1, torch.ones_like(kept))
        return values.index_select(0, kept), indices[kept], ends.cumsum(0)

    def cut(self, tensor: Tensor) -> Tensor:
        """This process's latents of a tensor with a row for each; a copy, unless that is all."""
        return tensor if self.latents.size == 1 else self.latents.part(tensor).clone()

    def deal(self, whole: Mapping[str, Tensor] | None, own: Mapping[str, Tensor], cut: set[str]) -> None:
        """Hand tensors out: the first process has them `whole`, each gets its part into `own`.

        Args:
            cut: names of those that have a row for each latent; the others go to all as they are.
        """
        for name in sorted(own):
            tensor = own[name]
            if name not in cut or self.latents.size == 1:
                if whole is not None:
                    tensor.copy_(whole[name])
                self.all.spread_(tensor)
                continue
            if self.rows.index == 0:
                parts = None
                if whole is not None:
                    parts = [part.to(tensor) for part in whole[name].tensor_split(self.latents.size)]
                with answered():
                    dist.scatter(tensor, parts, src=self.latents.ranks[0], group=self.latents.group)
            self.rows.spread_(tensor)

    def collect(self, own: Mapping[str, Tensor], cut: set[str]) -> dict[str, Tensor] | None:
        """The reverse of `deal`: whole tensors in the first process, None in the others."""
        if self.rows.index > 0:
            return None
        out: dict[str, Tensor] = {}
        for name in sorted(own):
            tensor = own[name].detach().contiguous()
            if name not in cut or self.latents.size == 1:
                out[name] = tensor
                continue
            parts = [torch.empty_like(tensor) for _ in range(self.latents.size)] if self.lead else None
            with answered():
                dist.gather(tensor, parts, dst=self.latents.ranks[0], group=self.latents.group)
            out[name] = torch.cat(parts) if parts is not None else tensor
        return out if self.lead else None


WHOLE = Split()


def divided(ranks: Ranks, config: MeshConfig) -> Split:
    """The split of the SAEs that this process trains. All have to call it.

    Raises:
        InputError: the processes cannot be divided so.
    """
    size, training = config.data * config.feature, ranks.size - config.harvest
    if training < 1:
        wanted = f"fewer than all processes, {ranks.size} (torchrun starts them)"
        raise InputError("mesh.harvest", config.harvest, wanted)
    if training % size:
        wanted = f"numbers whose product divides {training}, the number of processes that train"
        raise InputError("mesh.data x mesh.feature", f"{config.data} x {config.feature}", wanted)
    groups = training // size
    group = ranks.rank // size if ranks.rank < training else None
    if size == 1:
        return Split(group=group, groups=groups)
    timeout = timedelta(seconds=config.timeout_s)

    def axis(members: list[list[int]]) -> Axis:
        """The one of these lists that has this process, as a group; all processes make all groups."""
        own, _ = dist.new_subgroups_by_enumeration(members, timeout=timeout)
        ours = next((tuple(ones) for ones in members if ranks.rank in ones), None)
        return Axis() if ours is None else Axis(ours.index(ranks.rank), len(ours), own, ours)

    firsts = range(0, training, size)
    places = [
        [[first + r * config.feature + s for s in range(config.feature)] for r in range(config.data)]
        for first in firsts
    ]
    return Split(
        rows=axis([list(column) for table in places for column in zip(*table, strict=True)]),
        latents=axis([line for table in places for line in table]),
        all=axis([[rank for line in table for rank in line] for table in places]),
        group=group,
        groups=groups,
    )


def _keys(values: Tensor, latents: Tensor) -> Tensor:
    """[N, K] int64 that stand in the order of (value, lower latent first), for values >= 0; NaN is the
    largest, so that what is not finite is chosen, and seen."""
    values = (values.detach().float() + 0.0).contiguous()  # -0.0 would be negative
    values = values.masked_fill(values.isnan(), torch.nan)  # as would a NaN that bfloat16 has been through
    size = values.view(torch.int32).long()
    return (size << 32) | (HIGHEST - latents.long())


class _Enter(torch.autograd.Function):
    """The same tensor; its gradient is the sum of those of all processes."""

    @staticmethod
    def forward(ctx: Any, shared: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return shared.view_as(shared)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.axis.sum(grad), None


class _Reduce(torch.autograd.Function):
    """The sum over processes divided by a number; the gradient passes as it is."""

    @staticmethod
    def forward(ctx: Any, share: Tensor, axis: Axis, divisor: int) -> Tensor:
        total = axis.sum(share)
        return total if divisor == 1 else total / divisor

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad, None, None
