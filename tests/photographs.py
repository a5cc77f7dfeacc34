"""The two photographs that scikit-learn ships, and the kinds that ImageNet holds, made of them."""

from __future__ import annotations

from pathlib import Path

from PIL import Image
from sklearn.datasets import load_sample_images

CHINA, FLOWER = load_sample_images().images  # uint8 [427, 640, 3]


def write_photographs(folder: Path) -> dict[str, Path]:
    """A file of each kind."""
    china, flower = Image.fromarray(CHINA), Image.fromarray(FLOWER)
    alpha = Image.linear_gradient("L").resize(china.size)
    kinds = {
        "landscape.jpg": china,
        "portrait.jpg": flower.rotate(90, expand=True),
        "tiny.jpg": flower.resize((40, 60)),
        "large.jpg": china.resize((1501, 1003)),
        "grey.jpg": china.convert("L"),
        "palette.png": flower.quantize(64),
        "rgba.png": Image.merge("RGBA", (*china.split(), alpha)),
        "cmyk.jpg": flower.convert("CMYK"),
        "progressive.jpg": china.resize((500, 375)),
        "tower.jpg": china.resize((300, 700)),
        "strip.jpg": china.resize((900, 310)),
    }
    for name, image in kinds.items():
        image.save(folder / name, progressive=name == "progressive.jpg")
    return {name: folder / name for name in kinds}
