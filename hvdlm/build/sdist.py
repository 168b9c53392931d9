"""The source of Horovod as released, fetched once and checked against a pinned hash."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from hvdlm.build.mends import HOROVOD
from hvdlm.errors import BuildError

__all__ = ["SHA256", "fetch_sdist", "file_sha256", "unpack_sdist"]

SHA256 = "92a43f5a94c43907a56805bad15f19700c62ffc83b7ca483f9e104e229f67ef0"
_NAME = f"horovod-{HOROVOD}.tar.gz"
_TIMEOUT = 600


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    result = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            result.update(chunk)
    return result.hexdigest()


def fetch_sdist(cache: Path, refresh: bool = False) -> Path:
    """The source archive, from the cache if it is there and whole, else downloaded by pip from its configured index.

    Args:
        cache: Directory of hvdlm's cache.
        refresh: Download even if it is cached.

    Raises:
        BuildError: It cannot be downloaded, or what was downloaded is not the released archive.
    """
    kept = cache / "sdist" / _NAME
    if not refresh and kept.is_file() and file_sha256(kept) == SHA256:
        return kept
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=kept.parent) as directory:
        archive = _download(Path(directory))
        found = file_sha256(archive)
        if found != SHA256:
            raise BuildError(
                f"{_NAME} has SHA-256 {found}, not {SHA256}: it is not the released archive and was not used.",
                hint="look at the index pip uses: pip config list",
            )
        os.replace(archive, kept)
    return kept


def _download(directory: Path) -> Path:
    # pip honours the person's index, proxy and certificates; without isolation it needs only setuptools, not a network
    # of its own, to read the archive's metadata.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--no-binary", ":all:", "--no-build-isolation", "--dest", str(directory), f"horovod=={HOROVOD}"]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_TIMEOUT, check=False
        )
    except subprocess.TimeoutExpired:
        raise BuildError(
            f"downloading {_NAME} took more than {_TIMEOUT} s.", hint="pip download --no-deps horovod==0.28.1"
        ) from None
    archive = directory / _NAME
    if done.returncode != 0 or not archive.is_file():
        lines = [line for line in (done.stderr + done.stdout).splitlines() if "ERROR" in line] or ["no reason given"]
        raise BuildError(
            f"pip could not download {_NAME}: {lines[0].removeprefix('ERROR:').strip()}",
            hint=f"put the archive from PyPI into the cache by hand: {_NAME} in CACHE/sdist, CACHE as `hvdlm "
            "build-horovod --dry-run` shows",
        )
    return archive


def unpack_sdist(archive: Path, directory: Path) -> Path:
    """Unpack afresh (a second build in one tree fails: CMake copies Gloo into the source) and return the tree's root.

    Raises:
        BuildError: The archive cannot be read.
    """
    try:
        with tarfile.open(archive) as tar:
            if hasattr(tarfile, "data_filter"):
                tar.extractall(directory, filter="data")
            else:  # early Python 3.10 and 3.11; the hash has been checked
                tar.extractall(directory)
    except (OSError, tarfile.TarError) as error:
        shutil.rmtree(directory, ignore_errors=True)
        raise BuildError(f"{archive} cannot be unpacked: {error}.", hint="hvdlm build-horovod --force") from None
    return directory / f"horovod-{HOROVOD}"
