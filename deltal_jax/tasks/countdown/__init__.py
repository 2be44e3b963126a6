"""CountDown: reach a target from numbers, each used exactly once."""
