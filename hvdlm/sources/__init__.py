"""Data sets of sharded files, packed blocks of tokens, and streams of unknown length."""

from __future__ import annotations

from hvdlm.sources.dataset import FileDataset, open_files
from hvdlm.sources.packed import PackedBlocks
from hvdlm.sources.padding import pad_batch
from hvdlm.sources.stream import Stream

__all__ = ["FileDataset", "PackedBlocks", "Stream", "open_files", "pad_batch"]
