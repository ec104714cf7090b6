#!/usr/bin/env bash
# BLISS on your own web text:
#   [OTHER=FILE.jsonl] bash examples/web_text/run.sh 'DOCUMENTS_GLOB' VALIDATION.jsonl RUN_FOLDER \
#     [options of pretrain_bliss.py ...]
# DOCUMENTS_GLOB: JSON lines (.jsonl, .json, .gz) with a "text" field; "domain" and "format" are reported where present.
# VALIDATION: JSON lines with "text", passages like those the model should be good at. Every second one guides the
# selection; the others are held out for the result, by the loss on all their tokens and by that on their last words.
# OTHER: JSON lines with "text" of another kind, such as a general sample of the web; the result shows what was lost there.
set -euo pipefail
if [ $# -lt 3 ]; then
  sed -n '2,8s/^# //p' "$0" >&2
  exit 2
fi
documents=$1 validation=$(realpath "$2") folder=$(realpath -m "$3")
shift 3
other=${OTHER:+$(realpath "$OTHER")}
case $documents in /*) ;; *) documents=$PWD/$documents ;; esac
cd "$(dirname "$0")/../.."
. examples/find_python.sh
data=${DATA_FOLDER:-$folder-data}
mkdir -p "$data"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$("$python" -c 'import os; print(max(1, len(os.sched_getaffinity(0)) // 2))')}

if [ ! -f "$data/done" ]; then
  "$python" tools/train_tokenizer.py --input "$documents" --output "$data/tokenizer.json" --vocab-size 4096 \
    --max-megabytes 10
  "$python" tools/preprocess_data.py --input "$documents" --output-prefix "$data/pool" \
    --tokenizer-model "$data/tokenizer.json" --unit window --window-length 64 --workers 2
  prepare() {
    "$python" tools/prepare_validation.py --input "$validation" --output-prefix "$data/$1" --split "$2" --label "$3" \
      --tokenizer-model "$data/tokenizer.json" --max-length 64
  }
  prepare guide 1/2 all
  prepare heldout 2/2 all
  prepare heldout_last_word 2/2 last-word
  touch "$data/done"
fi
if [ -n "$other" ]; then
  "$python" tools/prepare_validation.py --input "$other" --output-prefix "$data/other" --label all \
    --tokenizer-model "$data/tokenizer.json" --max-length 64
  set -- --data.other_prefixes "[$data/other]" "$@"
fi

# Two processes, or as many as there are GPUs for them: NCCL takes one process a device.
processes=$("$python" -c 'import torch; print(min(2, torch.cuda.device_count() or 2))')
if [ "$processes" -eq 1 ]; then set -- --target.tensor_model_parallel_size 1 "$@"; fi
"$python" -m torch.distributed.run --standalone --nproc-per-node "$processes" pretrain_bliss.py \
  --config examples/web_text/config.yaml --run_folder "$folder" --data.train_prefix "$data/pool" \
  --data.validation_prefix "$data/guide" --data.test_prefixes "[$data/heldout,$data/heldout_last_word]" "$@"
