"""PowerSGD on the gradients of a flat bucket: the arithmetic of :mod:`hvdlm.algorithms.powersgd` on torch tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hvdlm.adapters.torch_journeys import CodedWire, Journey
from hvdlm.algorithms.hashing import derive_seed
from hvdlm.algorithms.powersgd import matrix_shape, start

__all__ = ["PowerSGD"]


@dataclass
class _Matrix:
    """One gradient that travels as two factors; offsets into the bucket and into the buffers of factors."""

    key: int
    offset: int
    rows: int
    columns: int
    q: torch.Tensor
    """Where the last step ended: (columns, rank)."""
    p: torch.Tensor
    """A view of the first buffer: (rows, rank)."""
    factor: torch.Tensor
    """A view of the second buffer: (columns, rank)."""
    own: torch.Tensor
    """This worker's part of ``factor``."""

    def view(self, flat: torch.Tensor) -> torch.Tensor:
        return flat[self.offset : self.offset + self.rows * self.columns].view(self.rows, self.columns)


class PowerSGD(Journey):
    """Two thin sums; what is no matrix travels with the first, as it is, and so do the flags.

    Args:
        wire: Collectives.
        name: Of the collectives.
        shapes: (offset in the bucket, shape) of each gradient.
        rank: Columns of the factors.
        length: Elements of the bucket.
        num_flags: How many flags.
        dtype: float32 or float64.
        device: Where the tensors are.
    """

    def __init__(
        self,
        wire: CodedWire,
        name: str,
        *,
        shapes: Sequence[tuple[int, Sequence[int]]],
        rank: int,
        length: int,
        num_flags: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__(wire, name)
        self.residual = torch.zeros(length, dtype=dtype, device=device)
        found = [(i, offset, matrix_shape(shape, rank)) for i, (offset, shape) in enumerate(shapes)]
        matrices = [(i, offset, *shape) for i, offset, shape in found if shape is not None]
        whole = [(shapes[i][0], torch.Size(shapes[i][1]).numel()) for i, _, shape in found if shape is None]
        thin = sum(rows for _, _, rows, _ in matrices) * rank
        self._first = torch.zeros(thin + sum(n for _, n in whole) + num_flags, dtype=dtype, device=device)
        self._second = torch.zeros(sum(columns for *_, columns in matrices) * rank, dtype=dtype, device=device)
        own = torch.zeros_like(self._second)
        self._matrices: list[_Matrix] = []
        at = then = 0
        for i, offset, rows, columns in matrices:
            seeded = torch.from_numpy(start(derive_seed("powersgd", name, i), columns, rank)).to(device, dtype)
            factor = slice(then, then + columns * rank)
            self._matrices.append(
                _Matrix(
                    key=i,
                    offset=offset,
                    rows=rows,
                    columns=columns,
                    q=seeded,
                    p=self._first[at : at + rows * rank].view(rows, rank),
                    factor=self._second[factor].view(columns, rank),
                    own=own[factor].view(columns, rank),
                )
            )
            at, then = at + rows * rank, then + columns * rank
        self._whole = []
        for offset, numel in whole:
            self._whole.append((offset, self._first[at : at + numel]))
            at += numel
        self._flags_at = at

    def start(self, flat: torch.Tensor, flags: torch.Tensor) -> None:
        """See :meth:`Journey.start`."""
        self._flat, self._flags = flat, flags
        for m in self._matrices:
            torch.mm(m.view(flat), m.q, out=m.p)
        for offset, values in self._whole:
            values.copy_(flat[offset : offset + len(values)])
        self._first[self._flags_at :].copy_(flags)
        self._await(self._wire.start(self._first, f"{self._name}.p"), self._project)

    def _project(self) -> None:
        self._flags.copy_(self._first[self._flags_at :] > 0)
        for offset, values in self._whole:
            self._flat[offset : offset + len(values)].copy_(values)
        if not self._matrices:
            return
        if not all(bool(torch.isfinite(m.p).all()) for m in self._matrices):
            # Every rank holds the same bits and takes this way. The residuals and the start of the next step stay.
            for m in self._matrices:
                m.view(self._flat).fill_(torch.nan)
            return
        assert self.residual is not None
        for m in self._matrices:
            largest = m.p.abs().amax(0)
            q, _ = torch.linalg.qr(m.p / torch.where(largest > 0, largest, 1.0))
            m.p.copy_(q)
            wanted = m.view(self._flat)
            torch.mm(wanted.t(), m.p, out=m.own)
            torch.addmm(wanted, m.p, m.own.t(), alpha=-1.0, out=m.view(self.residual))
            m.factor.copy_(m.own)
        self._await(self._wire.start(self._second, f"{self._name}.q"), self._multiply)

    def _multiply(self) -> None:
        for m in self._matrices:
            torch.mm(m.p, m.factor.t(), out=m.view(self._flat))
            largest = m.factor.abs().amax(0)
            m.q.copy_(torch.where(largest > 0, m.factor / torch.where(largest > 0, largest, 1.0), m.q))

    def warm(self) -> dict[int, torch.Tensor]:
        """Where the next step starts, by number of the gradient; the same on every worker. Views, to read or fill."""
        return {m.key: m.q for m in self._matrices}
