#!/usr/bin/env bash
# Train DAMSM's text and image encoder: bash scripts/pretrain.sh cfg/bird.yml [run=NAME] [key=value ...]
set -euo pipefail
here=$(dirname "$(readlink -f "$0")") # no cd: paths on the command line are the caller's
case " $* " in *" -h "* | *" --help "* | "  ") exec python3 "$here/../code/pretrain.py" "$@" ;; esac # help and usage need no environment
source "$here/env.sh"
exec python "$ratlip_root/code/pretrain.py" "$@"
