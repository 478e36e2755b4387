#!/usr/bin/env bash
# The first thing to run on a new GPU, in three parts of at most ten minutes each on one H100 or H200.
# Results: studies/results/gpu_A.json, gpu_B.json, gpu_C.json.
#
#   bash bench/gpu_check.sh A    Is it right? The CUDA tests (tests/test_cuda.py), the card's ceilings,
#                                three minutes of training at 0.12B.
#   bash bench/gpu_check.sh B    Is it fast? 0.12B, 0.5B and MoE-0.5B; the head; the optimizers.
#   bash bench/gpu_check.sh C    1B, with PyTorch's choice of attention and of fused reductions
#                                against others; a profile; MoE-1B.
#   bash bench/gpu_check.sh toy  All three at toy shapes: shows that they run. This is what happens
#                                without CUDA, too.
set -euo pipefail
cd "$(dirname "$0")/.."
part=${1:-}
case $part in
    A | B | C | toy) ;;
    *) echo "error: no part '$part': choose A, B, C or toy" >&2; exit 2 ;;
esac
if ! python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "no CUDA here: toy shapes, into out/gpu_check"
    part=toy
fi

check() {  # PART SECONDS; each finished check is in the file when the time is over
    local status=0
    timeout "$2" python -m bench.gpu_check "$1" --out studies/results || status=$?
    if [ "$status" = 124 ]; then echo "LOOK: stopped after $2 s; studies/results/gpu_$1.json is partial"; fi
    return "$status"
}

case $part in
    A) timeout 240 python -m pytest -q -m "" -k cuda || echo "LOOK: a CUDA test failed or was slow"
       check A 360 ;;
    B | C) check "$part" 600 ;;
    toy) for each in A B C; do python -m bench.gpu_check "$each" --out out/gpu_check --toy; done ;;
esac
