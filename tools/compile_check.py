# SPDX-License-Identifier: Apache-2.0
"""Compiles every shipped kernel for GPUs that need not be here, and holds the result to tests/compile/budgets.toml.

In: the COMPILE_CASES of each triton_*cases.py, and the CUDA C++ kernels: of the built _C module where it is newer than
their sources, else compiled where nvcc is found.
Out: a table of registers, spills, shared memory and matrix instructions; exit code 1 where one exceeds its budget.
`--update` writes the register limits anew.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BUDGETS = ROOT / "tests" / "compile" / "budgets.toml"
ARCHITECTURES = ("sm_80", "sm_90", "gfx942")
MATRIX_INSTRUCTION = re.compile(r"\b(wgmma\.mma_async|mma\.sync|v_mfma)")
APPROXIMATION = re.compile(r"\b(div\.(?:full|approx)\S*|sqrt\.approx\S*)")
NVCC_TARGETS = {"sm_80": "arch=compute_80,code=sm_80", "sm_90": "arch=compute_90a,code=sm_90a"}


@dataclass
class Result:
    """One kernel on one architecture."""

    name: str
    arch: str
    registers: int
    stack: int
    shared: int
    instruction: str
    needs_instruction: bool
    approximation: str = ""


def load_modules(paths: list[Path]) -> dict[str, ModuleType]:
    """The modules that hold COMPILE_CASES: those of the package, or the files named on the command line."""
    sys.path.insert(0, str(ROOT))
    modules = {}
    for path in paths or sorted((ROOT / "lrc_kernels").glob("*/triton_*cases.py")):
        if paths:
            spec = importlib.util.spec_from_file_location(path.stem, path)
            assert spec is not None and spec.loader is not None
            module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
        modules[module.__name__] = module
    return modules


def source_hash(modules: dict[str, ModuleType]) -> str:
    """Of everything that decides a Triton kernel's code, other than its case."""
    import triton

    folders = {Path(str(module.__file__)).parent for module in modules.values()} | {ROOT / "lrc_kernels"}
    files = sorted({file for folder in folders for file in folder.glob("*.py")} | {Path(__file__)})
    return digest(triton.__version__, *(file.read_text() for file in files if "triton" in file.read_text()))


def digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


def cuobjdump() -> str:
    import triton

    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    found = str(bundled) if bundled.exists() else shutil.which("cuobjdump")
    if found is None:
        raise SystemExit("compile_check: no cuobjdump, neither in triton's package nor on PATH")
    return found


def resource_usage(path: Path) -> list[tuple[str, str, int, int, int]]:
    """(arch or "", function, registers, stack, shared) of each kernel in a cubin, an object file or a library."""
    run = subprocess.run([cuobjdump(), "-res-usage", str(path)], capture_output=True, text=True)
    if run.returncode != 0:
        raise SystemExit(f"compile_check: cuobjdump failed on {path.name}: {run.stderr.strip()}")
    rows, arch, function = [], "", ""
    for line in (run.stdout + run.stderr).splitlines():
        if found := re.match(r"arch = (sm_\d+)", line.strip()):
            arch = found[1]
        elif found := re.match(r"\s*Function (\S+):", line):
            function = found[1]
        elif found := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", line):
            rows.append((arch, function, int(found[1]), int(found[2]), int(found[3])))
    return rows


def _constexpr_type(value: Any) -> Any:
    return ("constexpr",) * len(value) if isinstance(value, tuple) else "constexpr"


def compile_case(case: Any, arch: str) -> Result:
    """Compile one CompileCase with every pointer and stride divisible by 16, as PyTorch allocates them."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = case.kernel.arg_names
    unknown = sorted((set(case.signature) | set(case.constexprs)) - set(names))
    missing = [name for name in names if name not in case.signature and name not in case.constexprs]
    if unknown or missing:
        raise ValueError(f"{case.name}: unknown arguments {unknown}, missing arguments {missing}")
    types = {
        name: _constexpr_type(case.constexprs[name]) if name in case.constexprs else case.signature[name]
        for name in names
    }
    # A tuple argument is a type per element; its elements are addressed by two indices.
    leaves = {
        path: (name, leaf)
        for index, name in enumerate(names)
        for path, leaf in (
            [((index, j), leaf) for j, leaf in enumerate(types[name])]
            if isinstance(types[name], tuple)
            else [((index,), types[name])]
        )
    }
    aligned = {
        path: [["tt.divisibility", 16]]
        for path, (name, leaf) in leaves.items()
        if leaf.startswith("*") or ((name.startswith("stride") or name in case.multiples_of_16) and leaf != "constexpr")
    }
    source = ASTSource(fn=case.kernel, signature=types, constexprs=dict(case.constexprs), attrs=aligned)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    amd = arch.startswith("gfx")
    target = GPUTarget("hip", arch, 64) if amd else GPUTarget("cuda", int(arch[3:]), 32)
    compiled = triton.compile(source, target=target, options=options)
    if amd:
        registers, stack = (
            int(re.search(rf"\.{name}:\s+(\d+)", compiled.asm["amdgcn"])[1])  # type: ignore[index]
            for name in ("vgpr_count", "private_segment_fixed_size")
        )
    else:
        with tempfile.TemporaryDirectory() as folder:
            cubin = Path(folder) / "kernel.cubin"
            cubin.write_bytes(compiled.asm["cubin"])
            ((_, _, registers, stack, _),) = resource_usage(cubin)
    code = compiled.asm["amdgcn" if amd else "ptx"]
    found = "+".join(sorted(set(MATRIX_INSTRUCTION.findall(code))))
    rough = "+".join(sorted(set(APPROXIMATION.findall(code)))) if case.rounds_exactly else ""
    return Result(case.name, arch, registers, stack, compiled.metadata.shared, found, case.tensor_cores, rough)


_modules: dict[str, ModuleType] = {}


def _compile_task(task: tuple[str, int, str]) -> Result | str:
    module, index, arch = task
    case = _modules[module].COMPILE_CASES[index]
    try:
        return compile_case(case, arch)
    except Exception as error:
        return f"{case.name} {arch}: does not compile: {type(error).__name__}: {error}"


def check_triton(modules: dict[str, ModuleType], archs: list[str], cache: Path) -> tuple[list[Result], list[str]]:
    """Results and failures of all Triton cases; what the cache holds is not compiled again."""
    global _modules
    _modules = modules
    sources = source_hash(modules)
    results, tasks, keys = [], [], []
    failures = [f"{name}: has no COMPILE_CASES" for name, m in modules.items() if not hasattr(m, "COMPILE_CASES")]
    modules = {name: module for name, module in modules.items() if hasattr(module, "COMPILE_CASES")}
    names = [case.name for module in modules.values() for case in module.COMPILE_CASES]
    failures += [
        f"{name}: two compile cases have this name" for name in sorted({n for n in names if names.count(n) > 1})
    ]
    for name, module in modules.items():
        for index, case in enumerate(module.COMPILE_CASES):
            for arch in [arch for arch in archs if arch in case.archs]:
                launch = (case.num_warps, case.num_stages, case.rounds_exactly, case.multiples_of_16)
                description = (case.name, case.signature, case.constexprs, *launch)
                key = cache / f"{digest(sources, arch, repr(description), str(case.tensor_cores))}.json"
                if key.exists():
                    results.append(Result(**json.loads(key.read_text())))
                else:
                    tasks.append((name, index, arch))
                    keys.append(key)
    workers = min(len(tasks), os.cpu_count() or 1)
    if workers > 1 and "fork" in multiprocessing.get_all_start_methods():
        # Kernels cannot be pickled; a forked worker has them already.
        with multiprocessing.get_context("fork").Pool(workers) as pool:
            answers = pool.map(_compile_task, tasks, chunksize=1)
    else:
        answers = [_compile_task(task) for task in tasks]
    for key, answer in zip(keys, answers, strict=True):
        if isinstance(answer, str):
            failures.append(answer)
        else:
            results.append(answer)
            key.write_text(json.dumps(asdict(answer)))
    return results, failures


def built_rows(archs: list[str]) -> list[tuple[str, str, int, int, int]]:
    """What `resource_usage` says of the built _C module; nothing where it is older than a source or lacks an arch."""
    newest = max(path.stat().st_mtime for path in [ROOT / "CMakeLists.txt", *(ROOT / "csrc").rglob("*")])
    for path in (ROOT / "lrc_kernels").glob("_C*.so"):
        if path.stat().st_mtime > newest and b"sm_90a" in path.read_bytes():
            rows = resource_usage(path)
            if {arch for arch, *_ in rows} >= set(archs):
                return rows
    return []


def compiled_rows(nvcc: str, archs: list[str], cache: Path) -> list[tuple[str, str, int, int, int]]:
    """What `resource_usage` says of csrc/**/*.cu; what the cache holds is not compiled again."""
    headers = sorted([*(ROOT / "csrc").glob("**/*.cuh"), *(ROOT / "csrc" / "include").glob("**/*.h"), Path(__file__)])

    def compiled(source: Path) -> list[tuple[str, str, int, int, int]]:
        text = [file.read_text() for file in [source, *headers]]
        key = cache / f"{digest(*text, *archs, _nvcc_version(nvcc))}.json"
        if not key.exists():
            with tempfile.TemporaryDirectory() as folder:
                target = Path(folder) / "kernels.o"
                targets = [flag for arch in archs for flag in ("-gencode", NVCC_TARGETS[arch])]
                include = ("-I", str(ROOT / "csrc"), "-I", str(ROOT / "csrc" / "include"))
                command = [nvcc, "-std=c++17", "-O3", *targets, *include, "-c", str(source), "-o", str(target)]
                run = subprocess.run(command, capture_output=True, text=True)
                if run.returncode != 0:
                    raise SystemExit(f"compile_check: {source.relative_to(ROOT)} does not compile:\n{run.stderr}")
                key.write_text(json.dumps(resource_usage(target)))
        return [tuple(row) for row in json.loads(key.read_text())]

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return [row for rows in pool.map(compiled, sorted((ROOT / "csrc").glob("*/*.cu"))) for row in rows]


def check_cuda(archs: list[str], cache: Path) -> tuple[list[Result], str]:
    """Registers and spills of the CUDA C++ kernels, the most over a kernel's template instances, and their origin."""
    archs = [arch for arch in archs if arch in NVCC_TARGETS]
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    rows, origin = built_rows(archs), "read from the built _C module"
    if not rows and nvcc is None:
        return (
            [],
            f"CUDA C++ kernels left out: no nvcc and no _C module of these sources for {', '.join(archs)}",
        )
    if not rows:
        rows, origin = compiled_rows(nvcc, archs, cache), f"compiled by {_nvcc_version(nvcc)}"
    largest: dict[tuple[str, str], Result] = {}
    for arch, function, registers, stack, shared in rows:
        name = kernel_name(function)
        if arch in archs:
            old = largest.get((name, arch), Result(name, arch, 0, 0, 0, "", False))
            maxima = (max(old.registers, registers), max(old.stack, stack), max(old.shared, shared))
            largest[name, arch] = Result(name, arch, *maxima, "", False)
    return list(largest.values()), f"CUDA C++ kernels {origin}"


def kernel_name(mangled: str) -> str:
    """The function's own name in an Itanium-mangled one: a length, then as many characters, ending in _kernel."""
    for found in re.finditer(r"(?=(\d{1,2})([a-z]\w*?_kernel))", mangled):
        if int(found[1]) == len(found[2]):
            return found[2]
    return mangled


def _nvcc_version(nvcc: str | None) -> str:
    run = subprocess.run([str(nvcc), "--version"], capture_output=True, text=True)
    return run.stdout.strip().splitlines()[-1] if run.stdout else "unknown"


def read_budgets(path: Path) -> dict[str, Any]:
    try:
        import tomllib
    except ImportError:
        import tomli as tomllib  # Python 3.10, where pytest brings it
    return tomllib.loads(path.read_text()) if path.exists() else {}


def compare(results: list[Result], budgets: dict[str, Any], of_triton: bool = True) -> tuple[list[str], list[str]]:
    """A line for each budget that is exceeded or missing; and apart, those that another Triton may exceed."""
    failures: list[str] = []
    shared_limits = budgets.get("shared_memory", {})
    # Each version allocates registers its own way; what must hold with any of them are the limits of the device.
    other = of_triton and budgets.get("triton", triton_version()) != triton_version()
    notes = [] if other else failures
    for result in results:
        where = f"{result.name} {result.arch}"
        limit = budgets.get("registers", {}).get(result.name, {}).get(result.arch)
        if result.stack:
            notes.append(f"{where}: {result.stack} bytes of stack, budget 0 (registers spill)")
        if limit is None:
            failures.append(f"{where}: no register budget (tools/compile_check.py --update writes one)")
        elif result.registers > limit:
            notes.append(f"{where}: {result.registers} registers, budget {limit}")
        if result.arch not in shared_limits:
            failures.append(f"{where}: no shared memory limit for {result.arch}")
        elif result.shared > shared_limits[result.arch]:
            failures.append(
                f"{where}: {result.shared} bytes of shared memory, device limit {shared_limits[result.arch]}"
            )
        if result.needs_instruction and not result.instruction:
            failures.append(f"{where}: no tensor-core instruction (wgmma, mma.sync or v_mfma) in its code")
        if result.approximation:
            failures.append(f"{where}: {result.approximation} where every operation must round exactly")
    return failures, notes if other else []


def triton_version() -> str:
    import triton  # not by the distribution's name, which differs for ROCm and nightly builds

    return triton.__version__


def stale(results: list[Result], budgets: dict[str, Any], complete: bool) -> list[str]:
    names = {result.name for result in results}
    gone = sorted(set(budgets.get("registers", {})) - names) if complete else []
    return [f"{name}: has a register budget but is not shipped (--update removes it)" for name in gone]


def write_budgets(path: Path, results: list[Result], budgets: dict[str, Any], complete: bool) -> None:
    """Limits of an eighth above what was measured: Triton versions differ by that much."""
    registers = {} if complete else dict(budgets.get("registers", {}))
    for result in results:
        limit = min(512 if result.arch.startswith("gfx") else 255, -(-result.registers * 9 // 8 // 8) * 8)
        registers[result.name] = {**registers.get(result.name, {}), result.arch: limit}
    lines = [
        "# SPDX-License-Identifier: Apache-2.0",
        "# What a kernel may use, checked by tools/compile_check.py; the budget for spills is always 0.",
        "# shared_memory: bytes that one block can have on the device. registers: per thread, rewritten by --update.",
        "# triton: the version that they were measured with; of another one, registers and spills are only named.",
        "",
        f'triton = "{triton_version()}"',
        "",
        "[shared_memory]",
        *(f"{arch} = {limit}" for arch, limit in budgets["shared_memory"].items()),
    ]
    for name in sorted(registers):
        lines += ["", f"[registers.{json.dumps(name)}]", *(f"{k} = {v}" for k, v in sorted(registers[name].items()))]
    path.write_text("\n".join(lines) + "\n")


def print_table(results: list[Result]) -> None:
    width = max((len(result.name) for result in results), default=6)
    print(f"{'kernel':{width}}  arch   registers  stack  shared  instruction")
    for r in sorted(results, key=lambda result: (result.name, result.arch)):
        print(f"{r.name:{width}}  {r.arch}  {r.registers:9}  {r.stack:5}  {r.shared:6}  {r.instruction or '-'}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("files", nargs="*", type=Path, help="Python files with COMPILE_CASES (default: the package's)")
    parser.add_argument("--arch", default=",".join(ARCHITECTURES), help="architectures, comma-separated")
    parser.add_argument("--budgets", type=Path, default=BUDGETS)
    parser.add_argument("--cache", type=Path, default=ROOT / "build" / "compile_check")
    parser.add_argument("--update", action="store_true", help="write the register limits anew")
    options = parser.parse_args()
    # The interpreter replaces the compiler, and it is chosen when a kernel module is imported.
    os.environ.pop("TRITON_INTERPRET", None)
    if importlib.util.find_spec("triton") is None:
        raise SystemExit("compile_check: triton is not installed (pip install lrc-kernels[triton])")
    archs = options.arch.split(",")
    if unknown := sorted(set(archs) - set(ARCHITECTURES)):
        raise SystemExit(f"compile_check: --arch must be of {', '.join(ARCHITECTURES)}, got {', '.join(unknown)}")
    options.cache.mkdir(parents=True, exist_ok=True)
    modules = load_modules(options.files)
    results, failures = check_triton(modules, archs, options.cache)
    cuda, note = ([], "") if options.files else check_cuda(archs, options.cache)
    results += cuda
    if not results and not failures:
        failures.append("no kernel was found")
    complete = not options.files and bool(cuda) and set(archs) == set(ARCHITECTURES)
    if options.update and not failures:
        write_budgets(options.budgets, results, read_budgets(options.budgets), complete)
    budgets = read_budgets(options.budgets)
    exceeded, notes = compare(results[: len(results) - len(cuda)], budgets)
    failures += exceeded + compare(cuda, budgets, of_triton=False)[0] + stale(results, budgets, complete)
    print_table(results)
    print(note, *(f"NOTE {line} (of triton {budgets.get('triton')})" for line in notes), sep="\n")
    print(*(f"FAIL {failure}\n" for failure in failures), sep="", end="")
    print(f"{len(results)} kernels compiled, {len(failures)} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
