"""TensorFlow's RMSProp, multi-tensor, other optimizers by name, and the parameter groups."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial

import timm.optim
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class RMSpropTF(torch.optim.Optimizer):
    """RMSProp as TensorFlow computes it (`training_ops.cc`, ApplyRMSProp).

        ms  <- ms + (g^2 - ms) (1 - alpha)           ms starts at 1
        mom <- momentum mom + lr g / sqrt(ms + eps)   eps inside the root, lr inside the buffer
        p   <- p - mom

    with g the gradient plus `weight_decay` p. `torch.optim.RMSprop` differs in all three places;
    with eps = 1, the paper's value, that is another optimizer.

    All tensors of a group are updated together (`torch._foreach_*`), without a host-device
    synchronisation. Raises ValueError for a hyper-parameter out of range.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict],
        lr: float,
        alpha: float = 0.9,
        eps: float = 1.0,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
    ) -> None:
        for name, value, valid in (
            ("lr", lr, lr >= 0),
            ("alpha", alpha, 0 <= alpha < 1),
            ("eps", eps, eps >= 0),
            ("momentum", momentum, 0 <= momentum < 1),
            ("weight_decay", weight_decay, weight_decay >= 0),
        ):
            if not valid:
                raise ValueError(f"RMSpropTF: {name}={value} is out of range")
        defaults = {
            "lr": lr,
            "alpha": alpha,
            "eps": eps,
            "momentum": momentum,
            "weight_decay": weight_decay,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._update(params, group)
        return loss

    def _update(self, params: list[Tensor], group: dict) -> None:
        states = [self.slots_of(p) for p in params]
        mean_squares = [state["square_avg"] for state in states]
        momenta = [state["momentum_buffer"] for state in states]
        grads = [p.grad for p in params]
        if group["weight_decay"]:
            grads = torch._foreach_add(grads, params, alpha=group["weight_decay"])
        torch._foreach_mul_(mean_squares, group["alpha"])
        torch._foreach_addcmul_(mean_squares, grads, grads, value=1 - group["alpha"])
        roots = torch._foreach_add(mean_squares, group["eps"])
        torch._foreach_sqrt_(roots)
        torch._foreach_mul_(momenta, group["momentum"])
        torch._foreach_addcdiv_(momenta, grads, roots, value=group["lr"])
        torch._foreach_sub_(params, momenta)

    def slots_of(self, p: Tensor) -> dict[str, Tensor]:
        """A parameter's mean square and momentum, which begin at 1 and 0."""
        state = self.state[p]
        if not state:
            state["square_avg"] = torch.ones_like(p)
            state["momentum_buffer"] = torch.zeros_like(p)
        return state


KINDS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "rmsprop_tf": RMSpropTF,
    "sgd": torch.optim.SGD,
    "adamw": torch.optim.AdamW,
    "lamb": partial(timm.optim.Lamb, max_grad_norm=None),  # clipped before, as for all
}


def parameter_groups(
    model: nn.Module, weight_decay: float, lr_scales: Mapping[str, float] | None = None
) -> list[dict]:
    """Two groups of trainable parameters: L2 on convolutions and linear layers, none on batch norm.

    TF-slim regularises weights and biases alike and leaves batch norm's beta free.
    `lr_scales`: share of the learning rate that each of the model's children gets, by name; two
    groups for each share that occurs, which is the group's "lr_scale". Raises ValueError for a
    parameter of any other kind of layer, or of a child without a share, rather than guessing.
    """
    groups: dict[float, list[dict]] = {}
    for name, module in model.named_modules():
        own = [p for p in module.parameters(recurse=False) if p.requires_grad]
        if not own:
            continue
        is_regularised = isinstance(module, (nn.Conv2d, nn.Linear))
        if not (is_regularised or isinstance(module, _BatchNorm)):
            raise ValueError(f"{name}: no weight decay is defined for {type(module).__name__}")
        child = name.partition(".")[0]
        if lr_scales is not None and child not in lr_scales:
            raise ValueError(f"{child}: no share of the learning rate is defined for it")
        scale = 1.0 if lr_scales is None else lr_scales[child]
        regularised, free = groups.setdefault(
            scale,
            [
                {"params": [], "weight_decay": weight_decay, "lr_scale": scale},
                {"params": [], "weight_decay": 0.0, "lr_scale": scale},
            ],
        )
        (regularised if is_regularised else free)["params"] += own
    return [group for pair in groups.values() for group in pair]
