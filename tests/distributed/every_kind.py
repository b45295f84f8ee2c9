"""Run in each process of a group: every kind of SAE, divided among them and whole, on the same rows.

    DATA=2 FEATURE=2 OUT=FILE RANK=... python every_kind.py
    AUTOCAST=bfloat16 ONLY="matryoshka, topk|linear, relu" ...      some of them, products in bfloat16

The first process writes what it found, by kind, as JSON: how far losses and weights of the divided SAE came
apart from those of the whole one, whether counters are the same, and what went between processes in a step.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sae_train.activations.base import ACTIVATIONS
from sae_train.activations.jumprelu import JumpReLUConfig
from sae_train.activations.relu import ReLUConfig
from sae_train.activations.topk import TopKConfig
from sae_train.batch import RowBatch
from sae_train.places import Widths
from sae_train.ranks import MeshConfig, joined
from sae_train.sae.base import SAES, SAEConfig
from sae_train.sae.linear import LinearConfig
from sae_train.sae.matryoshka import MatryoshkaConfig
from sae_train.split import Split, divided
from sae_train.train.members import Member, MemberConfig
from sae_train.train.optim import OptimConfig
from sae_train.train.stepper import AutogradStepper

D, F, N, K, STEPS = 24, 96, 64, 4, 18
DEVICE = (
    torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
)


def kinds() -> Iterator[tuple[str, str, SAEConfig, OptimConfig]]:
    """(name, hook, what to build, how it learns): all of the registries, and options that matter here."""
    adam = OptimConfig(lr=3e-3)
    for name in ACTIVATIONS:
        for sae in SAES:
            yield f"{sae}, {name}", "a", SAES.config(sae)(d_sae=F, activation=activation(name), **DEAD), adam
    few = {"d_sae": F, "k_aux": 3} | DEAD
    yield "more dead than k_aux", "a", LinearConfig(activation=TopKConfig(k=2), **few), adam
    yield "multi-topk", "a", LinearConfig(d_sae=F, activation=TopKConfig(k=K, multi=0.125)), adam
    yield "k above a slice", "a", LinearConfig(d_sae=16, activation=TopKConfig(k=12)), adam
    yield "k falls", "a", LinearConfig(d_sae=F, activation=TopKConfig(k=2, k_start=40)), adam
    sampled = MatryoshkaConfig(d_sae=F, activation=TopKConfig(k=K), sampled=4)
    yield "sampled prefixes", "a", sampled, adam
    for penalty in ("tanh", "quadratic"):
        jump = JumpReLUConfig(target_l0=K, penalty=penalty)
        yield f"jumprelu, {penalty}", "a", LinearConfig(d_sae=F, activation=jump), adam
    yield "relu, p falls", "a", LinearConfig(d_sae=F, activation=ReLUConfig(target_l0=K, p_end=0.3)), adam
    for skip in (False, True):
        between = LinearConfig(kind="transcoder", d_sae=F, skip=skip, activation=TopKConfig(k=K), **DEAD)
        yield f"transcoder, skip={skip}", "a>b", between, adam
    yield "crosscoder", "a+b", LinearConfig(kind="crosscoder", d_sae=F, activation=TopKConfig(k=K)), adam
    plain = LinearConfig(d_sae=F, activation=TopKConfig(k=K), **DEAD)
    yield "clipped", "a", plain, OptimConfig(lr=3e-3, clip=1e-3)
    try:
        free = OptimConfig(name="schedule_free", lr=3e-3, decay=0.0)
        free.check_library()
        yield "schedule-free", "a", plain, free
    except Exception as error:
        print("not installed:", error)


DEAD = {"dead_after_tokens": 16}
"""Fewer than a batch has: what did not fire in the last one is dead."""


def activation(name: str) -> Any:
    config = ACTIVATIONS.config(name)
    return config(target_l0=K) if hasattr(config, "target_l0") else config(k=K)


def rows(step: int) -> dict[str, Tensor]:
    """The same in every process: of features that are rarely active, so that latents die."""
    make = torch.Generator().manual_seed(7)
    directions = torch.randn(60, D, generator=make)
    mixing = torch.randn(D, D, generator=make) / D**0.5
    draw = torch.Generator().manual_seed(1000 + step)
    active = torch.rand(N, 60, generator=draw) < 0.06
    a = 3 * (torch.rand(N, 60, generator=draw) * active) @ directions + 1
    return {"a": a.to(DEVICE), "b": torch.nn.functional.gelu(a @ mixing).to(DEVICE)}


def member(name: str, hook: str, sae: SAEConfig, optim: OptimConfig, split: Split | None) -> Member:
    read, _, target = hook.partition(">")
    config = MemberConfig(name, read, 0, sae, optim, target or None)
    widths = Widths((D,) * len(read.split("+")), (D,) if target else ())
    more = {} if split is None else {"split": split}
    return Member(config, widths, STEPS, 10 * STEPS * N, 0.9, DEVICE, **more)


class Counted:
    """Bytes of the tensors that this process hands to collectives, by the name of the collective."""

    def __init__(self) -> None:
        self.bytes: dict[str, int] = {}
        for name in ("all_reduce", "broadcast", "all_gather"):
            setattr(dist, name, self._wrapped(name, getattr(dist, name)))

    def _wrapped(self, name: str, real: Any) -> Any:
        def counted(*args: Any, **kwargs: Any) -> Any:
            tensor = args[1] if name == "all_gather" else args[0]
            self.bytes[name] = self.bytes.get(name, 0) + tensor.numel() * tensor.element_size()
            return real(*args, **kwargs)

        return counted


def compare(split: Split, name: str, hook: str, sae: SAEConfig, optim: OptimConfig, sent: Counted) -> Any:
    own = member(name, hook, sae, optim, split)
    own.initialise(rows(0))
    whole = member(name, hook, sae, optim, None) if split.lead else None  # the others have nobody to tell
    if whole is not None:
        whole.initialise(rows(0))
    found: dict[str, Any] = {"start": apart(own, whole), "losses": 0.0, "dead": 0}
    stepper = AutogradStepper(
        autocast=getattr(torch, os.environ["AUTOCAST"]) if "AUTOCAST" in os.environ else None
    )
    for step in range(STEPS):
        batch = RowBatch(rows(step), torch.arange(N))
        totals = []
        for one in filter(None, (whole, own)):
            one.begin_step(step)
            sent.bytes.clear()
            totals.append(float(stepper.step(one, stepper.take(one, batch)).losses.total.detach()))
        found["losses"] = max(found["losses"], abs(totals[-1] - totals[0]) / abs(totals[0]))
        found["bytes"] = dict(sent.bytes)
        found["dead"] = max(found["dead"], len(own.dead))
    found["weights"] = apart(own, whole)
    made = own.whole()
    if whole is not None and made is not None:
        numbers = [made.stats.state_dict(), whole.stats.state_dict()]
        same = [torch.equal(*(x[name] for x in numbers)) for name in ("counts", "last_fired")]
        found["counters"] = all(same) and made.stats.tokens == whole.stats.tokens
        found["dead"] = len(whole.dead)
        found["moved"] = float((whole.sae.state_dict()["w_dec"] - member_start(whole)).abs().max())
    return found


def member_start(whole: Member) -> Tensor:
    """The decoder that it started with."""
    fresh = Member(whole.config, whole.widths, STEPS, 10 * STEPS * N, 0.0, DEVICE)
    fresh.initialise(rows(0))
    return fresh.sae.state_dict()["w_dec"]


def apart(own: Member, whole: Member | None) -> float | None:
    """The largest difference between tensors of the two, as shares of the largest number in each."""
    made = own.whole()
    if made is None or whole is None:
        return None
    state, wanted = made.sae.state_dict(), whole.trained().state_dict()
    assert state.keys() == wanted.keys()
    return max(
        float((state[n] - wanted[n]).abs().max() / wanted[n].abs().max().clamp_min(1e-30)) for n in wanted
    )


def ties(split: Split) -> dict[str, list[int]]:
    """How many of equal values each process keeps, by its place: lower rows and lower latents come first."""
    values, latents = torch.ones(3, 5, device=DEVICE), torch.arange(5, device=DEVICE) + split.first(5)
    kept = split.best(values, latents.expand(3, 5), 7)
    x, w, b = torch.ones(4, 2, device=DEVICE), torch.ones(6, 2, device=DEVICE), torch.zeros(6, device=DEVICE)
    batch = split.batch_topk_encode(x, w, b, 2)[0]
    counts = torch.tensor([int(kept[0].sum()), int(kept.sum()), len(batch)])
    found = torch.stack(split.all.gather(counts)).T.tolist()
    return dict(zip(("first row", "rows", "batch"), found, strict=True))


def main() -> None:
    torch.set_num_threads(1)
    mesh = MeshConfig(data=int(os.environ["DATA"]), feature=int(os.environ["FEATURE"]), timeout_s=60)
    with joined(mesh) as ranks:
        split, sent, found = divided(ranks, mesh), Counted(), {}
        only = os.environ.get("ONLY", "").split("|")
        for name, *what in kinds():
            if only != [""] and name not in only:
                continue
            found[name] = compare(split, name, *what, sent)
        equal = ties(split)
        if ranks.lead:
            Path(os.environ["OUT"]).write_text(json.dumps({"kinds": found, "ties": equal}))


main()
os._exit(0)
