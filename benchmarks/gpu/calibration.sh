#!/usr/bin/env bash
# What each decision of a calibration is worth in answers, on a machine with a GPU: calibrates the bundled model
# (and the one in the folder SECOND), then asks 520 questions of every way to compress. OUT gets the files.
#
#     OUT=results SECOND=runs/second/model benchmarks/gpu/calibration.sh [PROCESSES]
set -u
processes=${1:-15}
bundled=$(python3 -c 'from xkv_service.demo import demo_model_path as path; print(path())')

measure() {  # name, model
  python3 tools/make_demo_calibration.py --model "$2" --device cuda --documents 16 --out "$OUT/$1.safetensors" \
    --figures "$OUT/$1_figures.json" >"/tmp/$1.log" 2>&1 || { tail -n 30 "/tmp/$1.log"; return 1; }
  echo "$1 calibrated: $SECONDS s"
}

ask() {  # name, model
  local at="calibration=$OUT/$1.safetensors,index=derived,selector=auto" ratio own=()
  for ratio in 8 20 32 48; do own+=("xkv:ratio=$ratio,$at,factors=mixed,bases=int8"); done
  for ratio in 20 32 48; do own+=("xkv:ratio=$ratio,$at,basis=calibrated,factors=mixed,reuse=none"); done
  python3 benchmarks/shards.py --processes "$processes" --out "$OUT/$1_answers.json" -- --model "$2" \
    --dtype float32 --tasks demo_documents --samples 520 --per-document 20 --methods \
    "xkv:ratio=8,factors=bfloat16,index=landmark,selector=landmark" "xkv:ratio=8,$at,basis=calibrated,factors=mixed" \
    "xkv:ratio=20,index=derived,selector=auto,bases=int8" "xkv:ratio=20,$at,factors=int8" \
    "xkv:ratio=20,$at,basis=calibrated,factors=int8" "xkv:ratio=20,$at,basis=calibrated,factors=mixed" \
    "xkv:ratio=32,index=derived,selector=auto,bases=int8" "xkv:ratio=32,$at,basis=calibrated,factors=int8" \
    "xkv:ratio=32,$at,basis=calibrated,factors=int4" "xkv:ratio=32,$at,basis=calibrated,factors=mixed" \
    "xkv:ratio=48,$at,basis=calibrated,factors=int4" "xkv:ratio=48,$at,basis=calibrated,factors=mixed" \
    "xkv:ratio=64,$at,basis=calibrated,factors=mixed" "${own[@]}"
  echo "$1 asked: $SECONDS s"
}

measure bundled "$bundled" &
one=$!
if [ -n "${SECOND:-}" ]; then measure second "$SECOND" || exit 1; fi
wait "$one" || exit 1
ask bundled "$bundled"
if [ -n "${SECOND:-}" ]; then ask second "$SECOND"; fi
