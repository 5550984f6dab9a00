#!/usr/bin/env bash
# A step's cost over the budget, over the size of the model, and the cost of selecting.
set -eu
out=${1:?usage: bash benchmarks/curves.sh OUT}
unmask bench --curve budget --model minilm --output "$out/curves"
unmask bench --curve selection --output "$out/curves"
unmask bench --curve size --draws 2 --steps 2 --output "$out/curves"
