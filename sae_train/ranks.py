"""What the processes of one run agree on. A process that runs alone always agrees with itself."""

import torch
import torch.distributed as dist


def any_rank(flag: bool) -> bool:
    """Whether any process of the default group says yes; all of them must ask. No group: the flag itself.

    A collective on a CPU tensor: the group needs gloo for CPU ("cpu:gloo,cuda:nccl"), so that asking at every
    step never waits for a GPU.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return flag
    said = torch.tensor(int(flag))
    dist.all_reduce(said, op=dist.ReduceOp.MAX)
    return bool(said)
