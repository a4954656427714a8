#!/usr/bin/env bash
# Check a data set and fill its cache: bash scripts/prepare.sh cfg/bird.yml [--resize] [key=value ...]
set -euo pipefail
cd "$(dirname "$0")/.."
case " $* " in *" -h "* | *" --help "* | "  ") exec python3 code/prepare.py "$@" ;; esac # help and usage need no environment
source scripts/env.sh
exec python code/prepare.py "$@"
