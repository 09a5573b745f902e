#!/usr/bin/env bash
# Quality on a machine with a GPU: what docs/quality.md and docs/selection.md say about needles, many requests,
# single layers, questions inside the prefix and budgets. OUT gets the JSON files; SECOND is a second model's folder
# (docs/demo-model.md says how to make one), asked the same. Paths are read from the repository's root.
#
#     OUT=results SECOND=runs/second/model JOBS="needles inside" benchmarks/gpu/quality.sh [PROCESSES]
set -u
cd "$(dirname "$0")/../.." || exit 1
export PYTHONPATH=.:workers:cli:artifacts${PYTHONPATH:+:$PYTHONPATH}
processes=${1:-14}
mkdir -p "${OUT:?is the folder of the results}"

bundled=$(python3 -c 'from xkv_service.demo import demo_model_path as path; print(path())')
needles=$(python3 -c 'from xkv_service.demo.ruler_tasks import TASKS; print(*(f"demo_{name}" for name in TASKS))')
sketch=selector=sketch
# Of 4,096 tokens 224 and the last 32, which are always rebuilt: a sixteenth in all.
factors="xkv:ratio=8 xkv:ratio=8,$sketch,budget=224"
single="xkv:group=1,ratio=8,$sketch,budget=224"
others="minicache minicache:start=0 snapkv:ratio=8 snapkv:ratio=8,kernel=21 quantized:bits=4 quantized:bits=2"
layers="xkv:ratio=12,index=sketch,$sketch,budget=256 xkv:group=1,ratio=12,index=sketch,$sketch,budget=256
  xkv:group=1,ratio=8,$sketch,budget=224,last=32 xkv:ratio=8,$sketch,budget=224,last=32"
inside="xkv:ratio=8 xkv:ratio=8,$sketch,budget=128,last=0 xkv:ratio=8,$sketch,budget=112,last=16
  xkv:ratio=8,$sketch,budget=96,last=32 xkv:ratio=8,$sketch,budget=64,last=64 snapkv:ratio=8 snapkv:ratio=8,kernel=21"
# The rows of benchmarks/selection.py that its plot shows, and the last 32 tokens.
rows='^(every token|exact scores|sketch, [468] planes, 4 bits, [0-9]+ by layer|landmarks of 8, [0-9]+ by head|sketch, 8 planes and)'

evaluated() {  # name of the result, model, options of xkv eval
  python3 benchmarks/shards.py --processes "$processes" --out "$OUT/$1.json" -- --model "$2" "${@:3}"
}

selections() {  # name of the result, model
  local parts part failed=0 running=()
  parts=$(mktemp -d)
  for part in $(seq "$processes"); do
    OMP_NUM_THREADS=1 python3 benchmarks/selection.py --device cuda --model "$2" --rows "$rows" \
      --part "$part/$processes" --out "$parts/$part.json" >"$parts/$part.log" 2>&1 &
    running+=($!)
  done
  for part in "${!running[@]}"; do
    wait "${running[part]}" || { failed=1; tail -n 5 "$parts/$((part + 1)).log" >&2; }
  done
  [ $failed = 0 ] || return 1
  python3 benchmarks/selection.py --merge "$parts"/*.json --out "$OUT/$1.json" && rm -r "$parts"
}

# shellcheck disable=SC2086 # lists of words
job() {  # name of the job, name of its result, model
  case $1 in
    needles) evaluated "$2" "$3" --tasks $needles --samples 75 --per-document 5 --methods $factors $single $others ;;
    requests) evaluated "$2" "$3" --tasks demo_documents --samples 520 --protocol many-requests --methods $factors $others ;;
    layers) evaluated "$2" "$3" --tasks demo_documents --samples 520 --per-document 20 --methods $layers ;;
    inside)
      evaluated "$2" "$3" --tasks demo_documents --samples 500 --per-document 5 --lengths 2048 \
        --protocol question-inside --methods $inside
      ;;
    selection) selections "$2" "$3" ;;
    *) echo "no job $1: needles, requests, layers, inside or selection" >&2; return 2 ;;
  esac
}

status=0
for name in ${JOBS:-needles requests layers inside selection}; do
  job "$name" "$name" "$bundled" || status=1
  if [ -n "${SECOND:-}" ]; then job "$name" "${name}_second" "$SECOND" || status=1; fi
  echo "$name: $SECONDS s"
done
exit $status
