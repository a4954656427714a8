#!/usr/bin/env bash
# Go on from the newest good checkpoint: bash scripts/resume.sh cfg/bird.yml [state_epoch=120] [key=value ...]
#
# state_epoch=120 picks the checkpoint of that epoch. Other words override settings, those of the networks excepted;
# what differs from the run's own is shown, so repeat those that the run was started with. Where nothing has been trained yet, training begins.
# Example: bash scripts/resume.sh cfg/demo.yml train.max_epoch=8
set -euo pipefail
case " $* " in *" -h "* | *" --help "*) sed -n '2,/^set/{/^#/p}' "$0" | cut -c3-; exit 0 ;; esac
[ $# -gt 0 ] || { echo "usage: bash scripts/resume.sh cfg/X.yml [state_epoch=N] [key=value ...]" >&2; exit 2; }
exec bash "$(dirname "$(readlink -f "$0")")/train.sh" "$1" train.resume=auto "${@:2}"
