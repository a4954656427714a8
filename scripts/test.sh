#!/usr/bin/env bash
# Evaluate: bash scripts/test.sh cfg/demo.yml [checkpoint] [key=value ...] [--images DIR | --real] [--against DIR] [--nearest]
set -euo pipefail
here=$(dirname "$(readlink -f "$0")") # no cd: paths on the command line are the caller's
case " $* " in *" -h "* | *" --help "* | "  ") exec python3 "$here/../code/test.py" "$@" ;; esac # help and usage need no environment
source "$here/env.sh"

gpus=$(ratlip_processes)
if [ "$gpus" -gt 1 ]; then
    exec python -c "$ratlip_torchrun" --standalone --nproc_per_node="$gpus" "$ratlip_root/code/test.py" "$@"
fi
exec python "$ratlip_root/code/test.py" "$@"
