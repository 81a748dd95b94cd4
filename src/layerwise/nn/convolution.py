"""Convolutions whose filters are standardized, and TensorFlow's way of padding."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Convolution(nn.Conv2d):
    """A 2-D convolution: (b, c, h, w) -> (b, c', h', w').

    Args:
        standardize: every filter is replaced by (w - mean w) / sqrt(var w + standardize), over its inputs and both axes, on the fly.
            Source: Qiao et al. 2019, "Weight Standardization", section 3.
        same: the output has ceil(input / stride) rows and columns; the odd pixel of padding is below and at the right.
            Otherwise `dilation * (size - 1) // 2` on every side.
    """

    def __init__(
        self,
        inner: int,
        outer: int,
        size: int,
        *,
        stride: int = 1,
        dilation: int = 1,
        bias: bool = False,
        standardize: float | None = None,
        same: bool = False,
    ) -> None:
        padding = 0 if same else dilation * (size - 1) // 2
        super().__init__(inner, outer, size, stride=stride, padding=padding, dilation=dilation, bias=bias)
        self.standardize, self.same = standardize, same

    def effective(self) -> Tensor:
        """The filters that are used."""
        if self.standardize is None:
            return self.weight
        flat = self.weight.flatten(1)
        variance, mean = torch.var_mean(flat, dim=1, correction=0, keepdim=True)
        return ((flat - mean) * torch.rsqrt(variance + self.standardize)).view_as(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        if self.same:
            x = pad_same(x, self.kernel_size[0], self.stride[0], self.dilation[0])
        return F.conv2d(x, self.effective(), self.bias, self.stride, self.padding, self.dilation)


def pad_same(x: Tensor, size: int, stride: int, dilation: int = 1) -> Tensor:
    """Zeros around (b, c, h, w) so that a window of `size` and `stride` makes ceil(h / stride) x ceil(w / stride) of it."""
    down, right = (max((-(-n // stride) - 1) * stride + (size - 1) * dilation + 1 - n, 0) for n in x.shape[-2:])
    return F.pad(x, (right // 2, right - right // 2, down // 2, down - down // 2)) if down or right else x
