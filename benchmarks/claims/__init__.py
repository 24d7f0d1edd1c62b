"""One script per system: its specification's claims at a small scale, several seeds, mean ± standard deviation."""
