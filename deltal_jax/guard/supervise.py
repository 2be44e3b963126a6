"""The parent of a process among several: it says what became of it, as one whose peer died cannot.

When a process of a run dies, jax ends the others from inside compiled code: at once where they wait
for it in a collective, otherwise after `DELTAL_HEARTBEAT` seconds. So the command is a small
parent, without jax, whose child is the real one. It hands signals on, lets all output through, and
when the child ends otherwise than by its own will says in one line how, and what to resume from.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from deltal_jax.guard.signals import SIGNALS

#: Numbers of processes, as users and launchers set them.
LAUNCHED = ("JAX_NUM_PROCESSES", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
#: In a child: the pipe on which it tells where the run's folder is, and its parent's id.
CHILD = "DELTAL_SUPERVISED"
#: What makes a step exist: see `checkpoints.manifest`.
MANIFEST = "manifest.json"
#: How a command ends by its own will: done, bad input, or by a signal with nothing to save.
OWN_WILL = (0, 2, *(128 + number for number in SIGNALS))
_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG


def wanted() -> bool:
    """Whether this process is one of several of a run, and nobody's child yet."""
    counts = (os.environ.get(name, "") for name in LAUNCHED)
    return CHILD not in os.environ and any(n.isdecimal() and int(n) > 1 for n in counts)


def supervise(command: list[str]) -> int:
    """Run the command as a child, in the place of this process; the exit code."""
    read, write = os.pipe()
    environment = os.environ | {CHILD: f"{write}:{os.getpid()}"}
    # In a group of its own, so that Ctrl-C comes to it once.
    child = subprocess.Popen(command, env=environment, pass_fds=[write], process_group=0)
    os.close(write)
    previous = {n: signal.signal(n, lambda n, _: _hand_on(child, n)) for n in SIGNALS}
    try:
        code = child.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    with os.fdopen(read, encoding="utf-8") as told:
        lines = told.read().splitlines()
    if code in OWN_WILL:
        return code
    folder, resume = lines if len(lines) == 2 else ("", "")
    print(f"deltal: {_ended(code)}; {_newest(folder, resume)}", file=sys.stderr, flush=True)
    return 1


def _hand_on(child: "subprocess.Popen[Any]", number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        child.send_signal(number)


def _ended(code: int) -> str:
    which = os.environ.get("JAX_PROCESS_ID") or os.environ.get("SLURM_PROCID")
    who = f"process {which}" if which else "this process"
    if code >= 0:
        return f"{who} failed with exit code {code}"
    name = signal.Signals(-code).name
    why = ", as jax ends a process whose peer was lost" if -code == signal.SIGABRT else ""
    return f"{who} was ended by {name}{why}"


def _newest(folder: str, resume: str) -> str:
    """What to resume from: the newest checkpoint that is complete."""
    if not folder:
        return "it had no run folder yet; start it again"
    if "://" in folder:
        return f"go on from the newest complete checkpoint in {folder} with: {resume}"
    steps = [
        int(path.parent.name)
        for path in Path(folder).glob(f"*/{MANIFEST}")
        if path.parent.name.isdecimal()
    ]
    if not steps:
        return f"no checkpoint yet in {folder}; start again with: {resume}"
    return f"newest complete checkpoint: {max(steps)}; go on with: {resume}"


def tell(folder: str, resume: str) -> None:
    """In a child: where its checkpoints are, and how to go on."""
    if CHILD not in os.environ:
        return
    descriptor = int(os.environ[CHILD].partition(":")[0])
    with contextlib.suppress(OSError):
        os.write(descriptor, f"{folder}\n{resume}\n".encode())
        os.close(descriptor)


def follow_parent() -> None:
    """In a child: a parent that is killed takes it along, by a signal that saves."""
    if CHILD not in os.environ or sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_DEATH_SIGNAL, signal.SIGTERM)
    if os.getppid() != int(os.environ[CHILD].partition(":")[2]):
        os.kill(os.getpid(), signal.SIGTERM)
