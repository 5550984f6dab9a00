#!/usr/bin/env bash
# On an NVIDIA GPU: the Llama-7B shape in bfloat16, B = 7M against LoRA r=32.
set -eu
out=${1:?usage: bash benchmarks/gpu.sh OUT}
unmask bench --model llama-7b --dtype bf16 --device cuda --budget 7000000 --lora-r 32 --warmup 4 --steps 20 --draws 3 \
  --methods frozen,full,lora,shira,static,id3,id3-10,id3-100 --output "$out/llama-7b"
