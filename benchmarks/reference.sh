#!/usr/bin/env bash
# The configuration that the bars are defined for: RoBERTa-base shape, 16 x 128, B = 320,000, 2 threads, dropout 0.1.
set -eu
out=${1:?usage: bash benchmarks/reference.sh OUT}
bench="unmask bench --device cpu"
$bench --draws 5 --methods frozen,lora,shira,static,id3-10 --output "$out/reference"
$bench --draws 5 --methods frozen,full,authors,id3,id3-10 --output "$out/reference-full"
$bench --draws 5 --methods frozen,lora,static,id3-10 --dtype autocast --output "$out/reference-autocast"
$bench --methods frozen,static@10000,static@1000000,static-d3,id3-100 --output "$out/reference-others"
$bench --methods frozen,full-fused,super --output "$out/reference-rest"
# Peak memory of every row. It is measured once more with every freed block of 1 MB or more given back to the system at once:
# then it is what is held, without what glibc's heap keeps between blocks.
$bench --draws 1 --steps 1 --output "$out/reference-memory"
few=frozen,full,lora,shira,static,id3,id3-10
MALLOC_MMAP_THRESHOLD_=1048576 $bench --draws 1 --steps 1 --methods $few --output "$out/reference-held"
python benchmarks/operators.py "$out" --methods frozen,static,id3-10,full
python benchmarks/operators.py "$out" --methods frozen,lora,id3-10 --dtype autocast
python benchmarks/bars.py "$out/reference/bench.json"
python benchmarks/bars.py "$out/reference-full/bench.json"
python benchmarks/bars.py "$out/reference-autocast/bench.json"
