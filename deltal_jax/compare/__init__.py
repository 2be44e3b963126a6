"""Methods compared: a plan of cells, one training run each, and what they show."""
