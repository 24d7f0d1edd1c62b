"""What an encoder said of each test image, and the figures of that; intervals are in `patchloom.statistics`."""
