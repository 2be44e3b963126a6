"""Metric lines are whole, finite JSON, and can be cut back to a checkpoint's position."""

import json
import math
import struct

import pytest
from tensorboardX.proto.event_pb2 import Event

from deltal_jax.errors import UserError
from deltal_jax.metrics import FILE_NAME, MetricsWriter, load_metrics


def test_values_that_are_not_finite_are_null(tmp_path):
    writer = MetricsWriter(tmp_path, tensorboard=False)
    writer.write(1, "rl", {"a": math.nan, "b": math.inf, "c": 0.1})
    writer.close()
    text = (tmp_path / FILE_NAME).read_text()
    assert json.loads(text) == {"step": 1, "phase": "rl", "a": None, "b": None, "c": 0.1}
    assert text.endswith("\n")


def test_a_resumed_run_cuts_back_to_the_checkpoint(tmp_path):
    writer = MetricsWriter(tmp_path, tensorboard=False)
    writer.write(1, "rl", {"a": 1.0})
    position = writer.bytes_written
    writer.write(2, "rl", {"a": 2.0})
    writer.close()
    resumed = MetricsWriter(tmp_path, keep_bytes=position, tensorboard=False)
    assert resumed.bytes_written == position
    resumed.write(2, "rl", {"a": 3.0})
    resumed.close()
    assert [line["a"] for line in load_metrics(tmp_path / FILE_NAME)] == [1.0, 3.0]


def test_a_new_run_starts_an_empty_file(tmp_path):
    (tmp_path / FILE_NAME).write_text("left over\n")
    MetricsWriter(tmp_path, tensorboard=False).close()
    assert (tmp_path / FILE_NAME).read_bytes() == b""


def test_tensorboard_events_carry_the_same_values(tmp_path):
    from tensorboardX.proto.event_pb2 import Event

    writer = MetricsWriter(tmp_path)
    writer.write(4, "rl", {"reward/mean": 0.25, "skipped": math.nan})
    writer.close()
    (path,) = (tmp_path / "tensorboard").glob("events*")
    data, found = path.read_bytes(), {}
    while data:
        length = int.from_bytes(data[:8], "little")
        event = Event.FromString(data[12 : 12 + length])
        found |= {v.tag: (event.step, v.simple_value) for v in event.summary.value}
        data = data[16 + length :]
    assert found == {"reward/mean": (4, 0.25)}


def shown(folder):
    """The points of every tag as TensorBoard has them: a session that starts at a step purges what
    was there from it on."""
    points = []
    for path in sorted(folder.glob("events*"), key=lambda path: path.stat().st_mtime_ns):
        content = path.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            event = Event.FromString(content[12 : 12 + length])
            content = content[16 + length :]
            if event.HasField("session_log"):
                points = [point for point in points if point[1] < event.step]
            points += [(v.tag, event.step, v.simple_value) for v in event.summary.value]
    return points


def test_tensorboard_repeats_no_step_after_a_resume(tmp_path):
    first = MetricsWriter(tmp_path)
    for step in (1, 2, 3):
        first.write(step, "sft", {"loss": step})
    for step, phase in ((1, "rl"), (2, "rl"), (2, "eval")):
        first.write(step, phase, {phase: 0.0})
    position = first.bytes_written
    first.write(3, "rl", {"rl": 0.0})
    first.write(3, "eval", {"eval": 0.0})
    first.close()
    second = MetricsWriter(tmp_path, keep_bytes=position)
    second.write(3, "rl", {"rl": 1.0})
    second.close()
    after = [("rl", 1, 0.0), ("rl", 2, 0.0), ("eval", 2, 0.0), ("rl", 3, 1.0)]
    assert shown(tmp_path / "tensorboard") == after
    warm_up = [("warm-up/loss", step, float(step)) for step in (1, 2, 3)]
    assert shown(tmp_path / "tensorboard" / "warm-up") == warm_up


def test_lines_that_a_checkpoint_counts_on_and_are_gone_are_said(tmp_path):
    (tmp_path / FILE_NAME).write_text("{}\n")
    with pytest.raises(UserError, match=r"metrics.jsonl: 3 bytes, where a checkpoint goes on aft"):
        MetricsWriter(tmp_path, keep_bytes=4)
    assert (tmp_path / FILE_NAME).read_text() == "{}\n"
