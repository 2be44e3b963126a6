"""Keeps Orbax and what it calls from printing tracebacks of errors that are said in one line."""

import functools
import logging
import os
import re
import sys
import traceback
import warnings

#: What Python says where TensorStore calls back a loop that Orbax has closed after an error, and of
#: what Orbax has not begun by then.
LATE = ("Event loop is closed", "coroutine 'async_serialize.*' was never awaited")


@functools.cache
def quieten() -> None:
    """For the rest of the process."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_not_orbax)
    warnings.filterwarnings("ignore", LATE[1], RuntimeWarning)
    hook = sys.unraisablehook
    late = re.compile("|".join(LATE))
    sys.unraisablehook = lambda x: None if late.match(str(x.exc_value)) else hook(x)


def _not_orbax(record: logging.LogRecord) -> bool:
    frames = traceback.walk_tb(record.exc_info[2] if record.exc_info else None)
    files = [record.pathname, *(frame.f_code.co_filename for frame, _ in frames)]
    if any(f"{os.sep}orbax{os.sep}" in file for file in files):
        return False
    return "OCDBT" not in record.getMessage()  # of a write that nobody waits for any more
