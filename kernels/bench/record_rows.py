"""Rows for `gpu.py --rows`: residual activations out of a harvest, as one safetensors file.

    sae-train harvest experiment=demo train.tokens=32_768 out=shards
    python kernels/bench/record_rows.py shards rows.safetensors

Any harvest will do; its width decides which shape the rows are used at (768: A, 2304: B and S, 4096: C
and D, 576, the demo's model: R). Four batches of a shape, 32,768 rows, are all that is ever used: 38 MB at
width 576. Every shard is checked as it is read. Rows are stored in bfloat16, in which the benchmark uses
them anyway.
"""

import argparse
import sys
from pathlib import Path

import torch

from sae_train.errors import InputError
from sae_train.files import write_tensors
from sae_train.shards.disk import DiskShards

MAX_ROWS = 32_768


def record(harvest: Path, out: Path, hook: str | None = None, rows: int = MAX_ROWS) -> tuple[int, int]:
    """Write the first rows of a harvest, whose order is random already; returns their shape.

    Raises:
        InputError: no finished harvest, a damaged shard, or a hook that is not in it."""
    shards = DiskShards(harvest, [hook] if hook is not None else None)
    name = shards.hooks[0]
    parts: list[torch.Tensor] = []
    while sum(map(len, parts)) < rows and (shard := shards.next_shard()) is not None:
        parts.append(shard.rows[name].bfloat16())
    recorded = torch.cat(parts)[:rows].contiguous()
    write_tensors(out, {"rows": recorded})
    return recorded.shape[0], recorded.shape[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("harvest", type=Path, help="folder written by sae-train harvest")
    parser.add_argument("out", type=Path)
    parser.add_argument("--hook", help="which hook of the harvest; default its first")
    parser.add_argument("--rows", type=int, default=MAX_ROWS, help=f"at most; default {MAX_ROWS}")
    a = parser.parse_args()
    if a.rows < 2:
        parser.error(f"--rows {a.rows}: expected at least 2")
    try:
        n, d = record(a.harvest, a.out, a.hook, a.rows)
    except InputError as error:
        print(f"record_rows.py: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{a.out}: {n} rows of width {d}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
