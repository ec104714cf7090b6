#!/usr/bin/env bash
# The data of this study, into data/arms_small:
#   bash examples/studies/arms_small/prepare.sh 'PAGES_GLOB' PASSAGES.jsonl C4_FILE OPENWEBTEXT_FILE
# All are JSON lines (.jsonl, .json, also .gz) with a "text" field. PAGES: the pool; "domain" and "format" are reported
# where present. PASSAGES: text like LAMBADA's; every second one guides the selection, the others are held out. The last
# two are held-out text that the guide does not speak for.
set -euo pipefail
if [ $# -ne 4 ]; then
  sed -n '2,6s/^# //p' "$0" >&2
  exit 2
fi
pages=$1 passages=$(realpath "$2") c4=$(realpath "$3") openwebtext=$(realpath "$4")
case $pages in /*) ;; *) pages=$PWD/$pages ;; esac
cd "$(dirname "$0")/../../.."
. examples/find_python.sh
data=data/arms_small
mkdir -p "$data"

"$python" tools/train_tokenizer.py --input "$pages" --output "$data/tokenizer.json" --vocab-size 4096 --max-megabytes 10
"$python" tools/preprocess_data.py --input "$pages" --output-prefix "$data/pool" \
  --tokenizer-model "$data/tokenizer.json" --unit window --window-length 64 --workers 2

# NAME INPUT SPLIT
prepare() {
  "$python" tools/prepare_validation.py --input "$2" --output-prefix "$data/$1" --split "$3" --label all \
    --tokenizer-model "$data/tokenizer.json" --max-length 64
}
prepare guide "$passages" 1/2
prepare heldout "$passages" 2/2
prepare c4 "$c4" 1/1
prepare openwebtext "$openwebtext" 1/1
