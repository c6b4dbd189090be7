#!/usr/bin/env bash
# Everything worth doing on a machine with a GPU, in one go: right first, then how fast; the summary comes last.
#
#   bash bench/gpu.sh [--budget SECONDS] [--rehearse]
#
# It installs nothing: Python with torch, triton, transformers and fasttrace's other requirements is enough; pytest,
# pytest-xdist and the peers are used where they are there. The steps run in the order of their worth and each has a
# limit of its own; what fails or runs out of time is told, and the next one begins. No step begins, and none goes on,
# when the budget (520 seconds) is spent. The exit code is 1 if anything that was checked was wrong.
#
#   --rehearse  the whole flow on tiny cases on the CPU
#   PYTHON      the interpreter; default python3
#   OUT         the folder for every step's output and report; default: one under bench/results/<device>
#   BENCH_COMMIT  what the reports call the commit where there is no git
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

BUDGET=520 REHEARSE=${REHEARSE:-0}
while (($#)); do
    case $1 in
        --budget) BUDGET=${2:?--budget needs seconds}; shift 2 ;;
        --rehearse) REHEARSE=1; shift ;;
        *) echo "unknown argument $1; usage: bash bench/gpu.sh [--budget SECONDS] [--rehearse]" >&2; exit 2 ;;
    esac
done
PYTHON=${PYTHON:-python3} GRACE=5 LEAST=15 SUMMARY=10
[[ $BUDGET =~ ^[0-9]+$ ]] || { echo "--budget $BUDGET: expected whole seconds" >&2; exit 2; }
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

# The folder of this run; stops at once where there is no GPU to measure.
folder() {
    "$PYTHON" - "$REHEARSE" <<'PY'
import sys
from datetime import UTC, datetime

import torch

from bench.card import card, slug
from bench.report import RESULTS

device = "cpu" if sys.argv[1] == "1" else "cuda"
if device == "cuda" and not torch.cuda.is_available():
    sys.exit(f"torch {torch.__version__} sees no GPU; bench/gpu.sh --rehearse runs tiny cases on the CPU")
print(RESULTS / slug(card(device)) / f"{datetime.now(UTC):%Y-%m-%dT%H%M}-gpu")
PY
}
DEFAULT=$(folder) || { echo "bench/gpu.sh: nothing was measured" >&2; exit 2; }
OUT=${OUT:-$DEFAULT}
mkdir -p "$OUT" || exit 2
if [[ -e $OUT/steps.jsonl ]]; then
    echo "$OUT holds an earlier run; expected an empty folder: OUT=another/folder bash bench/gpu.sh" >&2
    exit 2
fi
echo "output: $OUT"

# step NAME LIMIT COMMAND...: runs a command, its output in $OUT/NAME.log, and writes down what came of it.
step() {
    local name=$1 limit=$2 left=$((BUDGET - SECONDS - GRACE - SUMMARY)) began=$SECONDS code
    shift 2
    ((limit > left)) && limit=$left
    printf '%s ... ' "$name"
    if ((limit < LEAST)); then
        code=null limit=0
    else
        timeout -k "$GRACE" "$limit" "$@" >"$OUT/$name.log" 2>&1
        code=$?
    fi
    printf '{"name": "%s", "code": %s, "seconds": %d, "limit": %d}\n' \
        "$name" "$code" $((SECONDS - began)) "$limit" >>"$OUT/steps.jsonl"
    [[ $code == null ]] && echo "no time left" || echo "exit code $code after $((SECONDS - began)) s"
}

# tests NAME LIMIT ARGUMENT...: pytest, shared out where pytest-xdist is at hand.
tests() {
    local name=$1 limit=$2 workers=()
    shift 2
    if ! "$PYTHON" -c 'import pytest' 2>/dev/null; then
        echo '{"name": "'"$name"'", "code": null, "seconds": 0, "limit": 0, "absent": "pytest"}' >>"$OUT/steps.jsonl"
        echo "$name: pytest is not installed; bench.kernels and the gates still compare with plain computations"
        return
    fi
    "$PYTHON" -c 'import xdist' 2>/dev/null && workers=(-n 6)
    step "$name" "$limit" "$PYTHON" -m pytest -q "${workers[@]}" "$@"
}

# run NAME LIMIT DTYPES CASES [ARGUMENT...]: bench.run.
run() {
    local name=$1 limit=$2 dtypes=$3 cases=$4
    shift 4
    step "$name" "$limit" "$PYTHON" -m bench.run --dtypes "$dtypes" --cases "$cases" --out "$OUT/$name.json" "$@"
}

# peers NAME LIMIT CASE DTYPE [ARGUMENT...]: bench.peers; those that are not installed are left out.
peers() {
    local name=$1 limit=$2 case=$3 dtype=$4
    shift 4
    step "$name" "$limit" "$PYTHON" -m bench.peers --case "$case" --dtype "$dtype" --cells 9 --out "$OUT/$name.json" "$@"
}

on_gpu() {
    local elsewhere rest=gpt2-xl-t25,gpt2-12-n10,gpt2-12-t25,gpt2-12-t200
    mapfile -t elsewhere < <(grep -rl --include='test_*.py' 'mark\.gpu' tests | grep -v '^tests/kernels/')
    tests tests-kernels 150 -m gpu --confcutdir=tests/kernels tests/kernels/test_gpu*.py
    run xl-float16 80 float16 gpt2-xl,gpt2-xl-n10 --seconds 12
    # Again, since a profiler that fails would take the times with it.
    run xl-float16-profile 80 float16 gpt2-xl,gpt2-xl-n10 --seconds 12 --profile
    ((${#elsewhere[@]})) && tests tests-others 60 -m gpu "${elsewhere[@]}"
    run xl-bfloat16 60 bfloat16 gpt2-xl,gpt2-xl-n10 --seconds 8
    step kernels 110 "$PYTHON" -m bench.kernels --dtypes float16,bfloat16 --out "$OUT/kernels.json"
    run float16 60 float16 gpt2-12-mixed32,gpt2-12,smollm2,llama3-8b --seconds 5
    run bfloat16 60 bfloat16 llama3-8b,gpt2-12-mixed32,gpt2-12,smollm2 --seconds 5
    peers peers-xl-float16 60 gpt2-xl float16 --rounds 3
    run float16-rest 60 float16 "$rest" --seconds 5
    run bfloat16-rest 60 bfloat16 "$rest" --seconds 5
    peers peers-float32 60 gpt2-12 float32 --rounds 3
    run float32 60 float32 gpt2-xl,gpt2-12 --seconds 5
    run profile 60 float16 gpt2-12-mixed32,gpt2-12,smollm2 --seconds 5 --profile
    step scaling 60 "$PYTHON" -m bench.scaling --dtype float16 --out "$OUT/scaling.json"
}

on_cpu() {
    export CUDA_VISIBLE_DEVICES=""
    tests tests-kernels 60 --confcutdir=tests/kernels tests/kernels/test_layout.py
    run tiny 120 float32 tiny-gpt2,tiny-mixed3 --rounds 2 --profile
    step kernels 120 "$PYTHON" -m bench.kernels --quick --dtypes float32 --out "$OUT/kernels.json"
    peers peers-tiny 60 tiny-gpt2 float32 --rounds 2
}

if [[ $REHEARSE == 1 ]]; then on_cpu; else on_gpu; fi
"$PYTHON" -m bench.summary "$OUT" | tee "$OUT/summary.md"
