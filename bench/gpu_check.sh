#!/usr/bin/env bash
# The first thing to run on a new GPU, in three parts of nine minutes each on one H100 or H200.
# Results: studies/results/gpu_<check>.json, each written as its check ends.
#
#   bash bench/gpu_check.sh A    What matters most: the head, 0.12B beside nanoGPT's block, the CUDA
#                                tests (tests/test_cuda.py), MoE-0.5B, 1B.
#   bash bench/gpu_check.sh B    The card's ceilings, three minutes of training at 0.12B, 0.5B,
#                                more variants, the optimizers.
#   bash bench/gpu_check.sh C    1B with PyTorch's choice of attention and of fused reductions
#                                against others; a profile; MoE-1B.
#   bash bench/gpu_check.sh toy  All three at toy shapes: shows that they run. This is what happens
#                                without CUDA, too.
set -uo pipefail
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
options=()
if [ "$part" = toy ]; then options=(--toy); fi
failed=0

look() {  # STATUS NAME: say so if it is not 0
    if [ "$1" != 0 ]; then
        echo "LOOK: $2 failed or took too long (status $1)"
        failed=1
    fi
}

check() {  # SECONDS NAME
    local limit=$1
    if [ "$part" = toy ]; then limit=600; fi
    timeout "$limit" python -m bench.gpu_check "$2" "${options[@]}"
    look $? "$2"
}

part_A() {
    check 60 head
    check 90 race_120m
    check 90 race_120m_slices
    timeout 150 python -m pytest -q -m "" -k cuda
    look $? "the CUDA tests"
    check 70 race_moe_500m
    check 80 race_1b
}

part_B() {
    check 30 ceilings
    check 240 training
    check 90 race_500m
    check 80 race_120m_parts
    check 60 optimizers
}

part_C() {
    check 110 race_1b_parts
    check 80 race_1b_no_mix
    check 80 race_1b_flash
    if [ "$part" != toy ]; then check 80 race_1b_cudnn; fi  # a CPU has no cuDNN
    check 50 profile
    check 60 race_1b_small
    check 80 race_moe_1b
}

if [ "$part" = toy ]; then
    part_A; part_B; part_C
else
    "part_$part"
fi
exit $failed
