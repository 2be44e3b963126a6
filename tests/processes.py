"""Several processes on this machine under jax.distributed: the real path of a pod, over Gloo.

    results = run_processes("tests.test_devices:losses", count=2, devices_each=2, seed=3)

starts `count` Python processes with `devices_each` virtual CPU devices each, joins them, calls
`losses(seed=3)` in each, and returns what each returned, by process: a dict from names to arrays
or numbers. The target must be importable without pytest.
"""

import contextlib
import importlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

ROOT = Path(__file__).parent.parent
#: Flags with which tiny programs compile fast: LLVM need not optimise what runs once.
QUICK = (
    "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
    " --xla_cpu_parallel_codegen_split_count=1"
)
#: Seconds after which a process is missed that died outside of a collective.
HEARTBEAT = 10


def run_processes(
    target: str,
    count: int = 2,
    devices_each: int = 1,
    timeout: float = 120.0,
    join_by: Literal["arguments", "environment"] = "arguments",
    **arguments: Any,
) -> list[dict[str, np.ndarray]]:
    """The result of `target(**arguments)` ("module:function") in each of `count` processes.

    `join_by` says how `start_distributed` learns of the others. `arguments` travel as JSON,
    results as npz. Raises AssertionError with the stderr of the first process that fails, or of
    those that are not done after `timeout` seconds; no process outlives the call.
    """
    with tempfile.TemporaryDirectory() as name, reserved_port() as port:
        folder = Path(name)
        job = {
            "target": target,
            "arguments": arguments,
            "coordinator": f"localhost:{port}",
            "processes": count,
            "join_by": join_by,
        }
        (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
        children = [_start(folder, i, devices_each) for i in range(count)]
        try:
            failed, how = _wait(folder, children, timeout)
        finally:
            for child in children:
                child.kill()
                child.communicate()
        if failed:
            errors = [(folder / f"{i}.stderr").read_text(errors="replace") for i in failed]
            shown = "\n".join(
                f"process {i} of {target} {how}:\n{error[-4000:]}"
                for i, error in zip(failed, errors, strict=True)
            )
            raise AssertionError(shown)
        return [_load(folder / f"{i}.npz") for i in range(count)]


@contextlib.contextmanager
def reserved_port() -> Iterator[int]:
    """A port for process 0 to listen on, which nobody else is given."""
    with socket.socket() as bound:
        # Never listening: the coordinator, whose sockets set the same option, may still bind it.
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        bound.bind(("localhost", 0))
        yield bound.getsockname()[1]


def among(port: int, count: int, number: int) -> dict[str, str]:
    """The environment of a process among several, as users set it."""
    return {
        "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
        "JAX_NUM_PROCESSES": str(count),
        "JAX_PROCESS_ID": str(number),
        "DELTAL_HEARTBEAT": str(HEARTBEAT),
    }


def _load(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as file:
        return dict(file)


def _start(folder: Path, process_id: int, devices: int) -> subprocess.Popen:
    # This process's flags, which conftest.py sets, but for the number of devices: the last wins.
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')}"
        " --xla_cpu_collective_call_terminate_timeout_seconds=600"
        f" --xla_force_host_platform_device_count={devices}",
        "JAX_NUMPY_RANK_PROMOTION": "raise",
    }
    with (folder / f"{process_id}.stderr").open("wb") as stderr:
        return subprocess.Popen(
            [sys.executable, "-m", "tests.processes", str(folder), str(process_id)],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=stderr,
            stderr=stderr,
        )


def _wait(folder: Path, children: list[subprocess.Popen], timeout: float) -> tuple[list[int], str]:
    """The processes to blame, those that failed first or were too slow, and which it was.

    Done is who has left a result, not who has exited: processes that stay until all are done can't
    take each other down as they leave.
    """
    deadline = time.monotonic() + timeout
    while True:
        codes = [child.poll() for child in children]
        failed = [i for i, code in enumerate(codes) if code is not None]
        running = [i for i in range(len(codes)) if not (folder / f"{i}.npz").exists()]
        if failed or not running:
            return failed, f"failed with status {[codes[i] for i in failed]}"
        if time.monotonic() > deadline:
            return running, f"was still running after {timeout} s"
        time.sleep(0.02)


def _die_with_parent() -> None:
    """Exit when the pipe from the parent closes, however the parent ended."""
    os.read(0, 1)
    os._exit(1)


def _main(folder: Path, process_id: int) -> None:
    from deltal_jax.backend import enable_compile_cache
    from deltal_jax.parallel.mesh import start_distributed

    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    enable_compile_cache()
    if job["join_by"] == "arguments":
        start_distributed(job["coordinator"], job["processes"], process_id)
    else:
        os.environ["JAX_COORDINATOR_ADDRESS"] = job["coordinator"]
        os.environ["JAX_NUM_PROCESSES"] = str(job["processes"])
        os.environ["JAX_PROCESS_ID"] = str(process_id)
        start_distributed()
    module, function = job["target"].split(":")
    result = getattr(importlib.import_module(module), function)(**job["arguments"])
    arrays = {name: np.asarray(value) for name, value in result.items()}
    np.savez(folder / f"{process_id}.part.npz", **arrays)
    (folder / f"{process_id}.part.npz").rename(folder / f"{process_id}.npz")


if __name__ == "__main__":
    watch = threading.Thread(target=_die_with_parent)
    watch.start()
    try:
        _main(Path(sys.argv[1]), int(sys.argv[2]))
    except BaseException:
        # An ordinary exit would first wait for the other processes, which wait for this one.
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    watch.join()
