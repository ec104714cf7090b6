#!/usr/bin/env bash
# The data of these studies, into data/arms_small:
#   bash examples/studies/arms_small/prepare.sh 'PAGES_GLOB' PASSAGES C4 OPENWEBTEXT [ITEMS ...]
# All are files of JSON lines (.jsonl, .json, also .gz). The first four have a "text" field. PAGES: the pool; "domain" and
# "format" are reported where present. PASSAGES: text like LAMBADA's; every second one guides the selection, the others are
# held out. C4, OPENWEBTEXT: held-out text that the guide does not speak for.
# ITEMS: task items, one file a task (ARC, SciQ, HellaSwag, PIQA, BoolQ; tools/prepare_evaluation.py tells their fields).
# With the passages they are the guide of mixed.yaml, as many units of each; every second item is held out.
set -euo pipefail
if [ $# -lt 4 ]; then
  sed -n '2,9s/^# //p' "$0" >&2
  exit 2
fi
. "$(dirname "$0")/../inputs.sh"
passages=${files[0]} c4=${files[1]} openwebtext=${files[2]} items=("${files[@]:3}")
data=data/arms_small
mkdir -p "$data"

"$python" tools/train_tokenizer.py --input "$pages" --output "$data/tokenizer.json" --vocab-size 4096 --max-megabytes 10
"$python" tools/preprocess_data.py --input "$pages" --output-prefix "$data/pool" \
  --tokenizer-model "$data/tokenizer.json" --unit window --window-length 64 --workers 2

# NAME SPLIT LABEL INPUT, or several labels and inputs with --weights
prepare() {
  "$python" tools/prepare_validation.py --output-prefix "$data/$1" --split "$2" --label $3 --input "${@:4}" \
    --tokenizer-model "$data/tokenizer.json" --max-length 64 --max-bad-fraction 0.2   # answers longer than a unit
}
prepare guide 1/2 all "$passages"
prepare heldout 2/2 all "$passages"
prepare c4 1/1 all "$c4"
prepare openwebtext 1/1 all "$openwebtext"
if [ ${#items[@]} -gt 0 ]; then
  labels=all weights=1
  for file in "${items[@]}"; do
    name=$(basename "$file")
    prepare "heldout_${name%%.*}" 2/2 answer "$file"
    labels+=" answer" weights+=" 1"
  done
  prepare guide_mixed 1/2 "$labels" "$passages" "${items[@]}" --weights $weights
fi
