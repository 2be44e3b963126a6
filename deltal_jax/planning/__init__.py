"""What a run would take of a TPU slice, found by its compiler where there is none."""
