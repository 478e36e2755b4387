#!/usr/bin/env bash
# What to run first on a new GPU, each part meant for ten minutes of one H100 (no one has timed it there yet); writes results/gpu_A.json, gpu_B.json, gpu_C.json.
#
#   bash bench/gpu_check.sh A    is it right? every CUDA test of the suite, and numbers that a test cannot judge; the card's ceilings
#   bash bench/gpu_check.sh B    is it fast? 0.12B, 0.5B, MoE-0.5B; the head alone; the optimizers
#   bash bench/gpu_check.sh C    1B, MoE-1B; a profile
#   bash bench/gpu_check.sh toy  all three at toy shapes on whatever there is, as is done without CUDA: it only shows that they run
set -euo pipefail
cd "$(dirname "$0")/.."
part=${1:?"which part? bash bench/gpu_check.sh A, B, C or toy"}
if ! python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "no CUDA here: toy shapes, into out/gpu_check"
    part=toy
fi
case $part in
    A) python -m pytest -q -m "" -k cuda || echo "LOOK: a CUDA test failed"
       python -m bench.gpu_check A --out results ;;
    B | C) python -m bench.gpu_check "$part" --out results ;;
    toy) for each in A B C; do python -m bench.gpu_check "$each" --out out/gpu_check --toy; done ;;
    *) echo "error: no part $part: choose A, B, C or toy" >&2; exit 2 ;;
esac
