"""What a run will need, before anything starts: memory of each device, disk, rows per second, hours.

Arithmetic alone: shapes, dtypes and the configuration go in, nothing is allocated. What is known (weights,
optimizer states, counters, shards, held-out rows) is counted to the byte. What is not (the temporaries of a
step, what a process takes before it has any tensor) is a formula or a constant that was measured on CPUs; how
near the sum comes to real runs is in docs/planning.md. A run has four stages, and each part has its bytes in
each of them, because the largest stage decides and it is not always the same one:

    start     weights are set from the first rows; no optimizer state yet
    training  a step, the harvest of the next shard beside it, and a checkpoint being written
    judging   an evaluation between two steps
    report    the end: shards are gone, what is published is a copy

Nothing was measured on a GPU: plans for one are computed from what its vendor states.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from sae_train.plan_job import MIB, Job, MemberShape
from sae_train.plan_step import (
    chunk_bytes,
    held_bytes,
    is_fused,
    larger_matrix,
    low_copies,
    matrices,
    rows_at_once,
    share,
    temporaries,
)
from sae_train.train.kernels import most_together

STAGES = ("start", "training", "judging", "report")
MARGIN = 0.15
"""How far from the truth a sum may be (docs/planning.md); what is refused is beyond it."""

BASE_BYTES = {False: 405 * MIB, True: 555 * MIB}
"""Resident size of a process on a CPU with its libraries and next to no tensors, when it trains: on rows from
files, and with a language model (transformers, tokenizers, datasets). How: docs/planning.md."""
CUDA_BUILD_BYTES = 263 * MIB
"""What importing torch takes more where it is built for CUDA: 484 MiB are resident (2.11), not 221 (2.13)."""
REPORT_BYTES = 45 * MIB
"""What drawing the report adds: matplotlib and jinja2."""
SLACK_BYTES = 20 * MIB
"""Freed memory that malloc keeps for later, in the middle of what was seen."""
MALLOC_KEEPS = 32 * MIB
"""glibc gives blocks of this size back at once; smaller ones stay with the process (M_MMAP_THRESHOLD)."""
GPU_BASE_BYTES = 1_536 * MIB
"""CUDA context, libraries' workspaces and what the caching allocator cannot use; an assumption."""
INIT_ROWS = 32_768
"""As in cli/train.py: rows that weights start from."""
COUNTERS_BYTES = 28
"""Per latent, of `FeatureStats`: three int64 and a float32."""
SPLICE_TOKENS, SPLICE_NUMBERS = 1_024, {"cpu": 2**20, "gpu": 2**24}
"""As in harvest/splice.py: tokens whose logits are held, and numbers whose log-softmax is taken, at once."""
SYNTHETIC_BLOCK = 8_192


@dataclass(frozen=True)
class Plan:
    """A job's needs.

    Attributes:
        parts: name -> bytes on a device, by stage. host_bytes: beside a GPU, what a process needs in RAM.
        disk: name -> bytes. rows_per_s: of the whole run. hours: of harvest and steps.
    """

    parts: dict[str, dict[str, int]]
    host_bytes: int
    disk: dict[str, int]
    rows_per_s: float
    hours: float

    def total(self, stage: str) -> int:
        return sum(part[stage] for part in self.parts.values())

    @property
    def peak_stage(self) -> str:
        return max(STAGES, key=self.total)

    @property
    def peak(self) -> int:
        return self.total(self.peak_stage)

    @property
    def largest(self) -> str:
        """The part that has most of the peak."""
        return max(self.parts, key=lambda name: self.parts[name][self.peak_stage])

    def verdict(self, device_bytes: int | None) -> str:
        """unknown, fits, may not fit (nearer than the error of a plan), or does not fit."""
        if device_bytes is None:
            return "unknown"
        if self.peak * (1 - MARGIN) > device_bytes:
            return "does not fit"
        return "fits" if self.peak * (1 + MARGIN) <= device_bytes else "may not fit"


def make(job: Job) -> Plan:
    """The plan of a job; on a mesh, of the process that has most to do."""
    shares = [job.members[group :: job.groups] for group in range(min(job.groups, len(job.members)))]
    plans = [_memory(job, share) for share in shares]
    parts, host = max(plans, key=lambda found: max(_totals(found[0])))
    seconds = max(_seconds_per_row(job, share) for share in shares)
    rate = 1 / seconds if seconds else 0.0
    return Plan(parts, host, _disk(job), rate, job.config.train.tokens * seconds / 3600)


def weights_bytes(member: MemberShape, feature: int = 1) -> int:
    """What `SAE.state_dict` holds."""
    return sum(4 * share(p, feature) for p in member.parameters) + member.buffers_bytes


def optimizer_bytes(member: MemberShape, feature: int = 1) -> int:
    """What the optimizer's state holds once it has stepped."""
    optim = member.optim
    total = 4 * member.latents if optim.rows == "active" else 0
    total += 4 if optim.clip_norm == "lagged" else 0
    for parameter in member.parameters:
        numel = share(parameter, feature)
        if optim.name == "muon" and parameter.matrix:
            total += 4 * numel
        elif optim.name == "schedule_free":
            total += 8 * numel
        elif optim.name == "adam8bit" and numel >= 4096 and numel % 256 == 0:
            total += 2 * (numel + numel // 256 * 4 + 256 * 4) + 4
        else:
            low = optim.moments == "bfloat16" and parameter.matrix
            total += (4 if low else 8) * numel + 4
    return total


def _totals(parts: dict[str, dict[str, int]]) -> list[int]:
    return [sum(part[stage] for part in parts.values()) for stage in STAGES]


def _memory(job: Job, members: Iterable[MemberShape]) -> tuple[dict[str, dict[str, int]], int]:
    """name -> stage -> bytes on the device; and the bytes of RAM beside it."""
    config, own = job.config, list(members)
    saves = config.train.steps > config.checkpoint.every
    judges = config.eval.every != 0
    weights = sum(weights_bytes(m, job.feature) for m in own)
    moments = sum(optimizer_bytes(m, job.feature) for m in own)
    counters = sum(COUNTERS_BYTES * -(-m.latents // job.feature) for m in own)
    averages = weights + 8 * len(own) if config.train.ema > 0 else 0
    slow = [m for m in own if not is_fused(job, m)]
    kept_grads = sum(matrices(m, job, all_of_them=True) for m in slow)
    at_once = _at_once(job, own)
    grads = kept_grads + _largest(at_once, (2 * larger_matrix(m, job) for m in own if is_fused(job, m)))
    low = sum(low_copies(job, m) for m in own if is_fused(job, m))  # kept from step to step
    held = [held_bytes(job, m) for m in own]
    step = _largest(at_once, (temporaries(job, m) for m in own)) + 2 * sum(held) - _largest(at_once, held)
    undivided = replace(job, feature=1)
    copy = max(matrices(m, undivided) for m in own)  # one after the other
    # The first process of a group makes the weights of all latents, and has them to judge and to publish.
    whole = max(weights_bytes(m) + COUNTERS_BYTES * m.latents for m in own) if job.feature > 1 else 0
    published = copy * (2 if averages or any(m.optim.name == "schedule_free" for m in own) else 1)
    first = weights + counters  # the checkpoint of step 0
    small = not job.gpu and max(larger_matrix(m, job) for m in own) < MALLOC_KEEPS
    snapshot = weights + moments + counters + averages if saves else first if small else 0
    shards = _shards(job)
    heldout, heldout_made = _heldout(job)
    forward = _forward(job)
    judging = _judging(job, own)
    judged, shown = (max(2 * whole, whole + judging + more) for more in (0, published))
    start = whole + _starting(undivided, own)
    built = CUDA_BUILD_BYTES if job.gpu or job.cuda_build else 0
    process = BASE_BYTES[job.model is not None] + built
    base = GPU_BASE_BYTES if job.gpu else process
    slack = 0 if job.gpu else SLACK_BYTES
    drawn = 0 if job.gpu else REPORT_BYTES
    freed = snapshot + forward if small else 0
    here = 0 if job.gpu else 1  # a checkpoint's copy is in RAM
    model = job.model.weights_bytes // job.spread if job.model else 0
    state = averages + counters
    parts = {  # start, training, judging, report
        "Python, torch and libraries": (base, base, base, base + drawn),
        "language model, weights": (model, model, model, model),
        "language model, forward pass": (forward, forward, 0, 0),
        "shards": (shards, shards, shards, 0 if job.processes == 1 else shards),
        "held-out rows": (heldout_made, heldout, heldout, heldout),
        "SAEs, weights": (weights, weights, weights, weights),
        "SAEs, weights in bfloat16": (0, low, low, low if small else 0),
        "SAEs, optimizer state": (0, moments, moments, moments),
        "SAEs, statistics and averages": (state, state, state, state),
        "SAEs, gradients": (0, grads, kept_grads, kept_grads),
        "SAEs, activations of a step": (0, step, sum(held), 0),
        "SAEs, first weights": (start, 0, 0, 0),
        "checkpoint, copy": (here * first, here * snapshot, here * snapshot, 0),
        "evaluation, model included" if job.model else "evaluation": (0, 0, judged if judges else 0, shown),
        "kept by malloc": (slack, slack, slack, slack + freed),
    }
    host = process + max(snapshot, first) + REPORT_BYTES
    return {name: dict(zip(STAGES, found, strict=True)) for name, found in parts.items()}, host


def _at_once(job: Job, own: list[MemberShape]) -> int:
    """SAEs that step at a time, as `steps_side_by_side` and `at_once` decide, or more: shapes may differ."""
    fused = [m for m in own if is_fused(job, m)]
    flop = max((2 * rows_at_once(job) * m.latents * m.d_in for m in fused), default=0)
    together = min(len(fused), most_together(job.config.kernels, job.gpu, flop))
    apart = not job.gpu and job.data * job.feature == 1 and job.config.train.loss == "rows"
    apart = apart and all(m.optim.name != "adam8bit" for m in job.members)
    return max(together, min(len(own), job.cores) if apart else 1)


def _largest(count: int, of: Iterable[int]) -> int:
    """The sum of the largest."""
    return sum(sorted(of, reverse=True)[:count])


def _shard_bytes(job: Job) -> int:
    return job.shard_rows * job.row_bytes


def _shards(job: Job) -> int:
    """The one in use, those made ahead, and what making one takes: its rows before they are permuted."""
    source = job.config.source
    count = max(1, source.prefetch) + (1 if source.name == "shards" else 2)
    if source.name == "synthetic":
        rows = min(SYNTHETIC_BLOCK, source.shard_tokens)
        return count * _shard_bytes(job) + rows * source.synthetic.features * 20
    if job.config.train.loss != "rows":
        return 0  # batches of windows: the model makes the rows of each
    return count * _shard_bytes(job)


def _heldout(job: Job) -> tuple[int, int]:
    """Bytes that stay, and bytes while they are made."""
    config = job.config
    if config.source.name != "stream":
        return config.eval.tokens * job.row_bytes, config.eval.tokens * job.row_bytes
    judged = max(config.eval.tokens, config.eval.ce_tokens, config.eval.interval_ce_tokens) * job.row_bytes
    return config.eval.tokens * job.row_bytes, judged + config.eval.tokens * job.row_bytes


def micro_batch_tokens(job: Job) -> int:
    """Tokens per forward pass, as the harvester chooses them."""
    length = job.config.corpus.context_length
    most = 32_768 if job.gpu else 2_048
    return length * (job.config.model.micro_batch or max(1, most // length))


def _forward(job: Job) -> int:
    """Of a pass of the harvest: the hidden state, its normed copy and sum; three tensors of the widest."""
    if job.model is None:
        return 0
    return micro_batch_tokens(job) * job.model.itemsize * 3 * (job.model.width + job.model.widest)


def _judging(job: Job, members: list[MemberShape]) -> int:
    """Codes of a batch of held-out rows, or the logits of the model as it is and with the SAE in it."""
    rows = job.config.eval.batch_tokens
    codes = max(
        chunk_bytes(job, m.latents) + rows * 12 * (m.d_in + m.d_out) + rows * 8 * (m.slots or 64)
        for m in members
    )
    if job.model is None or max(job.config.eval.ce_tokens, job.config.eval.interval_ce_tokens) == 0:
        return codes
    model, length = job.model, job.config.corpus.context_length
    tokens = max(1, SPLICE_TOKENS // length) * length
    hidden = tokens * model.itemsize * 3 * (model.width + model.widest)
    softmax = max(model.vocabulary, SPLICE_NUMBERS["gpu" if job.gpu else "cpu"])
    logits = 2 * tokens * model.vocabulary * model.itemsize + softmax * 4 * 5
    return max(codes, hidden, logits)


def _starting(job: Job, members: list[MemberShape]) -> int:
    """Finding centre and scale of the first rows; random rows of the decoder before they are in it."""
    rows = min(INIT_ROWS, job.shard_rows)
    found = 0
    for m in members:
        # Where a target decides, the largest pre-activations of the first rows do too.
        ranked = 22 * chunk_bytes(job, m.latents) // 4 if m.slots is None else 0
        found = max(found, 16 * rows * m.d_in, 2 * larger_matrix(m, job), ranked)
    return found


def _disk(job: Job) -> dict[str, int]:
    config = job.config
    weights = sum(weights_bytes(m) for m in job.members)
    latents = sum(m.latents for m in job.members)
    average = weights if config.train.ema > 0 else 0
    moments = sum(optimizer_bytes(m) for m in job.members)
    state, keep = weights + average + moments + COUNTERS_BYTES * latents, config.checkpoint.keep
    return {
        "a checkpoint": state,
        f"checkpoints, {keep} kept and one being written": state * (keep + 1),
        "published SAEs": weights + 48 * latents,
        "shards, if harvested to disk": (config.train.tokens + config.eval.tokens) * job.row_bytes,
    }


def _seconds_per_row(job: Job, members: Iterable[MemberShape]) -> float:
    """Of one process: its share of the harvest, and the steps of its SAEs; they share the device."""
    cores = 1 if job.gpu else job.cores
    share = job.hardware.share * cores
    flops, speed = job.hardware.flops * share, job.hardware.bytes_per_s * share
    total = 0.0
    if job.model is not None:
        harvesters = min(job.processes, job.config.source.lanes)
        total += 2 * job.model.used / flops / harvesters
    batch = job.config.train.batch_tokens
    for m in members:
        dense = m.slots is None
        latents = m.latents / job.feature
        products = (12 if dense else 2) * (m.d_in + m.d_out) / 2 * latents
        moved = 30 * 4 * latents if dense else 4 * 4 * (m.slots or 0) * (m.d_in + m.d_out) / 2
        total += (products / flops + moved / speed) / job.data
        total += 20 * matrices(m, job) / 2 / speed / batch
    return total


def alternatives(job: Job) -> list[tuple[str, int]]:
    """(keys, bytes of the peak) of what makes the peak smaller by more than 2 %, the least first."""
    config, now = job.config, make(job).peak
    found: list[tuple[str, Job]] = []

    def other(key: str, **parts: Any) -> None:
        found.append((key, replace(job, config=replace(config, **parts))))

    for more in (2, 4, 8):
        text = f"mesh.feature={job.feature * more}"
        processes = max(job.processes, job.data * job.feature * more)
        text += f" with {processes} processes" if processes != job.processes else ""
        found.append((text, replace(job, feature=job.feature * more, processes=processes)))
    for less in (2, 4):
        tokens = job.shard_rows // less
        if config.source.name != "shards" and tokens >= max(config.source.lanes, 8_192):
            found.append((f"source.shard_tokens={tokens}", replace(job, shard_rows=tokens)))
    rows = config.train.batch_tokens // 2
    if rows >= 512:
        other(f"train.batch_tokens={rows}", train=replace(config.train, batch_tokens=rows))
    if config.kernels.stepper == "autograd":
        other("kernels.stepper=fused", kernels=replace(config.kernels, stepper="fused"))
    if all(is_fused(job, m) and m.optim.moments == "float32" for m in job.members):
        halved = tuple(replace(m, optim=replace(m.optim, moments="bfloat16")) for m in job.members)
        found.append(("optim.moments=bfloat16", replace(job, members=halved)))
    better = [(key, make(one).peak) for key, one in found]
    return sorted(((key, peak) for key, peak in better if peak < 0.98 * now), key=lambda pair: pair[1])
