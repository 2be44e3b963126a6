"""What keeps a run alive, or ends it well: fail-points to test that nothing is lost."""
