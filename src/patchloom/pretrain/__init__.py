"""Train an encoder on unlabelled images: the methods of `patchloom.pretrain`, a function."""
