#!/usr/bin/env bash
# Evaluate: bash scripts/test.sh cfg/demo.yml [checkpoint] [key=value ...] [--images DIR] [--against DIR]
set -euo pipefail
cd "$(dirname "$0")/.."
case " $* " in *" -h "* | *" --help "* | "  ") exec python3 code/test.py "$@" ;; esac # help and usage need no environment
source scripts/env.sh

gpus=$(ratlip_processes)
if [ "$gpus" -gt 1 ]; then
    exec python -m torch.distributed.run --standalone --nproc_per_node="$gpus" code/test.py "$@"
fi
exec python code/test.py "$@"
