"""The loss that training minimises."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Loss:
    """Cross-entropy with label smoothing; the auxiliary head's is added with its weight.

    With `class_weights`, float32 [C], an image's loss is multiplied by its class's weight, for a
    mixed image by the expected weight; the mean is still taken over images, so that it does not
    depend on how a batch is divided.
    """

    label_smoothing: float = 0.1
    aux_weight: float = 0.4
    class_weights: Tensor | None = None

    def __call__(self, output: Tensor | tuple[Tensor, Tensor], labels: Tensor) -> Tensor:
        """Mean loss, float32. `output`: logits [B, C], or (logits, auxiliary logits); `labels`:
        classes int64 [B], or their shares float [B, C]."""
        if isinstance(output, tuple):
            logits, aux_logits = output
            return self(logits, labels) + self.aux_weight * self(aux_logits, labels)
        logits, smoothing = output.float(), self.label_smoothing
        if self.class_weights is None:
            return F.cross_entropy(logits, labels, label_smoothing=smoothing)
        # cross_entropy's own `weight` would divide by the batch's sum of weights.
        losses = F.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="none")
        is_mixed = labels.ndim == 2
        weights = labels.float() @ self.class_weights if is_mixed else self.class_weights[labels]
        return (weights * losses).mean()


def balanced_weights(counts: Sequence[int]) -> Tensor:
    """Number of images of each class -> weights float32 [C] with which all classes count alike.

    N / (C n), scikit-learn's "balanced"; their mean over the images is 1.
    """
    images = torch.tensor(counts, dtype=torch.float64)
    return (images.sum() / (len(images) * images)).float()
