#!/usr/bin/env bash
# What each decision of a calibration is worth in answers, on a machine with a GPU: calibrates a model with all
# metrics, with the plain one and with groups of up to eight layers, then asks 520 questions of every way to
# compress. OUT gets NAME's files. The model is one that `train_demo_model.py` made, by default the bundled one.
# Takes 8 minutes there; with DEVICE=cpu an hour and a half of a core.
#
#     OUT=results benchmarks/gpu/calibration.sh bundled
#     OUT=results benchmarks/gpu/calibration.sh second runs/second/model
set -u
name=$1
model=${2:-$(python3 -c 'from xkv_service.demo import demo_model_path as path; print(path())')}
device=${DEVICE:-cuda} processes=${PROCESSES:-15}

measure() {  # suffix, options
  local file=$OUT/$name$1
  shift
  python3 tools/make_demo_calibration.py --model "$model" --device "$device" --documents 16 \
    --out "$file.safetensors" --figures "${file}_figures.json" "$@" >"$file.log" 2>&1 ||
    { tail -n 30 "$file.log"; return 1; }
  rm "$file.log"
  echo "$file calibrated: $SECONDS s"
}

ask() {
  local index="index=derived,selector=auto" ratio methods=("xkv:ratio=8,factors=bfloat16,index=landmark,selector=landmark")
  local plain="calibration=$OUT/${name}_plain.safetensors,$index" at="calibration=$OUT/$name.safetensors,$index"
  local groups="calibration=$OUT/${name}_groups.safetensors,$index"
  for ratio in 8 20 32; do
    methods+=("xkv:ratio=$ratio,$index,factors=bfloat16" "xkv:ratio=$ratio,$index,factors=int8,bases=int8")
    methods+=("xkv:ratio=$ratio,$plain,factors=int8,bases=int8" "xkv:ratio=$ratio,$at,factors=int8,bases=int8")
  done
  for ratio in 8 20 32 48; do methods+=("xkv:ratio=$ratio,$at,factors=mixed,bases=int8"); done
  for ratio in 20 32; do methods+=("xkv:ratio=$ratio,$at,basis=calibrated,factors=int8"); done
  for ratio in 32 48; do methods+=("xkv:ratio=$ratio,$at,basis=calibrated,factors=int4"); done
  for ratio in 20 32 48; do methods+=("xkv:ratio=$ratio,$at,basis=calibrated,factors=mixed,reuse=none"); done
  for ratio in 8 20 32 48 64; do methods+=("xkv:ratio=$ratio,$at,basis=calibrated,factors=mixed"); done
  for ratio in 20 32 48 64; do methods+=("xkv:ratio=$ratio,$groups,basis=calibrated,factors=mixed"); done
  python3 benchmarks/shards.py --processes "$processes" --out "$OUT/${name}_answers.json" -- --model "$model" \
    --dtype float32 --tasks demo_documents --samples 520 --per-document 20 --methods "${methods[@]}"
  echo "$name asked: $SECONDS s"
}

measure "" & calibrations=($!)
measure _plain --weightings plain & calibrations+=($!)
measure _groups --group-size 8 & calibrations+=($!)
for one in "${calibrations[@]}"; do wait "$one" || exit 1; done
ask
