#!/usr/bin/env bash
# C4 (or any text like it) and LAMBADA into what the C4 examples read, data/c4-neox or data/c4-llama.
#   bash examples/c4/prepare.sh neox  'C4/en/c4-train.*.json.gz' LAMBADA.jsonl gpt-neox-20b/tokenizer.json [ITEMS ...]
#   bash examples/c4/prepare.sh llama 'C4/en/c4-train.*.json.gz' LAMBADA.jsonl llama/tokenizer.model
# On an array of nodes: SHARD=3/16 bash examples/c4/prepare.sh ... for each of 16, then MERGE=16 bash ... once.
# WORKERS: tokenising processes (default: all cores). Every second LAMBADA passage guides the selection, the others are
# held out. ITEMS, files such as arc_easy.test.jsonl with a task's items, give a guide and a held-out set each, which
# examples/studies/guide takes. Running it again continues.
set -euo pipefail
if [ $# -lt 4 ]; then
  sed -n '2,8s/^# //p' "$0" >&2
  exit 2
fi
name=$1 documents=$2 lambada=$(realpath "$3") tokenizer=$(realpath "$4")
items=()
for file in "${@:5}"; do items+=("$(realpath "$file")"); done
case $documents in /*) ;; *) documents=$PWD/$documents ;; esac
cd "$(dirname "$0")/../.."
. examples/find_python.sh
data=data/c4-$name
mkdir -p "$data"
case $tokenizer in *.model) kind=sentencepiece ;; *) kind=huggingface ;; esac
common=(--tokenizer-type "$kind" --tokenizer-model "$tokenizer")

part=()
if [ -n "${SHARD:-}" ]; then part=(--shard "$SHARD"); fi
if [ -n "${MERGE:-}" ]; then part=(--merge-shards "$MERGE"); else part+=(--input "$documents"); fi
"$python" tools/preprocess_data.py "${part[@]}" --output-prefix "$data/c4" "${common[@]}" \
  --unit window --window-length 1024 --workers "${WORKERS:-$(nproc)}"
if [ -n "${SHARD:-}" ]; then exit 0; fi

# NAME LABEL INPUT
halves() {
  for set in guide:1/2 heldout:2/2; do
    [ -f "$data/$1_${set%%:*}.manifest.json" ] || "$python" tools/prepare_validation.py --input "$3" \
      --output-prefix "$data/$1_${set%%:*}" --split "${set##*:}" --label "$2" --max-length 1024 "${common[@]}"
  done
}
halves lambada last-word "$lambada"
for file in "${items[@]}"; do
  task=$(basename "$file")
  halves "${task%%.*}" item "$file"
done
