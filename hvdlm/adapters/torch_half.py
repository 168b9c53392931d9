"""Gradients as fp16, scaled by a power of two that makes good use of its range; what overflows is found out.

The scale of a sum comes from the sum before. The bits of an fp16 without its sign order magnitudes as the numbers that
they stand for, and are compared several times as fast: the next scale, and whether all is finite, are read off them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import torch

__all__ = ["decode", "encode", "exponent_of"]

_TARGET_EXP = 12
"""The scaled absolute maximum is brought to 2**12: 16 times under the fp16 limit, 2**36 above its smallest number."""
_MAX_DROP_EXP = 20
"""A maximum that fell by more than 2**20 in one step is at the bottom of the fp16 range, where it has few bits left."""
_ZERO_EXP = 126
"""The exponent after a sum of zeros, the largest that float32 can scale by: whatever comes next is found out."""
_INFINITY_BITS = 0x7C00
"""What is not finite has these bits, or greater ones."""
_CHUNK = 2**17
"""Elements that a processor's cache holds from one operation to the next."""


def encode(grad: torch.Tensor, weight: float, exponent: int, out: torch.Tensor) -> None:
    """Write ``weight * 2**exponent * grad``.

    Args:
        grad: Any shape.
        weight: Of this worker's gradient.
        exponent: The scale.
        out: float16, of the same shape, contiguous.
    """
    if weight == 0.0:
        out.zero_()  # a NaN of a filler sample must not spread: 0 * NaN is NaN
        return
    for own, part in _chunks(grad, out):
        torch.mul(own, weight * 2.0 ** min(exponent, _ZERO_EXP), out=part)


def decode(half: torch.Tensor, exponent: int, out: torch.Tensor) -> int | None:
    """Write a sum without its scale; returns the scale for the next one.

    Args:
        half: float16, shape (n,); its signs are lost.
        exponent: What it was scaled by.
        out: float32 or float64, shape (n,).

    Returns:
        None if the sum is not finite, or so small that fp16 rounded too much of it away.
    """
    scaled_by, highest = min(exponent, _ZERO_EXP), []
    for own, part in _chunks(half, out):
        part.copy_(own)
        part.mul_(2.0**-scaled_by)
        highest.append(own.abs_().view(torch.int16).amax())
    bits = int(torch.stack(highest).amax()) if highest else 0
    if bits >= _INFINITY_BITS:
        return None
    largest = float(np.int16(bits).view(np.float16))
    wanted = _TARGET_EXP - math.frexp(largest)[1] + scaled_by if bits else _ZERO_EXP
    return wanted if wanted - scaled_by <= _MAX_DROP_EXP else None


def exponent_of(flat: torch.Tensor) -> int | None:
    """The power of two that brings the largest magnitude to the target; None if one is not finite.

    All zeros give the largest exponent that can be scaled by.
    """
    if not len(flat):
        return _ZERO_EXP
    low, high = torch.aminmax(flat)  # on CPU 25 times as fast as an infinity norm
    largest = max(-float(low), float(high))
    if not math.isfinite(largest):
        return None
    if largest == 0.0:
        return _ZERO_EXP
    return _TARGET_EXP - math.frexp(largest)[1]


def _chunks(tensor: torch.Tensor, other: torch.Tensor) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
    """Two tensors of one shape, in pieces that stay in the cache where they can be cut."""
    whole = tensor.numel() <= _CHUNK or tensor.device.type != "cpu" or not tensor.is_contiguous()
    if whole:
        return [(tensor, other)] if tensor.numel() else []
    return zip(torch.split(tensor.view(-1), _CHUNK), torch.split(other.view(-1), _CHUNK), strict=True)
