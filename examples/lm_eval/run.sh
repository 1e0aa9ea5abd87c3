#!/bin/sh
# Runs lm-evaluation-harness on an endpoint: run.sh [URL] [MODEL] [TOKENIZER], from the repository's root.
set -eu
url=${1:-http://127.0.0.1:8000} model=${2:-t2ray:math} tokenizer=${3:-t2ray/tiny/model}
exec lm_eval run --model local-completions --include_path examples/lm_eval/tasks --tasks sums,sums_choice \
  --model_args "model=$model,base_url=$url/v1/completions,tokenizer_backend=huggingface,tokenizer=$tokenizer" \
  --batch_size 4
