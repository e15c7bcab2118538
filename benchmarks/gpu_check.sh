#!/usr/bin/env bash
# Everything that needs a GPU, in at most ten minutes: builds, tests, sanitizes and times, and writes logs and CSVs to
# the folder given to it.   benchmarks/gpu_check.sh FOLDER        (PYTHON=python of an environment with torch and pytest)
# Triton's cache is kept in runs/triton from one call to the next, or in TRITON_CACHE_DIR.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:?usage: benchmarks/gpu_check.sh FOLDER}
python=${PYTHON:-python3}
mkdir -p "$out"
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$PWD/runs/triton}
failed=0

step() {  # step NAME SECONDS COMMAND...: its output goes to FOLDER/NAME.log
  local name=$1 seconds=$2 start=$SECONDS
  shift 2
  timeout "$seconds" "$@" >"$out/$name.log" 2>&1
  local code=$?
  echo "$name: exit $code after $((SECONDS - start)) s" | tee -a "$out/summary.log"
  return $code
}

nvidia-smi >"$out/device.log" 2>&1
"$python" -m torch.utils.collect_env >>"$out/device.log" 2>&1

step build 130 env KDOPS_REQUIRE_EXTENSION=1 "$python" setup.py build_ext --inplace || failed=1
step triton 80 "$python" -m benchmarks.warm_triton || failed=1
step tests 130 "$python" -m pytest -m gpu -p no:cacheprovider --maxfail=20 tests || failed=1

# Small shapes in which blocks of clusters and waves synchronize: the tools make a kernel 100 times slower,
# and importing torch under one takes most of a minute. PyTorch's own allocator would hide accesses out of bounds.
sanitised=("$python" -m pytest -m gpu -p no:cacheprovider -x tests/test_cuda_gpu.py -k "sanitizer")
if command -v compute-sanitizer >/dev/null; then
  running=()
  for tool in memcheck racecheck synccheck; do
    step $tool 140 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $tool --error-exitcode 9 "${sanitised[@]}" &
    running+=($!)
  done
  for job in "${running[@]}"; do wait "$job" || failed=1; done
else
  echo "memcheck, racecheck, synccheck: compute-sanitizer is not installed" | tee -a "$out/summary.log"
  failed=1
fi
step paths 60 "$python" -m benchmarks.gpu_paths --output "$out" || failed=1
step bench 60 "$python" -m benchmarks.run --quick --device cuda --seconds 1 --output "$out" || failed=1
exit $failed
