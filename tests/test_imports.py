# SPDX-License-Identifier: Apache-2.0
"""The house rule: who may import whom. Data flows one way, so do imports."""

import ast
import sys
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).parents[1]
# Rooms without an op: every room may use these.
COMMON = {"backend", "checks", "env", "layout", "native", "_triton", "_C"}
ROOMS_A_ROOM_MAY_USE = {"sequence_parallel": {"attention", "token_dropout"}}
FIRST_PARTY = {"lrc_kernels", "lrc_model", "benchmarks", "examples", "tests", "tools"}


def imported_names(path: PurePosixPath, source: str) -> set[str]:
    """Absolute dotted names that a file imports, `from x import y` as "x.y", `import_module("x")` included."""
    package, names = path.with_suffix("").parts[:-1], set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else ()
            names |= {".".join((*base, *filter(None, [node.module]), alias.name)) for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            names |= {arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)}
    return names


def why_forbidden(path: PurePosixPath, name: str) -> str | None:
    """The rule of architecture.md that this import breaks, or None."""
    parts, here = name.split("."), path.parts
    room, target = (here[1] if len(here) > 2 else ""), (parts[1] if len(parts) > 1 else "")
    allowed = {"torch", "__future__", *sys.stdlib_module_names}
    if path.name.startswith("triton_"):
        shared = parts[:2] == ["lrc_kernels", "_triton"] or parts[:3][-1].startswith("triton_")
        return (
            None if parts[0] in {"triton", *allowed} or shared else "triton_*.py takes torch, triton and _triton only"
        )
    if path.name == "reference.py" and room not in ("", "packing") and parts[0] not in allowed:
        return "reference.py takes torch only"
    if parts[0] not in FIRST_PARTY:
        return None
    if here[0] == "lrc_kernels" and parts[0] != "lrc_kernels":
        return f"lrc_kernels never imports {parts[0]}"
    if parts[:2] == ["lrc_kernels", "_C"]:
        return None if path.name == "native.py" else "_C is imported by native.py only"
    if parts[0] == "lrc_kernels" and target == "integrations" and room != "integrations":
        return "nobody imports integrations"
    if any(part.startswith("_") and not part.startswith("__") for part in parts):
        return "a private name of another module"
    if path.name == "__main__.py":
        return None  # A command puts rooms together, and nobody imports it.
    if here[0] == "lrc_kernels" and room and (ROOT / "lrc_kernels" / target).is_dir() and room != "integrations":
        permitted = {room, *COMMON, *ROOMS_A_ROOM_MAY_USE.get(room, ())}
        return None if target in permitted or not target else f"{room} must not import {target}"
    return None


def violations(path: str, source: str) -> list[str]:
    where = PurePosixPath(path)
    found = ((name, why_forbidden(where, name)) for name in sorted(imported_names(where, source)))
    return [f"{path} imports {name}: {why}" for name, why in found if why]


def test_house_rule():
    files = [file for folder in ("lrc_kernels", "lrc_model") for file in sorted((ROOT / folder).rglob("*.py"))]
    assert len(files) > 10
    bad = [line for f in files for line in violations(f.relative_to(ROOT).as_posix(), f.read_text(encoding="utf-8"))]
    assert not bad, "\n".join(bad)


@pytest.mark.parametrize(
    ("path", "source", "rule"),
    [
        ("lrc_kernels/tome/reference.py", "import numpy", "torch only"),
        ("lrc_kernels/tome/reference.py", "from lrc_kernels.layout import VarlenLayout", "torch only"),
        ("lrc_kernels/tome/reference.py", "from . import op", "torch only"),
        ("lrc_kernels/tome/triton_kernels.py", "from lrc_kernels import backend", "torch, triton and _triton"),
        ("lrc_kernels/tome/triton_plan.py", "from .op import plan_op", "torch, triton and _triton"),
        ("lrc_kernels/tome/op.py", "from lrc_kernels import _C", "native.py only"),
        ("lrc_kernels/tome/op.py", "import importlib; importlib.import_module('lrc_kernels._C')", "native.py only"),
        ("lrc_kernels/tome/op.py", "from ..attention import varlen_attention", "tome must not import attention"),
        ("lrc_kernels/tome/op.py", "from lrc_kernels.tome.plan import _check", "private"),
        ("lrc_kernels/tome/op.py", "def f():\n    from lrc_kernels.integrations import timm", "nobody imports"),
        ("lrc_kernels/tome/__main__.py", "from lrc_kernels.packing.video import _info", "private"),
        ("lrc_kernels/backend.py", "import lrc_model.config", "never imports lrc_model"),
        ("lrc_model/model.py", "from lrc_kernels.tome.op import _plan", "private"),
        ("lrc_model/model.py", "import lrc_kernels.integrations.timm", "nobody imports"),
    ],
)
def test_a_violation_is_caught(path, source, rule, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    for room in ("tome", "attention", "integrations"):
        (tmp_path / "lrc_kernels" / room).mkdir(parents=True)
    (line,) = violations(path, source)
    assert rule in line


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("lrc_kernels/tome/reference.py", "import math, torch\nfrom torch import Tensor"),
        (
            "lrc_kernels/tome/triton_kernels.py",
            "import triton.language as tl\nfrom lrc_kernels._triton import CompileCase",
        ),
        ("lrc_kernels/tome/triton_kernels.py", "from lrc_kernels.tome.triton_plan import plan_kernel"),
        ("lrc_kernels/native.py", "from lrc_kernels import _C"),
        ("lrc_kernels/tome/native.py", "from lrc_kernels.native import C, pointer"),
        ("lrc_kernels/tome/op.py", "from lrc_kernels.tome import native, reference\nfrom .plan import MergePlan"),
        ("lrc_kernels/sequence_parallel/ring.py", "from lrc_kernels.attention import merge_partials"),
        ("lrc_kernels/integrations/timm.py", "from lrc_kernels.tome import merge_tokens"),
        ("lrc_kernels/tome/__main__.py", "from lrc_kernels.packing import decode_frames"),
        ("lrc_model/model.py", "from lrc_kernels.tome import compress_clips"),
    ],
)
def test_what_the_rule_allows(path, source):
    assert violations(path, source) == []
