"""Plans: what is counted is counted to the byte, and what is computed moves as it must."""

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from sae_train.batch import RowBatch
from sae_train.cli.compose import compose
from sae_train.cli.fit import job_of
from sae_train.config import Config, to_config
from sae_train.member_set import members
from sae_train.plan import (
    COUNTERS_BYTES,
    CUDA_BUILD_BYTES,
    alternatives,
    make,
    optimizer_bytes,
    weights_bytes,
)
from sae_train.plan_job import GIB, HARDWARE, Job
from sae_train.plan_step import held_bytes, is_fused, temporaries
from sae_train.train.kernels import choose_stepper
from sae_train.train.members import Member, MemberConfig

D = 16
BASE = ("source=synthetic", "hook=auto", "sae.d_sae=512", "train.tokens=64_000", "train.batch_tokens=512")


@cache
def configured(*args: str) -> tuple[Config, list[MemberConfig]]:
    composed = compose("train", [*BASE, *args])
    config = to_config(composed)
    return config, members(config, composed)


def job(*args: str, device: str = "cpu", d: int = D) -> Job:
    return job_of(*configured(*args), {"auto": d}, None, HARDWARE[device], None, 1)


def nbytes(value: Any) -> int:
    """Bytes of every tensor in a nested state."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(map(nbytes, value.values()))
    return sum(map(nbytes, value)) if isinstance(value, list | tuple) else 0


def stepped(*args: str) -> Member:
    """A member that has made one step, by whatever stepper it gets."""
    config, (wanted,) = configured(*args)
    widths = wanted.places.widths({"auto": D})
    member = Member(wanted, widths, 100, 64_000, config.train.ema, torch.device("cpu"))
    rows = torch.randn(64, D, generator=torch.Generator().manual_seed(0))
    member.initialise({"auto": rows})
    member.begin_step(0)
    stepper = choose_stepper(config.kernels, [member], 1, None)
    stepper.step(member, stepper.take(member, RowBatch({"auto": rows}, torch.arange(64))))
    return member


ARCHITECTURES = ("sae=linear", "sae=gated", "sae=matryoshka")
ACTIVATIONS = ("topk", "batch_topk", "group_max", "jumprelu", "relu")
FUSED_ONLY = (
    ("optim.moments=bfloat16",),
    ("optim.clip_norm=lagged",),
    ("optim.rows=active", "optim.beta1=0"),
)


def check_bytes(*args: str) -> None:
    member = stepped(*args)
    planned = job(*args).members[0]
    state = member.state_dict()
    assert weights_bytes(planned) == nbytes(state["sae"])
    assert optimizer_bytes(planned) == nbytes(state["optimizer"])
    assert COUNTERS_BYTES * planned.latents == nbytes(state["stats"])


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_weights_and_adams_state_are_counted_to_the_byte(architecture, activation):
    check_bytes(architecture, f"sae/activation={activation}")


@pytest.mark.usefixtures("optional_libraries", "one_thread")
@pytest.mark.parametrize("optimizer", ["muon", "schedule_free", "adam8bit"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_other_optimizers_states_are_counted_to_the_byte(architecture, optimizer):
    check_bytes(architecture, "sae/activation=jumprelu", f"optim={optimizer}")


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("optimizer", FUSED_ONLY, ids=lambda keys: keys[0])
def test_what_only_fused_steps_keep_is_counted_to_the_byte(optimizer):
    check_bytes(*optimizer)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    "args",
    [
        (),
        ("kernels.stepper=autograd",),
        ("train.accumulate=2",),
        ("sae=gated",),
        ("sae/activation=relu",),
        ("optim=muon",),
        ("sae/activation=topk", "sae.activation.multi=1"),
    ],
    ids=" ".join,
)
def test_a_plan_knows_which_steps_are_fused(args):
    config, (wanted,) = configured(*args)
    member = Member(wanted, wanted.places.widths({"auto": D}), 100, 64_000, 0.0, torch.device("cpu"))
    stepper = choose_stepper(config.kernels, [member], config.train.accumulate, None)
    planned = job(*args)
    assert is_fused(planned, planned.members[0]) == (type(stepper).__name__ == "FusedStepper")


def test_a_mesh_divides_what_it_divides_and_nothing_else():
    alone = job("kernels.stepper=autograd")
    whole = make(alone)
    sliced = make(replace(alone, processes=4, feature=4))
    rows = make(replace(alone, processes=4, data=4))
    latents = sum(4 * p.numel for p in alone.members[0].parameters if p.of_latents)

    def part(plan, name):
        return plan.parts[name]["training"]

    for name in ("SAEs, weights", "SAEs, gradients"):
        assert part(whole, name) - part(sliced, name) == latents * 3 // 4
        assert part(whole, name) == part(rows, name)
    for name in ("shards", "held-out rows", "Python, torch and libraries"):
        assert part(whole, name) == part(sliced, name) == part(rows, name)
    held = "SAEs, activations of a step"
    assert part(rows, held) < part(whole, held) and part(sliced, held) < part(whole, held)
    assert not is_fused(replace(job(), processes=2, feature=2), job().members[0])


def test_saes_that_step_at_a_time_have_temporaries_at_a_time():
    four, alone = job("grid={seed: [0, 1, 2, 3]}"), job()

    def held(of: Job, name: str) -> int:
        return make(of).parts[name]["training"]

    for name in ("SAEs, gradients", "SAEs, activations of a step"):
        one = held(replace(alone, cores=1), name)
        kept = held(replace(four, cores=1), name) - one  # of every SAE, from one step to the next
        beside = held(replace(four, cores=2), name) - kept - one
        assert 0 < beside <= one and held(replace(four, cores=4), name) == 3 * beside + kept + one
        assert held(replace(four, cores=99), name) == held(replace(four, cores=4), name)
        for other in (replace(four, data=2, processes=2), replace(four, hardware=HARDWARE["h100"])):
            assert held(replace(other, cores=4), name) == held(replace(other, cores=1), name)
    assert held(replace(alone, cores=4), name) == one
    for key in ("optim=adam8bit", "train.loss=kl"):  # these take turns
        turns = job("grid={seed: [0, 1, 2, 3]}", key)
        assert held(replace(turns, cores=4), name) == held(replace(turns, cores=1), name)


def test_an_annealed_k_needs_what_it_starts_with():
    (member,) = job("sae.activation.k=32", "sae.activation.k_start=64").members
    assert member.slots == 64 and job("sae.activation.k=32").members[0].slots == 32


def test_saes_are_dealt_to_groups_of_processes_round_robin():
    several = job("grid={d_sae: [512, 1024, 2048]}")
    sizes = [weights_bytes(member) for member in several.members]

    def weights(processes, feature=1):
        plan = make(replace(several, processes=processes, feature=feature))
        return plan.parts["SAEs, weights"]["training"]

    assert weights(1) == sum(sizes)
    assert weights(2) == max(sizes[0] + sizes[2], sizes[1])
    assert weights(3) == weights(8) == max(sizes)
    assert weights(4, feature=2) < weights(2)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_more_of_anything_is_never_planned_as_less(activation):
    few = job(f"sae/activation={activation}", d=64)
    train = replace(few.config.train, batch_tokens=2 * few.config.train.batch_tokens)
    larger = {
        "rows of a step": replace(few, config=replace(few.config, train=train)),
        "rows of a shard": replace(few, shard_rows=2 * few.shard_rows),
        "latents": job(f"sae/activation={activation}", "sae.d_sae=1024", d=64),
        "width": job(f"sae/activation={activation}", d=128),
    }
    for what, more in larger.items():
        for stage in ("start", "training", "judging"):
            assert make(few).total(stage) <= make(more).total(stage), (what, stage)
        assert make(few).total("training") < make(more).total("training"), what


def test_a_plan_tells_what_fits_from_what_does_not():
    plan = make(job())
    assert plan.verdict(None) == "unknown"
    assert plan.verdict(2 * plan.peak) == "fits"
    assert plan.verdict(plan.peak) == "may not fit"
    assert plan.verdict(plan.peak // 2) == "does not fit"
    assert plan.parts[plan.largest][plan.peak_stage] == max(p[plan.peak_stage] for p in plan.parts.values())


def test_what_would_help_is_less_than_what_is_planned():
    wide = job("sae.d_sae=65536", "sae/activation=jumprelu", "train.batch_tokens=2048", d=512)
    peak = make(wide).peak
    found = dict(alternatives(wide))
    assert {"mesh.feature=2 with 2 processes", "train.batch_tokens=1024"} <= found.keys()
    assert all(less < 0.98 * peak for less in found.values())
    assert list(found.values()) == sorted(found.values())
    assert alternatives(job("source.shard_tokens=8192")) == []  # the libraries are nearly all of it
    assert found["mesh.feature=8 with 8 processes"] == make(replace(wide, processes=8, feature=8)).peak


def test_small_saes_that_share_a_gpus_launches_have_their_temporaries_at_once():
    keys = ["train.tokens=3_000_000", "grid={lr: [1e-3, 2e-3, 3e-3, 4e-3], seed: [0, 1]}"]

    def of_steps(*more: str, d: int = D) -> int:
        return make(job(*keys, *more, device="h100", d=d)).parts["SAEs, activations of a step"]["training"]

    small = job(*keys, "sae.d_sae=4096", device="h100")
    one = temporaries(small, small.members[0]) - held_bytes(small, small.members[0])
    apart = of_steps("sae.d_sae=4096", "kernels.together=never")
    assert of_steps("sae.d_sae=4096") == apart + 7 * one and one > 0
    wide = "sae.d_sae=1048576"  # of width 512: a product of that is no small thing
    assert of_steps(wide, d=512) == of_steps(wide, "kernels.together=never", d=512)


def test_a_gpu_is_planned_with_its_own_memory_and_the_copy_of_a_checkpoint_beside_it():
    on_gpu = job("sae.d_sae=65536", "train.tokens=3_000_000", device="h100", d=512)
    plan = make(on_gpu)
    assert plan.parts["checkpoint, copy"]["training"] == 0
    assert plan.host_bytes > optimizer_bytes(on_gpu.members[0])
    assert plan.rows_per_s > 100 * make(replace(on_gpu, hardware=HARDWARE["cpu"])).rows_per_s
    assert plan.peak < HARDWARE["h100"].memory < 81 * GIB


def test_the_shape_of_a_crosscoder_is_that_of_all_its_hooks():
    wanted = configured("sae=crosscoder", "hook=a+b")
    found = job_of(*wanted, {"a": 16, "b": 24}, None, HARDWARE["cpu"], None, 1)
    assert (found.members[0].d_in, found.row_bytes) == (40, 8 + 4 * 40)


def test_a_build_of_torch_for_cuda_is_counted_where_the_plan_is_for_the_cpu():
    plain, built = (make(replace(job(), cuda_build=has)) for has in (False, True))
    assert built.peak - plain.peak == CUDA_BUILD_BYTES
    on_gpu = [make(replace(job(device="h100"), cuda_build=has)) for has in (False, True)]
    assert on_gpu[0] == on_gpu[1]
