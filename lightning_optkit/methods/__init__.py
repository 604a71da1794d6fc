"""What can a training run do about it? Pure functions of tensors."""
