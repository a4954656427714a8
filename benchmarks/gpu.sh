#!/usr/bin/env bash
# What only a GPU can show, in the order of its worth: bash benchmarks/gpu.sh [--smoke] [part ...]
#
# Each part ends within its limit, all together within 8 minutes, and prints its line as soon as it has it:
#   tests       pytest -m gpu                                                                         90 s
#   waits       five steps of 64 in which PyTorch refuses to wait for the GPU                         25 s
#   step        the training step of 64 in bf16, against the plain form in fp16: time, memory         60 s
#   compiled    the same, ours compiled with CUDA graphs                                             110 s
#   sampling    1, 16 and 64 pictures, bf16 against the plain form in fp16                            35 s
#   evaluation  drawing 64 pictures and CLIP's features of them, likewise                             25 s
#   reading     training images a second from prepare.sh's resized copies onto the GPU                25 s
#   demo        the demo's first minute, with its scores                                              75 s
#   largest     the largest batch at 256 pixels that a card of 24 GB holds                            35 s
# --smoke: the same on a CPU, so small that it says nothing but that it runs.
#
# Example: bash benchmarks/gpu.sh waits step
set -euo pipefail
cd "$(dirname "$0")/.."
case "${1:-}" in -h | --help) sed -n '2,/^set/{/^#/p}' "$0" | cut -c3-; exit 0 ;; esac
all=$(sed -n 's/^#   \([a-z]*\) .* \([0-9]*\) s$/\1=\2/p' "$0") # the table above: part=seconds
smoke=
[ "${1:-}" = --smoke ] && smoke=--smoke && shift
parts=${*:-$(sed 's/=.*//' <<<"$all")}
for part in $parts; do
    grep -q "^$part=" <<<"$all" || { echo "error: no part $part; there are" $(sed 's/=.*//' <<<"$all") >&2; exit 2; }
done
# A lent machine has what the parts need and nothing to install from: lint and the other tests' packages are not asked for.
if python -c 'import torch, torchvision, clip, easydict, torch_fidelity, tensorboard, pytest' 2>/dev/null; then
    export PYTHONPATH=$PWD/code${PYTHONPATH:+:$PYTHONPATH}
else
    REQUIREMENTS=requirements-dev.txt source scripts/env.sh
fi

if [ -n "$smoke" ]; then # in one process; what torch.compile gives runs as it was
    CUDA_VISIBLE_DEVICES='' TORCHDYNAMO_DISABLE=1 exec python benchmarks/gpu.py --smoke $parts
fi
if ! python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "error: PyTorch sees no GPU here; --smoke shows on a CPU that it runs" >&2
    exit 2
fi
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader || true
status=0
for part in $parts; do
    limit=$(sed -n "s/^$part=//p" <<<"$all")
    timeout --kill-after=5 "$limit" python benchmarks/gpu.py "$part" && continue
    [ $? -lt 124 ] || echo "$part: no result within $limit s"
    status=1
done
exit $status
