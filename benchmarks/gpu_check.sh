#!/usr/bin/env bash
# Everything that needs a GPU, in at most ten minutes: builds, tests, sanitises and times, and leaves logs and CSVs in the
# folder given to it.   benchmarks/gpu_check.sh FOLDER        (PYTHON=python of an environment with torch and pytest)
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:?usage: benchmarks/gpu_check.sh FOLDER}
python=${PYTHON:-python3}
mkdir -p "$out"
failed=0

step() {  # step NAME SECONDS COMMAND...: its output goes to FOLDER/NAME.log
  local name=$1 seconds=$2 start=$SECONDS
  shift 2
  timeout "$seconds" "$@" >"$out/$name.log" 2>&1
  local code=$?
  [ $code -eq 0 ] || failed=1
  echo "$name: exit $code after $((SECONDS - start)) s" | tee -a "$out/summary.log"
}

nvidia-smi >"$out/device.log" 2>&1
"$python" -m torch.utils.collect_env >>"$out/device.log" 2>&1

step build 150 env KDOPS_REQUIRE_EXTENSION=1 "$python" setup.py build_ext --inplace
step tests 150 "$python" -m pytest -m gpu -p no:cacheprovider --maxfail=20 tests
# Small shapes only: the tools slow a kernel down by two orders of magnitude.
sanitised=("$python" -m pytest -m gpu -p no:cacheprovider -x tests/test_cuda_gpu.py
  -k "test_gradient_in_the_forward_through_autograd")
if command -v compute-sanitizer >/dev/null; then
  step memcheck 40 compute-sanitizer --tool memcheck --error-exitcode 9 "${sanitised[@]}"
  step racecheck 40 compute-sanitizer --tool racecheck --error-exitcode 9 "${sanitised[@]}"
  step synccheck 30 compute-sanitizer --tool synccheck --error-exitcode 9 "${sanitised[@]}"
else
  echo "memcheck, racecheck, synccheck: compute-sanitizer is not installed" | tee -a "$out/summary.log"
  failed=1
fi
step paths 90 "$python" -m benchmarks.gpu_paths --seconds 3 --output "$out"
step bench 90 "$python" -m benchmarks.run --quick --device cuda --seconds 1 --output "$out"
exit $failed
