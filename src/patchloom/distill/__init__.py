"""Teach a small model what a large one knows: the methods of `patchloom.distill`, a function."""
