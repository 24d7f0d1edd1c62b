"""ViT-VQGAN: a tokenizer of images that is learned (Yu et al. 2022, arXiv 2110.04627)."""
