"""Metric lines are whole, finite JSON, and can be cut back to a checkpoint's position."""

import json
import math

import pytest
from tensorboardX.proto.event_pb2 import Event

from deltal_jax.errors import UserError
from deltal_jax.metrics import FILE_NAME, MetricsWriter, load_metrics
from deltal_jax.trackers import TensorBoard


def test_values_that_are_not_finite_are_null(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.write(1, "rl", {"a": math.nan, "b": math.inf, "c": 0.1})
    writer.close()
    text = (tmp_path / FILE_NAME).read_text()
    assert json.loads(text) == {"step": 1, "phase": "rl", "a": None, "b": None, "c": 0.1}
    assert text.endswith("\n")


def test_a_resumed_run_cuts_back_to_the_checkpoint(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.write(1, "rl", {"a": 1.0})
    position = writer.bytes_written
    writer.write(2, "rl", {"a": 2.0})
    writer.close()
    resumed = MetricsWriter(tmp_path, keep_bytes=position)
    assert resumed.bytes_written == position
    resumed.write(2, "rl", {"a": 3.0})
    resumed.close()
    assert [line["a"] for line in load_metrics(tmp_path / FILE_NAME)] == [1.0, 3.0]


def test_a_new_run_starts_an_empty_file(tmp_path):
    (tmp_path / FILE_NAME).write_text("left over\n")
    MetricsWriter(tmp_path).close()
    assert (tmp_path / FILE_NAME).read_bytes() == b""


def events(folder):
    """Tag, step and value of every scalar, in order."""

    (path,) = (folder / "tensorboard").glob("events*")
    data, found = path.read_bytes(), []
    while data:
        length = int.from_bytes(data[:8], "little")
        event = Event.FromString(data[12 : 12 + length])
        found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
        data = data[16 + length :]
    return found


def test_tensorboard_events_carry_the_same_values(tmp_path):
    writer = MetricsWriter(tmp_path, sinks=[TensorBoard(tmp_path)])
    writer.write(4, "rl", {"reward/mean": 0.25, "skipped": math.nan})
    writer.close()
    assert events(tmp_path) == [("reward/mean", 4, 0.25)]


def test_after_a_resume_every_step_is_there_once_and_none_is_lost(tmp_path):
    """Events are flushed now and then only: those of a run that dies may be gone."""
    killed = MetricsWriter(tmp_path)
    killed.write(1, "sft", {"a": 1.0, "b": math.nan})
    killed.write(1, "rl", {"a": 2.0})
    position = killed.bytes_written
    killed.write(2, "rl", {"a": 3.0})
    killed.close()
    for value in (4.0, 5.0):
        resumed = MetricsWriter(tmp_path, keep_bytes=position, sinks=[TensorBoard(tmp_path)])
        resumed.write(2, "rl", {"a": value})
        resumed.close()
        assert events(tmp_path) == [("warm-up/a", 1, 1.0), ("a", 1, 2.0), ("a", 2, value)]


def test_lines_that_a_checkpoint_counts_on_and_are_gone_are_said(tmp_path):
    (tmp_path / FILE_NAME).write_text("{}\n")
    with pytest.raises(UserError, match=r"metrics.jsonl: 3 bytes, where a checkpoint goes on aft"):
        MetricsWriter(tmp_path, keep_bytes=4)
    assert (tmp_path / FILE_NAME).read_text() == "{}\n"
