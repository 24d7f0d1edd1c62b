"""How well defects are found: figures of images and pixels, baselines, maps on disk."""
