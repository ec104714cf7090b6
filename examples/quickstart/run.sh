#!/usr/bin/env bash
# Corpus, tokenizer, indexed datasets, then the main job on two processes.
#   bash examples/quickstart/run.sh [--short] [options of pretrain_bliss.py ...]
# --short: a few steps of everything, to see that it works (about a minute).
set -euo pipefail
cd "$(dirname "$0")/../.."
. examples/find_python.sh
data=runs/quickstart-data
options=()
if [ "${1:-}" = --short ]; then
  shift
  data=runs/quickstart-short-data
  corpus=(--megabytes 2)
  options=(--run_folder runs/quickstart-short --data.train_prefix $data/pool --data.validation_prefix $data/validation
    --data.test_prefixes "[$data/heldout,$data/cloze]" --data.other_prefixes "[$data/other]"
    --proxy.warmup_iters 20 --bilevel.upper_iters 10
    --pretraining.warmup_iters 10 --pretraining.train_iters 10 --pretraining.eval_interval 5 --evaluation.max_samples 64
    --evaluation.data_dir $data/tasks --evaluation.limit 100)
else
  corpus=()
fi

step() { printf '\n== %s\n' "$*"; }
"$python" -c 'import os; raise SystemExit(os.cpu_count() < 2)' || echo "note: fewer than 2 cores, this takes longer" >&2
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$("$python" -c 'import os; print(max(1, len(os.sched_getaffinity(0)) // 2))')}

if [ ! -f $data/done ] || [ ! -f $data/other.idx ]; then
  step "corpus: prose, code, tables and damaged text from this Python installation"
  "$python" tools/make_demo_corpus.py --output $data/text "${corpus[@]}"
  step "tokenizer: byte-level BPE, 2,048 entries"
  "$python" tools/train_tokenizer.py --input $data/text/pool-*.jsonl.gz --output $data/tokenizer.json --vocab-size 2048 \
    --max-megabytes 4
  step "indexed datasets"
  "$python" tools/preprocess_data.py --input $data/text/pool-*.jsonl.gz --output-prefix $data/pool \
    --tokenizer-model $data/tokenizer.json --unit window --window-length 64 --workers 2
  for set in validation heldout other; do
    name=${set/other/heldout_other}
    "$python" tools/prepare_validation.py --input $data/text/$name.jsonl.gz --output-prefix $data/$set \
      --tokenizer-model $data/tokenizer.json --label all --max-length 64
  done
  "$python" tools/prepare_validation.py --input $data/text/heldout_cloze.jsonl.gz --output-prefix $data/cloze \
    --tokenizer-model $data/tokenizer.json --label last-word --max-length 64
  touch $data/done
fi

if [ ! -f $data/tasks/prose.tasks.json ]; then
  step "tasks from the held-out prose: a passage's last word, and which words come next"
  "$python" tools/prepare_evaluation.py --from-text $data/text/heldout.jsonl.gz --output $data/tasks --name prose \
    --kind cloze choice --min-words 12 --max-words 32
fi

step "warm-up, two rounds of [bilevel, score, select, pretrain, evaluate], two arms"
# Two processes, or as many as there are GPUs for them: NCCL takes one process a device.
processes=$("$python" -c 'import torch; print(min(2, torch.cuda.device_count() or 2))')
if [ "$processes" -eq 1 ]; then set -- --target.tensor_model_parallel_size 1 "$@"; fi
"$python" -m torch.distributed.run --standalone --nproc-per-node "$processes" pretrain_bliss.py \
  --config examples/quickstart/config.yaml "${options[@]}" "$@"
