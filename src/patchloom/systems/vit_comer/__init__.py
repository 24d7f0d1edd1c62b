"""ViT-CoMer: a CNN beside a plain ViT makes its tokens a feature pyramid (Xia et al. 2024, arXiv 2403.07392)."""
