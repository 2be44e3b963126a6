"""The parts of a run: which of them runs share."""

from deltal_jax.config import load_config
from deltal_jax.training.setup import make_engine, make_setup, make_update


def test_runs_of_one_experiment_share_their_programs_and_no_other_run_has_them(tmp_path):
    def programs(**overrides):
        fields = {name.replace("__", "."): value for name, value in overrides.items()}
        setup = make_setup(load_config("countdown-tiny", fields))
        updates = [make_update(setup, phase) for phase in ("sft", "rl")]
        return [make_engine(setup, temperature=1.0), *updates]

    first = programs(run__dir=str(tmp_path / "one"))
    again = programs(run__dir=str(tmp_path / "two"))
    assert all(a is b for a, b in zip(first, again, strict=True)) and first[1] is not first[2]
    other = programs(model__d_ff=8)
    assert not any(a is b for a, b in zip(first, other, strict=True))
    rate = programs(rl__optimizer__learning_rate=0.5)
    assert rate[0] is first[0] and rate[2] is not first[2]


def test_a_mixture_has_updates_too():
    """Though its config has a dictionary, which no cache takes as a key."""
    fields = {"task.name": "mixture", "task.mixture": {"countdown": 3, "paths": 1}}
    setup = make_setup(load_config("countdown-tiny", fields))
    assert make_update(setup, "rl") is make_update(setup, "rl")
