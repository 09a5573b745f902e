#!/usr/bin/env bash
# What each decision of a calibration is worth in answers, on a machine with a GPU: calibrates the bundled model
# (and the one in the folder SECOND), with the metrics to choose from and with the plain one, then asks 520 questions
# of every way to compress. OUT gets the files. DEVICE=cpu takes an hour of a core for each model.
#
#     OUT=results SECOND=runs/second/model benchmarks/gpu/calibration.sh [PROCESSES]
set -u
processes=${1:-15}
device=${DEVICE:-cuda}
bundled=$(python3 -c 'from xkv_service.demo import demo_model_path as path; print(path())')

measure() {  # name, model, options
  local name=$1 model=$2
  shift 2
  python3 tools/make_demo_calibration.py --model "$model" --device "$device" --documents 16 \
    --out "$OUT/$name.safetensors" --figures "$OUT/${name}_figures.json" "$@" >"/tmp/$name.log" 2>&1 ||
    { tail -n 30 "/tmp/$name.log"; return 1; }
  echo "$name calibrated: $SECONDS s"
}

measure_both() {  # name, model
  measure "$1" "$2" && measure "$1_plain" "$2" --weightings plain
}

ask() {  # name, model
  local index="index=derived,selector=auto" ratio methods=("xkv:ratio=8,factors=bfloat16,index=landmark,selector=landmark")
  local plain="calibration=$OUT/$1_plain.safetensors,$index" at="calibration=$OUT/$1.safetensors,$index"
  for ratio in 8 20 32; do
    methods+=("xkv:ratio=$ratio,$index,factors=bfloat16" "xkv:ratio=$ratio,$index,factors=int8,bases=int8")
    methods+=("xkv:ratio=$ratio,$plain,factors=int8,bases=int8" "xkv:ratio=$ratio,$at,factors=int8,bases=int8")
  done
  for ratio in 8 20 32 48; do methods+=("xkv:ratio=$ratio,$at,factors=mixed,bases=int8"); done
  for ratio in 20 32; do methods+=("xkv:ratio=$ratio,$at,basis=calibrated,factors=int8"); done
  for ratio in 32 48; do methods+=("xkv:ratio=$ratio,$at,basis=calibrated,factors=int4"); done
  for ratio in 20 32 48; do methods+=("xkv:ratio=$ratio,$at,basis=calibrated,factors=mixed,reuse=none"); done
  for ratio in 8 20 32 48 64; do methods+=("xkv:ratio=$ratio,$at,basis=calibrated,factors=mixed"); done
  python3 benchmarks/shards.py --processes "$processes" --out "$OUT/$1_answers.json" -- --model "$2" \
    --dtype float32 --tasks demo_documents --samples 520 --per-document 20 --methods "${methods[@]}"
  echo "$1 asked: $SECONDS s"
}

measure_both bundled "$bundled" &
one=$!
if [ -n "${SECOND:-}" ]; then measure_both second "$SECOND" || exit 1; fi
wait "$one" || exit 1
ask bundled "$bundled"
if [ -n "${SECOND:-}" ]; then ask second "$SECOND"; fi
