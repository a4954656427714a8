#!/usr/bin/env bash
# Captions to pictures: bash scripts/sample.sh cfg/demo.yml "a small red star in the centre on a white background"
set -euo pipefail
cd "$(dirname "$0")/.."
case " $* " in *" -h "* | *" --help "* | "  ") exec python3 code/sample.py "$@" ;; esac # help and usage need no environment
source scripts/env.sh
exec python code/sample.py "$@"
