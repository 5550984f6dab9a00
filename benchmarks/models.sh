#!/usr/bin/env bash
# The other shapes. Rows that do not fit into memory together run in groups.
set -eu
out=${1:?usage: bash benchmarks/models.sh OUT}
for model in minilm mpnet smollm2; do
  unmask bench --model "$model" --output "$out/$model"
done
unmask bench --model llama-1b --dtype bf16 --budget 1000000 --methods frozen,full,lora,static,id3,id3-10 \
  --rounds 3 --output "$out/llama-1b"
