#!/usr/bin/env bash
# On one NVIDIA H100 or H200: the 7B and 1B shapes in bfloat16 and the RoBERTa-base shape, against LoRA as peft makes it and with
# adapters in bfloat16. It takes about 6 minutes, and ends after LIMIT seconds (360) with what it has: each record is written
# after every row. Write into a folder that you keep.
set -u
out=${1:?usage: bash benchmarks/gpu.sh OUT}
limit=${LIMIT:-360}
UNMASK=${UNMASK:-unmask}

run() { # run NAME OPTIONS...: one table
  local name=$1 left=$((limit - SECONDS)); shift
  if [ "$left" -lt 20 ]; then
    echo "$name: no time is left"
  else
    timeout "$left" $UNMASK bench --device "${DEVICE:-cuda}" --draws 1 "$@" --output "$out/$name" || echo "$name: ended with status $?"
  fi
}

run host --host
run llama-7b --model llama-7b --dtype bf16 --budget 7000000 --lora-r 32 --warmup 4 --steps 10 --methods frozen,lora,lora-cast,static,id3-10,id3,full
run llama-1b --model llama-1b --dtype bf16 --batch-size 8 --seq-len 1024 --budget 2400000 --lora-r 16 --warmup 4 --steps 10 \
  --methods frozen,lora,lora-cast,static,id3-10,id3,full
run roberta-base --dtype autocast --batch-size 32 --warmup 4 --steps 20 --methods frozen,lora,static,id3-10,id3,full
