#!/usr/bin/env bash
# Go on from the newest good checkpoint: bash scripts/resume.sh cfg/bird.yml [state_epoch=120] [key=value ...]
set -euo pipefail
config=${1:?"usage: bash scripts/resume.sh cfg/X.yml [state_epoch=N] [key=value ...]"}
exec bash "$(dirname "$0")/train.sh" "$config" train.resume=auto "${@:2}"
