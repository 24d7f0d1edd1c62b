"""VIM: images made token by token (vector-quantised image modelling; Yu et al. 2022, arXiv 2110.04627)."""
