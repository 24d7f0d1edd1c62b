"""Classes learnt task after task, with gated class-attention and drift compensation (GCAB-CFDC)."""
