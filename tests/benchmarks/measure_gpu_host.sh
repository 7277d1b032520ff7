#!/bin/sh
# Check and measure on a GPU host, in one go, the most telling first (tests/benchmarks/README.md):
#
#   sh tests/benchmarks/measure_gpu_host.sh OUT [MINUTES]     results and logs into OUT; nothing begins after MINUTES (default 15)
#   sh tests/benchmarks/measure_gpu_host.sh --list            the commands for two GPUs, one a line
#
# A step that fails or takes too long does not keep the next ones from running; OUT/summary.txt says how each ended. PYTHON names the
# interpreter, by default that of .venv (sh deploy/setup_env.sh dev).
set -u
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-.venv/bin/python}
list=
if [ "${1:-}" = --list ]; then
    list=yes out=OUT gpus=2
else
    out=${1:?where to} minutes=${2:-15}
    mkdir -p "$out"
    out=$(cd "$out" && pwd)
    gpus=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')
    end=$(($(date +%s) + 60 * minutes))
    { git rev-parse HEAD; nvidia-smi --query-gpu=name,driver_version --format=csv,noheader; "$PYTHON" -m pip list 2>/dev/null; } >"$out/host.txt" 2>&1
    : >"$out/summary.txt"
fi

step() {  # step NAME SECONDS ARGUMENTS OF PYTHON...
    name=$1 seconds=$2
    shift 2
    if [ -n "$list" ]; then
        echo "$PYTHON $*"
        return
    fi
    now=$(date +%s)
    if [ "$now" -ge "$end" ]; then
        echo "$name: not begun, out of time" | tee -a "$out/summary.txt"
        return
    fi
    timeout -k 5 "$seconds" "$PYTHON" "$@" >"$out/$name.log" 2>&1
    status=$?
    echo "$name: status $status after $(($(date +%s) - now)) s; $(tail -n 1 "$out/$name.log" | cut -c 1-200)" | tee -a "$out/summary.txt"
}

# What changed last: products of experts that are kept as FP8 or told where their rows end, the grouped projection's output in place.
new="moe_experts or grouped_linear"
step parity_new 240 -m pytest -q -n 4 -m gpu tests/parity/test_ops.py tests/parity/test_dot_scaled.py -k "$new or dot_scaled"
step parity_model 150 -m pytest -q -s tests/parity/test_gpu_model.py
step parity_steps 120 -m pytest -q tests/parity/test_gpu_steps.py
if [ "$gpus" -ge 2 ]; then
    step parity_exchange 180 -m pytest -q tests/parity/test_exchange_gpus.py tests/parity/test_direct_gpus.py tests/parity/test_heads_gpus.py -k "not deepep"
    engine="-m tests.benchmarks.bench_engine --ranks 2 --profile"
    also=1x8192,32x8192,128x8192,256x8192,1x4096,1x921600,32x131072
else
    engine="-m tests.benchmarks.bench_engine --layers 22 --profile"
    also=1x8192,32x8192,128x8192,1x4096,32x131072
fi
# shellcheck disable=SC2086  # words, not one word
step decode 240 $engine --also $also --out "$out/decode.json"
# shellcheck disable=SC2086
step prefill 180 $engine --prompts 8192,131072 --out "$out/prefill.json"
# shellcheck disable=SC2086
step prefill_16k 150 $engine --prompts 8192 --chunk 16384 --out "$out/prefill_16k.json"
ops=exchange_pack,exchange_unpack,page_rows,step_tables,index_logits,fp8_linear,grouped_linear,hc_post_pre
step ops_latency 150 -m tests.benchmarks.bench_ops --ops "$ops" --out "$out/ops_latency.json"
step steps 150 -m tests.benchmarks.bench_steps --layers 8 --out "$out/steps.json"
step ops_experts 150 -m tests.benchmarks.bench_ops --ops moe_experts --out "$out/ops_experts.json"
if [ "$gpus" -ge 2 ]; then
    step transfer 120 -m tests.benchmarks.bench_transfer --devices cuda:0,cuda:1 --out "$out/transfer.json"
    step transfer_isolated 90 -m tests.benchmarks.bench_transfer --devices cuda:0,cuda:1 --isolated --prompts 8192 --out "$out/transfer_isolated.json"
    step timeline 240 -m tests.benchmarks.timeline --devices cuda:0,cuda:1 --model deploy/model_shapes/v4_flash --layers 16 --out "$out/timeline"
    step exchange 90 -m tests.benchmarks.bench_exchange --out "$out/exchange.json"
    step heads 120 -m tests.benchmarks.bench_engine --ranks 2 --attention-tp 2 --batches 1,8 --out "$out/heads.json"
fi
if [ "$gpus" -ge 4 ]; then
    step cluster 600 -m tests.benchmarks.bench_cluster --out "$out/cluster" --requests 1 --shapes 4096x1024 --concurrency 1,16,256
fi
step parity_rest 300 -m pytest -q -n 4 -m gpu tests/parity -k "not ($new) and not test_gpu_model and not test_gpu_steps and not test_exchange and not test_direct and not test_heads"
