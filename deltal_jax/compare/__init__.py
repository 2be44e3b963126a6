"""Comparisons: methods × seeds, one small file for each training run."""
