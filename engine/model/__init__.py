"""DeepSeek-V4: weights, layers, forward pass."""
