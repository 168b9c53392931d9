"""What the person sees while training runs: a bar on a terminal, a line now and then elsewhere; rank 0 only."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Progress"]

_BAR_SECONDS = 0.2
_LINE_SECONDS = 5.0
_LINE_WIDTH = 74
"""With the launcher's ``[0] `` before it a bar must fit 80 columns: the terminal is not ours to ask for its width."""
_BAR_WIDTHS = 6, 30
_ERASE = "\x1b[K"
"""To the end of the line only: the launcher's prefix stays."""


class Progress:
    """Shows epoch, step, loss and speed.

    Args:
        mode: ``bar`` redraws one line, ``lines`` prints a line every few seconds, ``none`` is silent.
        write: Where text goes; standard error by default, so that it never mixes with the script's output.
        clock: Seconds; monotonic.
    """

    def __init__(
        self,
        mode: str,
        write: Callable[[str], object] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._mode = mode
        self._write = write or _to_stderr
        self._clock = clock
        self._epoch = self._steps = self._step = self._samples = self._trained = 0
        self._started = self._shown = clock()
        self._drawn = False
        self._console: Console | None = None
        self.note = ""
        """What else is worth a place in the line: a straggler."""

    def epoch(self, number: int, steps: int) -> None:
        """A training epoch of ``steps`` global batches starts; 0 if their number is not known."""
        self._epoch, self._steps, self._step, self._samples, self._trained = number, steps, 0, 0, 0
        self._started = self._clock()

    def batch(self, samples: int, loss: Callable[[], float | None]) -> None:
        """A global batch of ``samples`` was handed out; ``loss`` is read only when something is shown."""
        self._step += 1
        self._samples, self._trained = self._samples + samples, self._samples
        # Nothing is known of the speed before the first batch has been trained on.
        if self._mode == "none" or self._step == 1:
            return
        now = self._clock()
        if now - self._shown >= (_BAR_SECONDS if self._mode == "bar" else _LINE_SECONDS):
            self._shown = now
            self._show(loss())

    def metrics(self, numbers: Mapping[str, float]) -> None:
        """Print metrics by name.

        >>> Progress("lines", print).metrics({"epoch": 1.0, "valid_loss": 2.71828, "lr": 3e-05})
        epoch 1  valid_loss 2.7183  lr 3e-05
        <BLANKLINE>
        """
        self.message("  ".join(f"{name} {_short(value)}" for name, value in numbers.items()))

    def message(self, text: str) -> None:
        """Print a line without tearing the bar."""
        if self._mode != "none":
            self._write(f"\r{text}{_ERASE}\n" if self._drawn else text + "\n")
            self._drawn = False

    def close(self) -> None:
        """Leave the cursor on an empty line."""
        if self._drawn:
            self._write("\r" + _ERASE)
            self._drawn = False

    def _show(self, loss: float | None) -> None:
        seconds = max(1e-9, self._clock() - self._started)
        remaining = (self._steps - self._step + 1) * seconds / (self._step - 1)
        facts = [f"{self._step}/{self._steps}" if self._steps else f"step {self._step}"]
        facts += [] if loss is None else [f"loss {loss:.4f}"]
        facts += [f"{self._trained / seconds:.1f} samples/s"] + [f"{_duration(remaining)} left"] * bool(self._steps)
        facts += [self.note] if self.note else []
        epoch, text = f"epoch {self._epoch + 1} ", "  ".join(facts)
        if self._mode == "lines":
            self._write(f"{epoch} {text}\n")
            return
        narrowest, widest = _BAR_WIDTHS
        width = min(widest, max(narrowest, _LINE_WIDTH - len(epoch) - len(text) - 2))
        self._write(f"\r{epoch}{self._bar(width)}  {text}{_ERASE}")
        self._drawn = True

    def _bar(self, width: int) -> str:
        """One of rich's, as the text that draws it; rich does not draw it itself, since it would erase the prefix."""
        from rich.console import Console
        from rich.progress_bar import ProgressBar

        if self._console is None:
            self._console = Console(file=io.StringIO(), force_terminal=True, width=_LINE_WIDTH)
        with self._console.capture() as drawn:
            bar = ProgressBar(total=max(1, self._steps), completed=self._step if self._steps else 0, width=width)
            self._console.print(bar, end="")
        return drawn.get()


def _duration(seconds: float) -> str:
    """Hours, minutes and seconds as a clock shows them.

    >>> _duration(7.4), _duration(125), _duration(7325)
    ('0:07', '2:05', '2:02:05')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _short(value: float) -> str:
    """A number as a person writes it: whole numbers whole, small ones with an exponent."""
    if abs(value) < 1e15 and value.is_integer():
        return str(int(value))
    return f"{value:.4f}" if abs(value) >= 0.01 else f"{value:.3g}"


def _to_stderr(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()
