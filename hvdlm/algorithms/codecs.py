"""How gradients are written in fewer bytes: reference arithmetic, which the tensor versions are tested against.

Block codecs (fp16, bf16, int8) write a block of consecutive elements as one scale and a code for each element. They
travel in two hops, so that every worker sends and gets little more than its own gradient once each way, however many
workers there are: each worker sends its k-th chunk to worker k; worker k adds up what it got in full precision and
sends the sum, encoded once more, to all. Everybody decodes the same bytes, so all end with the same bits.

``topk`` and ``powersgd`` (:mod:`hvdlm.algorithms.powersgd`) have journeys of their own.

What encoding drops is added to the next gradient (error feedback; Seide et al. 2014, Karimireddy et al. 2019): the
residuals. A residual belongs to nobody in particular, only the sum over workers counts, which is what
:func:`redistribute` keeps when workers come and go.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["CODECS", "Codec", "decode", "encode", "exchange_sum", "payload_bytes", "redistribute", "topk", "topk_sum"]

Array = npt.NDArray[Any]

INT8_BLOCK = 256
"""Elements under one scale: 1.6 % more bytes, and one large gradient coarsens only its neighbours."""
FP16_BLOCK = 4096
TOP_EXP = {"fp16": 15, "bf16": 1}
"""The largest magnitude of a block is brought to at most 2**this: 15 is the last power of two that fp16 holds."""
MIN_EXP = {"float32": -100, "float64": -1000}
"""Blocks below 2**this are written as though they were that large: scales stay normal numbers."""


@dataclass(frozen=True)
class Codec:
    """What a codec does to bytes and to gradients.

    Attributes:
        name: As in the option ``compression``.
        lossy: Whether it changes gradients at all.
        feedback: Whether what it drops is kept for the next step.
        block: Elements under one scale; 0 where it does not work in blocks.
        code_bytes: Bytes of an element's code, where it works in blocks.
    """

    name: str
    lossy: bool
    feedback: bool
    block: int = 0
    code_bytes: int = 0


CODECS: Mapping[str, Codec] = {
    codec.name: codec
    for codec in (
        Codec("none", lossy=False, feedback=False),
        Codec("fp16", lossy=True, feedback=False, block=FP16_BLOCK, code_bytes=2),
        Codec("bf16", lossy=True, feedback=False, block=FP16_BLOCK, code_bytes=2),
        Codec("int8", lossy=True, feedback=True, block=INT8_BLOCK, code_bytes=1),
        Codec("powersgd", lossy=True, feedback=True),
        Codec("topk", lossy=True, feedback=True),
    )
}


def payload_bytes(codec: Codec, num_elements: int, itemsize: int, num_flags: int = 0) -> int:
    """Bytes of ``num_elements`` (a multiple of the block) written by a block codec, flags behind them.

    >>> payload_bytes(CODECS["int8"], 512, 4)
    520

    Args:
        codec: A block codec.
        num_elements: Elements.
        itemsize: Bytes of an element before encoding, which are those of a scale.
        num_flags: Bytes of flags; the whole is rounded up to 8.
    """
    size = num_elements // codec.block * itemsize + num_elements * codec.code_bytes + num_flags
    return -(-size // 8) * 8


def encode(codec: Codec, values: Array) -> tuple[Array, Array]:
    """Write values in blocks.

    Args:
        codec: A block codec.
        values: float32 or float64, a multiple of the block long.

    Returns:
        One scale for each block, in the type of the values; codes: int8, float16, or uint16 (the bits of a bfloat16).
    """
    blocks = values.reshape(-1, codec.block)
    with np.errstate(all="ignore"):
        largest = np.abs(blocks).max(axis=1)
        if codec.name == "int8":
            floor = values.dtype.type(2.0 ** MIN_EXP[values.dtype.name])
            # A block that is not finite has a scale that is not: all of it decodes to what nobody takes for a number.
            scales = np.where(largest < floor, floor, largest) / values.dtype.type(127)
            codes = np.nan_to_num(np.rint(blocks * (1 / scales)[:, None]), nan=0, posinf=0, neginf=0).astype(np.int8)
            return scales, codes.reshape(-1)
        if not np.isfinite(largest).all():
            largest = np.abs(np.where(np.isfinite(blocks), blocks, 0)).max(axis=1)
        exponents = np.maximum(np.frexp(largest)[1], MIN_EXP[values.dtype.name])
        scales = np.ldexp(values.dtype.type(1), exponents - TOP_EXP[codec.name]).astype(values.dtype)
        scaled = blocks * (1 / scales)[:, None]
        codes = scaled.astype(np.float16) if codec.name == "fp16" else _to_bf16(scaled.astype(np.float32))
    return scales, codes.reshape(-1)


def decode(codec: Codec, scales: Array, codes: Array) -> Array:
    """The values, in the type of the scales. See :func:`encode`."""
    if codec.name == "bf16":
        codes = (codes.astype(np.uint32) << 16).view(np.float32)
    with np.errstate(all="ignore"):
        values: Array = codes.astype(scales.dtype).reshape(-1, codec.block) * scales[:, None]
    return values.reshape(-1)


def _to_bf16(values: Array) -> Array:
    """The upper halves of float32 numbers, rounded to nearest even; a NaN stays one."""
    bits = values.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    result: Array = np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)
    return result


def exchange_sum(
    codec: Codec, own: Sequence[Array], residuals: Sequence[Array], owner_residuals: Sequence[Array]
) -> Array:
    """What all workers hold after the two hops; updates the residuals in place.

    Args:
        codec: A block codec.
        own: Each worker's values, already weighted; their length is a multiple of workers times block.
        residuals: What each worker's encoding has dropped; as long as its values. Zeros without feedback.
        owner_residuals: What the encoding of each worker's chunk of the sum has dropped.
    """
    size = len(own)
    chunk = len(own[0]) // size
    sent = []
    for values, residual in zip(own, residuals, strict=True):
        wanted = values + residual
        sent.append(decode(codec, *encode(codec, wanted)))
        _keep(codec, residual, wanted, sent[-1])
    chunks = []
    for r, residual in enumerate(owner_residuals):
        total = residual.copy()
        for values in sent:
            total += values[r * chunk : (r + 1) * chunk]
        chunks.append(decode(codec, *encode(codec, total)))
        _keep(codec, residual, total, chunks[-1])
    return np.concatenate(chunks)


def _keep(codec: Codec, residual: Array, wanted: Array, sent: Array) -> None:
    """The new residual; where a block was not finite, what it was."""
    if codec.feedback:
        finite = np.isfinite(sent).reshape(-1, codec.block).all(axis=1).repeat(codec.block)
        np.copyto(residual, wanted - np.where(finite, sent, 0), where=finite)


def topk(values: Array, ratio: float) -> Array:
    """Indices of the largest magnitudes, ``ceil(ratio * len)`` of them, at least one.

    >>> topk(np.array([1.0, -5.0, 0.0, 2.0]), 0.5).tolist()
    [1, 3]
    """
    count = max(1, int(np.ceil(ratio * len(values))))
    magnitude = np.where(np.isnan(values), np.inf, np.abs(values))
    return np.sort(np.argpartition(-magnitude, count - 1)[:count])


def topk_sum(own: Sequence[Array], residuals: Sequence[Array], ratio: float) -> Array:
    """Sum over workers of each one's largest values (Aji & Heafield 2017); updates the residuals in place.

    Args:
        own: Each worker's values, already weighted.
        residuals: What each worker has not sent yet.
        ratio: The part of the values that is sent.
    """
    total = np.zeros_like(own[0])
    for values, residual in zip(own, residuals, strict=True):
        wanted = values + residual
        at = topk(wanted, ratio)
        total[at] += wanted[at]
        wanted[at] = 0
        residual[:] = np.nan_to_num(wanted, nan=0, posinf=0, neginf=0)
    return total


def redistribute(states: Sequence[Mapping[str, Array]], rank: int, size: int) -> dict[str, Array]:
    """The residuals of worker ``rank`` of ``size`` from those of all workers of a job of another size.

    The sum over workers of each residual, which is what training has yet to see, stays the same.

    >>> [redistribute([{"w": np.ones(1)}] * 3, rank, 2)["w"].tolist() for rank in range(2)]
    [[2.0], [1.0]]

    Args:
        states: By old rank, residuals by name of the parameter.
        rank: Which worker of the new job.
        size: How many it has.
    """
    result: dict[str, Array] = {}
    for state in states[rank::size]:
        for name, residual in state.items():
            result[name] = np.asarray(result[name] + residual) if name in result else np.array(residual)
    return result
