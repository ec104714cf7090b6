#!/usr/bin/env bash
# The transfer of scorers between corpora, after prepare.sh: every corpus's own arms, each one's scorer of seed 1 applied to all
# four corpora, and targets that train on what these choose. Running it again continues.
#   bash examples/studies/corpora/run.sh [--seeds 1 2 3]
set -euo pipefail
cd "$(dirname "$0")/../../.."
. examples/find_python.sh
names=(weborganizer c4 openwebtext stackexchange)
study() { "$python" tools/study.py "examples/studies/corpora/$1.yaml" --output "runs/corpora/$1" "${@:2}"; }

for name in "${names[@]}"; do
  study "$name" "$@" --only bliss dsir > /dev/null
  [ -d "runs/corpora/scorers/$name" ] || "$python" tools/export_scorer.py "runs/corpora/$name/runs/seed_1/own" \
    --output "runs/corpora/scorers/$name"
done
for corpus in "${names[@]}"; do
  for name in "${names[@]}"; do
    "$python" tools/score_corpus.py --scorer "runs/corpora/scorers/$name" --corpus "data/corpora/$corpus" \
      --output "runs/corpora/scores/${name}_on_$corpus" --quiet
  done
  study "$corpus" "$@" > /dev/null
done
"$python" examples/studies/corpora/matrix.py runs/corpora
