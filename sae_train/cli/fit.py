"""What a plan is made of, read off a configuration: shapes of model and SAEs, this device's memory.

Nothing is loaded. The model is built without memory out of its configuration, as for checking hook names, and
so are the SAEs. `refuse_unfit` is what a run asks before its model's weights are read.
"""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from sae_train.activations.base import ActivationConfig
from sae_train.config import Config
from sae_train.demo import resolve as demo
from sae_train.devices import native_bfloat16
from sae_train.errors import InputError
from sae_train.files import MAX_MANIFEST_BYTES, read_json
from sae_train.harvest.harvester import NeedsWeights, check_sites
from sae_train.harvest.hooks import Site, is_other, resolve
from sae_train.harvest.kinds import skeleton
from sae_train.harvest.model import DTYPES, ModelConfig, load_config
from sae_train.harvest.second import of_second, second
from sae_train.plan import Plan, alternatives, make
from sae_train.plan_job import GIB, HARDWARE, Hardware, Job, MemberShape, ModelShape, Parameter
from sae_train.registry import nearest
from sae_train.sae.base import SAES
from sae_train.shards.disk import ROWS, Harvest, shard_path
from sae_train.shards.synthetic import HOOK
from sae_train.train.members import MemberConfig

CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
"""Of version 2 and 1: what a container may use. A huge number, or the word max, is no limit."""
IDS_BYTES = 8
FILE_BYTES = {"F32": 4, "BF16": 2, "F16": 2}


def refuse_unfit(
    config: Config, wanted: list[MemberConfig], dims: Mapping[str, int], device: torch.device, processes: int
) -> None:
    """Raises InputError, with the numbers, if the run cannot fit this device even if the plan is far off.

    Args:
        dims: width of every hook, as the user spelt it.
    """
    room = device_bytes(device, processes)
    if room is None:
        return
    model, spread = None, spread_over(config)
    if config.source.name == "stream":
        model = most(config)
        if model is not None:
            job = job_of(config, wanted, dims, model, here(device), room, processes, spread)
            if make(job).verdict(room) != "does not fit":
                return  # as nearly always; building the model without memory would take a moment
        low = native_bfloat16(device)
        try:
            model = model_shape(config, {hook for m in wanted for hook in m.places.hooks}, low)[0]
        except NeedsWeights:
            return  # what its forward takes is seen when it runs
    job = job_of(config, wanted, dims, model, here(device), room, processes, spread)
    plan = make(job)
    if plan.verdict(room) == "does not fit":
        raise InputError(
            "memory",
            f"{plan.peak / GIB:.1f} GiB",
            f"at most {room / GIB:.1f} GiB, what a process has here; {helps(job, plan)}",
        )


def helps(job: Job, plan: Plan) -> str:
    """The largest part of a plan, and what would make it smaller, with the numbers."""
    largest = plan.parts[plan.largest][plan.peak_stage] / GIB
    text = f"the largest part is {plan.largest.replace(',', ':')} with {largest:.1f} GiB"
    better = [f"{key} ({peak / GIB:.1f} GiB)" for key, peak in alternatives(job)]
    return text + (f"; less is needed with {', or '.join(better[:4])}" if better else "")


def spread_over(config: Config) -> int:
    """Devices of this machine that the language model is laid over."""
    return 1 if config.model.device_map is None else max(1, torch.cuda.device_count())


def here(device: torch.device) -> Hardware:
    """This machine's device, as far as the table knows it."""
    if device.type == "cpu":
        return HARDWARE["cpu"]
    name = torch.cuda.get_device_name(device).lower()
    return next((found for key, found in HARDWARE.items() if key in name), HARDWARE["a100"])


def device_bytes(device: torch.device, processes: int) -> int | None:
    """Memory that one of the processes of a run may use; None if it cannot be known."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    limits = [psutil.virtual_memory().total]
    for path in map(Path, CGROUP_LIMITS):
        try:
            limits.append(int(path.read_text()))
        except (OSError, ValueError):
            continue  # another version, another system, or no limit
    here = int(os.environ.get("LOCAL_WORLD_SIZE") or processes)
    return int(min(limits)) // max(1, here)


def job_of(
    config: Config,
    wanted: list[MemberConfig],
    dims: Mapping[str, int],
    model: ModelShape | None,
    hardware: Hardware,
    room: int | None,
    processes: int,
    spread: int = 1,
) -> Job:
    """The job that a configuration is, of SAEs on hooks of these widths."""
    only = next(iter(dims.values()))  # what `auto` means
    members = []
    for member in wanted:
        places = member.places
        widths = places.widths({hook: dims.get(hook, only) for hook in places.hooks})
        with torch.device("meta"):
            members.append(member_shape(member, SAES.build(member.sae, widths)))
    low = native_bfloat16(torch.device("cpu")) if hardware.name == "cpu" else True
    itemsize = 4 if model is None else model.itemsize
    row_bytes, shard_rows = IDS_BYTES + itemsize * sum(dims.values()), config.source.shard_tokens
    if config.source.name == "shards":
        row_bytes, shard_rows = on_disk(Path(str(config.source.path)).expanduser(), row_bytes, shard_rows)
    elif config.source.name == "tensors":
        found = header(config)
        row_bytes = IDS_BYTES + FILE_BYTES.get(str(found["dtype"]), 4) * int(found["shape"][1])
    autocast = config.train.autocast
    return Job(
        config=config,
        members=tuple(members),
        model=model,
        row_bytes=row_bytes,
        shard_rows=shard_rows,
        hardware=hardware,
        device_bytes=room,
        processes=processes,
        data=config.mesh.data,
        feature=config.mesh.feature,
        low=low if autocast == "auto" else autocast == "bfloat16",
        cores=config.run.threads or torch.get_num_threads(),
        cuda_build=torch.backends.cuda.is_built(),
        spread=spread,
    )


def member_shape(member: MemberConfig, sae: Any) -> MemberShape:
    """The numbers of an SAE that was built without memory."""
    activation = sae.activation
    dense = activation.config.name in ("jumprelu", "relu")
    parameters = tuple(
        Parameter(p.numel(), p.dim() == 2, p.dim() > 0 and p.shape[0] == sae.d_sae) for p in sae.parameters()
    )
    buffers = sum(b.numel() * b.element_size() for b in sae.state_dict().values())
    return MemberShape(
        name=member.name,
        architecture=sae.config.name,
        activation=activation.config.name,
        d_in=sae.d_in,
        d_out=sae.d_out,
        latents=sae.d_sae,
        slots=None if dense else _most_slots(activation.config),
        pre=activation.config.name == "jumprelu",
        parts=1 + len(sae.first_latents()),
        parameters=parameters,
        buffers_bytes=buffers - sum(4 * p.numel for p in parameters),
        one_form=sae.latents() is not None,
        optim=member.optim,
    )


def model_shape(config: Config, hooks: Iterable[str], low: bool) -> tuple[ModelShape, dict[str, int]]:
    """The language model's shape, two of them added up, and the width of every hook as it is spelt.

    Args:
        low: `auto` means bfloat16.

    Raises:
        InputError: as loading the model, for what can be known without weights.
    """
    if config.model.name in ("none", "???"):
        raise InputError(
            "model.name", config.model.name, "a Hugging Face model: model.name=HUB_ID or a folder"
        )
    named = config.model.dtype
    itemsize = DTYPES[("bfloat16" if low else "float32") if named == "auto" else named].itemsize
    hooks = list(hooks)
    first = ModelConfig(**vars(config.model) | {"name": demo(config.model.name)})
    shape, dims = _one_model(first, [hook for hook in hooks if not is_other(hook)], itemsize)
    beside = [hook for hook in hooks if is_other(hook)]
    if not beside:
        return shape, dims
    with of_second():
        other, more = _one_model(second(first), beside, itemsize)
    both = ModelShape(
        shape.weights_bytes + other.weights_bytes,
        itemsize,
        shape.used + other.used,
        max(shape.width, other.width),
        max(shape.widest, other.widest),
        max(shape.vocabulary, other.vocabulary),
    )
    return both, dims | more


def most(config: Config) -> ModelShape | None:
    """A bound on the model's shape by the size of its files; None where they are not in a folder here."""
    names = [name for name in (config.model.name, config.model.other) if name is not None]
    folders = [Path(demo(name)) for name in names]
    if config.model.gguf_file is not None or not all(folder.is_dir() for folder in folders):
        return None
    size = sum(path.stat().st_size for folder in folders for path in folder.glob("*.safetensors"))
    text = load_config(ModelConfig(**vars(config.model) | {"name": str(folders[0])})).get_text_config()
    width = int(text.hidden_size)
    return ModelShape(2 * size, 4, 0, width, 4 * width, int(text.vocab_size))  # bfloat16 may become float32


def _one_model(config: ModelConfig, hooks: list[str], itemsize: int) -> tuple[ModelShape, dict[str, int]]:
    hf_config = load_config(config)
    model = skeleton(hf_config)
    sites = [resolve(hook, model) for hook in hooks]
    text = hf_config.get_text_config()
    weights = sum(p.numel() for p in model.parameters()) * itemsize
    dims, ran = _until_hooks(model, sites, getattr(text, "num_experts_per_tok", None))
    causal = model.get_output_embeddings() is not None  # type: ignore[operator]
    shape = ModelShape(
        weights_bytes=weights,
        itemsize=itemsize,
        used=sum(numel for numel, _ in ran),
        width=int(text.hidden_size),
        widest=max((width for _, width in ran), default=int(text.hidden_size)),
        vocabulary=int(text.vocab_size) if causal else 0,
    )
    return shape, {site.name: dims[site.key] for site in sites}


def _until_hooks(
    model: nn.Module, sites: list[Site], experts: int | None
) -> tuple[dict[str, int], list[tuple[int, int]]]:
    """Site key -> D; and of every matrix on the way to the last: how many numbers, what width it gives.

    Of experts, whose matrices lie in one tensor [E, ., .], a token goes through `experts`, if None all."""
    ran: list[tuple[int, int]] = []
    reached: list[int] = []

    def stacks(module: nn.Module) -> list[nn.Parameter]:
        return [p for p in module.parameters(recurse=False) if p.dim() == 3 and type(module) is not nn.Conv1d]

    def count(module: nn.Module, args: Any, output: Any) -> None:
        weight = getattr(module, "weight", None)
        if weight is not None and weight.dim() == 2:
            given = output[0] if isinstance(output, tuple) else output  # routers give scores and choices
            ran.append((weight.numel(), given.shape[-1]))
        for stack in stacks(module):
            taken = min(experts, len(stack)) if experts else len(stack)
            ran.append((taken * stack[0].numel(), taken * max(stack.shape[1:])))

    def anew(*_: Any) -> None:  # a forward that failed for its mask is tried with another
        ran.clear()
        reached.clear()

    handles: list[Any] = [model.register_forward_pre_hook(anew)]
    for module in model.modules():
        leaf = not any(True for _ in module.children())
        if not isinstance(module, nn.Embedding) and (leaf or stacks(module)):
            handles.append(module.register_forward_hook(count))
    for site in sites:
        module = model.get_submodule(site.path)
        if site.side == "in":
            handles.append(module.register_forward_pre_hook(lambda *_: reached.append(len(ran))))
        else:
            handles.append(module.register_forward_hook(lambda *_: reached.append(len(ran))))
    try:
        dims = check_sites(model, sites)
    finally:
        for handle in handles:
            handle.remove()
    return dims, ran[: max(reached, default=0)]


def rows_of(config: Config, hooks: Iterable[str], low: bool) -> tuple[ModelShape | None, dict[str, int]]:
    """The language model, if there is one, and the width of every hook, from wherever the rows come.

    Raises:
        InputError: a hook that is not there, or no rows.
    """
    hooks = list(dict.fromkeys(hooks))
    source = config.source
    if source.name == "stream":
        return model_shape(config, hooks, low)
    if source.name == "synthetic":
        found = {HOOK: source.synthetic.d}
    elif source.name == "tensors":
        found = {source.key: int(header(config)["shape"][1])}
    else:
        harvest = Harvest.read(Path(str(source.path)).expanduser())
        if harvest is None:
            raise InputError("source.path", source.path, "a folder written by sae-train harvest")
        found = dict(harvest.dims)
    for hook in hooks:
        if hook not in found and not (hook == "auto" and len(found) == 1):
            raise InputError("hook", hook, nearest(hook, list(found)))
    only = next(iter(found.values()))
    return None, found if hooks == ["auto"] else {hook: found.get(hook, only) for hook in hooks}


def header(config: Config) -> dict[str, Any]:
    """What the first file of source=tensors says of the rows: dtype, shape."""
    path = Path(config.source.paths[0])
    try:
        with open(path, "rb") as file:
            told = json.loads(file.read(min(int.from_bytes(file.read(8), "little"), 1 << 20)))
        found: dict[str, Any] = told[config.source.key]
        int(found["shape"][1])
    except (OSError, ValueError, LookupError, TypeError):
        raise InputError(
            "source.paths", str(path), f"a safetensors file with {config.source.key} as [n, d] in it"
        ) from None
    return found


def on_disk(folder: Path, row_bytes: int, shard_rows: int) -> tuple[int, int]:
    """Bytes of a row and rows of a shard as the first shard of a harvest has them; else as they are given."""
    first = shard_path(folder, 0)
    try:
        rows = int(read_json(first / "MANIFEST.json", MAX_MANIFEST_BYTES)["meta"]["rows"])
        found = (first / ROWS).stat().st_size // max(1, rows)
    except (OSError, ValueError, LookupError, TypeError):
        found, rows = 0, 0
    # Reading the shards themselves says what is wrong with them.
    return (found, rows) if row_bytes / 4 <= found <= 4 * row_bytes else (row_bytes, shard_rows)


def _most_slots(activation: ActivationConfig) -> int:
    """Latents kept per row, where k is annealed those of the start."""
    return max(int(getattr(activation, "k", 64)), int(getattr(activation, "k_start", None) or 0))
