"""Measure an encoder on labelled images: the evaluations of `patchloom.evaluate`, a function."""
