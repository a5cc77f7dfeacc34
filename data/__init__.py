"""Images in: sources, the endless stream, transforms and the loader."""
