"""Whatever happens to a checkpoint is found and named, and the newest intact one is used."""

import json
import os
import re
import resource
import shutil
import subprocess
from contextlib import closing, contextmanager
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deltal_jax.checkpoints.manifest import FORMAT, NAME, Position, encode, read_manifest
from deltal_jax.checkpoints.reader import SavedSteps, abstract_state
from deltal_jax.checkpoints.store import Checkpoints, SaveError
from deltal_jax.errors import UserError
from deltal_jax.types import TrainState

ORIGIN = {"config": {"seed": 0, "objective.alpha": 1.0}, "tokenizer": {"tokenizer.json": "0a"}}
DATA = Path(__file__).parent / "data"


def state(value=0.0):
    params = {"w": jnp.full((3, 4), float(value)), "b": jnp.arange(4.0)}
    key = jax.random.key(7, impl="threefry2x32")
    return TrainState(params, {"mu": params["b"] + 1}, jnp.asarray(5), key)


def position(step):
    return Position("rl", step, 8 * step, 100 * step, {"guard": {"skipped": 1}})


def complete(checkpoints, step, saved):
    checkpoints.save(step, saved, position(step))
    checkpoints.wait()


ROLLOUTS = {"carried": {"lengths": np.arange(3, dtype=np.int32)}}


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """Checkpoints 1 and 2."""
    folder = tmp_path_factory.mktemp("original") / "c"
    with closing(Checkpoints(folder, origin=ORIGIN)) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state(step), position(step), ROLLOUTS)
    return folder


@pytest.fixture
def folder(original, tmp_path):
    """A copy of them."""
    return Path(shutil.copytree(original, tmp_path / "c"))


def files(step):
    return sorted(p for p in step.rglob("*") if p.is_file() and p.stat().st_size)


def test_a_flipped_byte_is_found_in_every_file_and_place(folder):
    """First, last and some in between, of array data, of Orbax's metadata and of our manifest."""
    step, saved = folder / "2", SavedSteps(folder)
    names = [str(path.relative_to(step)) for path in files(step)]
    kinds = [
        NAME,
        "_METADATA",
        "state/ocdbt.process_0/d/",
        "rollouts/",
        "manifest.ocdbt",
    ]
    assert all(any(kind in name for name in names) for kind in kinds)
    for path, name in zip(files(step), names, strict=True):
        content = path.read_bytes()
        for place in {0, 1, len(content) // 3, len(content) // 2, len(content) - 1}:
            flipped = bytearray(content)
            flipped[place] ^= 1 << place % 8
            path.write_bytes(flipped)
            said = f"{NAME} is damaged" if name == NAME else f"{name} has flipped bytes"
            assert saved.damage(2) == said, place
        path.write_bytes(content)
    assert saved.damage(2) is None


def test_truncated_empty_missing_and_extra_files_are_named_by_their_sizes_alone(folder):
    step, saved = folder / "2", SavedSteps(folder)
    for path in files(step):
        content, name = path.read_bytes(), str(path.relative_to(step))
        damages = {content[:-1]: f"{name} is truncated: {len(content) - 1} bytes, not"}
        damages |= {b"": f"{name} is empty", content + b" ": f"{name} has grown"}
        if name == NAME:
            damages = {content[:-1]: f"{NAME} is damaged", b"": f"{NAME} is empty"}
        for damaged, said in damages.items():
            path.write_bytes(damaged)
            assert (saved.damage(2, contents=False) or "").startswith(said)
        if name != NAME:
            path.unlink()
            assert saved.damage(2, contents=False) == f"{name} is missing"
        path.write_bytes(content)
    (step / "state" / "more").write_text("x")
    assert saved.damage(2) == "state/more does not belong to it"


def test_the_newest_intact_one_is_used_and_the_damaged_ones_are_set_aside(folder):
    data = folder / "2" / "state" / "_METADATA"
    data.write_bytes(data.read_bytes()[::-1])
    said = []
    with closing(Checkpoints(folder, origin=ORIGIN, say=said.append)) as checkpoints:
        assert checkpoints.choose(1000) == 1
        restored = checkpoints.read_state(1, abstract_state(state))
        np.testing.assert_array_equal(restored.params["w"], np.ones((3, 4)))
        checkpoints.save(2, state(7), position(2))
        assert checkpoints.all() == [1, 2]
    (line,) = said
    what = f"checkpoint 2 is damaged: {data.relative_to(folder / '2')} has flipped bytes"
    assert line == f"{what}; set aside as 2.damaged"
    assert (folder / "2.damaged" / NAME).exists()


def test_a_reader_names_damage_and_changes_nothing(folder):
    (folder / "1" / "state" / "_METADATA").unlink()
    (folder / "3").mkdir()
    (folder / "4.orbax-checkpoint-tmp").mkdir()
    before = sorted(folder.rglob("*"))
    saved = SavedSteps(folder)
    assert saved.all() == [1, 2] and saved.newest_intact() == (2, {})
    with pytest.raises(UserError, match=r"^checkpoint 1 in .* is damaged: state/_METADATA is miss"):
        saved.read_position(1)
    assert saved.read_position(2) == position(2)
    assert sorted(folder.rglob("*")) == before


def test_what_was_never_complete_is_removed_by_who_writes_and_said(folder):
    (folder / "2" / NAME).unlink()
    (folder / "5.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    (folder / "1.damaged").mkdir()
    said = []
    with closing(Checkpoints(folder, origin=ORIGIN, say=said.append)) as checkpoints:
        assert checkpoints.choose(1000) == 1
    assert sorted(path.name for path in folder.iterdir()) == ["1", "1.damaged"]
    assert sorted(said) == [
        f"checkpoint {number} has no manifest, so it is not complete: removed" for number in (2, 5)
    ]


def test_where_no_manifest_is_left_nothing_is_removed(folder):
    for number in (1, 2):
        (folder / str(number) / NAME).unlink()
    with closing(Checkpoints(folder, origin=ORIGIN)) as checkpoints:
        assert checkpoints.choose(1000) is None
    aside = ["1.incomplete", "2.incomplete"]
    assert sorted(path.name for path in folder.iterdir()) == aside
    assert all((folder / name / "state").is_dir() for name in aside)


def test_one_under_another_number_or_of_another_run_is_not_taken_for_the_newest(folder):
    (folder / "2").rename(folder / "7")
    (folder / "1" / "state" / ".DS_Store").touch()  # harmless
    saved = SavedSteps(folder)
    assert saved.newest_intact() == (1, {7: "it was saved as checkpoint 2"})
    saved.check_origin(1, ORIGIN)
    other = {"config": ORIGIN["config"] | {"objective.alpha": 0.25}}
    with pytest.raises(UserError, match=r"^objective.alpha: checkpoint 1 in .* 0.25; bring that"):
        saved.check_origin(1, other)


def test_none_intact_is_one_line_and_nothing_is_set_aside(folder):
    for number in (1, 2):
        (folder / str(number) / "commit_success.txt").write_bytes(b"")
    with closing(Checkpoints(folder)) as checkpoints, pytest.raises(UserError) as refused:
        checkpoints.choose(1000)
    said = r"none in .* is intact \(2: commit_success.txt is empty; 1: commit_success.txt is empt"
    assert re.search(said, str(refused.value)) and "\n" not in str(refused.value)
    assert SavedSteps(folder).all() == [1, 2]


def test_lines_of_metrics_that_are_gone_are_damage_too(folder):
    said = []
    with closing(Checkpoints(folder, say=said.append)) as checkpoints:
        assert checkpoints.choose(150) == 1
    assert said[0].startswith("checkpoint 2 is damaged: metrics.jsonl has 150 of its 200 bytes")


@pytest.mark.parametrize(
    ("section", "field", "now", "said"),
    [
        ("config", "objective.alpha", 0.5, r"^objective.alpha: .* with 1.0 \(config\), .* has 0.5"),
        ("tokenizer", "tokenizer.json", "0b", r"^tokenizer.json: .* '0a' \(tokenizer\), .* '0b'"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_with_both_values(folder, section, field, now, said):
    origin = ORIGIN | {section: ORIGIN[section] | {field: now}}
    checkpoints = Checkpoints(folder, origin=origin)
    with closing(checkpoints), pytest.raises(UserError, match=said):
        checkpoints.choose(1000)


def test_a_newer_format_is_refused_and_left_alone(folder):
    manifest = read_manifest(SavedSteps(folder).path(2))
    (folder / "2" / NAME).write_bytes(encode(manifest, FORMAT + 1))
    checkpoints, said = Checkpoints(folder), r"is in format 2, .* up to 1; update deltal-jax"
    with closing(checkpoints), pytest.raises(UserError, match=said):
        checkpoints.choose(1000)
    assert (folder / "2").is_dir()


def test_checkpoints_from_before_there_were_manifests_are_never_taken_for_debris(folder):
    (folder / "2" / NAME).unlink()
    (folder / "2" / "meta").mkdir()
    with pytest.raises(UserError, match=r"^checkpoint.dir: .*/2 is of an older version"):
        Checkpoints(folder)
    assert (folder / "2" / "meta").is_dir()


@contextmanager
def small_files(limit):
    """No file may grow over so many bytes, as on a disk that is full."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)


def big(value):
    """Whose arrays are more than any file of metadata."""
    params = {"w": jax.random.normal(jax.random.key(value), (100, 100))}
    return TrainState(params, {}, jnp.asarray(0), jax.random.key(7, impl="threefry2x32"))


@pytest.mark.parametrize("limit", [0, 100, 20_000])
def test_a_save_that_the_disk_has_no_room_for_harms_nothing_and_is_said_once(limit, tmp_path):
    """No room for metadata, for some of it, or for arrays."""
    with closing(Checkpoints(tmp_path / "c")) as checkpoints:
        complete(checkpoints, 1, big(1))
        with small_files(limit), pytest.raises(SaveError) as failed:
            complete(checkpoints, 2, big(2))
        said = f"checkpoint 2 could not be saved in {tmp_path / 'c'}: File too large"
        assert str(failed.value) == said
        assert checkpoints.all() == [1] and checkpoints.damage(1) is None
        complete(checkpoints, 2, big(2))
        assert sorted(os.listdir(tmp_path / "c")) == ["1", "2"]


def test_a_full_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=160k", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        with closing(Checkpoints(disk / "c")) as checkpoints:
            complete(checkpoints, 1, big(1))
            with pytest.raises(SaveError, match=r"No space left on device$"):
                complete(checkpoints, 2, big(2))
            assert checkpoints.all() == [1] and checkpoints.damage(1) is None
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        checkpoints, said = Checkpoints(disk / "c"), r"2 could not .*: Read-only file system$"
        with closing(checkpoints), pytest.raises(SaveError, match=said):
            complete(checkpoints, 2, state())
        with pytest.raises(UserError, match=r"^checkpoint.dir: cannot write .*: Read-only file s"):
            Checkpoints(disk / "new")
        assert SavedSteps(disk / "c").newest_intact() == (1, {})
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_file_in_the_place_of_the_folder_is_said(tmp_path):
    (tmp_path / "c").write_text("mine")
    with pytest.raises(UserError, match=r"^checkpoint.dir: cannot write to .*/c: Not a directory$"):
        Checkpoints(tmp_path / "c")
    assert (tmp_path / "c").read_text() == "mine"


def test_the_first_format_loads_for_ever():
    """The checkpoint of `write_example` below, as it was written when there was one format."""
    saved = SavedSteps(DATA / "checkpoint-format-1")
    assert saved.all() == [2] and saved.damage(2) is None
    assert json.loads((DATA / "checkpoint-format-1" / "2" / NAME).read_text())["format"] == 1
    assert saved.read_position(2) == position(2)
    assert saved.manifest(2).origin == ORIGIN and saved.manifest(2).metrics == {"eval/x": 0.5}
    restored, wanted = saved.read_state(2, abstract_state(state)), state(2.0)
    jax.tree.map(np.testing.assert_array_equal, restored.params, wanted.params)
    jax.tree.map(np.testing.assert_array_equal, restored.opt_state, wanted.opt_state)
    assert int(restored.updates) == 5 and restored.key == wanted.key
    jax.tree.map(np.testing.assert_array_equal, saved.read_rollouts(2), ROLLOUTS)


def write_example(folder):
    """What the test above loads: never to be written again in another format."""
    with closing(Checkpoints(folder, origin=ORIGIN)) as checkpoints:
        checkpoints.save(2, state(2.0), position(2), ROLLOUTS, metrics={"eval/x": 0.5})
