"""The network among timm's: `import irv2.timm`, then `timm.create_model("irv2_…")`.

timm.create_model("irv2_inception_resnet_v2", num_classes=10, aux_logits=True)
timm.create_model("irv2_inception_resnet_v2.tf_in1k", pretrained=True)
"""

from __future__ import annotations

from typing import Any

from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    get_pretrained_cfg,
    register_model,
)

from irv2.network import inception_resnet_v2
from irv2.network.model import InceptionResnetV2

THEIRS = "inception_resnet_v2"
NAME = f"irv2_{THEIRS}"

default_cfgs = generate_default_cfgs(
    {
        f"{NAME}.{tag}": get_pretrained_cfg(f"{THEIRS}.{tag}")
        for tag in ("tf_in1k", "tf_ens_adv_in1k")
    }
)


@register_model
def irv2_inception_resnet_v2(pretrained: bool = False, **options: Any) -> InceptionResnetV2:
    """Build `irv2.network.inception_resnet_v2`, whose options it takes, with timm's weights if
    these are asked for."""
    return build_model_with_cfg(inception_resnet_v2, NAME, pretrained, **options)
