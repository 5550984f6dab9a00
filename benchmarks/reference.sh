#!/usr/bin/env bash
# The configuration that the bars are defined for: RoBERTa-base shape, 16 x 128, B = 320,000, 2 threads.
set -eu
out=${1:?usage: bash benchmarks/reference.sh OUT}
bars=frozen,full,lora,shira,authors,static,id3,id3-10
few=frozen,full,lora,static,id3,id3-10
time="unmask bench --device cpu --no-memory"
# As fine-tuning runs it, with the config's dropout of 0.1: the rows of the bars, then the other rows; the rows of the bars
# without any dropout; the bar under autocast.
$time --rounds 3 --methods $bars --output "$out/reference"
$time --rounds 2 --methods frozen,full,full-fused,super,static-d3,id3-100,static@10000,static@1000000 --output "$out/reference-others"
$time --rounds 2 --methods $bars --dropout 0 --output "$out/reference-no-dropout"
$time --rounds 2 --methods $few --dtype autocast --output "$out/reference-autocast"
# Peak memory; and again with every freed block of 1 MB or more given back to the system at once: what is held, without what
# glibc's heap keeps between blocks.
unmask bench --device cpu --no-timing --output "$out/reference-memory"
MALLOC_MMAP_THRESHOLD_=1048576 unmask bench --device cpu --no-timing --methods $few,shira --output "$out/reference-held"
