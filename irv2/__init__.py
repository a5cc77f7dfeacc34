"""Inception-ResNet-v2: the network and everything that trains it."""
