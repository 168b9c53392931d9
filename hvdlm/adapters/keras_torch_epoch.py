"""What comes before the person's callbacks in a ``fit`` of Keras on torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import keras

from hvdlm.adapters.keras_callbacks import share_numbers
from hvdlm.adapters.torch_loader import ShardedLoader

__all__ = ["OpeningOnTorch"]


class OpeningOnTorch(keras.callbacks.Callback):  # type: ignore[misc]  # Keras has no types
    """Counts samples, reads each epoch to its end, and makes numbers equal on all ranks.

    Args:
        job: The adapter.
        loader: What this ``fit`` reads.
        whole: Whether an epoch of Keras is one of the loader (no ``steps_per_epoch``).
    """

    def __init__(self, job: Any, loader: ShardedLoader, *, whole: bool) -> None:
        super().__init__()
        self._job, self._loader, self._whole = job, loader, whole
        self._reading: Iterator[Any] | None = None
        self._batches = 0
        own = loader._train

        def train() -> Iterator[Any]:
            # Keras also makes iterators that it does not read from: the one that is read counts, and is held here since
            # Keras lets go of it after the last batch.
            def reading() -> Iterator[Any]:
                self._reading = made[0]
                yield from own()

            made = [reading()]
            return made[0]

        loader._train = train  # type: ignore[method-assign]  # until remove()

    def remove(self) -> None:
        """Give the loader its own back."""
        self._loader.__dict__.pop("_train", None)

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Count from here."""
        if self._whole and not self._batches:
            self._loader._epoch = max(self._loader._epoch, epoch)  # BackupAndRestore may begin at a later one
        self._job.start_epoch()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Count the optimizer's steps, which the torch engine cannot see: the optimizer is Keras's."""
        self._batches += 1
        if self._batches % (getattr(self.model.optimizer, "gradient_accumulation_steps", None) or 1) == 0:
            self._job.recorder.step()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Keras asks for the batches it knows of and no more: the loader would not hear that it was read to its end."""
        if self._whole and self._reading is not None:
            assert next(self._reading, None) is None, "an epoch of Keras ended before that of its loader"
        share_numbers(logs, self._job)
