"""The batch script of a job: what a reader of the cluster's queue sees, and what brings a run through it.

Every process of a run is a task of `srun`, told its rank by Slurm and the first node's name as the meeting
place, so torchrun is not needed: it would be a second process to signal on every node, kills what does not
save within 30 s, and turns the exit code by which a script knows that a run wants to go on (75) into 1.

What ends a job early, and who does something about it:

    the time limit nears     --signal sends USR1 to the tasks          they save and leave with 75
    preemption               Slurm sends TERM to the tasks             the same
    scancel --signal=USR1    to the tasks, with --batch to the script  the script passes it on; the same
    75 by itself             a full disk, another process lost         the same
    (while it starts         one of these signals                      nothing was lost; the same)
    a node fails             nobody can do anything there              Slurm puts the job back by itself
    scancel                  TERM, and the job is no longer "running"  saved, and not put back

After 75 the script puts its job back into the queue, under the same id and with the same log. When it starts
again it is the same command, which continues its run.
"""

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from signal import SIGTERM, SIGUSR1, SIGUSR2

from sae_train.errors import InputError
from sae_train.launch.base import IN_A_JOB, STOPPED, Job
from sae_train.launch.config import LaunchConfig
from sae_train.launch.local import PROGRAM

PORTS = (20000, 12000)
"""The first port and how many: below those that Linux gives to connections that do not care (32768 on)."""

BODY = r"""
# Signals that reach this shell go on to the processes, each once.
asked=0
passed=0
step=
own=$(cat /proc/$$/comm)
pass_on() {
    if [ -z "$step" ] || [ "$passed" = "$asked" ]; then return; fi
    passed=$asked
    # Between fork and exec srun is a copy of this shell, which would swallow it.
    while [ "$(cat "/proc/$step/comm" 2>/dev/null)" = "$own" ]; do sleep 0.05; done
    kill -USR1 "$step"
}
trap 'asked=$((asked + 1)); pass_on' TERM USR1 USR2

note() { echo "$1 $(date -u +%Y-%m-%dT%H:%M:%SZ) $2" >> "$legs"; }
unready() { echo "launch.setup failed: $1"; note ended 2; exit 2; }
note started "$(hostname) $$"

# The processes of the run meet on the first node.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((@FIRST@ + SLURM_JOB_ID % @PORTS@))
export MASTER_ADDR MASTER_PORT @MARK@="$SLURM_JOB_NAME"
@SETUP@
srun @OPTIONS@ sh -c \
    'export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS; exec "$@"' sh \
    "${command[@]}" &
step=$!
pass_on
while :; do
    before=$asked
    wait "$step"
    code=$?
    if [ "$code" -le 128 ] || [ "$before" = "$asked" ]; then break; fi # else a signal ended the wait alone
done
step=
case $code in
    @SIGNALS@) code=@STOPPED@ ;; # asked to stop while it started, or was about to end: no handler then
    0) if [ "$asked" -gt 0 ]; then code=@STOPPED@; fi ;; # an srun that is told to end may not wait for tasks
esac
note ended "$code"

# Back into the queue: the same command continues. Not if somebody is ending this job on purpose.
if [ "$code" = @STOPPED@ ] && [ "${SLURM_RESTART_COUNT:-0}" -lt @REQUEUE@ ]; then
    state=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)
    if [ "$state" = RUNNING ]; then
        scontrol requeue "$SLURM_JOB_ID"
    else
        echo "not put back into the queue: the job is $state"
    fi
fi
exit "$code"
"""


def batch_script(
    config: LaunchConfig, jobs: Sequence[Job], logs: Path, cwd: Path, after: Sequence[str] = ()
) -> str:
    """The script that runs these jobs, as one array where there are several.

    Args:
        logs: folder of logs and legs; it has to be there when the job starts, and everywhere the same one.
        cwd: where the commands run.
        after: ids of jobs that have to be done first.

    Raises:
        InputError: a folder or an argument cannot be written into a script.
    """
    for text in (arg for job in jobs for arg in job.args):
        if "\0" in text:
            raise InputError("job", text, "arguments without null characters")
    several = len(jobs) > 1
    name = "slurm-%A_%a" if several else "slurm-%j"
    own = "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID" if several else "$SLURM_JOB_ID"
    lines = ["#!/bin/bash", "# Written by sae-train: see docs/slurm.md."]
    lines += [f"#SBATCH {option}" for option in _options(config, jobs, cwd, after)]
    lines += [f"#SBATCH --output={_quoted(f'{_pattern(logs)}/{name}.log')}", ""]
    lines += [f'legs={shlex.quote(str(logs))}/"slurm-{own}.legs"', ""]
    program = ("sae-train",) if config.container_image is not None else PROGRAM
    commands = [f"command=({shlex.join([*program, *job.args])})" for job in jobs]
    if several:
        lines.append('case "$SLURM_ARRAY_TASK_ID" in')
        lines += [f"{i}) # {job.name}\n    {commands[i]} ;;" for i, job in enumerate(jobs)]
        lines.append("esac")
    else:
        lines += commands
    put = {
        "FIRST": PORTS[0],
        "PORTS": PORTS[1],
        "SETUP": "".join(f"\n{{ {line}\n}} || unready {shlex.quote(line)}" for line in config.setup),
        "OPTIONS": shlex.join(_step_options(config, cwd)),
        "STOPPED": STOPPED,
        "SIGNALS": " | ".join(str(128 + number) for number in (SIGUSR1, SIGUSR2, SIGTERM)),
        "MARK": IN_A_JOB,
        "REQUEUE": config.requeue,
    }
    return "\n".join(lines) + "\n" + re.sub(r"@([A-Z]+)@", lambda found: str(put[found[1]]), BODY)


def _options(config: LaunchConfig, jobs: Sequence[Job], cwd: Path, after: Sequence[str]) -> list[str]:
    """What is asked of the cluster, as it stands after #SBATCH."""
    most = f"%{config.parallel}" if config.parallel else ""
    told: dict[str, object] = {
        "job-name": jobs[0].name if len(jobs) == 1 else f"{jobs[0].name}...",
        "array": f"0-{len(jobs) - 1}{most}" if len(jobs) > 1 else None,
        "dependency": "afterok:" + ":".join(after) if after else None,
        "kill-on-invalid-dep": "yes" if after else None,
        "partition": config.partition,
        "account": config.account,
        "qos": config.qos,
        "nodes": config.nodes,
        "ntasks-per-node": config.tasks_per_node,
        "gpus-per-node": config.gpus_per_node or None,
        "cpus-per-task": config.cpus_per_task,
        "mem": f"{config.mem_gb}G" if config.mem_gb else None,
        "time": config.time,
        "signal": f"USR1@{config.signal_s}" if config.signal_s else None,
        "requeue" if config.requeue else "no-requeue": True,
        "open-mode": "append",
        "chdir": cwd,
        **config.options,
    }
    lines = []
    for name, value in told.items():
        if value is True:
            lines.append(f"--{name}")
        elif value is not None and value is not False:
            lines.append(f"--{name}={_quoted(str(value))}")
    return lines


def _step_options(config: LaunchConfig, cwd: Path) -> list[str]:
    """What srun is told and does not know from the job."""
    told = ["--kill-on-bad-exit=0"]  # those that are left save, when they find that one is gone
    if config.cpus_per_task is not None:
        told.append(f"--cpus-per-task={config.cpus_per_task}")  # since 22.05 it does not take the job's
    if config.container_image is not None:
        mounts = [f"{cwd}:{cwd}", *config.container_mounts]
        told += [f"--container-image={config.container_image}", f"--container-workdir={cwd}"]
        told.append(f"--container-mounts={','.join(mounts)}")
    return told


def _pattern(path: Path) -> str:
    """A path in which sbatch finds nothing to fill in."""
    if "\\" in str(path):
        raise InputError("run.dir", str(path), "a folder without backslashes in its path, for Slurm")
    return str(path).replace("%", "%%")


def _quoted(text: str) -> str:
    """A value after #SBATCH, as sbatch takes quotes off: in double ones, with backslashes inside."""
    if "\n" in text:
        raise InputError("launch", text, "text on one line")
    if re.fullmatch(r"[\w./:=,@%+-]*", text, re.ASCII):
        return text
    return '"' + re.sub(r'(["\\])', r"\\\1", text) + '"'
