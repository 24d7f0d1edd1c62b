"""Show what an encoder or a classifier looks at."""
