"""The forms in which weights are kept, each read into timm's names."""
