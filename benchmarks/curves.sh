#!/usr/bin/env bash
# A step's cost over the budget, over the size of the model, and the cost of selecting.
set -eu
out=${1:?usage: bash benchmarks/curves.sh OUT}
for curve in budget size selection; do
  unmask bench --curve "$curve" --output "$out/curves"
done
