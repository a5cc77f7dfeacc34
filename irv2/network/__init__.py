"""Inception-ResNet-v2, its weights in and out, and the form of it that is fast."""

from irv2.network.model import inception_resnet_v2

__all__ = ["inception_resnet_v2"]
