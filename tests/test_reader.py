"""Who reads the checkpoints of a run that goes on, and deletes old ones meanwhile."""

import shutil
from contextlib import closing

import pytest

from deltal_jax.checkpoints.manifest import Position
from deltal_jax.checkpoints.reader import SavedSteps, abstract_state
from deltal_jax.checkpoints.store import Checkpoints
from deltal_jax.errors import UserError
from tests.test_store import state


@pytest.fixture
def folder(tmp_path):
    """Checkpoints 1 and 2."""
    with closing(Checkpoints(tmp_path / "c")) as checkpoints:
        for number in (1, 2):
            checkpoints.save(number, state(), Position("rl", number, 0, 0))
    return tmp_path / "c"


def test_the_newest_is_looked_for_again_where_it_was_deleted_while_it_was_read(folder):
    def slow(manifest):
        """While the second is read the run saves a third and deletes both."""
        if manifest.position.step == 2 and (folder / "1").exists():
            with closing(Checkpoints(folder, 9)) as checkpoints:
                checkpoints.save(3, state(), Position("rl", 3, 0, 0))
            shutil.rmtree(folder / "1")
            shutil.rmtree(folder / "2")
            return "gone before it was restored"
        return None

    assert SavedSteps(folder).newest_intact(slow) == (3, {})


def test_metrics_that_are_added_later_replace_the_manifest_or_leave_it_as_it_was(folder):
    with closing(Checkpoints(folder)) as checkpoints:
        checkpoints.add_metrics(2, {"eval/x": 0.5, "eval/y": float("nan")})
    saved = SavedSteps(folder)
    assert saved.manifest(2).metrics == {"eval/x": 0.5}
    (folder / "2" / ".manifest.json.tmp").write_text("{")  # killed while it added others
    assert saved.damage(2) is None and saved.read_position(2).step == 2


def test_one_that_is_gone_is_not_called_damaged(folder):
    saved = SavedSteps(folder)
    assert saved.read_position(2).step == 2
    shutil.rmtree(folder / "2")
    gone = r"^checkpoint 2 in .*/c: there is none; a run that goes on deletes old ones"
    with pytest.raises(UserError, match=gone):
        saved.read_state(2, abstract_state(state))
    with pytest.raises(UserError, match=gone):
        SavedSteps(folder).read_position(2)


def test_what_a_sick_disk_hides_is_not_taken_for_debris(folder):
    """Here a loop of links: `exists` says no to that as to any other error."""
    manifest = folder / "2" / "manifest.json"
    manifest.unlink()
    manifest.symlink_to(manifest)
    with pytest.raises(UserError, match=r"^checkpoint.dir: cannot write to .*: Too many levels of"):
        Checkpoints(folder)
    assert (folder / "2" / "state").is_dir()
