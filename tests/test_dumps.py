"""What is no dump, and what a replay does not change, is refused in one line."""

import pytest

from deltal_jax.errors import UserError
from deltal_jax.guard.dumps import RECORD, load_dump

CHANGES = ["objective.alpha", "rl.steps", "model.param_dtype", "model", "guard.dumps"]


def test_a_folder_without_a_record_is_no_dump(tmp_path):
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    with pytest.raises(UserError, match=rf"no dump, or not a complete one \(it has no {RECORD}\)"):
        load_dump(tmp_path, {})


def test_a_record_that_was_cut_off_is_said(tmp_path):
    (tmp_path / RECORD).write_text('{"step": 1')
    with pytest.raises(UserError, match=f"{RECORD}: empty or damaged; replay another dump$"):
        load_dump(tmp_path, {})


@pytest.mark.parametrize("name", CHANGES)
def test_what_a_step_computes_is_not_changed(name, tmp_path):
    (tmp_path / RECORD).write_text("{}")
    with pytest.raises(UserError, match=f"^{name}: a replay computes what the step did; it takes"):
        load_dump(tmp_path, {name: 1})
