"""Programs that run a trained network on a CPU faster than PyTorch does."""
