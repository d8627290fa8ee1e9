#!/bin/sh
# The steps before annotation on a pool of real instructions, with a real model on a CPU.
#
#     benchmarks/instructions/steps.sh FOLDER [PASSAGES [INSTRUCTIONS]]
#
# MODEL is OPENQWEN_REAL_CHECKPOINT. PASSAGES of books become questions first (400; 0: none).
# INSTRUCTIONS: use the first so many of the pool. Each step prints its time; a step that is
# finished is not done again.
set -eu
folder=$1 passages=${2:-400} most=${3:-2000}
here=$(dirname "$0")
model=$OPENQWEN_REAL_CHECKPOINT
python=${PYTHON:-python}
openqwen="$python -m openqwen.cli"
mkdir -p "$folder"
if [ ! -s "$folder/pool.jsonl" ]; then
  books=""
  if [ "$passages" -gt 0 ]; then
    $python "$here/pool.py" "$folder/passages" --passages "$passages"
    $openqwen synthesize repurpose --documents "$folder/passages" --model "$model" \
      --quantize int8 --no-pairs --fit 0 --per-document 1 --longest 1200 --max-tokens 96 \
      --judge-tokens 48 --most-items "$passages" --output "$folder/made"
    books="--books $folder/made --from-books $passages"
  fi
  $python "$here/pool.py" "$folder/pool.jsonl" $books
fi
step() {
  name=$1 from=$2 to=$3
  shift 3
  start=$(date +%s)
  $openqwen instructions "$name" "$from" --recipe instructions-0.5b --output "$folder/$to" "$@"
  echo "$name: $(($(date +%s) - start)) s"
}
step tag "$folder/pool.jsonl" tagged --model "$model" --most-items "$most"
step select "$folder/tagged" chosen
step evolve "$folder/chosen" harder --model "$model"
step respond "$folder/harder" tasks --model "$model"
