"""How easily a model is fooled: attacks on one's own models, what they did, and whether the figures can be trusted."""
