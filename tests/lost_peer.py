"""A process among several, of which one is killed: what `tests/test_processes.py` starts.

    python -m tests.lost_peer FOLDER WHERE LOST

The process LOST kills itself while the others are inside a collective, or outside of any.
"""

import os
import signal
import sys
import time

from deltal_jax.guard import supervise


def main(folder: str, where: str, lost: int) -> None:
    if supervise.wanted():  # before jax is imported, as `deltal train` does it
        command = [sys.executable, "-m", "tests.lost_peer", *sys.argv[1:]]
        sys.exit(supervise.supervise(command))
    supervise.follow_parent()

    import jax
    import numpy as np

    from deltal_jax.parallel.mesh import start_distributed
    from deltal_jax.parallel.processes import PeerError, check_alike, ending_together, gather

    start_distributed()
    index = jax.process_index()
    supervise.tell(process=index, folder=folder, resume="deltal train run.dir=x --resume")
    with ending_together():
        check_alike("the first numbers", np.arange(3.0), np.zeros(2))
        try:
            check_alike("the others", np.arange(3.0), np.asarray(index // 2))
        except PeerError as error:
            print(error, flush=True)
        gather(index)
        if index == lost:
            os.kill(os.getpid(), signal.SIGKILL)
        if where == "outside":
            time.sleep(600)
        gather(index)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
