#!/usr/bin/env bash
# Train: bash scripts/train.sh cfg/demo.yml [run=NAME] [key=value ...]
set -euo pipefail
here=$(dirname "$(readlink -f "$0")") # no cd: paths on the command line are the caller's
case " $* " in *" -h "* | *" --help "* | "  ") exec python3 "$here/../code/train.py" "$@" ;; esac # help and usage need no environment
source "$here/env.sh"

gpus=$(ratlip_processes)
if [ "$gpus" -le 1 ]; then
    exec python "$ratlip_root/code/train.py" "$@"
fi
# Several processes. torchrun would kill them on a signal; they are to save and leave by themselves, so the signal
# goes to them alone (setsid keeps a terminal's Ctrl-C from torchrun).
setsid python -c "$ratlip_torchrun" --standalone --nproc_per_node="$gpus" "$ratlip_root/code/train.py" "$@" &
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
