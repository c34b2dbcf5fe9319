#!/usr/bin/env bash
# Submits the paper's main chain as dependent jobs, from a recipe's folder:
#   cd recipes/imdb; make runs/imdb/manifest.json; bash ../slurm/chain.sh
# Run prepare first, on a machine that reaches the Hub: compute nodes often do not.
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
runs=${RUNS:-runs} model=${MODEL:-gpt2-large} scorer=${SCORER:-siebert/sentiment-roberta-large-english}
world=${WORLD:-$runs/imdb} shards=${SHARDS:-8}
read -ra betas <<<"${BETAS:-0.05 0.1 1 5}"
recipe=(--config "${RECIPE:-recipe.yaml}")
points=(--eval-prompts "$world/prompts.test.jsonl" --scorer "$scorer")

job() { # SBATCH-OPTION... FILE ARGUMENT...; prints the job's number; nothing runs after a failed job
  sbatch --parsable --kill-on-invalid-dep=yes "$@" | cut -d ';' -f 1
}

sft=$(job "$here/one-gpu.sbatch" "$runs/sft" sft "${recipe[@]}" --model "$model" --data "$world/sft.jsonl")
parts=$(job --dependency="afterok:$sft" --array="1-$shards" "$here/shards.sbatch" "$runs/prefs.jsonl" "$shards" \
  make-prefs "${recipe[@]}" --model "$runs/sft" --prompts "$world/prompts.train.jsonl" --scorer "$scorer")
prefs=$(job --dependency="afterok:$parts" "$here/merge.sbatch" "$runs/prefs.jsonl" "$shards")
dpo=$(job --dependency="afterok:$prefs" --array="0-$((${#betas[@]} - 1))" "$here/sweep.sbatch" \
  "$runs/dpo" beta "${betas[*]}" train-dpo "${recipe[@]}" --model "$runs/sft" --data "$runs/prefs.jsonl" "${points[@]}")
evaluation=$(job --dependency="afterok:$dpo" "$here/one-gpu.sbatch" "$runs/eval.jsonl" \
  evaluate "${recipe[@]}" --model "$runs/sft" "${betas[@]/#/--model=$runs/dpo-}" --ref "$runs/sft" \
  --prompts "$world/prompts.test.jsonl" --scorer "$scorer")
echo "sft $sft, make-prefs $parts, merge $prefs, train-dpo $dpo, evaluate $evaluation"
