#!/bin/bash
# Written by: hvdlm submit spark
set -euo pipefail

cd -- /shared/project
export DATA='/shared/my data'
export PYSPARK_DRIVER_PYTHON=/opt/venv/bin/python
export PYSPARK_PYTHON=/opt/venv/bin/python
: "${HF_TOKEN:?is not set: --secret takes it from the environment}"

exec spark-submit --master spark://head:7077 --deploy-mode client --name train --conf spark.cores.max=4 --conf spark.executor.cores=1 --conf spark.task.cpus=1 --conf spark.pyspark.python=/opt/venv/bin/python /opt/hvdlm/clusters/on_engine.py spark -np 4 --workdir /shared/project --option checkpoint_dir=/shared/ck --option compression=fp16 --option resume=auto --pass DATA --pass HF_TOKEN -- train.py --epochs 3
