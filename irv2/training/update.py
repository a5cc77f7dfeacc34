"""The end of a step: clipping, optimizer and running average - or, after a bad step, nothing.

With RMSProp one compiled loop does all three on a CPU. The host decides here, which on a CPU costs
nothing. On a GPU it would have to wait, so that flat.py does the same on the device; but not in
fp16, where the scaler asks the host anyway, nor with other optimizers, which take no mask.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from irv2.network.accelerate import loops
from irv2.training.optim import RMSpropTF
from irv2.training.state import TrainState


def gradient_norm(parameters: Iterable[Tensor]) -> Tensor:
    """Norm of all gradients together, float32 []; not finite if one of them is not."""
    grads = [p.grad for p in parameters if p.grad is not None]
    if loops is not None and loops.takes(grads):
        return loops.norm(grads)
    return nn.utils.get_total_norm(grads, foreach=True)


def apply(
    state: TrainState,
    good: Tensor,
    norm: Tensor,
    clip_norm: float | None,
    statistics: list[Tensor],
    before: list[Tensor],
) -> None:
    """Update weights and average from the gradients if the bool `good` is true, else undo forward.

    norm: of the gradients, which are scaled down to `clip_norm` if it is more. To undo what forward
    has changed, `statistics` are set to `before`.
    """
    if good:
        _apply(state, norm, clip_norm)
    elif statistics:
        torch._foreach_copy_(statistics, before)


def _apply(state: TrainState, norm: Tensor, clip_norm: float | None) -> None:
    has_loop = isinstance(state.optimizer, RMSpropTF) and loops is not None
    is_looped = has_loop and not state.scaler.is_enabled()
    if not (is_looped and _apply_in_one_pass(state, norm, clip_norm)):
        if clip_norm is not None:
            parameters = state.model.parameters()
            nn.utils.clip_grads_with_norm_(parameters, clip_norm, norm, foreach=True)
        state.scaler.step(state.optimizer)
        state.ema.update(state.model, step=state.step + 2)


def _apply_in_one_pass(state: TrainState, norm: Tensor, clip_norm: float | None) -> bool:
    """Clip, update and average in the compiled loop; if it cannot, do nothing: False."""
    decay = state.ema.get_decay(state.step + 2)
    averages = dict(zip(state.model.parameters(), state.ema.module.parameters()))
    groups = [(group, _slots(state, group, averages)) for group in state.optimizer.param_groups]
    if not all(loops.fits(slots) for _, slots in groups):
        return False
    grad_scale = 1.0 if clip_norm is None else min(1.0, clip_norm / (norm.item() + 1e-6))
    with torch.no_grad():
        for group, slots in groups:
            rates = (group[name] for name in ("weight_decay", "alpha", "eps", "momentum", "lr"))
            loops.rmsprop(slots, loops.Rates(grad_scale, *rates, 1 - decay))
            for own in slots:
                del averages[own.parameter]
        _average(list(averages), list(averages.values()), 1 - decay)  # what is not trained
        _average(list(state.model.buffers()), list(state.ema.module.buffers()), 1 - decay)
    return True


def _slots(state: TrainState, group: dict, averages: dict[Tensor, Tensor]) -> list[loops.Slots]:
    """Collect the loop's tensors, of the parameters that have a gradient."""
    slots = []
    for p in group["params"]:
        if p.grad is not None:
            own = state.optimizer.slots_of(p)
            mean_square, momentum = own["square_avg"], own["momentum_buffer"]
            slots.append(loops.Slots(p, p.grad, mean_square, momentum, averages[p]))
    return slots


def _average(values: list[Tensor], averages: list[Tensor], weight: float | Tensor) -> None:
    """Move averages towards values by a share `weight` of the way; counters are copied.

    ModelEmaV3 does the same, but its update takes no mask.
    """
    pairs = [(v, a) for v, a in zip(values, averages) if a.is_floating_point()]
    counters = [(v, a) for v, a in zip(values, averages) if not a.is_floating_point()]
    if counters:
        torch._foreach_copy_([a for _, a in counters], [v for v, _ in counters])
    if pairs:
        changes = torch._foreach_sub([v for v, _ in pairs], [a for _, a in pairs])
        torch._foreach_mul_(changes, weight)
        torch._foreach_add_([a for _, a in pairs], changes)
