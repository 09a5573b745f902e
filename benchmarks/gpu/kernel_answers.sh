#!/usr/bin/env bash
# Right answers through the decode kernels beside those in PyTorch, to the same questions over the same documents, on
# a GPU. OUT gets the JSON files; SECOND is a second model's folder (docs/demo-model.md says how to make one).
#
#     OUT=benchmarks/results/gpu SECOND=runs/second/model benchmarks/gpu/kernel_answers.sh [PROCESSES]
set -u
cd "$(dirname "$0")/../.." || exit 1
export PYTHONPATH=.:workers:cli:artifacts${PYTHONPATH:+:$PYTHONPATH}
mkdir -p "${OUT:?is the folder of the results}"
bundled=xkv_service/demo/model
calibration=xkv_service/demo/calibration.safetensors
own="xkv:ratio=8,selector=sketch,budget=256"
shared="xkv:ratio=20,calibration=$calibration,basis=calibrated,factors=mixed,index=derived,selector=auto,budget=256"

status=0
asked() {  # name of the result, model, methods
  for kernels in on off; do
    XKV_DECODE_KERNELS=$kernels python3 benchmarks/shards.py --processes "${processes:-13}" \
      --out "$OUT/answers_kernels_${kernels}_$1.json" -- --model "$2" --device cuda \
      --dtype float32 --tasks demo_documents --samples 520 --per-document 20 --methods "${@:3}" || status=1
    echo "$1, kernels $kernels: $SECONDS s"
  done
}
processes=${1:-13}
asked bundled "$bundled" "$own" "$shared"
if [ -n "${SECOND:-}" ]; then asked second "$SECOND" "$own"; fi
exit $status
