"""What a pile of images holds, and which of it to train on: a first look, copies, parts, a balanced choice, shards."""
