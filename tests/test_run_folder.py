"""Run folders: created once, never overwritten, found again, and changed only where allowed."""

import contextlib
import dataclasses
import os
import re
import threading
import time

import pytest

from deltal_jax.config import (
    Config,
    ModelConfig,
    RunConfig,
    TaskConfig,
    describe_fields,
    dump_config,
    load_config,
)
from deltal_jax.errors import UserError
from deltal_jax.training import run_folder
from deltal_jax.training.run_folder import (
    check_run_folder,
    create_run_folder,
    drifted_fields,
    load_run_config,
    reopen_run_folder,
    write_text,
)


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def config(**run) -> Config:
    return dataclasses.replace(Config(), run=RunConfig(**run))


def everything_under(folder) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def test_a_new_run_gets_a_time_stamped_folder_that_holds_its_config(tmp_path):
    folder, resolved = create_run_folder(config(name="trial"))
    assert re.fullmatch(r"runs/trial-\d{8}-\d{6}", str(folder))
    assert resolved == config(name="trial", dir=str(folder))
    assert load_run_config(folder) == resolved
    assert everything_under(folder).keys() == {"config.yaml"}


def test_runs_of_the_same_second_get_folders_of_their_own():
    folders = [create_run_folder(config(name="trial"))[0] for _ in range(5)]
    assert len(set(folders)) == 5
    assert all(load_run_config(folder).run.dir == str(folder) for folder in folders)


def test_a_named_folder_is_used_as_it_is_with_its_parents(tmp_path):
    folder, resolved = create_run_folder(config(dir="a/b/c"))
    assert (str(folder), resolved.run.dir) == ("a/b/c", "a/b/c")
    assert load_run_config(tmp_path / "a" / "b" / "c") == resolved


def test_an_empty_folder_may_be_named(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / ".config.yaml.123").touch()  # a run was killed as it began
    folder, resolved = create_run_folder(config(dir="empty"))
    assert load_run_config(folder) == resolved


@pytest.mark.parametrize("inside", ["config.yaml", ".hidden", "checkpoints"])
def test_a_folder_in_use_is_refused_and_nothing_is_written(tmp_path, inside):
    used = tmp_path / "used"
    used.mkdir()
    (used / inside).mkdir() if inside == "checkpoints" else (used / inside).write_text("mine")
    before = everything_under(tmp_path)
    for refuse in (create_run_folder, check_run_folder):
        with pytest.raises(UserError, match=r"^run.dir: used exists already; add --resume"):
            refuse(config(dir="used"))
    assert everything_under(tmp_path) == before


def test_a_file_in_the_way_is_refused_and_kept(tmp_path):
    (tmp_path / "taken").write_text("mine")
    for refuse in (create_run_folder, check_run_folder):
        with pytest.raises(UserError, match=r"^run.dir: taken is a file; name a folder$"):
            refuse(config(dir="taken"))
    with pytest.raises(UserError, match=r"^run.dir: cannot write to taken/below: Not a directory$"):
        create_run_folder(config(dir="taken/below"))
    assert everything_under(tmp_path) == {"taken": b"mine"}


def test_checking_writes_nothing(tmp_path):
    check_run_folder(config())
    check_run_folder(config(dir="new/folder"))
    assert everything_under(tmp_path) == {}


def test_a_run_is_reopened_with_the_config_that_it_was_started_with():
    folder, started = create_run_folder(load_config("countdown-tiny", {"seed": 7}))
    assert reopen_run_folder(None, {}, str(folder)) == (folder, started)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rl.steps", 777),
        ("model.attention", "xla"),
        ("model.remat", "layer"),
        ("rl.tokens_per_microbatch", 512),
        ("sft.log_every", 3),
        ("rollout.slots", 5),
        ("rollout.devices", 2),
        ("evaluate.every", 9),
        ("evaluate.problems", 11),
        ("checkpoint.every", 13),
        ("checkpoint.keep_last", 4),
        ("run.trackers", ("wandb",)),
        ("run.report", False),
    ],
)
def test_how_far_and_how_watched_may_change_and_nothing_is_written_yet(field, value):
    folder, started = create_run_folder(load_config("countdown-tiny"))
    section, name = field.split(".")
    assert getattr(getattr(started, section), name) != value
    _, changed = reopen_run_folder(None, {field: value}, str(folder))
    assert getattr(getattr(changed, section), name) == value
    restored = dataclasses.replace(changed, **{section: getattr(started, section)})
    assert restored == started, "nothing else changes"
    assert reopen_run_folder(None, {}, str(folder)) == (folder, started)


@pytest.mark.parametrize(
    ("field", "value", "before", "after"),
    [
        ("seed", 1, "0", "1"),
        ("model.layers", 9, "3", "9"),
        ("objective.alpha", 0.75, "1.0", "0.75"),
        ("objective.aggregation", "token_mean", "'delta_l'", "'token_mean'"),
        ("rl.optimizer.learning_rate", 1e-6, "0.0003", "1e-06"),
        ("rl.samples_per_prompt", 4, "8", "4"),
        ("sft.steps", 1, "3500", "1"),
        ("rollout.temperature", 0.5, "1.0", "0.5"),
        ("length_buckets", [64, 200], "(32, 64, 128, 200)", "(64, 200)"),
    ],
)
def test_what_the_run_computes_may_not_change(field, value, before, after, tmp_path):
    folder, _ = create_run_folder(load_config("countdown-tiny"))
    written = everything_under(tmp_path)
    with pytest.raises(UserError) as refused:
        reopen_run_folder(None, {field: value}, str(folder))
    assert str(refused.value) == (
        f"{field}: the run was started with {before} and cannot go on with {after}; "
        "start a new run instead"
    )
    assert everything_under(tmp_path) == written


@pytest.mark.parametrize("field", ["rollout.slots", "rollout.devices"])
def test_what_decides_how_far_a_response_comes_in_a_step_may_not_change(field):
    partial = {"rollout.partial": True, "rollout.oversampling": 2.0}
    folder, _ = create_run_folder(load_config("countdown-tiny", partial))
    with pytest.raises(UserError, match=f"{field}: the run was started with"):
        reopen_run_folder(None, {field: 4}, str(folder))


def test_an_override_that_repeats_the_stored_value_is_no_change():
    folder, started = create_run_folder(load_config("countdown-tiny"))
    same = {"seed": 0, "objective.alpha": 1, "length_buckets": [32, 64, 128, 200]}
    assert reopen_run_folder(None, same, str(folder)) == (folder, started)


def test_an_override_of_a_whole_section_is_judged_field_by_field():
    folder, started = create_run_folder(load_config("countdown-tiny"))
    with pytest.raises(UserError, match=r"objective"):
        reopen_run_folder(None, {"objective": {"alpha": 0.5}}, str(folder))
    assert load_run_config(folder) == started


def test_a_moved_run_is_reopened_where_it_is_now(tmp_path):
    folder, _ = create_run_folder(config(dir="old"))
    folder.rename(tmp_path / "new")
    reopened, resolved = reopen_run_folder(None, {"run.dir": "new"}, "new")
    assert (str(reopened), resolved.run.dir) == ("new", "new")


@pytest.mark.parametrize("name", ["missing", "empty", "file"])
def test_what_is_no_run_cannot_be_reopened(tmp_path, name):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=rf"^run.dir: {name} is not a run folder"):
        reopen_run_folder(None, {}, name)


def aged_run(name: str, folder: str, age: int) -> str:
    create_run_folder(config(name=name, dir=f"runs/{folder}"))
    path = f"runs/{folder}/config.yaml"
    when = os.stat(path).st_mtime - age
    os.utime(path, (when, when))
    return f"runs/{folder}"


def test_the_newest_run_of_a_name_is_found_and_no_other():
    aged_run("trial", "trial-1", age=300)
    newest = aged_run("trial", "trial-0", age=100)
    aged_run("trial", "trial-2", age=200)
    longer = aged_run("trial-longer", "trial-longer-9", age=0)
    assert str(reopen_run_folder("trial", {}, None)[0]) == newest
    assert str(reopen_run_folder("configs/trial.yaml", {}, None)[0]) == newest
    assert str(reopen_run_folder("trial-longer", {}, None)[0]) == longer


def test_without_a_name_the_newest_run_of_all_is_found():
    aged_run("one", "one-1", age=100)
    newest = aged_run("two", "two-1", age=50)
    assert str(reopen_run_folder(None, {}, None)[0]) == newest


def test_a_dot_in_an_experiments_name_belongs_to_the_name():
    newest = aged_run("qwen2.5-math", "qwen2.5-math-1", age=0)
    assert str(reopen_run_folder("qwen2.5-math.yaml", {}, None)[0]) == newest
    assert str(reopen_run_folder("qwen2.5-math", {}, None)[0]) == newest


def test_no_run_to_resume_is_said_with_the_name():
    with pytest.raises(UserError, match=r"^--resume: no run of trial under runs/; name run.dir$"):
        reopen_run_folder("trial", {}, None)
    aged_run("trial-longer", "trial-longer-1", age=0)
    with pytest.raises(UserError, match=r"^--resume: no run of trial under runs/"):
        reopen_run_folder("trial", {}, None)


def test_drift_names_the_fields_in_which_the_experiment_file_changed(tmp_path):
    path = tmp_path / "trial.yaml"
    path.write_text("seed: 1\nobjective: {alpha: 0.5}\nrl: {steps: 5}\n")
    _, stored = create_run_folder(load_config(path))
    assert drifted_fields(str(path), stored) == []
    path.write_text("seed: 2\nobjective: {alpha: 0.75}\nrl: {steps: 9}\n")
    assert drifted_fields(str(path), stored) == ["seed", "objective.alpha"]


def test_every_changeable_name_is_of_a_field_or_a_section_and_has_a_reason():
    names = [name for name, *_ in describe_fields()]
    for name, reason in run_folder.CHANGEABLE.items():
        assert name in names or any(n.startswith(name) for n in names if name.endswith(".")), name
        assert reason


def with_other(section, path):
    """The config with another value of one field, whatever rules it breaks."""
    name, *rest = path.split(".")
    value = getattr(section, name)
    if rest:
        other = with_other(value, ".".join(rest))
    else:
        other = (value, "other") if value is None or isinstance(value, (str, tuple)) else value + 1
    return dataclasses.replace(section, **{name: other})


@pytest.mark.parametrize("name", [name for name, *_ in describe_fields()])
def test_each_field_is_listed_as_safe_or_refused_with_both_values(name):
    """Where nothing that makes a safe one unsafe is switched on."""
    stored = dataclasses.replace(Config(), model=ModelConfig(path="here"))
    after = with_other(stored, name)
    safe = name in run_folder.CHANGEABLE or any(
        name.startswith(section) for section in run_folder.CHANGEABLE if section.endswith(".")
    )
    if safe and name != "checkpoint.dir":
        (found,) = run_folder.changes(stored, after).items()
        assert found[0] == name and found[1][0] != found[1][1]
        return
    with pytest.raises(UserError, match=rf"^{name}: the run was started with .* and cannot go on"):
        run_folder.changes(stored, after)


def test_what_a_mixture_lacks_or_has_beyond_is_refused():
    """Its keys are no fields, and one of two configs may lack some."""
    task = TaskConfig(name="mixture", mixture={"countdown": 1.0})
    stored = dataclasses.replace(Config(), task=task)
    for mixture in (None, {"countdown": 1.0, "paths": 1.0}, {"paths": 1.0}):
        after = dataclasses.replace(stored, task=dataclasses.replace(task, mixture=mixture))
        with pytest.raises(UserError, match=r"^task\.mixture: the run was started with {'count"):
            run_folder.changes(stored, after)


def test_a_run_that_stopped_for_want_of_groups_may_look_longer_or_fill_up():
    some = {"rollout.dynamic_sampling": "reward", "rollout.max_rounds": 2}
    for fill_up in (False, True):
        options = some | {"rollout.fill_up": fill_up, "run.dir": f"fill-up-{fill_up}"}
        create_run_folder(load_config("countdown-tiny", options))
    for changed in ({"rollout.max_rounds": 20}, {"rollout.fill_up": True}):
        _, found = reopen_run_folder(None, changed, "fill-up-False")
        assert (found.rollout.max_rounds == 20) != found.rollout.fill_up
    with pytest.raises(UserError, match=r"^rollout\.max_rounds: the run was started with 2 and"):
        reopen_run_folder(None, {"rollout.max_rounds": 20}, "fill-up-True")


def test_writing_replaces_the_file_as_a_whole_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "config.yaml"
    write_text(path, "old")
    held = path.open(encoding="utf-8")
    write_text(path, "new Δ")
    with held:
        assert held.read() == "old", "a reader that had opened it sees the old text"
    assert everything_under(tmp_path) == {"config.yaml": "new Δ".encode()}


def test_a_write_that_fails_keeps_the_old_text(tmp_path):
    path = tmp_path / "config.yaml"
    write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "\ud800")
    assert path.read_text() == "old"


def test_the_stored_config_is_the_dump_of_the_resolved_one():
    folder, resolved = create_run_folder(load_config("countdown-tiny"))
    assert (folder / "config.yaml").read_text(encoding="utf-8") == dump_config(resolved)


def test_a_start_waits_for_the_lock_of_a_process_that_leaves(tmp_path, monkeypatch):
    """As that of a host that died, which NFS keeps for a while."""
    done = threading.Event()

    def leave():
        time.sleep(2 * run_folder.LOOK)
        done.set()
        held.close()

    held = contextlib.ExitStack()
    held.enter_context(run_folder.locked(tmp_path))
    monkeypatch.setenv(run_folder.LOCK_WAIT, "60")
    leaves = threading.Thread(target=leave)
    leaves.start()
    with run_folder.locked(tmp_path):
        assert done.is_set()
    leaves.join()


def test_a_folder_that_another_host_has_made_is_awaited(tmp_path, monkeypatch):
    made, _ = create_run_folder(config(dir=str(tmp_path / "x")))
    hidden = (made / run_folder.CONFIG).rename(tmp_path / "hidden")
    appears = threading.Timer(2 * run_folder.LOOK, hidden.rename, [made / run_folder.CONFIG])
    appears.start()
    assert run_folder.await_run_config(made) == run_folder.load_run_config(made)
    monkeypatch.setattr(run_folder, "SEEN_WITHIN", 0.0)
    with pytest.raises(UserError, match=r"^run.dir: .*/none was made by another host and is not"):
        run_folder.await_run_config(tmp_path / "none")
