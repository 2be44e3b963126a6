"""The parent of a process among several: it says what became of it, as one whose peer died cannot.

When a process of a run dies, jax ends the others from inside compiled code: at once where they wait
for it in a collective, otherwise after `DELTAL_HEARTBEAT` seconds. So the command is a small
parent, without jax, whose child is the real one. It hands signals on, lets all output through, and
when the child ends otherwise than by its own will says in one line how, and what to resume from.
"""

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from deltal_jax.guard.signals import SIGNALS, stopped_code

#: Numbers of processes, or of slices of them, as users and launchers set them.
LAUNCHED = (
    "JAX_NUM_PROCESSES",
    "SLURM_STEP_NUM_TASKS",
    "OMPI_COMM_WORLD_SIZE",
    "MEGASCALE_NUM_SLICES",
)
#: The hosts of a TPU slice, with commas between them, as GKE sets them.
LISTED = ("TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES")
#: Set to 1 where no variable says that there are others: TPU VMs have to ask for that.
ASKED = "DELTAL_SUPERVISE"
#: In a child: the pipe on which it tells what its parent has to know, and its parent's id.
CHILD = "DELTAL_SUPERVISED"
#: What makes a step exist: see `checkpoints.manifest`.
MANIFEST = "manifest.json"
#: How a command ends by its own will: done, bad input, or by a signal with nothing to save; and
#: with `stopped_code()`.
OWN_WILL = (0, 2, *(128 + number for number in SIGNALS))
#: Bytes of what a child tells at once, which arrive as a whole.
MOST = 4096
_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG


def wanted() -> bool:
    """Whether this process is one of several of a run, and nobody's child yet."""
    counts = (os.environ.get(name, "") for name in LAUNCHED)
    several = any(n.isdecimal() and int(n) > 1 for n in counts)
    several = several or any("," in os.environ.get(name, "") for name in LISTED)
    return CHILD not in os.environ and (several or os.environ.get(ASKED) == "1")


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
    told = _read(read)
    if code in (*OWN_WILL, stopped_code()):
        return code
    print(f"deltal: {_ended(code, told)}; {_newest(told)}", file=sys.stderr, flush=True)
    return 1


def _read(descriptor: int) -> dict[str, Any]:
    """All that the child told, later facts in the place of earlier ones. It has ended, so nothing
    is waited for: a process that it has left behind may hold the pipe."""
    os.set_blocking(descriptor, False)
    text, told = b"", {}
    with contextlib.suppress(BlockingIOError):
        while part := os.read(descriptor, 65_536):
            text += part
    os.close(descriptor)
    for line in text.splitlines():
        told |= json.loads(line)
    return told


def _hand_on(child: "subprocess.Popen[Any]", number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        child.send_signal(number)


def _ended(code: int, told: dict[str, Any]) -> str:
    which = os.environ.get("JAX_PROCESS_ID") or os.environ.get("SLURM_PROCID")
    which = told.get("process", which)
    who = "this process" if which is None else f"process {which}"
    if "lost" in told:
        return f"{who} lost another one and ended: {told['lost']}"
    if code >= 0:
        return f"{who} failed with exit code {code}"
    name = signal.Signals(-code).name
    why = ", as jax ends a process whose peer was lost" if -code == signal.SIGABRT else ""
    return f"{who} was ended by {name}{why}"


def _newest(told: dict[str, Any]) -> str:
    """What to resume from: the newest checkpoint that is complete."""
    folder, resume = told.get("folder", ""), told.get("resume", "")
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


def tell(**facts: Any) -> bool:
    """In a child: which `process` it is, the `folder` of its checkpoints and how to `resume`, or
    that it `lost` another one. Whether a parent hears it."""
    if CHILD not in os.environ:
        return False
    descriptor = int(os.environ[CHILD].partition(":")[0])
    line = f"{json.dumps(facts)}\n".encode()
    with contextlib.suppress(OSError):
        return len(line) <= MOST and os.write(descriptor, line) == len(line)
    return False


def follow_parent() -> None:
    """In a child: a parent that is killed takes it along, by a signal that saves."""
    if CHILD not in os.environ:
        return
    with contextlib.suppress(OSError):  # its own children need not tell anything
        os.set_inheritable(int(os.environ[CHILD].partition(":")[0]), False)
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_DEATH_SIGNAL, signal.SIGTERM)
    if os.getppid() != int(os.environ[CHILD].partition(":")[2]):
        os.kill(os.getpid(), signal.SIGTERM)
