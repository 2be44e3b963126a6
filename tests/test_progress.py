"""Progress goes to standard error, as plain lines where there is no terminal."""

from deltal_jax.progress import ProgressDisplay


def test_plain_lines_go_to_standard_error_and_the_last_step_is_always_said(capsys):
    display = ProgressDisplay()
    display.start("RL", 0, 3)
    for step in (1, 2, 3):
        display.update(step, {"reward": 0.25, "tokens/s": 12345.6})
    display.stop()
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == ["RL 3/3  reward 0.25  tokens/s 12346  0 s left"]


def test_markup_in_a_message_is_shown_as_it_is(capsys):
    ProgressDisplay().say("loss [bold] <a> [/x]")
    assert capsys.readouterr().err == "loss [bold] <a> [/x]\n"


def test_quiet_says_nothing(capsys):
    display = ProgressDisplay(quiet=True)
    display.say("hello")
    display.start("RL", 0, 1)
    display.update(1, {})
    assert capsys.readouterr() == ("", "")
