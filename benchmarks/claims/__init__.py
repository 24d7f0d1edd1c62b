"""One script per system: what its paper claims, at a small scale, several seeds, mean ± standard deviation."""
