#!/usr/bin/env bash
# The data of this study, into data/corpora:
#   bash examples/studies/corpora/prepare.sh 'PAGES_GLOB' C4 OPENWEBTEXT STACKEXCHANGE PASSAGES
# All are files of JSON lines with a "text" field (.jsonl, .json, also .gz). Three quarters of each corpus are chosen from, the last
# quarters are held out. PASSAGES: text like LAMBADA's, of which a half is the guide and the other one held out. One tokenizer
# is trained on all four corpora.
set -euo pipefail
if [ $# -lt 5 ]; then
  sed -n '2,7s/^# //p' "$0" >&2
  exit 2
fi
. "$(dirname "$0")/../inputs.sh"
data=data/corpora
mkdir -p "$data/text"

lines() { for file in "$@"; do case $file in *.gz) gzip -dc "$file" ;; *) cat "$file" ;; esac; done; }
names=(weborganizer c4 openwebtext stackexchange)
for place in 0 1 2 3; do
  if [ "$place" = 0 ]; then inputs=($pages); else inputs=("${files[$((place - 1))]}"); fi
  name=${names[$place]}
  lines "${inputs[@]}" | awk 'NR % 4' | gzip > "$data/text/$name.jsonl.gz"
  lines "${inputs[@]}" | awk 'NR % 4 == 0' | gzip > "$data/text/$name.held.jsonl.gz"
done

"$python" tools/train_tokenizer.py --input "$data"/text/{weborganizer,c4,openwebtext,stackexchange}.jsonl.gz \
  --output "$data/tokenizer.json" --vocab-size 4096 --max-megabytes 20
for name in "${names[@]}"; do
  "$python" tools/preprocess_data.py --input "$data/text/$name.jsonl.gz" --output-prefix "$data/$name" \
    --tokenizer-model "$data/tokenizer.json" --unit window --window-length 64 --workers 2
done

# NAME SPLIT INPUT
prepare() {
  "$python" tools/prepare_validation.py --output-prefix "$data/$1" --split "$2" --label all --input "$3" \
    --tokenizer-model "$data/tokenizer.json" --max-length 64 --max-bad-fraction 0.2
}
for name in "${names[@]}"; do prepare "heldout_$name" 1/1 "$data/text/$name.held.jsonl.gz"; done
prepare guide 1/2 "${files[3]}"
prepare heldout 2/2 "${files[3]}"
