"""Denoising Vision Transformers (DVT): features without the pattern that hangs on the position and not on the image."""
