"""TensorFlow's notes about itself."""

from __future__ import annotations

from hvdlm.environment import read_environment
from hvdlm.noise import without_noise

NOTES = (
    b"WARNING: All log messages before absl::InitializeLog() is called are written to STDERR\n"
    b"I0000 00:00:1795643029.511451   30863 port.cc:153] oneDNN custom operations are on. You may see slightly\n"
)


def test_notes_go_and_the_rest_stays() -> None:
    rest = b"W0000 00:00:1795643029.5 30863 a.cc:1] careful\nTraceback (most recent call last):\n"
    assert without_noise(NOTES + rest + NOTES) == rest
    assert without_noise(rest) == rest


def test_a_line_that_only_speaks_of_them_stays() -> None:
    line = b"ValueError: absl::InitializeLog() and oneDNN custom operations are on.\n"
    assert without_noise(line) == line


def test_they_can_be_asked_for() -> None:
    assert read_environment({"TF_CPP_MIN_LOG_LEVEL": "0"}).tensorflow_logs is True
    assert read_environment({"TF_CPP_MIN_LOG_LEVEL": "1"}).tensorflow_logs is False
