#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Makes .venv with torch, this package (editable) and the extras named in $1, e.g. `tools/bootstrap.sh test,video`.
# PYTHON picks the interpreter; a torch that it can import is reused and never replaced. TORCH holds pip's arguments for
# installing torch otherwise. Does nothing when .venv is up to date.
set -euo pipefail
cd "$(dirname "$0")/.."
extras=${1:-}
venv=.venv
py=$venv/bin/python

say() { echo "lrc_kernels: $*"; }
stop() { echo "lrc_kernels: $*" >&2; exit 1; }

find_python() {
  local name
  for name in ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.10 python}; do
    if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
      echo "$name"
      return
    fi
  done
  stop "no Python >= 3.10 found (tried ${PYTHON:-python3, python3.13 ... python3.10, python}): install one, or name it with PYTHON=/path/to/python3"
}

check_machine() {
  local missing=() apt=() dnf=() compiler found=
  for compiler in ${CXX:-c++ g++ clang++}; do
    if command -v "$compiler" >/dev/null; then found=1; fi
    if [ -n "${CXX:-}" ]; then break; fi
  done
  if [ -z "$found" ]; then
    missing+=("a C++ compiler${CXX:+ (CXX=$CXX)}") apt+=(g++) dnf+=(gcc-c++)
  fi
  if ! "$1" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))'; then
    missing+=("Python.h") apt+=(python3-dev) dnf+=(python3-devel)
  fi
  if [ ! -x $py ] && ! "$1" -c 'import venv, ensurepip' 2>/dev/null; then
    missing+=("the venv module") apt+=(python3-venv) dnf+=(python3)
  fi
  if [ ${#missing[@]} -gt 0 ]; then
    local list
    list=$(printf ', %s' "${missing[@]}")
    stop "missing ${list:2}: run \`sudo apt-get install ${apt[*]}\` (Debian, Ubuntu) or \`sudo dnf install ${dnf[*]}\` (Fedora, RHEL)"
  fi
}

# Everything that decides what is installed; Python sources are not part of it, because the install is editable.
state() {
  "$1" - "$extras" "${TORCH:-}" "${LRC_CUDA:-}" "${LRC_CUDA_ARCHS:-}" "${CUDA_HOME:-}" "$(command -v nvcc || true)" <<'PY'
import hashlib, pathlib, sys
digest = hashlib.sha256(repr((sys.version, pathlib.Path.cwd(), sys.argv[1:])).encode())
names = ("pyproject.toml", "constraints.txt", "setup.py", "CMakeLists.txt", "tools/bootstrap.sh")
files = [pathlib.Path(name) for name in names]
for path in [*files, *sorted(p for p in pathlib.Path("csrc").rglob("*") if p.is_file())]:
    digest.update(str(path).encode() + path.read_bytes())
print(digest.hexdigest())
PY
}

# pip's output goes to a log, of which a failure shows the end.
log=$venv/bootstrap.log
pip() {
  local reason
  if ! "$py" -m pip --disable-pip-version-check "$@" >>$log 2>&1; then
    tail -n 40 $log >&2
    reason=$(grep -h '^ *lrc_kernels: ' $log | tail -n 1 | sed 's/^ *lrc_kernels: //' || true)
    stop "${reason:-pip $1 failed} (whole log: $log)"
  fi
}

torch_version() { "$1" -c 'import torch; print(torch.__version__)' 2>/dev/null || true; }

make_venv() {
  local version
  version=$(torch_version "$1")
  if [ -n "$version" ] && "$1" -c 'import sys; v = sys.argv[1].split("."); sys.exit((int(v[0]), int(v[1])) < (2, 9))' "$version"; then
    say "making $venv on $1, with its torch $version"
    "$1" -m venv --clear --system-site-packages $venv
    # Where that Python is itself a virtual environment, --system-site-packages skips its packages.
    if [ -z "$(torch_version $py)" ]; then
      "$1" -c 'import pathlib, torch; print(pathlib.Path(torch.__file__).parents[1])' \
        >"$("$py" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/reused_torch.pth"
    fi
    echo "$version" >$venv/.lrc-reused-torch
  else
    say "making $venv on $1${version:+ (its torch $version is older than 2.9 and stays unused)}"
    "$1" -m venv --clear $venv
  fi
}

install_torch() {
  local torch=${TORCH:-torch==2.13.0} found
  # shellcheck disable=SC2086  # TORCH holds several arguments
  found=$("$py" -m pip --disable-pip-version-check install --quiet --dry-run --ignore-installed --no-deps --report - $torch 2>/dev/null |
    "$py" -c 'import json, sys; item = json.load(sys.stdin)["install"][0]; print(item["metadata"]["version"], item["download_info"]["url"])' 2>/dev/null) || found=
  case $found in
    *+cpu\ file:*) say "installing the CPU build of torch from a local wheel" ;;
    *+cpu*) say "downloading the CPU build of torch (about 200 MB)" ;;
    *) say "downloading torch, on Linux x86-64 with its CUDA packages about 3 GB; a CPU build (about 200 MB) comes with TORCH=\"torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu\"" ;;
  esac
  # shellcheck disable=SC2086
  pip install $torch
}

# torch stays what it is. Triton stays what torch brought, and else is the one of constraints.txt.
write_constraints() {
  "$py" - "$([ -f $venv/.lrc-reused-torch ] && echo reused || true)" <<'PY'
import importlib.metadata, pathlib, re, sys
lines = [line for line in pathlib.Path("constraints.txt").read_text().splitlines() if re.match(r"[\w-]+==", line)]
pins = {line.split("==")[0]: line for line in lines}
if sys.argv[1]:
    pins = {"triton": pins["triton"]}
for name in ("torch", "triton"):
    try:
        pins[name] = f"{name}=={importlib.metadata.version(name)}"
    except importlib.metadata.PackageNotFoundError:
        continue
pathlib.Path(".venv/constraints.txt").write_text("\n".join(pins.values()) + "\n")
PY
}

build_requirements() {
  "$py" -c '
try:
    import tomllib
except ImportError:
    from pip._vendor import tomli as tomllib
print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"], sep="\n")'
}

python=$(find_python)
if [ -e $venv ] && ! $py -c '' 2>/dev/null; then
  say "$venv has no working Python, making it again"
  rm -rf $venv
fi
stamp=$venv/.lrc-extras-${extras//,/-}
if [ -x $py ] && [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$(state $py)" ] && compgen -G 'lrc_kernels/_C.*.so' >/dev/null; then
  exit 0
fi

if [ -x $py ]; then check_machine $py; else check_machine "$python"; fi
[ -x $py ] || make_venv "$python"
: >$log
"$py" -c 'import pip' 2>/dev/null || "$py" -m ensurepip >>$log
[ -n "$(torch_version $py)" ] || install_torch
write_constraints
note=
if [[ ,$extras, == *,triton,* ]] && ! "$py" -c 'import triton' 2>/dev/null; then note=" with Triton (about 200 MB)"; fi
say "building and installing lrc-kernels[$extras]$note into $venv (log: $log)"
mapfile -t requirements < <(build_requirements)
pip install -c $venv/constraints.txt "${requirements[@]}"
pip install -v -c $venv/constraints.txt --no-build-isolation -e ".[$extras]"
grep -h '^ *lrc_kernels: ' $log | tail -n 1 | sed 's/^ *//' || true
state $py >"$stamp"
