"""Block codecs on torch tensors: the arithmetic of :mod:`hvdlm.algorithms.codecs`, a cache-sized piece at a time.

A whole bucket would go through memory once for each operation; a piece stays in the processor's cache for all of them.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from hvdlm.algorithms.codecs import MIN_EXP, TOP_EXP, Codec, payload_bytes

__all__ = ["Blocks", "Payload"]

_PIECE = 1 << 17
"""Elements at a time: 512 kB of float32. Half as many cost a third more, for what each operation takes to start."""
_CODES = {"fp16": torch.float16, "bf16": torch.bfloat16, "int8": torch.int8}


class Payload:
    """Bytes of an encoded chunk, as views: made once, filled and read at every step.

    Args:
        data: uint8, as long as :attr:`Blocks.payload_bytes`.
        blocks: What writes and reads it.
    """

    def __init__(self, data: torch.Tensor, blocks: Blocks) -> None:
        block, end = blocks.codec.block, blocks.scales_bytes + blocks.num_elements * blocks.codec.code_bytes
        self.data = data
        self.scales = data[: blocks.scales_bytes].view(blocks.dtype)
        self.flags = data[end : end + blocks.num_flags]
        codes = data[blocks.scales_bytes : end].view(_CODES[blocks.codec.name]).view(-1, block)
        self.codes = torch.split(codes, _PIECE // block)
        self.factors = torch.split(self.scales[:, None], _PIECE // block)


class Blocks:
    """Writes chunks of a flat tensor into bytes and reads them back.

    Args:
        codec: A block codec.
        num_elements: Elements of a chunk, a multiple of the block.
        num_flags: Bytes that travel behind each chunk as they are.
        dtype: float32 or float64.
        device: Where the tensors are.
    """

    def __init__(
        self, codec: Codec, num_elements: int, num_flags: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.codec, self.dtype = codec, dtype
        self.num_elements, self.num_flags = num_elements, num_flags
        self.payload_bytes = payload_bytes(codec, num_elements, dtype.itemsize, num_flags)
        self.scales_bytes = num_elements // codec.block * dtype.itemsize
        self._scratch = torch.empty(min(_PIECE, num_elements), dtype=dtype, device=device).view(-1, codec.block)
        self._inverse, self._lowest = torch.empty(2, num_elements // codec.block, dtype=dtype, device=device)
        self._inverses = torch.split(self._inverse[:, None], _PIECE // codec.block)
        self._smallest_exponent = MIN_EXP[str(dtype).removeprefix("torch.")]

    def _pieces(self, flat: torch.Tensor) -> Iterator[torch.Tensor]:
        return iter(torch.split(flat.view(-1, self.codec.block), _PIECE // self.codec.block))

    def encode(self, values: torch.Tensor, payload: Payload, residual: torch.Tensor | None) -> None:
        """Write ``values``; what that drops replaces ``residual``, except in blocks that are not finite."""
        whole, scales = values.view(-1, self.codec.block), payload.scales
        torch.amax(whole, 1, out=scales)
        torch.maximum(scales, torch.amin(whole, 1, out=self._lowest).neg_(), out=scales)
        if self.codec.name == "int8":
            scales.clamp_(min=2.0**self._smallest_exponent).div_(127)
        else:
            self._power_of_two(whole, scales)
        torch.reciprocal(scales, out=self._inverse)
        kept = iter(()) if residual is None else self._pieces(residual)
        finite = residual is None or bool(torch.isfinite(scales).all())
        for x, codes, inverse, factor in zip(
            self._pieces(values), payload.codes, self._inverses, payload.factors, strict=True
        ):
            scratch = self._scratch[: len(x)]
            torch.mul(x, inverse, out=scratch)
            if self.codec.name == "int8":
                scratch.round_()
            codes.copy_(scratch)
            if residual is None:
                continue
            left = next(kept)
            scratch.mul_(factor)
            if finite:
                torch.sub(x, scratch, out=left)
            else:
                left.copy_(torch.where(torch.isfinite(factor), x - scratch, left))

    def _power_of_two(self, x: torch.Tensor, scales: torch.Tensor) -> None:
        if not bool(torch.isfinite(scales).all()):
            scales.copy_(torch.where(torch.isfinite(x), x, 0.0).abs().amax(1))
        exponents = torch.frexp(scales)[1].clamp_(min=self._smallest_exponent)
        torch.ldexp(torch.ones_like(scales), exponents - TOP_EXP[self.codec.name], out=scales)

    def decode(self, payload: Payload, out: torch.Tensor) -> None:
        """Read a payload into ``out``."""
        for view, codes, factor in zip(self._pieces(out), payload.codes, payload.factors, strict=True):
            view.copy_(codes)
            view.mul_(factor)

    def add(self, payload: Payload, out: torch.Tensor) -> None:
        """Read a payload and add it to ``out``."""
        for view, codes, factor in zip(self._pieces(out), payload.codes, payload.factors, strict=True):
            scratch = self._scratch[: len(view)]
            scratch.copy_(codes)
            view.addcmul_(scratch, factor)
