"""A network's training: its state, one step of it, and the ranks that take part."""
