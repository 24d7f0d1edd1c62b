"""ViT-P: a ViT that classifies points, beside a model that draws masks (arXiv 2505.19795)."""
