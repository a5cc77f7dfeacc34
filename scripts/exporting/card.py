"""A model card, written from what a network and its run say, and the hub that it goes to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.utils import HfHubHTTPError, HFValidationError

from data.names import in_order
from irv2 import strict_yaml
from irv2.formats import ExportError
from irv2.report import markdown
from irv2.report.statistics import wilson
from irv2.result_files import log_beside
from irv2.run.trained import Trained

HEAD = """---
library_name: timm
pipeline_tag: image-classification
tags: [image-classification, timm, inception-resnet-v2]
---
"""
RECIPE = ("train", "optim", "schedule", "loss", "ema")  # sections of the config; no paths in them
EVALUATIONS = 10  # rows of the curve


def text(network: Trained, repository: str) -> str:
    """Write a card: data, recipe, figures with intervals, curve, limits, how to load it."""
    log = log_beside(network.name)
    evaluations = [
        line for line in log if line["kind"] == "eval" and line["weights"] == network.which
    ]
    parts = [
        HEAD,
        f"# {repository.rpartition('/')[2]}\n",
        f"Inception-ResNet-v2 ([arXiv:1602.07261](https://arxiv.org/abs/1602.07261)) for "
        f"{network.model.num_classes:,} classes, {network.which} weights"
        f"{'' if network.step is None else f' of step {network.step:,}'}.\n",
        _data(network),
        _figures(network, evaluations),
        _recipe(Path(network.name)),
        "## Limits\n\nThe figures are of the validation images named above, as one run left them, "
        "and of no others. Images\nof other cameras, places and classes were not looked at; nor "
        "was how errors are spread over groups of people.\n",
        f"""## Use

```python
import timm

model = timm.create_model("hf-hub:{repository}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
logits = model(transform(image).unsqueeze(0))
```
""",
    ]
    return "\n".join(part for part in parts if part)


def _data(network: Trained) -> str:
    data, classes = network.data, network.classes
    names = "" if classes is None else f" Classes: {markdown.escaped(in_order(classes))}."
    sets = "" if network.images is None else (
        f" Trained on `{Path(data.train).name}`, validated on `{Path(data.val).name}`."
    )  # fmt: skip
    size, crop = data.image_size, data.eval_crop
    return (
        f"## Data\n\nImages of {size}x{size} px, crop {crop:g}, {data.eval_interpolation}, "
        f"mean {data.mean}, std {data.std}.{sets}{names}\n"
    )


def _figures(network: Trained, evaluations: list[dict[str, Any]]) -> str:
    """Top-1 and top-5 of the network's own step with 95 % intervals, and the way there."""
    own = [line for line in evaluations if line["step"] == network.step]
    if not own:
        return "## Figures\n\nNone were at hand when this card was written.\n"
    images, figures = own[-1]["images"], []
    for name in ("top1", "top5"):
        share = own[-1][name]
        low, high = wilson(round(share * images / 100), images)
        figures.append(
            f"{name[:3]}-{name[3]} | {share:.2f} % | {low:.2f} to {high:.2f} | {images:,}"
        )
    every = -(-len(evaluations) // EVALUATIONS)
    rows = [
        f"{line['step']:,} | {line['epoch']:.1f} | {line['loss']:.4f} | {line['top1']:.2f}"
        for line in evaluations[::-1][::every][::-1]
    ]
    return "\n\n".join(
        [
            "## Figures",
            markdown.table("figure | value | 95 % interval | validation images", figures),
            markdown.table("step | epoch | loss | top-1, %", rows) + "\n",
        ]
    )


def _recipe(checkpoint: Path) -> str:
    """Sections of the run's config that say how it was trained; "" without one."""
    for folder in checkpoint.parents[:2]:
        if (folder / "config.yaml").is_file():
            config = strict_yaml.load(folder / "config.yaml")
            lines = [f"{section}: {json.dumps(config[section])}" for section in RECIPE]
            text = "\n".join([*lines, f"seed: {config['run']['seed']}"])
            return f"## Recipe\n\n```yaml\n{text}\n```\n"
    return ""


def push(folder: Path, repository: str) -> str:
    """Upload a folder to a repository of the hub, made if need be; returns its address.

    Raises ExportError, of which the folder remains.
    """
    api = huggingface_hub.HfApi()
    try:
        address = api.create_repo(repository, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Weights and card")
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().partition("\n")[0][:200]
        raise ExportError(
            f"{repository}: cannot be pushed to ({reason}); log in with `hf auth login`. "
            f"{folder} is complete, and can be uploaded as it is"
        ) from None
    return str(address)
