"""Where the network looked: HiResCAM (Draelos and Carin, arXiv:2011.08891) by captum, drawn.

At the last map, which is 7x7 or larger for images of 267 px or more, this is Grad-CAM
(arXiv:1610.02391). Smaller images are explained at an earlier map, where Grad-CAM would not be
faithful: it averages gradients over places.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from data.errors import UserError
from data.optional import is_installed
from data.to_input import ToInput
from irv2 import input_pipeline
from irv2.evaluation import Evaluation
from irv2.run.trained import Trained

COLOURS = "inferno"
OPACITY = 0.6  # of the colours where the map is at its largest
LAYERS = ((267, "conv2d_7b"), (139, "repeat_1"), (0, "repeat"))  # from a side of px on: 7x7 places
GAP = 4  # px between pictures side by side


class ExplainError(UserError):
    """A library that is needed, and is not installed."""


def check_installed() -> None:
    """Raise ExplainError where there is no captum."""
    if not is_installed("captum"):
        raise ExplainError("--explain needs captum: pip install -r requirements-explain.txt")


class ClassMaps:
    """Maps of how much each place of an image speaks for a class."""

    def __init__(self, network: Trained, device: torch.device) -> None:
        from captum.attr import LayerGradientXActivation

        model: nn.Module = network.model.to(device).eval()
        layer = next(name for least, name in LAYERS if network.data.image_size >= least)
        self.products = LayerGradientXActivation(model, getattr(model, layer))
        self.to_input = ToInput(network.data.mean, network.data.std, device)
        self.device = device

    def maps(self, pixels: np.ndarray, classes: Sequence[int]) -> Tensor:
        """uint8 [B, H, W, 3] and a class of each -> float32 [B, H, W] in [0, 1], 0 where nothing
        speaks for the class."""
        images = torch.from_numpy(pixels).to(self.device)
        flips = torch.zeros(len(images), dtype=torch.bool, device=self.device)
        target = torch.tensor(classes, device=self.device)
        with torch.inference_mode(False), torch.enable_grad():
            x = self.to_input(images, flips, None).clone()
            heat = self.products.attribute(x, target=target).detach().sum(1, keepdim=True).relu()
        heat = F.interpolate(heat, pixels.shape[1:3], mode="bilinear", align_corners=False)[:, 0]
        return heat / heat.amax((1, 2), keepdim=True).clamp_min(1e-12)

    def drawn(self, pixels: np.ndarray, classes: Sequence[int]) -> Image.Image:
        """Draw the maps of some classes over one image, uint8 [H, W, 3], side by side with it."""
        several = np.broadcast_to(pixels, (len(classes), *pixels.shape)).copy()
        return side_by_side([pixels, *map(over, several, self.maps(several, classes).cpu())])


def of_images(evaluation: Evaluation) -> Callable[[int, list[int]], Image.Image]:
    """Return what draws (image number, classes) of an evaluation as `ClassMaps.drawn` does."""
    maps = ClassMaps(evaluation.network, torch.device("cpu"))

    def explanation(index: int, classes: list[int]) -> Image.Image:
        seen = input_pipeline.pictures(evaluation.data, evaluation.source, [index])
        return maps.drawn(seen[index], classes)

    return explanation


def over(pixels: np.ndarray, heat: Tensor) -> np.ndarray:
    """Lay a map [H, W] in [0, 1] over an image, uint8 [H, W, 3], as colours."""
    colours = 255 * matplotlib.colormaps[COLOURS](heat.numpy())[..., :3]
    share = OPACITY * heat.numpy()[..., None]
    return (pixels * (1 - share) + colours * share).round().astype(np.uint8)


def side_by_side(pictures: Sequence[np.ndarray]) -> Image.Image:
    """Join pictures of one size, uint8 [H, W, 3], with white between them."""
    gap = np.full((pictures[0].shape[0], GAP, 3), 255, np.uint8)
    parts = [part for picture in pictures for part in (gap, picture)][1:]
    return Image.fromarray(np.concatenate(parts, axis=1))
