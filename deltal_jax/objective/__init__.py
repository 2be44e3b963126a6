"""The mathematics: arrays in, arrays out. Knows no config, no mesh, no I/O."""
