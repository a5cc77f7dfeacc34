"""The network's maximum as torch.compile should have it: a kernel forward and one backward.

Inductor's own backward scatters: it adds up gradients in float32, by atomic operations, and in
another layout. Here each position of the input looks at the windows that it is part of, four at
most, so that nothing waits or is moved twice, and sums have one order.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

KERNEL, STRIDE = 3, 2


class FastMaxPool(nn.MaxPool2d):
    """nn.MaxPool2d, with the same numbers; another way where it is compiled for a GPU to train."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() and x.is_cuda and x.requires_grad and self._is_usual():
            return Gathered.apply(x)
        return super().forward(x)

    def _is_usual(self) -> bool:
        how = self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode
        return how == (KERNEL, STRIDE, 0, 1, False) and not self.return_indices


class Gathered(torch.autograd.Function):
    """Maxima of 3x3 windows, 2 apart: [B, C, H, W] -> [B, C, (H - 1) // 2, (W - 1) // 2]."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        """As ATen has it: the first of equal numbers is the largest, and NaN is larger than all."""
        height, width = ((side - KERNEL) // STRIDE + 1 for side in x.shape[2:])
        best = place = None
        for number in range(KERNEL**2):
            top, left = divmod(number, KERNEL)
            rows = x[:, :, top : top + STRIDE * (height - 1) + 1 : STRIDE]
            seen = rows[..., left : left + STRIDE * (width - 1) + 1 : STRIDE]
            if best is None:
                best, place = seen, torch.zeros_like(seen, dtype=torch.int8)
            else:
                is_better = (seen > best) | seen.isnan()
                best = torch.where(is_better, seen, best)
                place = torch.where(is_better, number, place)
        ctx.save_for_backward(place.to(torch.int8))
        ctx.sides = x.shape[2:]
        return best

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> Tensor:
        (place,) = ctx.saved_tensors
        # Channels last, as they lie in memory: indexing would else leave them in another order.
        place, last = place.permute(0, 2, 3, 1), gradient.permute(0, 2, 3, 1)
        vertical, horizontal = (
            _windows(side, count, gradient.device)
            for side, count in zip(ctx.sides, gradient.shape[2:])
        )
        total = None
        for row, above, has_row in vertical:
            for column, before, has_column in horizontal:
                own = ((above * KERNEL).unsqueeze(1) + before).unsqueeze(2)
                exists = has_row.view(-1, 1, 1) & has_column.view(-1, 1)
                is_own = (place[:, row][:, :, column] == own) & exists
                part = torch.where(is_own, last[:, row][:, :, column].float(), 0.0)
                total = part if total is None else total + part
        return total.to(gradient.dtype).permute(0, 3, 1, 2)


def _windows(side: int, count: int, device: torch.device) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return the two windows that each of `side` positions may be part of, of `count` along it.

    For each position: the window's number, the position within it, and whether there is such one.
    """
    position = torch.arange(side, device=device)
    found = []
    for back in (1, 0):  # as ATen adds up: the first window first
        window = position // STRIDE - back
        within = position - STRIDE * window
        exists = (window >= 0) & (window < count) & (within < KERNEL)
        found.append((window.clamp(0, count - 1), within, exists))
    return found
