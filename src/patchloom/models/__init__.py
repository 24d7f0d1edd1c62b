"""A model on disk: bundles, adapters, parts of masked models, exports, and the tensors of published checkpoints."""
