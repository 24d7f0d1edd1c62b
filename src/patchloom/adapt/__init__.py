"""Train an encoder further on labelled images: the methods of `patchloom.adapt`, a function."""
