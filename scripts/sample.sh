#!/usr/bin/env bash
# Captions to pictures: bash scripts/sample.sh cfg/demo.yml "a small red star in the centre on a white background"
set -euo pipefail
here=$(dirname "$(readlink -f "$0")") # no cd: paths on the command line are the caller's
case " $* " in *" -h "* | *" --help "* | "  ") exec python3 "$here/../code/sample.py" "$@" ;; esac # help and usage need no environment
source "$here/env.sh"
exec python "$ratlip_root/code/sample.py" "$@"
