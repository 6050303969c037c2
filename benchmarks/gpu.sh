#!/usr/bin/env bash
# Runs the benchmarks and tests that need a GPU, in a quarter of an hour, without a network.
#
#   benchmarks/gpu.sh OUT                         all parts; results go to the folder OUT
#   WHEELS=FOLDER benchmarks/gpu.sh OUT           installs the wheels of FOLDER first
#   benchmarks/gpu.sh OUT attention speed         some parts, in this order
#   REHEARSE=1 benchmarks/gpu.sh OUT              tests this script on a CPU, with tiny sizes
#
# Needs Python 3.11 or newer, JAX for the GPU and this project's other requirements. The part `torch`
# also needs torch and diffusers, the part `tests` pytest and beartype. Each part has its own time
# limit and result files, so that an interrupted run keeps the results of finished parts.
#
#   speed      FLUX.1-dev's size: one evaluation and whole plans      speed.jsonl, kernels.txt
#   attention  cuDNN and XLA at the shapes of all stages              attention.jsonl
#   torch      diffusers' transformer, compiled, at the same shapes   torch.jsonl
#   tests      the tests marked gpu                                   tests.log
#   quality    the quality benchmark on the bundled checkpoint        quality.jsonl
#   memory     XLA's account of all programs against the estimate     memory.jsonl
#   quantised  one evaluation with int8, int4 and float8 weights      quantised.jsonl
set -uo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
out=$(mkdir -p "$1" && cd "$1" && pwd)
shift
parts=("$@")
[ ${#parts[@]} -gt 0 ] || parts=(speed attention torch tests quality memory quantised)
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

if [ -n "${WHEELS:-}" ]; then
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$work/site" \
        "$WHEELS"/*.whl || echo "cannot install the wheels of $WHEELS"
fi
cd "$root" || exit 1
export PYTHONPATH="$root:$work/site" PYTHONUNBUFFERED=1
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$work/xla}
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0

# part NAME SECONDS COMMAND...: run a command with a time limit, log its output, ignore failures
part() {
    local name=$1 limit=$2 began=$SECONDS
    shift 2
    timeout --kill-after=5 "$limit" "$@" >>"$out/$name.log" 2>&1
    echo "$name: status $? after $((SECONDS - began)) s of $limit: $*" | tee -a "$out/parts.txt"
}

small=()
# Only the plans by default: each method takes time to compile.
default="dense-50 4x 7x multistep-12 multistep-7 jit-10x jit-14x"
read -ra methods <<<"${QUALITY_METHODS:-$default}"
if [ -n "${REHEARSE:-}" ]; then
    export JAX_PLATFORMS=cpu
    small=(--rounds 2)
fi
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv >"$out/card.txt" 2>/dev/null
: >"$out/parts.txt"

for which in "${parts[@]}"; do
    case "$which${REHEARSE:+-rehearsed}" in
    tests)
        part tests 150 "$python" -m pytest -m gpu -n 0 -p no:cacheprovider tests/test_gpu.py
        tail -n 15 "$out/tests.log" ;;
    tests-rehearsed)
        part tests 120 "$python" -m pytest -m gpu -n 0 --collect-only tests/test_gpu.py ;;
    attention)
        part attention 110 "$python" -m benchmarks.attention --out "$out/attention.jsonl" ;;
    attention-rehearsed)
        part attention 90 "$python" -m benchmarks.attention --out "$out/attention.jsonl" \
            --implementations xla --heads 2 --width 16 --tokens 20 "${small[@]}" ;;
    speed)
        part speed 200 "$python" -m benchmarks.speed --out "$out/speed.jsonl" \
            --profile "$out/kernels.txt"
        part speed 50 "$python" -m benchmarks.speed --attention xla --out "$out/speed.jsonl" \
            --plans --profile "$out/kernels-xla.txt" ;;
    speed-rehearsed)
        part speed 300 "$python" -m benchmarks.speed --model tiny --size 64 --text 32 \
            --dtype float32 --matmul 256 --plans multistep-7 --out "$out/speed.jsonl" \
            --profile "$out/kernels.txt" "${small[@]}" ;;
    torch)
        part torch 90 "$python" -m benchmarks.torch_speed --out "$out/torch.jsonl" ;;
    torch-rehearsed)
        part torch 120 "$python" -m benchmarks.torch_speed --out "$out/torch.jsonl" --tiny \
            --device cpu --dtype float32 --tokens 64 --backends native --no-compile --matmul 256 \
            "${small[@]}" ;;
    quality)
        # Full float32 in matrix products, as on a CPU, instead of TensorFloat-32.
        export JAX_DEFAULT_MATMUL_PRECISION=highest
        part quality "${QUALITY_SECONDS:-200}" "$python" -m benchmarks.quality \
            --batch 96 --jobs 14 --out "$out/quality.jsonl" --methods "${methods[@]}" ;;
    quality-rehearsed)
        part quality 200 "$python" -m benchmarks.quality --quick --jobs 2 \
            --out "$out/quality.jsonl" --methods multistep-7 ;;
    memory)
        part memory 60 "$python" -m benchmarks.memory --out "$out/memory.jsonl"
        part memory 60 "$python" -m benchmarks.memory --quantise int8 --out "$out/memory.jsonl" ;;
    memory-rehearsed)
        part memory 60 "$python" -m benchmarks.memory --model middle --parts encoders decoder \
            --out "$out/memory.jsonl" ;;
    quantised)
        for kind in int8 int4 float8; do
            part quantised 50 "$python" -m benchmarks.speed --quantise "$kind" --plans \
                --out "$out/quantised.jsonl" --profile "$out/kernels-$kind.txt"
        done ;;
    quantised-rehearsed)
        part quantised 60 "$python" -m benchmarks.speed --model tiny --size 64 --text 32 \
            --dtype float32 --matmul 256 --plans --quantise int4 --out "$out/quantised.jsonl" \
            "${small[@]}" ;;
    *)
        echo "unknown part $which; expected tests, attention, speed, torch, quality, memory or quantised"
        exit 2 ;;
    esac
done
cat "$out/parts.txt"
