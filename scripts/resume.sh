#!/usr/bin/env bash
# Go on with a run: bash scripts/resume.sh cfg/bird.yml|saved_models/bird/RUN [run=RUN] [state_epoch=120] [key=value ...]
#
# With a configuration it is the newest run begun from it, from its furthest good checkpoint, unless run= names one; where
# there is none yet, training begins. The run's own settings hold, then what has changed in the configuration since, then
# the words, but for the networks; what differs is shown. state_epoch=120 goes back: a new run begins from that state.
# Example: bash scripts/resume.sh cfg/demo.yml train.max_epoch=8
set -euo pipefail
case " $* " in *" -h "* | *" --help "*) sed -n '2,/^set/{/^#/p}' "$0" | cut -c3-; exit 0 ;; esac
[ $# -gt 0 ] || { echo "usage: bash scripts/resume.sh cfg/X.yml [run=NAME] [state_epoch=N] [key=value ...]" >&2; exit 2; }
exec bash "$(dirname "$(readlink -f "$0")")/train.sh" "$1" train.resume=auto "${@:2}"
