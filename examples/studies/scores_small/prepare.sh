#!/usr/bin/env bash
# The data of this study, into data/scores_small:
#   bash examples/studies/scores_small/prepare.sh 'PAGES_GLOB' C4 OPENWEBTEXT PASSAGES ITEMS ...
# All are files of JSON lines (.jsonl, .json, also .gz); all but ITEMS have a "text" field. The pool is PAGES with two
# thirds of C4 and OPENWEBTEXT; the last thirds are held out, as text that the guide does not speak for. PASSAGES: text
# like LAMBADA's. ITEMS: task items, one file a task (ARC, SciQ, HellaSwag, PIQA, BoolQ; tools/prepare_evaluation.py tells
# their fields). A half of the passages and of every task's items, with the right answers, are the sets of the guide; the
# other halves are held out, the items' also as tasks of evaluation. The passages' half comes in two halves, too.
set -euo pipefail
if [ $# -lt 5 ]; then
  sed -n '2,9s/^# //p' "$0" >&2
  exit 2
fi
. "$(dirname "$0")/../inputs.sh"
c4=${files[0]} openwebtext=${files[1]} sets=("${files[@]:2}")
data=data/scores_small
mkdir -p "$data"

lines() { case $1 in *.gz) gzip -dc "$1" ;; *) cat "$1" ;; esac; }
for name in c4 openwebtext; do
  lines "${!name}" | awk 'NR % 3' | gzip > "$data/$name.pool.jsonl.gz"
  lines "${!name}" | awk 'NR % 3 == 0' | gzip > "$data/$name.held.jsonl.gz"
done

"$python" tools/train_tokenizer.py --input "$pages" --output "$data/tokenizer.json" --vocab-size 4096 --max-megabytes 10
"$python" tools/preprocess_data.py --input "$pages" "$data/c4.pool.jsonl.gz" "$data/openwebtext.pool.jsonl.gz" \
  --output-prefix "$data/pool" --tokenizer-model "$data/tokenizer.json" --unit window --window-length 64 --workers 2

# NAME SPLIT LABEL INPUT
prepare() {
  "$python" tools/prepare_validation.py --output-prefix "$data/$1" --split "$2" --label "$3" --input "$4" \
    --tokenizer-model "$data/tokenizer.json" --max-length 64 --max-bad-fraction 0.2
}
prepare c4 1/1 all "$data/c4.held.jsonl.gz"
prepare openwebtext 1/1 all "$data/openwebtext.held.jsonl.gz"
mkdir -p "$data/tasks"
label=all
for file in "${sets[@]}"; do
  name=$(basename "$file")
  if [ "$label" = item ]; then lines "$file" | awk 'NR % 2 == 0' | gzip > "$data/tasks/${name%.gz}.gz"; fi
  prepare "guide_${name%%.*}" 1/2 "$label" "$file"
  prepare "heldout_${name%%.*}" 2/2 "$label" "$file"
  label=item
done
passages=$(basename "${sets[0]}")
prepare "guide_${passages%%.*}_first" 1/4 all "${sets[0]}"
prepare "guide_${passages%%.*}_second" 3/4 all "${sets[0]}"
