"""BEiT and BEiT v2, and its tokenizer VQ-KD (Bao et al. 2021, arXiv 2106.08254; Peng et al. 2022, arXiv 2208.06366)."""
