"""The mesh, and the start of several processes."""

import os
import re
import subprocess
import sys
import time
import types

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils
from jax.sharding import AxisType

from deltal_jax.errors import UserError
from deltal_jax.parallel.mesh import AXES, LAUNCHED, make_mesh, start_distributed
from tests.processes import reserved_port, run_processes


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ({}, (8, 1, 1, 1)),
        ({"fsdp": 2}, (4, 2, 1, 1)),
        ({"data": 1, "fsdp": -1}, (1, 8, 1, 1)),
        ({"data": 2, "fsdp": 2, "tensor": -1}, (2, 2, 1, 2)),
        ({"data": 2, "fsdp": 1, "tensor": 4}, (2, 1, 1, 4)),
        ({"data": 1, "tensor": 2, "context": -1}, (1, 1, 4, 2)),
    ],
)
def test_one_size_may_be_the_rest_of_the_devices(sizes, shape):
    mesh = make_mesh(**sizes)
    assert dict(mesh.shape) == dict(zip(AXES, shape, strict=True))
    assert mesh.axis_types == (AxisType.Auto,) * 4
    assert sorted(device.id for device in mesh.devices.flat) == list(range(8))


def test_a_mesh_takes_the_devices_that_it_is_given():
    mesh = make_mesh(fsdp=3, devices=jax.devices()[2:8])
    assert mesh.devices.shape == (2, 3, 1, 1)
    assert {device.id for device in mesh.devices.flat} == {2, 3, 4, 5, 6, 7}


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"fsdp": 3}, r"data=-1, fsdp=3, context=1, tensor=1 does not multiply to the 8 devices"),
        ({"fsdp": 16}, r"data=-1, fsdp=16, context=1, tensor=1 does not multiply to the 8 devices"),
        (
            {"data": 2, "fsdp": 2},
            r"data=2, fsdp=2, context=1, tensor=1 does not multiply to the 8 devices",
        ),
        (
            {"tensor": -1},
            r"at most one is -1 \(the rest\), got data=-1, fsdp=1, context=1, tensor=-1",
        ),
        ({"fsdp": 0}, r"sizes are 1 or more .* got data=-1, fsdp=0, context=1, tensor=1"),
        (
            {"data": -2, "fsdp": -4},
            r"sizes are 1 or more .* got data=-2, fsdp=-4, context=1, tensor=1",
        ),
    ],
)
def test_sizes_that_do_not_multiply_to_the_devices_are_refused_in_one_line(sizes, message):
    with pytest.raises(ValueError, match=f"^mesh: .*{message}") as error:
        make_mesh(**sizes)
    assert "\n" not in str(error.value)


@pytest.fixture
def nothing_set(monkeypatch):
    variables = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", *LAUNCHED)
    for name in variables:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.usefixtures("nothing_set")
def test_a_single_process_with_nothing_set_stays_alone():
    jax.devices()
    start_distributed()
    start_distributed()
    assert not jax.distributed.is_initialized() and jax.process_count() == 1


def test_several_processes_that_start_too_late_are_refused(nothing_set):
    jax.devices()
    with pytest.raises(RuntimeError, match="must be called before"):
        start_distributed("localhost:1", 2, 0)
    nothing_set.setenv("SLURM_STEP_NUM_TASKS", "2")
    with pytest.raises(RuntimeError, match="must be called before"):
        start_distributed()


@pytest.mark.usefixtures("nothing_set")
def test_a_fresh_process_with_nothing_set_stays_alone():
    program = (
        "import jax; from deltal_jax.parallel.mesh import start_distributed as start; start();"
        "print(jax.distributed.is_initialized(), jax.process_count()); start()"
    )
    printed = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    assert printed.stdout.split() == ["False", "1"]


#: Prints the GPUs that jax would use, of a process that SLURM or Open MPI would have started.
VISIBLE = """
import jax
from deltal_jax.parallel.mesh import start_distributed
start_distributed()
print(jax.process_count(), jax.config.read("jax_cuda_visible_devices"))
"""
SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "localhost",
    "SLURM_NTASKS": "1",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_TASKS_PER_NODE": "1(x1)",
}


@pytest.mark.parametrize(
    ("environment", "gpus"),
    [
        ({}, "all"),  # jax alone would take the first
        ({"SLURM_STEP_TASKS_PER_NODE": "8(x2)"}, "0"),
        ({"JAX_LOCAL_DEVICE_IDS": "0,2"}, "0,2"),
    ],
)
def test_the_only_task_of_a_node_uses_all_of_its_gpus(environment, gpus):
    with reserved_port() as port:
        variables = SLURM | {"JAX_COORDINATOR_PORT": str(port)} | environment
        printed = subprocess.run(
            [sys.executable, "-c", VISIBLE],
            env=os.environ | variables,
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
    assert printed.stdout.split() == ["1", gpus]


def test_under_pathways_the_only_process_looks_for_a_proxy_and_not_for_others(nothing_set):
    """It has all devices; what Kubernetes would say of its pod is not asked."""
    nothing_set.setenv("JAX_COORDINATOR_ADDRESS", "nobody:1")
    nothing_set.setenv("JAX_PLATFORMS", "proxy,cpu")
    nothing_set.setitem(sys.modules, "pathwaysutils", None)  # not installed
    with pytest.raises(UserError, match=r"^JAX_PLATFORMS: proxy .* pip install pathwaysutils$"):
        start_distributed()
    called = []
    package = types.SimpleNamespace(initialize=lambda: called.append(True))
    nothing_set.setitem(sys.modules, "pathwaysutils", package)
    start_distributed()
    assert called == [True] and not jax.distributed.is_initialized()


def who() -> dict[str, np.ndarray]:
    start_distributed()  # a second call
    index = np.asarray([jax.process_index()])
    return {
        "index": index[0],
        "counts": [jax.process_count(), jax.device_count(), jax.local_device_count()],
        "all": multihost_utils.process_allgather(index + 10).ravel(),
    }


@pytest.mark.parametrize("join_by", ["arguments", "environment"])
def test_processes_join_through_arguments_or_the_environment(join_by):
    results = run_processes("tests.test_mesh:who", devices_each=3, join_by=join_by)
    for index, result in enumerate(results):
        assert result["index"] == index
        np.testing.assert_array_equal(result["counts"], [2, 6, 3])
        np.testing.assert_array_equal(result["all"], [10, 11])


def one_fails() -> dict[str, int]:
    if jax.process_index() == 1:
        raise LookupError("only this process fails")
    return {"sum": multihost_utils.process_allgather(np.ones(1)).sum()}


def test_the_process_that_fails_is_shown_and_its_peers_are_ended():
    with pytest.raises(AssertionError, match=r"process 1 .*\n(.*\n)*LookupError: only this"):
        run_processes("tests.test_mesh:one_fails")


def one_hangs() -> dict[str, int]:
    print(f"pid {os.getpid()}", flush=True)
    if jax.process_index() == 1:
        time.sleep(600)
    return {}


def test_processes_that_hang_are_shown_and_ended_at_the_time_limit():
    with pytest.raises(AssertionError, match=r"process 1 .* still running after 5 s") as error:
        run_processes("tests.test_mesh:one_hangs", timeout=5)
    (pid,) = re.findall(r"pid (\d+)", str(error.value))  # of the one that hangs
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid), 0)
