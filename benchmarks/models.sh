#!/usr/bin/env bash
# The other shapes.
set -eu
out=${1:?usage: bash benchmarks/models.sh OUT}
few=frozen,full,lora,static,id3,id3-10
unmask bench --model minilm --output "$out/minilm"
for model in mpnet smollm2; do
  unmask bench --model "$model" --methods $few --output "$out/$model"
done
unmask bench --model llama-1b --dtype bf16 --budget 1000000 --methods $few --draws 2 --steps 2 --output "$out/llama-1b"
