#!/usr/bin/env bash
# Check a data set and fill its cache: bash scripts/prepare.sh cfg/bird.yml [--resize] [key=value ...]
set -euo pipefail
here=$(dirname "$(readlink -f "$0")") # no cd: paths on the command line are the caller's
case " $* " in *" -h "* | *" --help "* | "  ") exec python3 "$here/../code/prepare.py" "$@" ;; esac # help and usage need no environment
source "$here/env.sh"
exec python "$ratlip_root/code/prepare.py" "$@"
