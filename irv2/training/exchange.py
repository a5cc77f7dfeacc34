"""How the gradients of all ranks become one.

DistributedDataParallel averages them while backward runs. A step that is recorded cannot hold its
hooks; its gradients are averaged between backward and update, whole buffers at a time.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from irv2.training.distributed import World


def wrapped(model: nn.Module, world: World, reduce_dtype: str = "fp32") -> nn.Module:
    """Wrap the model, so that its gradients are averaged over ranks while backward runs.

    With `reduce_dtype` "bf16" gradients travel rounded to bfloat16, which halves the traffic; they
    are accumulated and applied in the parameters' type.
    """
    if world.size == 1:
        return model
    # Running statistics are averaged by the step itself, so none are broadcast. The option has a
    # new name in newer releases of PyTorch.
    known = inspect.signature(DistributedDataParallel).parameters
    option = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    network = DistributedDataParallel(model, gradient_as_bucket_view=True, **{option: False})
    if reduce_dtype == "bf16":
        network.register_comm_hook(None, bf16_compress_hook)
    return network


def in_backward(network: nn.Module, is_last: bool) -> AbstractContextManager:
    """Average gradients over ranks in a step's last backward; only add them up in the others."""
    if is_last or not isinstance(network, DistributedDataParallel):
        return nullcontext()
    return network.no_sync()


def average_(gradients: Iterable[Tensor], world: World, reduce_dtype: str = "fp32") -> None:
    """Replace buffers of gradients by their means over all ranks; see `wrapped`.

    Divides before it adds up, as DistributedDataParallel does.
    """
    if world.size == 1:
        return
    for gradient in gradients:
        sent = gradient.to(torch.bfloat16) if reduce_dtype == "bf16" else gradient
        sent.div_(world.size)
        dist.all_reduce(sent)
        if sent is not gradient:
            gradient.copy_(sent)
