"""What a step of one SAE takes beside its state: arithmetic and measured multiples, for `plan`."""

from sae_train.plan_job import MIB, Job, MemberShape, Parameter

CHUNK_ELEMENTS = {"cpu": 4 << 20, "gpu": 64 << 20}
"""Pre-activations that an encoder holds at a time (kernels/sae_kernels/cpu.py, chunked.py)."""
CHUNK_ROWS = 256
GROUP_MAX_ELEMENTS = 16 << 20
BLOCKS_BYTES = 100 * MIB
"""Temporaries of an optimizer step in blocks (bfloat16 moments, active rows): measured, at any width."""
LONGEST_ROW = 8
"""Latents of the row that has most, over k, where a batch's are chosen together: codes are as wide as it is.
An assumption; random weights on synthetic rows had 15."""


def is_fused(job: Job, member: MemberShape) -> bool:
    """Whether steps of this member are fused, as `choose_stepper` decides."""
    train = job.config.train
    alone = job.data * job.feature == 1 and train.accumulate == 1 and train.loss == "rows"
    asked = job.config.kernels.stepper != "autograd"
    return alone and asked and member.one_form and member.optim.name == "adam"


def share(parameter: Parameter, feature: int) -> int:
    return -(-parameter.numel // feature) if parameter.of_latents else parameter.numel


def larger_matrix(member: MemberShape, job: Job) -> int:
    """Bytes of the larger weight matrix, as it is here, in float32."""
    return 4 * max(share(p, job.feature) for p in member.parameters)


def matrices(member: MemberShape, job: Job, all_of_them: bool = False) -> int:
    return sum(4 * share(p, job.feature) for p in member.parameters if p.matrix or all_of_them)


def rows_at_once(job: Job) -> int:
    """Rows that a process puts through an SAE at once."""
    train = job.config.train
    return -(-train.batch_tokens // (train.accumulate * job.data))


def chunk_bytes(job: Job, latents: int) -> int:
    """Bytes of pre-activations that an encoder holds at once."""
    least = 0 if job.gpu else CHUNK_ROWS * latents
    return 4 * max(least, min(CHUNK_ELEMENTS["gpu" if job.gpu else "cpu"], rows_at_once(job) * latents))


def low_copies(job: Job, member: MemberShape) -> int:
    """Bytes of the weight matrices in bfloat16, where products are; fused steps on a CPU do without."""
    return 0 if not job.low or (is_fused(job, member) and not job.gpu) else matrices(member, job) // 2


def slots_of(member: MemberShape, latents: int) -> int | None:
    """Latents that codes have room for in each row; None where they are dense."""
    if member.slots is None or member.activation != "batch_topk":
        return member.slots
    return min(latents, LONGEST_ROW * member.slots)


def held_bytes(job: Job, member: MemberShape) -> int:
    """What stays of a step until the next one of the same SAE has been made: codes and reconstruction."""
    rows, latents = rows_at_once(job), -(-member.latents // job.feature)
    slots = slots_of(member, latents)
    codes = 8 * slots if slots is not None else 4 * latents * (2 if member.pre else 1)
    return rows * (codes + 4 * member.d_out)


def temporaries(job: Job, member: MemberShape) -> int:
    """Temporaries of one step, gradients left out: measured as multiples of what they are made of."""
    rows, latents = rows_at_once(job), -(-member.latents // job.feature)
    matrix, width = larger_matrix(member, job), member.d_in + member.d_out
    # A CPU's encoder has float32 weights in bfloat16 too, if it multiplies that; bfloat16 ones in float32.
    wide = 0 if job.gpu else matrix if job.low and not is_fused(job, member) else matrix // 2
    if is_fused(job, member):
        plain = member.optim.beyond_adam() in (None, "clip_norm")
        return wide + chunk_bytes(job, latents) + rows * 8 * width + (0 if plain else BLOCKS_BYTES)
    # The decoder's gradient is projected with a temporary of its size; some optimizers have more of them.
    beside = matrix * {"muon": 2.5, "schedule_free": 2.0, "adam8bit": 4.0}.get(member.optim.name, 1.0)
    nested = member.parts * rows * 4 * member.d_out + (matrix if member.parts > 1 else 0)
    total = low_copies(job, member) + wide + int(beside) + nested + rows * 20 * width
    slots = slots_of(member, latents)
    if slots is None:
        return total + int(rows * latents * 4 * (6.25 if not member.pre else 7.25))
    total += rows * slots * 40
    if member.activation == "group_max":
        return total + 4 * min(GROUP_MAX_ELEMENTS, rows * latents)
    chunk = chunk_bytes(job, latents)
    return total + chunk + (chunk * 9 // 2 if member.activation == "batch_topk" else 0)
