"""The state that training changes, and its part that a checkpoint holds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from irv2.training.flat import Flat

GROUP = "group_step"  # of an optimizer that counts the steps of its groups, as Lamb
COUNTERS = ("step", "images_seen", "bad_images", "bad_steps", "bad_steps_in_a_row")


@dataclass(eq=False)
class TrainState:
    """The state of a run: `step` counts steps, `images_seen` is the position in the stream."""

    model: nn.Module
    ema: ModelEmaV3
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    step: int = 0
    images_seen: int = 0
    bad_images: int = 0  # that training could not use
    bad_steps: int = 0  # left out because the loss or the gradient was not finite
    bad_steps_in_a_row: int = 0
    unread: list[Tensor] = field(
        default_factory=list
    )  # of each step since the last count: was it applied?
    flat: Flat | None = None  # on a GPU, from the first step on: the buffers of all tensors

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Return the tensors to resume from, not copied; weights under timm's names."""
        slots = {
            f"{slot}.{name}": tensor
            for name, parameter in self.model.named_parameters()
            for slot, tensor in self.optimizer.state.get(parameter, {}).items()
            if tensor is not None  # as SGD's without momentum
        }
        counts = {
            f"{GROUP}.{number}": torch.as_tensor(group["step"])
            for number, group in enumerate(self.optimizer.param_groups)
            if "step" in group
        }
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.module.state_dict(),
            "optimizer": slots | counts,
        }

    def counters(self) -> dict[str, Any]:
        """Return all that is not a tensor. Call `read_bad_steps` after the last step first."""
        return {
            **{name: getattr(self, name) for name in COUNTERS},
            "scaler": self.scaler.state_dict(),
        }

    def load(self, tensors: dict[str, dict[str, Tensor]], counters: dict[str, Any]) -> None:
        """Restore a saved state.

        Raises RuntimeError or KeyError if it is another network's or optimizer's.
        """
        self.model.load_state_dict(tensors["model"])
        self.ema.module.load_state_dict(tensors["ema"])
        parameters = dict(self.model.named_parameters())
        groups = {str(number): group for number, group in enumerate(self.optimizer.param_groups)}
        for key, saved in tensors["optimizer"].items():
            slot, _, name = key.partition(".")
            if slot == GROUP:
                groups[name]["step"] = saved.clone()
                continue
            parameter = parameters[name]
            like = parameter if parameter.shape == saved.shape else saved  # as AdamW's count
            self.optimizer.state[parameter][slot] = torch.empty_like(like).copy_(saved)
        self.flat = None  # the slots are new
        self.scaler.load_state_dict(counters["scaler"])
        for name in COUNTERS:
            setattr(self, name, counters[name])

    def read_bad_steps(self) -> tuple[list[int], int]:
        """Count the steps since the last call that were left out.

        Returns their numbers, a run's first step being 1, and how many came in a row at most; a row
        may have begun before. Waits for the device.
        """
        good = torch.stack(self.unread).tolist() if self.unread else []
        first = self.step - len(good) + 1
        self.unread.clear()
        longest = 0
        for is_good in good:
            self.bad_steps_in_a_row = 0 if is_good else self.bad_steps_in_a_row + 1
            longest = max(longest, self.bad_steps_in_a_row)
        bad = [first + i for i, is_good in enumerate(good) if not is_good]
        self.bad_steps += len(bad)
        return bad, longest


def running_average(model: nn.Module, decay: float) -> ModelEmaV3:
    """Average of weights and batch-norm statistics with TensorFlow's warm-up.

    timm's 1 - (1 + s / 9)^-1 with s = n + 1, n the steps before this one, is
    tf.train.ExponentialMovingAverage's min(decay, (1 + n) / (10 + n)). timm subtracts 1 from the
    step it is given, so it is given n + 2.
    """
    return ModelEmaV3(model, decay, use_warmup=True, warmup_gamma=9.0, warmup_power=1.0)
