"""Inception-ResNet-v2, its weights in and out, and the form of it that is fast."""
