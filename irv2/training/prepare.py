"""Before the first step: compiling, laying out in memory, wrapping for several ranks."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from data import user_cache
from irv2.training import exchange
from irv2.training.distributed import World
from irv2.training.state import TrainState
from irv2.training.step import StepOptions, backward, lay_out, train_mode


def network(
    state: TrainState, micro_batch: int, image_size: int, options: StepOptions, world: World
) -> nn.Module:
    """Return the network that steps call: compiled on request, its gradients averaged over ranks.

    Changes no number in `state`, but where its tensors lie: an evaluation before the first step may
    be recorded.
    """
    if options.compiled:
        user_cache.give_inductor_its_own(torch.__version__)
        state.model.compile_regions(world.say)
    train_mode(state.model, options.freeze_bn)
    lay_out(state, options)
    if options.recorded:
        return state.model
    wrapped = exchange.wrapped(state.model, world, options.reduce_dtype)
    settle(state, wrapped, micro_batch, image_size, options)
    return wrapped


def settle(
    state: TrainState, network: nn.Module, micro_batch: int, image_size: int, options: StepOptions
) -> None:
    """Have DistributedDataParallel lay out its buffers of gradients before the first step.

    It does so after its first backward, and from then on ranks add up in another order; a resumed
    run would differ from an unbroken one in its first step. Changes nothing in `state`.
    """
    if not isinstance(network, DistributedDataParallel):
        return
    train_mode(state.model, options.freeze_bn)
    before = [(buffer, buffer.clone()) for buffer in state.model.buffers()]
    device = next(state.model.parameters()).device
    images = torch.zeros(micro_batch, 3, image_size, image_size, device=device)
    labels = torch.zeros(micro_batch, dtype=torch.int64, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    backward(state, network, images, labels, options)
    state.optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
        for buffer, value in before:
            buffer.copy_(value)
