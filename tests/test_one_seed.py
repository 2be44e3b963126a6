"""A run's numbers come from the seed of its config, and from nothing that a process has of its own:
neither hashes, nor its number, nor what it imported first. So it may be one process of many, or the
only one of all devices."""

import ast
import json
import os
import subprocess
import sys

import pytest

from tests.processes import ROOT
from tests.runs import TINY, assert_same

PACKAGE = ROOT / "deltal_jax"
#: Where the number of a process, or what only it has, may be asked for, and what for.
OWN = {
    "parallel/": "what processes say to each other, and how they begin",
    "training/devices.py": "which mesh several processes have, and what they refuse",
    "training/loop.py": "whether a signal has to be agreed upon",
    "training/verdicts.py": "who judges what; all get every verdict",
    "training/setup.py": "what several processes refuse, and the memory that is free",
    "rollout/engine.py": "which prompts are its own, where each brings others; free memory",
    "rollout/checks.py": "the memory that is free",
    "model/kernels.py": "what the GPU here can do",
}
#: Names that are drawn without a seed: they name things, and decide nothing.
NAMES = ("trackers.py", "rollout/served.py")
PROGRAM = """
import json, sys
for name in json.loads(sys.argv[1]):
    __import__(name)
from deltal_jax import train
train("countdown-tiny", json.loads(sys.argv[2]), rewards=["task"], quiet=True)
"""
MODULES = ("deltal_jax.report.page", "deltal_jax.rollout.engine", "optax", "deltal_jax.tasks.paths")


def sources():
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path.relative_to(PACKAGE).as_posix(), ast.parse(path.read_text(encoding="utf-8"))


def calls(tree):
    """The called names with their dots, and whether anything is given to them."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), bool(node.args or node.keywords)


def test_nothing_is_drawn_without_a_seed():
    found = []
    for name, tree in sources():
        for called, given in calls(tree):
            first, _, last = called.rpartition(".")
            seeded = given and last in ("Random", "default_rng")
            if first in ("random", "np.random", "numpy.random") and not seeded:
                found.append(f"{name}: {called}")
            if called in ("hash", "os.urandom") or first in ("secrets", "uuid"):
                found += [f"{name}: {called}"] * (name not in NAMES)
    assert not found


def test_only_few_places_ask_what_this_process_is():
    asks = ("process_index", "process_count", "local_devices", "local_device_count")
    found = {
        name
        for name, tree in sources()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr in asks
    }
    assert {name for name in found if not name.startswith(tuple(OWN))} == set()
    assert all(any(name.startswith(part) for name in found) for part in OWN)


def test_a_run_is_the_same_bit_for_bit_in_processes_of_other_hashes_and_imports(tmp_path):
    options = TINY | {"sft.steps": 0, "rl.steps": 2, "evaluate.every": 0}
    runs = []
    for seed, modules in (("0", MODULES), ("4242", MODULES[::-1])):
        folder = tmp_path / seed
        settings = json.dumps(options | {"run.dir": str(folder)})
        flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=1"
        subprocess.run(
            [sys.executable, "-c", PROGRAM, json.dumps(modules), settings],
            cwd=ROOT,
            env=os.environ | {"PYTHONHASHSEED": seed, "XLA_FLAGS": flags},
            check=True,
            timeout=300,
        )
        runs.append(folder)
    assert_same(*runs)


DRAWN = """
import json, sys
from deltal_jax.config.tasks import *
from deltal_jax.tasks.procedural import KINDS
from deltal_jax.tasks.procedural.generated import Generated
found = {}
for kind in KINDS:
    task = Generated(kind)
    found[kind] = [repr(task.problem(3, at)) for at in range(2)]
json.dump(found, sys.stdout)
"""


@pytest.mark.slow
def test_generated_problems_do_not_depend_on_hashes():
    """Every process of a run generates them for itself."""
    pytest.importorskip("reasoning_gym")
    found = []
    for seed in ("0", "4242"):
        done = subprocess.run(
            [sys.executable, "-c", DRAWN],
            cwd=ROOT,
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
            timeout=300,
        )
        found.append(json.loads(done.stdout))
    assert len(found[0]) > 10 and found[0] == found[1]
