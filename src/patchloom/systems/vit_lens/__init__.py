"""ViT-Lens: a frozen ViT as the encoder of point clouds, depth, sound, touch and EEG (arXiv 2311.16081)."""
