#!/usr/bin/env bash
# Train: bash scripts/train.sh cfg/demo.yml [key=value ...]
set -euo pipefail
cd "$(dirname "$0")/.."
case " $* " in *" -h "* | *" --help "* | "  ") exec python3 code/train.py "$@" ;; esac # help and usage need no environment
source scripts/env.sh

gpus=$(ratlip_processes)
if [ "$gpus" -le 1 ]; then
    exec python code/train.py "$@"
fi
# Several processes. torchrun would kill them on a signal; they are to save and leave by themselves, so the signal
# goes to them alone (setsid keeps a terminal's Ctrl-C from torchrun).
setsid python -m torch.distributed.run --standalone --nproc_per_node="$gpus" code/train.py "$@" &
torchrun=$!
trap 'pkill -TERM -P $torchrun' TERM
trap 'pkill -HUP -P $torchrun' HUP # not under nohup, where bash leaves it ignored
trap 'pkill -USR1 -P $torchrun' USR1
trap 'pkill -INT -P $torchrun' INT
status=0
wait $torchrun || status=$?
while kill -0 $torchrun 2>/dev/null; do # a signal ends the wait, not torchrun
    status=0
    wait $torchrun || status=$?
done
exit $status
