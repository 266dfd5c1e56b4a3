#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Everything that only a GPU can tell, in one call of minutes, without a network:
#   tools/gpu_check.sh OUT_DIR [--seconds 540] [--only STEP,STEP] [--dry-run]
# Steps run the most valuable first, each under its own deadline and all within --seconds: build, report, smoke, prefill,
# bench, ablation, test, sanitize. One that fails does not stop the next; one for which a third of its deadline is not
# left is "not run", which a second call with --only makes up for. The last lines say what failed and why, and the
# figures. OUT_DIR/summary.txt and OUT_DIR/results.tar.gz (logs, figures) are rewritten after every step, so that a call
# that is cut off loses one step at most. The exit code is 1 if a step failed.
# --dry-run proves each step without a GPU: it prints the command, checks that what it names is here or says that it is
# absent, and rehearses it at a tiny size. PYTHON names the interpreter (default python3), which must import torch.
set -uo pipefail
cd "$(dirname "$0")/.."

STEPS=build,report,smoke,prefill,bench,ablation,test,sanitize
export PYTHON=${PYTHON:-python3} PYTHONUNBUFFERED=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

usage() { echo "usage: tools/gpu_check.sh OUT_DIR [--seconds N] [--only $STEPS] [--dry-run]${1:+: $1}" >&2; exit 2; }

out='' only=$STEPS seconds=540 dry_run=
while [ $# -gt 0 ]; do
  case $1 in
    --only) [ $# -ge 2 ] || usage "--only needs a list of steps"; only=$2; shift ;;
    --seconds) [[ ${2:-} =~ ^[1-9][0-9]*$ ]] || usage "--seconds needs a whole number, got ${2:-none}"; seconds=$2; shift ;;
    --dry-run) dry_run=1 ;;
    -h | --help) sed -n '3,12s/^# //p' "$0"; exit 0 ;;
    -*) usage "unknown option $1" ;;
    *) [ -z "$out" ] || usage "one OUT_DIR, got $out and $1"; out=$1 ;;
  esac
  shift
done
[ -n "$out" ] || usage "OUT_DIR is missing"
for name in ${only//,/ }; do
  case ",$STEPS," in *",$name,"*) ;; *) usage "unknown step $name" ;; esac
done
mkdir -p "$out" || exit 2
out=$(cd "$out" && pwd)
work=$(mktemp -d) || exit 2
export work
trap 'rm -rf "$work"' EXIT
summary=$out/summary.txt
absent=0 failed=() skipped=()

note() { printf '%s\n' "$*" | tee -a "$summary"; }

pack() {
  cp "$summary" "$work/summary.txt"
  tar -czf "$out/.results.tar.gz" -C "$work" . && mv "$out/.results.tar.gz" "$out/results.tar.gz"
}

# run NAME SECONDS COMMAND...: one step, its output in the log of that name.
run() {
  local name=$1 deadline=$2 started=$SECONDS code verdict=ok
  shift 2
  printf '+ %s\n' "$*" >"$work/$name.log"
  # pytest writes what it has when interrupted.
  timeout --signal=INT --kill-after=10 "$deadline" "$@" >>"$work/$name.log" 2>&1 </dev/null
  code=$?
  if [ $code -ne 0 ]; then
    failed+=("$name") verdict=FAILED
    [ $code -eq 124 ] || [ $code -eq 137 ] && verdict="FAILED (deadline of $deadline s)"
  fi
  note "$(printf '%-16s exit %3d  %4d s  %s' "$name" $code $((SECONDS - started)) "$verdict")"
  pack
}

need() {
  local what=$1 found
  if found=$(command -v "$what") || { [ -e "$what" ] && found=$what; }; then
    echo "    $what: $found"
  elif [ "${what#python:}" != "$what" ] && "$PYTHON" -c "import importlib.util as u, sys; sys.exit(not u.find_spec('${what#python:}'))"; then
    echo "    ${what#python:}: importable"
  else
    echo "    ${what#python:}: ABSENT here"
    absent=$((absent + 1))
  fi
}

# step NAME SECONDS "NEEDED..." "REHEARSAL" COMMAND...: runs the command where its time is left, or in a dry run proves it.
step() {
  local name=$1 deadline=$2 needs=$3 rehearsal=$4 left=$((seconds - SECONDS)) what
  shift 4
  case ",$only," in *",${name%%_*},"*) ;; *) return ;; esac
  if [ -n "$dry_run" ]; then
    printf '%s (deadline %d s):\n   ' "$name" "$deadline"
    printf ' %q' "$@"
    printf '\n'
    for what in $needs; do need "$what"; done
    echo "    rehearsal: $rehearsal"
    run "$name" 120 bash -c "$rehearsal"
  elif [ $left -lt $((deadline / 3)) ]; then
    skipped+=("$name")
    note "$(printf '%-16s not run: %d s left' "$name" $left)"
  else
    run "$name" $((left < deadline ? left : deadline)) "$@"
  fi
}

# each NAME COMMAND...: one of several at a time in a step, its output in the log of that name and a line in the step's.
each() {
  local name=$1 verdict=ok
  shift
  "$@" >"$work/$name.log" 2>&1 || verdict=FAILED
  echo "$verdict $name: $(tail -n 1 "$work/$name.log")"
  [ $verdict = ok ] || { grep -E '^(FAILED|ERROR|E  |=+ (Invalid|Error|Race))' "$work/$name.log" | head -n 12; return 1; }
}
export -f each

# The last 12,000 characters that a step of a lent machine returns hold all of this.
finish() {
  local name figures
  mapfile -t figures < <(find "$work" -name 'bench_*.json' -size +0)
  if [ ${#figures[@]} -gt 0 ]; then
    "$PYTHON" -m benchmarks.report "${figures[@]}" --out "$work/bench" --command tools/gpu_check.sh >"$work/bench_report.log" 2>&1
  fi
  { [ ! -e "$work/prefill.log" ] || tail -n 40 "$work/prefill.log"; } | cut -c1-120
  { [ ! -e "$work/bench/results.md" ] || sed 's/ – |//g' "$work/bench/results.md"; } | cut -c1-240 | head -c 4500
  for name in "${failed[@]}"; do
    echo "--- $name"
    { grep -E '^(FAILED|ERROR)' "$work/$name.log" | head -n 25; tail -n 12 "$work/$name.log"; } |
      cut -c1-240 | head -c $((4500 / ${#failed[@]}))
  done
  echo "---"
  cat "$summary"
  [ -z "$dry_run" ] || note "dry run: $absent of the things needed are absent here"
  [ ${#skipped[@]} -eq 0 ] || note "not run, --only takes them: ${skipped[*]}"
  note "$([ ${#failed[@]} -eq 0 ] && echo "all steps passed" || echo "FAILED: ${failed[*]}")"
  pack
  exit $((${#failed[@]} > 0))
}

: >"$summary"
note "gpu_check $(date -u +%Y-%m-%dT%H:%M:%SZ) steps $only, $seconds s${dry_run:+ (dry run)}"
if [ -z "$dry_run" ]; then
  # Its own architecture alone is compiled; what is read here also warms the import of torch.
  capability='import torch; major, minor = torch.cuda.get_device_capability(); print(f"{major}{minor}" + "a" * (major >= 9))'
  if ! LRC_CUDA_ARCHS=$("$PYTHON" -c "$capability" 2>"$work/torch.log")-real; then
    note "no CUDA device that torch of $PYTHON can use ($(tail -n 1 "$work/torch.log")); --dry-run proves the steps without"
    pack
    exit 1
  fi
  export LRC_CUDA_ARCHS
fi

step build 150 "$PYTHON setup.py CMakeLists.txt python:cmake python:ninja python:pybind11 nvcc" \
  "$PYTHON setup.py --name" "$PYTHON" setup.py build_ext --inplace
# shellcheck disable=SC2016  # bash -c expands these
step report 60 "nvidia-smi lrc_kernels/env.py" "$PYTHON -m lrc_kernels.env" \
  bash -c 'nvidia-smi; "$PYTHON" -m lrc_kernels.env'
step smoke 150 "tools/sanitize.py" "$PYTHON tools/sanitize.py reference --op plan_merge" \
  "$PYTHON" tools/sanitize.py --each aten cudnn cuda triton
# Where a kernel breaks it, Triton alone still gives the figures; the step has failed all the same.
# shellcheck disable=SC2016
step prefill 240 "lrc_model/cli.py" "$PYTHON -m lrc_model.cli prefill --preset tiny --frames 16,64 --device cpu" \
  bash -c '"$@" || { echo "again with LRC_BACKEND=triton"; LRC_BACKEND=triton "$@"; exit 1; }' _ \
  "$PYTHON" -m lrc_model.cli prefill --frames 1000,3000,10000 --out "$work/prefill"

bench() {
  local name=$1
  shift
  step "bench_$name" 80 "python:pytest_benchmark" "$PYTHON -m pytest -q --collect-only -p no:cacheprovider $*" \
    "$PYTHON" -m pytest -q -p no:cacheprovider --benchmark-only "--benchmark-json=$work/bench_$name.json" "$@"
}
# The ops with the largest share of a prefill, at sizes that take seconds.
bench attention benchmarks/test_attention.py::test_attention\[{8k-32/8/128-one-forward{,_backward},49k-32/8/128-one-forward}\]
bench tome benchmarks/test_tome.py::test_compress_clips\[iv25-{rel-bf16-{gaussian,video_like},{paper,stream}-bf16-video_like}\] \
  benchmarks/test_tome.py::test_op\[{head_mean,plan,merge}-bf16\]
bench dropout benchmarks/test_attention_scores.py::{test_attention_scores\[160k-internlm2.5-bf16\],test_column_sums\[internlm2.5\]} \
  benchmarks/test_token_dropout.py::{test_drop_step,test_drop_tokens_rmsnorm}\[160k-4096\]
step ablation 120 "lrc_model/cli.py" "$PYTHON -m lrc_model.cli prefill --preset tiny --frames 64 --device cpu --ablate" \
  "$PYTHON" -m lrc_model.cli prefill --frames 512 --dropout paper --ablate --curve --out "$work/ablation"

# What runs a kernel on the device, three functions a process, so that a sticky CUDA error reaches no other.
mapfile -t tests < <(grep -rlE 'mark\.(triton|gpu)\b' tests --include='test_*.py' | grep -v ^tests/compile/ | sort)
# shellcheck disable=SC2016
step test 300 "python:pytest python:hypothesis" "$PYTHON -m pytest -q --collect-only -p no:cacheprovider ${tests[*]}" \
  bash -c 'set -o pipefail; "$PYTHON" -m pytest -q --collect-only -m "triton or gpu" -p no:cacheprovider "$@" |
    sed -n "s/^\(tests[^ []*::[^ []*\).*/\1/p" | sort -u | xargs -P "$(nproc)" -n 3 bash -c '\''
    each "test_$$" "$PYTHON" -m pytest -q --tb=short -m "triton or gpu" -p no:cacheprovider "$@"'\'' _' _ "${tests[@]}"

# Without torch's caching allocator an access past a tensor leaves its allocation, which memcheck then sees.
# shellcheck disable=SC2016
step sanitize 300 "compute-sanitizer tools/sanitize.py" "$PYTHON tools/sanitize.py reference --op plan_merge" \
  env PYTORCH_NO_CUDA_MEMORY_CACHING=1 xargs -P 4 -n 2 -a <(printf '%s\n' {memcheck,racecheck}\ {cuda,triton}) bash -c '
    each "sanitize_$0_$1" compute-sanitizer "--tool=$0" --error-exitcode=3 "$PYTHON" tools/sanitize.py "$1"'
finish
