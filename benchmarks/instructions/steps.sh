#!/bin/sh
# The steps before annotation on a pool of real instructions, with a real model on a CPU.
#
#     benchmarks/instructions/steps.sh FOLDER [PASSAGES [INSTRUCTIONS]]
#
# The model is OPENQWEN_REAL_CHECKPOINT. PASSAGES of books become questions first (400; 0: none).
# INSTRUCTIONS: use the first so many of the pool. The tables and pictures come last: tables.md,
# coverage.svg, tagged.png, chosen.png. After a kill the same command goes on where it was: a
# finished step is not done again, and a step keeps the model's answers.
set -eu
folder=$1 passages=${2:-400} most=${3:-2000}
here=$(dirname "$0")
model=$OPENQWEN_REAL_CHECKPOINT
python=${PYTHON:-python}
openqwen="$python -m openqwen.cli"
mkdir -p "$folder"
name=none start=0
spent() {
  if [ "$name" != none ]; then
    echo "$name $(($(date +%s) - start))" | tee -a "$folder/times.txt"
  fi
  name=none
}
trap spent EXIT
trap 'exit 130' INT TERM
begin() {
  name=$1 start=$(date +%s)
}
if [ ! -s "$folder/pool.jsonl" ]; then
  books=""
  if [ "$passages" -gt 0 ]; then
    begin books
    $python "$here/pool.py" "$folder/passages" --passages "$passages"
    $openqwen synthesize repurpose --documents "$folder/passages" --model "$model" \
      --quantize int8 --no-pairs --fit 0 --per-document 1 --longest 1200 --max-tokens 96 \
      --judge-tokens 48 --most-items "$passages" --limits.concurrency 32 --output "$folder/made"
    spent
    books="--books $folder/made --from-books $passages"
  fi
  $python "$here/pool.py" "$folder/pool.jsonl" $books
fi
step() {
  stage=$1 from=$2 to=$3
  shift 3
  begin "$stage"
  $openqwen instructions "$stage" "$from" --recipe instructions-0.5b --output "$folder/$to" "$@"
  spent
}
step tag "$folder/pool.jsonl" tagged --model "$model" --most-items "$most"
step select "$folder/tagged" chosen
step evolve "$folder/chosen" harder --model "$model"
step respond "$folder/harder" tasks --model "$model"
$python "$here/tables.py" "$folder"
