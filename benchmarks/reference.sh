#!/usr/bin/env bash
# The configuration that the bars are defined for: RoBERTa-base shape, 16 x 128, B = 320,000, 2 threads.
set -eu
out=${1:?usage: bash benchmarks/reference.sh OUT}
few=frozen,full,lora,static,id3,id3-10
# As fine-tuning runs it, with the config's dropout of 0.1; the rows of the bars without any; the bar under autocast.
unmask bench --device cpu --rounds 3 --methods all,static@10000,static@1000000 --output "$out/reference"
unmask bench --device cpu --rounds 3 --no-memory --methods $few --dropout 0 --output "$out/reference-no-dropout"
unmask bench --device cpu --rounds 3 --no-memory --methods $few --dtype autocast --output "$out/reference-autocast"
# Peak memory again, with every freed block of 1 MB or more given back to the system at once: what is held, without what glibc's heap
# keeps between blocks.
MALLOC_MMAP_THRESHOLD_=1048576 unmask bench --device cpu --no-timing --methods $few,shira --output "$out/reference-held"
