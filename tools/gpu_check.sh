#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Everything that only a GPU can tell, in one go, without a network:
#   tools/gpu_check.sh OUT_DIR [--only build,test,bench,model,sanitize] [--dry-run]
# Stages run the most valuable first, each step under its own deadline (<= 9 minutes); one that fails does not stop the
# next. OUT_DIR/summary.txt (exit code and seconds of each step) and OUT_DIR/results.tar.gz (summary, logs, figures) are
# rewritten after every step, so that a run that is cut off loses one step at most. The exit code is 1 if a step failed.
# --dry-run proves each step without a GPU: it prints the command, checks that what it names is here or says that it is
# absent, and rehearses it at a tiny size. PYTHON names the interpreter (default python3), which must import torch.
set -uo pipefail
cd "$(dirname "$0")/.."

STAGES=build,test,bench,model,sanitize
PYTHON=${PYTHON:-python3}

usage() { echo "usage: tools/gpu_check.sh OUT_DIR [--only $STAGES] [--dry-run]${1:+: $1}" >&2; exit 2; }

out='' only=$STAGES dry_run=
while [ $# -gt 0 ]; do
  case $1 in
    --only) [ $# -ge 2 ] || usage "--only needs a list of stages"; only=$2; shift ;;
    --dry-run) dry_run=1 ;;
    -h | --help) sed -n '3,10s/^# //p' "$0"; exit 0 ;;
    -*) usage "unknown option $1" ;;
    *) [ -z "$out" ] || usage "one OUT_DIR, got $out and $1"; out=$1 ;;
  esac
  shift
done
[ -n "$out" ] || usage "OUT_DIR is missing"
for stage in ${only//,/ }; do
  case ",$STAGES," in *",$stage,"*) ;; *) usage "unknown stage $stage" ;; esac
done
mkdir -p "$out" || exit 2
out=$(cd "$out" && pwd)
work=$(mktemp -d) || exit 2
trap 'rm -rf "$work"' EXIT
summary=$out/summary.txt
failed=0 absent=0
export PYTHONUNBUFFERED=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

note() { printf '%s\n' "$*" | tee -a "$summary"; }

pack() {
  cp "$summary" "$work/summary.txt"
  tar -czf "$out/.results.tar.gz" -C "$work" --exclude=./site . && mv "$out/.results.tar.gz" "$out/results.tar.gz"
}

# run NAME SECONDS COMMAND...: one step, its output in the log of that name.
run() {
  local name=$1 deadline=$2 started=$SECONDS code verdict=ok
  shift 2
  printf '+ %s\n' "$*" >"$work/$name.log"
  timeout --kill-after=10 "$deadline" "$@" >>"$work/$name.log" 2>&1 </dev/null
  code=$?
  if [ $code -ne 0 ]; then
    failed=1 verdict=FAILED
    [ $code -eq 124 ] || [ $code -eq 137 ] && verdict="FAILED (deadline of $deadline s)"
    tail -n 25 "$work/$name.log"
  fi
  note "$(printf '%-18s exit %3d  %4d s  %s' "$name" $code $((SECONDS - started)) "$verdict")"
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

# step NAME SECONDS "NEEDED..." "REHEARSAL" COMMAND...: runs the command, or in a dry run proves it.
step() {
  local name=$1 deadline=$2 needs=$3 rehearsal=$4 what
  shift 4
  if [ -z "$dry_run" ]; then run "$name" "$deadline" "$@"; return; fi
  printf '%s (deadline %d s):\n   ' "$name" "$deadline"
  printf ' %q' "$@"
  printf '\n'
  for what in $needs; do need "$what"; done
  if [ -n "$rehearsal" ]; then
    echo "    rehearsal: $rehearsal"
    run "$name" 120 bash -c "$rehearsal"
  fi
}

wanted() { case ",$only," in *",$1,"*) return 0 ;; *) return 1 ;; esac; }

# pybind11 is needed to build, and torch carries its headers: where the package is absent, they make do.
pybind11_from_torch() {
  "$PYTHON" -c 'import pybind11' 2>/dev/null && return
  local include
  include=$("$PYTHON" -c 'import os, torch; print(os.path.join(os.path.dirname(torch.__file__), "include"))') || return
  mkdir -p "$work/site/pybind11"
  printf 'def get_cmake_dir():\n    return %s\n' "'$work/site/pybind11'" >"$work/site/pybind11/__init__.py"
  cat >"$work/site/pybind11/pybind11Config.cmake" <<CMAKE
find_package(Python REQUIRED COMPONENTS Interpreter Development.Module)
function(pybind11_add_module target)
  set(sources \${ARGN})
  list(REMOVE_ITEM sources MODULE NO_EXTRAS)
  Python_add_library(\${target} MODULE WITH_SOABI \${sources})
  target_include_directories(\${target} SYSTEM PRIVATE "$include")
endfunction()
set(pybind11_FOUND TRUE)
CMAKE
  export PYTHONPATH=$work/site${PYTHONPATH:+:$PYTHONPATH}
}

: >"$summary"
note "gpu_check $(date -u +%Y-%m-%dT%H:%M:%SZ) stages $only${dry_run:+ (dry run)}"
if [ -z "$dry_run" ]; then
  if ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    note "no CUDA device that torch of $PYTHON can use; --dry-run proves the steps without one"
    pack
    exit 1
  fi
  run machine 60 nvidia-smi
fi

if wanted build; then
  pybind11_from_torch
  step build 420 "$PYTHON setup.py CMakeLists.txt python:cmake python:ninja python:pybind11 nvcc" \
    "$PYTHON setup.py --name" "$PYTHON" setup.py build_ext --inplace
  step report 60 "lrc_kernels/env.py" "$PYTHON -m lrc_kernels.env" "$PYTHON" -m lrc_kernels.env
fi

if wanted test; then
  ops=()
  for folder in tests/*/; do
    if [ -e "lrc_kernels/$(basename "$folder")/op.py" ]; then ops+=("$folder"); fi
  done
  ignored=()
  for folder in "${ops[@]}"; do ignored+=("--ignore=$folder"); done
  step test_ops 540 "python:pytest python:hypothesis ${ops[*]}" \
    "$PYTHON -m pytest -q --collect-only -p no:cacheprovider ${ops[*]}" \
    "$PYTHON" -m pytest -q -m "not slow" -p no:cacheprovider --durations=15 "${ops[@]}"
  step test_rest 540 "tests" "$PYTHON -m pytest -q --collect-only -p no:cacheprovider tests ${ignored[*]}" \
    "$PYTHON" -m pytest -q -m "not slow" -p no:cacheprovider --durations=15 tests "${ignored[@]}"
fi

if wanted bench; then
  step bench 540 "python:pytest_benchmark benchmarks benchmarks/report.py" \
    "$PYTHON -m pytest -q --collect-only -p no:cacheprovider benchmarks" \
    "$PYTHON" -m pytest -q -p no:cacheprovider benchmarks --benchmark-only "--benchmark-json=$work/bench.json"
  step bench_report 60 "python:matplotlib" "$PYTHON -m benchmarks.report --help" \
    "$PYTHON" -m benchmarks.report "$work/bench.json" --out "$work/bench" --command "tools/gpu_check.sh OUT --only bench"
fi

if wanted model; then
  step model 540 "examples/demo.py" "$PYTHON -m examples.demo --help" \
    "$PYTHON" -m examples.demo --video synthetic:20 --out "$work/demo"
  step prefill 540 "lrc_model/cli.py" "$PYTHON -m lrc_model.cli prefill --preset tiny --frames 64 --device cpu" \
    "$PYTHON" -m lrc_model.cli prefill --frames 10000 --out "$work/prefill"
  step ablation 540 "lrc_model/cli.py" "$PYTHON -m lrc_model.cli prefill --preset tiny --frames 64 --device cpu --ablate" \
    "$PYTHON" -m lrc_model.cli prefill --frames 512 --dropout paper --ablate --curve --out "$work/ablation"
fi

if wanted sanitize; then
  rehearsal="$PYTHON tools/sanitize.py reference"
  for tool in memcheck racecheck; do
    for backend in cuda triton; do
      # Without torch's caching allocator an access past a tensor leaves its allocation, which memcheck then sees.
      step "${tool}_$backend" 240 "compute-sanitizer tools/sanitize.py" "$rehearsal" \
        env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer "--tool=$tool" --error-exitcode=3 \
        "$PYTHON" tools/sanitize.py "$backend"
      rehearsal=
    done
  done
fi

if [ -n "$dry_run" ]; then note "dry run: $absent of the things needed are absent here"; fi
note "$([ $failed -eq 0 ] && echo "all steps passed" || echo "some steps FAILED")"
pack
exit $failed
