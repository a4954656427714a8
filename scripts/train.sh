#!/usr/bin/env bash
# Train: bash scripts/train.sh cfg/demo.yml [key=value ...]
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/env.sh

gpus=${GPUS:-$(python -c 'import torch; print(torch.cuda.device_count())')}
if [ "$gpus" -gt 1 ]; then
    exec python -m torch.distributed.run --standalone --nproc_per_node="$gpus" code/train.py "$@"
fi
exec python code/train.py "$@"
