"""Checkpoints in an object store: an emulator of Google Cloud Storage, through gcsfs and
TensorStore."""

import importlib.util
import os
import socket
import subprocess
import sys
from contextlib import closing

import pytest

from deltal_jax.checkpoints.reader import SavedSteps, abstract_state
from deltal_jax.checkpoints.retention import Keep
from deltal_jax.checkpoints.store import Checkpoints
from tests.test_store import POSITION, state

LACKING = [x for x in ("gcsfs", "gcp_storage_emulator") if importlib.util.find_spec(x) is None]


def in_a_bucket(port):
    """What the test below runs in a process of its own, whose environment names the emulator."""
    from gcp_storage_emulator.server import create_server

    server = create_server("localhost", port, in_memory=True, default_bucket="bucket")
    server.start()
    said = []
    with closing(Checkpoints("gs://bucket/a/run", Keep(last=2))) as checkpoints:
        for number in (1, 2, 3):
            checkpoints.save(number, state(seed=number), POSITION)
    saved = SavedSteps("gs://bucket/a/run")
    assert saved.all() == [2, 3] and saved.damage(3) is None
    damaged = saved.path(3) / "state" / "_METADATA"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"!")
    (saved.path(9) / "state").mkdir(parents=True, exist_ok=True)
    (saved.path(9) / "state" / "x").write_bytes(b"half")
    with closing(Checkpoints("gs://bucket/a/run", say=said.append)) as checkpoints:
        assert checkpoints.choose(10_000) == 2
        restored = checkpoints.read_state(2, abstract_state(state))
    assert (restored.params["w"] == state(seed=2).params["w"]).all()
    assert len(said) == 2 and "9 has no manifest" in said[0] and "set aside as 3." in said[1]
    assert saved.all() == [2]
    print("as it should be", flush=True)
    os._exit(0)  # the emulator's threads


@pytest.mark.skipif(bool(LACKING), reason=f"needs {', '.join(LACKING)}: the extra remote")
def test_an_object_store_holds_checkpoints_as_a_disk_does():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    address = f"http://localhost:{port}"
    environment = os.environ | {
        "STORAGE_EMULATOR_HOST": address,
        "TENSORSTORE_GCS_HTTP_URL": address,
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "any",
        "NO_GCE_CHECK": "true",
    }
    code = f"from tests.test_remote import in_a_bucket; in_a_bucket({port})"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.endswith("as it should be\n"), done.stderr[-4000:]
