#!/bin/bash
# On every worker of a TPU pod at once; the pod's own metadata tells JAX the rest. OUT is a folder that all workers see.
# usage: distributed_tpu.sh NAME ZONE OUT
set -euo pipefail
gcloud compute tpus tpu-vm ssh "$1" --zone "$2" --worker=all --command \
    "cd reroute_jax && python -m evals.refcoco --distributed --out $3 --model llava-hf/llava-1.5-7b-hf --data hub --compare --mesh model=4"
