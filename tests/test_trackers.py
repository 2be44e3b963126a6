"""Trackers: a run is one run there, and a step is there once, whatever ends in between."""

import importlib.util
import json
import math
import sqlite3

import pytest

from deltal_jax import trackers
from deltal_jax.config import load_config
from deltal_jax.errors import UserError
from deltal_jax.metrics import MetricsWriter
from deltal_jax.training.opening import create_run
from deltal_jax.training.plan import make_plan
from deltal_jax.training.run_folder import create_run_folder, load_run_config
from tests.fakes import config_refusal

needs_wandb = pytest.mark.skipif(
    importlib.util.find_spec("wandb") is None, reason="the extra wandb is not installed"
)
needs_trackio = pytest.mark.skipif(
    importlib.util.find_spec("trackio") is None, reason="the extra trackio is not installed"
)


def config_of(*names: str):
    return load_config("countdown-tiny", {"run.trackers": list(names), "sft.steps": 10})


class Shelf:
    """A tracker that keeps what it is given, as the real ones do: a run by its id."""

    def __init__(self):
        self.runs: dict[str, list] = {}
        self.ended, self.full = 0, math.inf

    def open(self, folder, run_id, config):
        lines = self.runs.setdefault(run_id, [])

        def log(values, step):
            if len(lines) == self.full:
                raise OSError("no\nroom")
            lines.append((step, values))

        def finish():
            self.ended += 1

        return log, finish


@pytest.fixture
def shelf(monkeypatch):
    found = Shelf()
    monkeypatch.setitem(trackers.OPENERS, "trackio", found.open)
    return found


def opened(folder, keep_bytes=0, say=print):
    sink = trackers.Tracked("trackio", folder, config_of("trackio"), say)
    return MetricsWriter(folder, keep_bytes=keep_bytes, sinks=[sink])


def test_a_run_that_goes_on_is_one_run_and_repeats_no_step(tmp_path, shelf):
    killed = opened(tmp_path)
    killed.write(10, "sft", {"sft/loss": 2.0, "optim/lr": math.nan})
    killed.write(0, "eval", {"eval/x": 0.5})
    killed.write(1, "rl", {"a": 1.0})
    position = killed.bytes_written
    killed.write(2, "rl", {"a": 2.0})
    killed.write(2, "eval", {"eval/x": 0.6})
    killed.close()
    for last in (2, 3):  # ended twice at the same place
        resumed = opened(tmp_path, position)
        resumed.write(2, "rl", {"a": 2.0})
        resumed.write(2, "eval", {"eval/x": 0.6})
        if last == 3:
            resumed.write(3, "rl", {"a": 3.0})
        resumed.close()
    (lines,) = shelf.runs.values()
    assert lines == [
        (10, {"warm-up/sft/loss": 2.0}),
        (10, {"eval/x": 0.5}),
        (11, {"a": 1.0}),
        (12, {"a": 2.0}),
        (12, {"eval/x": 0.6}),
        (13, {"a": 3.0}),
    ]
    assert shelf.ended == 3


def test_one_that_comes_later_is_shown_all_that_was_before(tmp_path, shelf):
    alone = MetricsWriter(tmp_path)
    alone.write(1, "rl", {"a": 1.0})
    alone.close()
    later = opened(tmp_path, (tmp_path / "metrics.jsonl").stat().st_size)
    later.write(2, "rl", {"a": 2.0})
    later.close()
    assert list(shelf.runs.values()) == [[(11, {"a": 1.0}), (12, {"a": 2.0})]]


def test_one_that_fails_gets_no_more_and_the_run_goes_on(tmp_path, shelf):
    said, shelf.full = [], 1
    writer = opened(tmp_path, say=said.append)
    for step in (1, 2, 3):
        writer.write(step, "rl", {"a": float(step)})
    writer.close()
    assert said == ["warning: run.trackers: trackio gets no more: no room"]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


def test_one_that_does_not_open_is_said_in_one_line(tmp_path, monkeypatch):
    def refuse(*_):
        raise ValueError("no key\nfor you")

    monkeypatch.setitem(trackers.OPENERS, "wandb", refuse)
    wanted = "run.trackers: wandb: no key for you; see `wandb login`, or set WANDB_MODE=offline"
    with pytest.raises(UserError) as caught:
        trackers.open_sinks(tmp_path, config_of("wandb"), print)
    assert str(caught.value) == wanted


def test_a_missing_package_is_said_before_there_is_a_run(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    overrides = {"run.trackers": ["wandb"], "run.dir": str(tmp_path / "run")}
    with pytest.raises(
        UserError, match=r"^run.trackers: wandb is not installed; pip install delta"
    ):
        create_run("countdown-tiny", overrides, None, None)
    assert not (tmp_path / "run").exists()
    plan = make_plan(load_config("countdown-tiny", overrides))  # perhaps for another machine
    assert plan.notes == [
        "note: run.trackers: wandb is not installed; pip install deltal-jax[wandb]"
    ]


def test_a_folder_of_that_name_is_no_package(tmp_path, monkeypatch):
    (tmp_path / "wandb").mkdir()  # as it leaves one where it is used
    monkeypatch.syspath_prepend(str(tmp_path))
    if importlib.util.find_spec("wandb").origin is None:
        with pytest.raises(UserError, match="wandb is not installed"):
            trackers.check_trackers(config_of("wandb"))


def test_the_field_takes_no_other_name_and_is_read_back_empty(tmp_path):
    assert config_of().run.trackers == ()
    assert "run.trackers[0]: 'mlflow' is not one of wandb" in config_refusal(
        {"run.trackers": ["mlflow"]}
    )
    assert "[wandb]" in config_refusal({"run.trackers": "wandb"})


def test_tensorboard_is_no_choice_any_more_and_older_runs_still_open(tmp_path):
    assert config_refusal({"run.tensorboard": False}).startswith("run.tensorboard: no such field")
    config = load_config("countdown-tiny", {"run.dir": str(tmp_path / "run")})
    folder, config = create_run_folder(config)
    path = folder / "config.yaml"
    path.write_text(path.read_text().replace("  trackers: []\n", "  tensorboard: false\n"))
    assert "tensorboard" in path.read_text()
    assert load_run_config(folder) == config


@needs_trackio
def test_trackio_itself(tmp_path, monkeypatch):
    import trackio

    monkeypatch.setattr("trackio.utils.TRACKIO_DIR", tmp_path / "t")
    monkeypatch.setattr("trackio.sqlite_storage.TRACKIO_DIR", tmp_path / "t")
    position = 0
    for steps in ((1, 2), (2, 3)):
        writer = opened(tmp_path, position)
        for step in steps:
            writer.write(step, "rl", {"a": float(step)})
            position = position or writer.bytes_written
        writer.close()
    assert trackio.context_vars.current_run.get() is None
    (path,) = (tmp_path / "t").glob("*.db")
    with sqlite3.connect(path) as database:
        rows = database.execute("select step, metrics from metrics order by id").fetchall()
        assert database.execute("select count(distinct run_name) from metrics").fetchone() == (1,)
    assert [(step, json.loads(found)) for step, found in rows] == [
        (11, {"a": 1.0}),
        (12, {"a": 2.0}),
        (13, {"a": 3.0}),
    ]


@needs_wandb
def test_wandb_itself(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    position, ids = 0, []
    for steps in ((1, 2), (2, 3)):
        sink = trackers.Tracked("wandb", tmp_path, config_of("wandb"), print)
        writer = MetricsWriter(tmp_path, keep_bytes=position, sinks=[sink])
        for step in steps:
            writer.write(step, "rl", {"a": float(step)})
            position = position or writer.bytes_written
        writer.close()
        ids.append(json.loads((tmp_path / "trackers" / "wandb.json").read_text())["id"])
    assert ids[0] == ids[1]
    stores = sorted((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert {path.stem for path in stores} == {f"run-{ids[0]}"}
    assert [steps_in(path) for path in stores] == [[11, 12], [13]]


def steps_in(path) -> list[int]:
    """The steps in a store of Weights & Biases: a log as LevelDB's, after a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole, steps = path.read_bytes(), 7, b"", []
    while at < len(data):
        if 2**15 - at % 2**15 < 7:  # no room for another header in this block
            at += 2**15 - at % 2**15
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # a whole record, or the last part of one
            record, whole = Record.FromString(whole), b""
            steps += [record.history.step.num] if record.HasField("history") else []
    return steps
