"""Stronger recipes, each off by default: RandAugment, random erasing, mixup, cutmix.

The operations are torchvision's. Their random numbers come from torch's CPU generator, which is
set for each image, or pair of images, by its place in the run, and put back afterwards.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import one_hot
from torchvision.transforms import v2

from data.loader import Batch
from data.stream import AUGMENT, MIX, Key


@contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Seed torch's CPU generator by the key; afterwards it is as it was."""
    (seed,) = np.random.SeedSequence(key).generate_state(1, np.uint64)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(seed))  # torch.manual_seed sets those of GPUs too
        yield


class Augment:
    """RandAugment (Cubuk et al., 2020), two operations, then random erasing (Zhong et al., 2020).

    magnitude: from 0 to 30, None for none of it; erasing: its probability; fill: the level of each
    channel where an image was moved away or erased.
    """

    def __init__(self, magnitude: int | None, erasing: float, fill: Sequence[int]) -> None:
        self._rand_augment = None
        if magnitude is not None:
            self._rand_augment = v2.RandAugment(magnitude=magnitude, fill=list(fill))
        self._erase = v2.RandomErasing(erasing, value=list(fill), inplace=True)

    def __call__(self, pixels: np.ndarray, key: tuple[int, int, int]) -> None:
        """Change uint8 [H, W, 3] in place; key: (seed, epoch, index)."""
        with seeded(*key, AUGMENT):
            if self._rand_augment is not None:
                pixels[:] = np.asarray(self._rand_augment(Image.fromarray(pixels)))
            self._erase(torch.from_numpy(pixels).permute(2, 0, 1))


class Mix:
    """Mixup (Zhang et al., 2018) and cutmix (Yun et al., 2019) of neighbours in the stream.

    The images 2k and 2k + 1 of a batch are mixed with each other, so that a pair does not depend
    on how the global batch is divided as long as every part is even. If both are asked for, each
    pair draws one of the two. alpha: both parameters of the beta distribution of shares; 0: off.
    """

    def __init__(self, mixup: float, cutmix: float, num_classes: int, seed: int) -> None:
        self.num_classes, self.seed = num_classes, seed
        kinds = ((v2.MixUp, mixup), (v2.CutMix, cutmix))
        self._kinds = [kind(alpha=a, num_classes=num_classes) for kind, a in kinds if a > 0]

    def __call__(
        self, images: Tensor, labels: Tensor, keys: Sequence[Key]
    ) -> tuple[Tensor, Tensor]:
        """float [B, 3, H, W], int64 [B] -> mixed images, float [B, C] shares of the classes.

        An odd image at the end stays as it is.
        """
        mixed, shares = images.clone(), one_hot(labels, self.num_classes).to(images.dtype)
        for first in range(0, len(images) - 1, 2):
            pair = slice(first, first + 2)
            with seeded(self.seed, *keys[first], MIX):
                kind = self._kinds[int(torch.randint(len(self._kinds), ()))]
                mixed[pair], shares[pair] = kind(images[pair], labels[pair])
        return mixed, shares

    def batches(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yield batches, mixed."""
        for batch in batches:
            images, shares = self(batch.images, batch.labels, batch.keys)
            yield batch._replace(images=images, labels=shares)
