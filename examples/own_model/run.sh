#!/usr/bin/env bash
# Decomposes a model, trains one domain on it, and measures: ./run.sh FOLDER, a Hugging Face folder or a hub id.
set -euo pipefail
model=${1:?name the folder of a model}

t2ray decompose "$model" --out factors
t2ray train domain.yaml model="$model" factors=factors --resume
t2ray eval --run runs/own --tasks pick --strategies base,pick --limit 100 --json own.json
