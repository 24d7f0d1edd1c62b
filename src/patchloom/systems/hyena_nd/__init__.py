"""Published checkpoints of Hyena N-D; its encoders are `encoders/hyena_vit.py`."""
