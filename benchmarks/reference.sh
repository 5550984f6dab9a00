#!/usr/bin/env bash
# The configuration that the bars are defined for: RoBERTa-base shape, 16 x 128, B = 320,000, 2 threads.
set -eu
out=${1:?usage: bash benchmarks/reference.sh OUT}
unmask bench --device cpu --methods all,static@10000,static@1000000 --output "$out/reference"
unmask bench --device cpu --dtype autocast --methods frozen,full,lora,static,id3,id3-10 --output "$out/reference-autocast"
