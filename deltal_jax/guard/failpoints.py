"""Places where a test may end the process as a lost machine would: nothing is cleaned up.

    DELTAL_FAIL=save.commit:2 deltal train …     ends the second time that the run comes there

Without the variable a fail-point does nothing.
"""

import os
import signal

#: The fail-points, and what is half done there.
POINTS = {
    "rollout": "a batch is sampled and not trained on",
    "update": "some updates of a step are done, others not",
    "metrics.append": "half a line of metrics is written",
    "save.arrays": "arrays of a checkpoint are being written",
    "save.commit": "all files of a checkpoint are there, its manifest is not",
    "save.manifest": "the manifest is written under another name",
    "delete.begin": "a checkpoint that goes has lost its manifest",
    "delete.files": "a checkpoint that goes has lost some of its files",
}
VARIABLE = "DELTAL_FAIL"

_seen = dict.fromkeys(POINTS, 0)


def fails(name: str) -> bool:
    """Whether the process is meant to end at this visit to a fail-point: for callers that have to
    leave something half done before they call `die`."""
    _seen[name] += 1
    wanted, _, visit = os.environ.get(VARIABLE, "").partition(":")
    return wanted == name and int(visit or 1) == _seen[name]


def die() -> None:
    """End this process at once."""
    os.kill(os.getpid(), signal.SIGKILL)


def fail_point(name: str) -> None:
    """End this process here if the environment says so."""
    if fails(name):
        die()
