#!/bin/bash
# Written by: hvdlm submit dask
set -euo pipefail

cd -- /shared/project
export DATA='/shared/my data'
: "${HF_TOKEN:?is not set: --secret takes it from the environment}"

exec /opt/venv/bin/python -m hvdlm.clusters.on_engine dask --scheduler tcp://10.0.0.1:8786 --max-restarts 3 -np 4 --workdir /shared/project --option checkpoint_dir=/shared/ck --option compression=fp16 --option resume=auto --pass DATA --pass HF_TOKEN -- train.py --epochs 3
