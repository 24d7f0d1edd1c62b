"""Show what an encoder or a classifier looks at: the methods of `patchloom.explain`, a function."""
