#!/usr/bin/env bash
# The configuration that the bars are defined for: RoBERTa-base shape, 16 x 128, B = 320,000, 2 threads.
# The rows of a bar must be in memory together (24 GB for five of them); so there are two runs, each with the floor.
set -eu
out=${1:?usage: bash benchmarks/reference.sh OUT}
time="unmask bench --device cpu --no-memory --memory-share 0.9"
# As fine-tuning runs it, with the config's dropout of 0.1.
$time --rounds 3 --methods frozen,lora,shira,static,id3-10 --output "$out/reference"
$time --rounds 3 --methods frozen,full,authors,id3,id3-10 --output "$out/reference-full"
$time --rounds 3 --methods frozen,lora,static,id3-10 --dtype autocast --output "$out/reference-autocast"
# How a process's heap happens to lie is settled when it starts, and with it some of what its steps cost: the same again, with new
# processes for every round.
$time --draws 3 --rounds 1 --methods frozen,lora,shira,static,id3-10 --output "$out/reference-draws"
$time --draws 4 --rounds 1 --methods frozen,lora,static,id3-10 --dtype autocast --output "$out/reference-autocast-draws"
python benchmarks/operators.py "$out" --methods frozen,static,id3-10,full
python benchmarks/operators.py "$out" --methods frozen,lora,id3-10 --dtype autocast
$time --rounds 2 --methods frozen,static@10000,static@1000000,static-d3,id3-100 --output "$out/reference-others"
$time --rounds 2 --methods frozen,full-fused,super --output "$out/reference-rest"
# What the allocator does to the ratios: the rows of the bars against LoRA in one process, whose heap keeps what was freed.
kept="$time --no-processes --rounds 2"
$kept --methods frozen,lora,shira,static,id3-10 --output "$out/reference-kept"
$kept --dtype autocast --methods frozen,lora,static,id3-10 --output "$out/reference-autocast-kept"
# Peak memory; and again with every freed block of 1 MB or more given back to the system at once: what is held, without what
# glibc's heap keeps between blocks.
unmask bench --device cpu --no-timing --output "$out/reference-memory"
few=frozen,full,lora,shira,static,id3,id3-10
MALLOC_MMAP_THRESHOLD_=1048576 unmask bench --device cpu --no-timing --methods $few --output "$out/reference-held"
