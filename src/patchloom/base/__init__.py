"""What every floor may use and that knows nothing of images: signals, progress, stored tensors, words of settings."""
