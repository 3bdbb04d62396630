"""A buffer that grows in place while earlier parts of it are already in an autograd graph."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Growing:
    """Vectors appended one by one and read as slices, at O(1) a vector forward and backward.

    Concatenating copies all that came before, step after step, and an ordinary buffer written in
    place loses its gradient. Here a read adds its gradient into a second buffer, from which an
    append takes its own; each append hands a token to the next and to the reads after it, so that
    backward meets them in the right order.
    """

    def __init__(self, start: Tensor, room: int) -> None:
        """Begins with `start` (B S …), with room for so many more along its second axis."""
        self.size = start.shape[1]
        shape = (start.shape[0], room, *start.shape[2:])
        self.buffer = torch.cat([start.detach(), start.new_zeros(shape)], 1)
        self.gradient: Tensor | None = None
        self.token: Tensor = _Begin.apply(self, start)  # pyright: ignore[reportAttributeAccessIssue]

    def append(self, x: Tensor) -> None:
        """x: B …"""
        self.token = _Append.apply(self, self.size, x, self.token)  # pyright: ignore[reportAttributeAccessIssue]
        self.size += 1

    def read(self, first: int, last: int) -> Tensor:
        """Vectors first … last − 1, all of them there already."""
        return _Read.apply(self, first, last, self.token)  # pyright: ignore[reportReturnType]

    def gathered(self) -> Tensor:
        """The gradient so far."""
        if self.gradient is None:
            self.gradient = torch.zeros_like(self.buffer)
        return self.gradient


class _Begin(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, growing: Growing, start: Tensor) -> Tensor:
        ctx.growing, ctx.size = growing, start.shape[1]
        return start.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *_: Any) -> Any:
        return None, ctx.growing.gathered()[:, : ctx.size].clone()


class _Append(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, growing: Growing, at: int, x: Tensor, token: Tensor) -> Tensor:
        ctx.growing, ctx.at = growing, at
        growing.buffer[:, at] = x
        return token.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dtoken: Tensor) -> Any:
        gathered = ctx.growing.gathered()[:, ctx.at]
        found = gathered.clone()
        gathered.zero_()  # a second backward pass starts anew
        return None, None, found, dtoken


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, growing: Growing, first: int, last: int, token: Tensor) -> Tensor:
        ctx.growing, ctx.first, ctx.last = growing, first, last
        # `.data` leaves the version counter behind: what is read here is never written again.
        return growing.buffer.data[:, first:last]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dread: Tensor) -> Any:
        ctx.growing.gathered()[:, ctx.first : ctx.last] += dread
        return None, None, None, dread.new_zeros(())
