"""sae-train plan: what `train` with the same keys would need, before anything is loaded or started.

    sae-train plan experiment=gpt2-small sae.d_sae=1_048_576 processes=8 mesh.feature=8 device=h100

The keys are those of `train`; those of `PlanOptions` are the plan's own.
"""

import io
import json
import sys
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.table import Table

from sae_train.cli.check import check, hooks_of
from sae_train.cli.compose import run_composed
from sae_train.cli.fit import device_bytes, helps, here, job_of, rows_of, spread_over
from sae_train.config import Config, to_config
from sae_train.devices import native_bfloat16, pick_device
from sae_train.errors import InputError
from sae_train.member_set import members
from sae_train.plan import MARGIN, STAGES, Plan, alternatives, make
from sae_train.plan_job import GIB, HARDWARE, MIB, Job
from sae_train.plan_step import is_fused
from sae_train.ranks import started


@dataclass
class PlanOptions:
    """`plan`: the keys of `train`, and these."""

    processes: int | None = None
    """Processes of the run, one per device. Unset: those that torchrun started, or 1."""
    device: str | None = None
    """cpu, a100, h100, h200 or mi300x, to plan for another machine. Unset: this one's."""
    device_gib: float | None = None
    """Memory of a device. Unset: what the device has; on a CPU a share of the machine or container."""
    devices: int | None = None
    """Devices that model.device_map lays the language model over. Unset: those of this machine."""
    format: str = "table"
    """table, or json for programs."""

    def check(self) -> None:
        """Raises InputError for a value that cannot be."""
        if self.processes is not None and self.processes < 1:
            raise InputError("processes", self.processes, "a number of processes, at least 1")
        if self.devices is not None and self.devices < 1:
            raise InputError("devices", self.devices, "a number of devices, at least 1")
        if self.device is not None and self.device not in HARDWARE:
            raise InputError("device", self.device, ", ".join(HARDWARE))
        if self.device_gib is not None and not 0 < self.device_gib < float("inf"):
            raise InputError("device_gib", self.device_gib, "a number of GiB above 0")
        if self.format not in ("table", "json"):
            raise InputError("format", self.format, "table or json")


def run(args: list[str]) -> int:
    own = {f.name for f in fields(PlanOptions)}
    mine = [arg for arg in args if arg.partition("=")[0] in own and "=" in arg]
    wanted = options(mine)
    return run_composed("train", [arg for arg in args if arg not in mine], lambda c: show(c, wanted))


def options(args: list[str]) -> PlanOptions:
    """The plan's own keys, typed and checked."""
    found = PlanOptions()
    for arg in args:
        key, _, value = arg.partition("=")
        try:
            told: Any = OmegaConf.merge(OmegaConf.structured(found), OmegaConf.from_dotlist([arg]))
            typed = OmegaConf.to_object(told)
        except OmegaConfBaseException:
            kind = "a whole number" if key in ("processes", "devices") else "a number"
            raise InputError(key, value, kind) from None
        assert isinstance(typed, PlanOptions)
        found = typed
    found.check()
    return found


def show(composed: DictConfig, asked: PlanOptions) -> int:
    """Plan and print; returns 0."""
    config: Config = to_config(composed)
    job = planned(config, composed, asked)
    plan = make(job)
    print(as_json(job, plan) if asked.format == "json" else as_text(job, plan))
    return 0


def planned(config: Config, composed: DictConfig, asked: PlanOptions) -> Job:
    """The job of a configuration on the machine that was asked for.

    Raises:
        InputError: what `train` would say about the configuration, or a mesh that the processes cannot make.
    """
    wanted = members(config, composed)
    check(config)
    processes = asked.processes or started()
    together = config.mesh.data * config.mesh.feature
    if processes % together:
        raise InputError("processes", processes, f"a multiple of mesh.data x mesh.feature = {together}")
    real = pick_device(config.model.device)
    hardware = HARDWARE[asked.device] if asked.device is not None else here(real)
    room = int(asked.device_gib * GIB) if asked.device_gib is not None else None
    if room is None and asked.device in (None, real.type):
        room = device_bytes(real, processes)
    elif room is None:
        room = hardware.memory or None
    low = hardware.name != "cpu" or native_bfloat16(torch.device("cpu"))
    model, dims = rows_of(config, hooks_of(wanted), low)
    if asked.devices is not None and config.model.device_map is None:
        raise InputError("devices", asked.devices, "model.device_map with it: else a model is on one device")
    spread = asked.devices or spread_over(config)
    return job_of(config, wanted, dims, model, hardware, room, processes, spread)


def as_json(job: Job, plan: Plan) -> str:
    """The plan for programs; all memory and disk in bytes."""
    told = asdict(plan) | {
        "peak_bytes": plan.peak,
        "peak_stage": plan.peak_stage,
        "device_bytes": job.device_bytes,
        "verdict": plan.verdict(job.device_bytes),
        "processes": job.processes,
        "device": job.hardware.name,
        "rates": "measured" if job.hardware.measured else "computed, not measured",
        "alternatives": dict(alternatives(job)),
    }
    return json.dumps(told, indent=1)


def as_text(job: Job, plan: Plan) -> str:
    """The plan for people."""
    table = Table(title=f"Memory of a process, MiB ({title(job)})", title_justify="left", title_style="bold")
    table.add_column("part")
    for stage in STAGES:
        table.add_column(stage, justify="right", style="bold" if stage == plan.peak_stage else None)
    for name, part in plan.parts.items():
        if any(part.values()):
            table.add_row(name, *(mib(part[stage]) for stage in STAGES))
    table.add_section()
    table.add_row("together", *(mib(plan.total(stage)) for stage in STAGES), style="bold")
    lines = [drawn(table), verdict(job, plan)]
    if job.gpu:
        lines.append(f"beside each device: {plan.host_bytes / GIB:.1f} GiB of RAM for a process")
    lines.append("disk: " + "; ".join(f"{name} {size / GIB:.2f} GiB" for name, size in plan.disk.items()))
    rows, hours = job.config.train.tokens, plan.hours
    how = (
        f"rates measured on {job.cores} cores of another CPU: docs/planning.md"
        if job.hardware.measured
        else f"computed, not measured: {job.hardware.share:.0%} of what the vendor states"
    )
    took = f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.1f} min"
    lines.append(f"time: {plan.rows_per_s:,.0f} rows/s, {rows:,} rows in {took}, evaluation left out ({how})")
    return "\n".join(lines)


def title(job: Job) -> str:
    mesh = f"{job.processes} on {job.hardware.name}"
    if job.data * job.feature > 1:
        mesh += f", data {job.data} x feature {job.feature}"
    fused = sum(is_fused(job, member) for member in job.members)
    return f"{mesh}; {len(job.members)} SAEs, steps of {fused} fused"


def verdict(job: Job, plan: Plan) -> str:
    """Whether it fits, in a sentence with the numbers."""
    peak, found = f"{plan.peak / GIB:.2f} GiB ({plan.peak_stage})", plan.verdict(job.device_bytes)
    if job.device_bytes is None:
        return f"needs {peak}; device_gib=N says how much there is"
    room = f"{job.device_bytes / GIB:.2f} GiB"
    if found == "fits":
        return f"fits: {peak} of {room}"
    if found == "may not fit":
        return f"may not fit: {peak}, give or take {MARGIN:.0%}, of {room}; {helps(job, plan)}"
    return f"does not fit: needs {peak} of {room}; {helps(job, plan)}"


def mib(size: int) -> str:
    return f"{size / MIB:,.0f}" if size else "-"


def drawn(table: Table) -> str:
    """As a table of the terminal's, or plain and as wide as it needs to be elsewhere."""
    console = Console(file=io.StringIO(), width=110, force_terminal=sys.stdout.isatty())
    with console.capture() as captured:
        console.print(table)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())
