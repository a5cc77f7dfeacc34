"""Pages for people: an evaluation explained, training runs side by side."""
