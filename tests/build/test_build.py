# SPDX-License-Identifier: Apache-2.0
"""The build from a clean copy of the sources: sdist, wheel, the one-line errors; and the package on bare machines."""

import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from lrc_kernels import env

ROOT = Path(__file__).parents[2]
LEFT_OUT = (".*", "build", "dist", "out", "__pycache__", "*.egg-info", "*.so")


def run(*command: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess:
    """Run this interpreter; a variable given as "" is as good as unset for the build."""
    environment = {**os.environ, "LRC_BACKEND": "", "LRC_CUDA": "", "LRC_BUILD_DIR": "", **variables}
    return subprocess.run([sys.executable, *command], cwd=cwd, env=environment, capture_output=True, text=True)


def build(hook: str, cwd: Path, out: Path, **variables: str) -> Path:
    """Call a PEP 517 hook of setuptools, as pip does, and return the file that it made."""
    out.mkdir()
    code = f"from setuptools import build_meta; build_meta.{hook}({str(out)!r})"
    done = run("-c", code, cwd=cwd, **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(out.iterdir())


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked sdist of the working tree."""
    tmp = tmp_path_factory.mktemp("sdist")
    shutil.copytree(ROOT, tmp / "copy", ignore=shutil.ignore_patterns(*LEFT_OUT))
    with tarfile.open(build("build_sdist", tmp / "copy", tmp / "out")) as archive:
        archive.extractall(tmp / "unpacked")
    return next((tmp / "unpacked").iterdir())


@pytest.fixture
def setup_module(monkeypatch: pytest.MonkeyPatch) -> dict:
    """The names of setup.py, without the call of setup()."""
    monkeypatch.setattr("setuptools.setup", lambda **arguments: None)
    for name in ("LRC_CUDA", "CUDA_HOME", "CUDA_PATH", "CXX"):
        monkeypatch.delenv(name, raising=False)
    return runpy.run_path(str(ROOT / "setup.py"))


def test_sdist_carries_everything_a_build_needs(sdist: Path):
    native = {path.relative_to(ROOT) for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    assert native
    python = {path.relative_to(ROOT) for path in (ROOT / "lrc_kernels").rglob("*") if path.suffix in (".py", ".pyi")}
    others = {
        Path(name) for name in ("CMakeLists.txt", "setup.py", "pyproject.toml", "LICENSE", "lrc_kernels/py.typed")
    }
    shipped = {path.relative_to(sdist) for path in sdist.rglob("*") if path.is_file()}
    assert (native | python | others) <= shipped
    assert not [path for path in shipped if path.suffix in (".so", ".o", ".pyc")]


def test_missing_compiler_gives_one_line(sdist: Path):
    done = run("setup.py", "-q", "build_ext", cwd=sdist, CXX="/nonexistent/c++", LRC_CUDA="0")
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1] == (
        "lrc_kernels: no C++ compiler found (looked for /nonexistent/c++): run `sudo apt-get install g++` (Debian, "
        "Ubuntu) or `sudo dnf install gcc-c++` (Fedora, RHEL)"
    )
    assert "Traceback" not in done.stderr


def test_missing_python_header_gives_one_line(setup_module: dict, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    monkeypatch.setattr("shutil.which", lambda name, path=None: f"/usr/bin/{name}")
    with pytest.raises(SystemExit, match=r"no Python\.h in .*apt-get install python3-dev.*dnf install python3-devel"):
        setup_module["check_toolchain"]()


def test_without_nvcc_one_line_says_so(
    setup_module: dict, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
):
    monkeypatch.setattr("shutil.which", lambda name, path=None: None)
    assert setup_module["find_nvcc"]() is None
    assert capfd.readouterr().out == (
        "lrc_kernels: no nvcc found, building the CPU kernels only (set CUDA_HOME to build the CUDA kernels)\n"
    )
    monkeypatch.setenv("LRC_CUDA", "1")
    with pytest.raises(SystemExit, match="LRC_CUDA=1 asks for the CUDA kernels but no nvcc"):
        setup_module["find_nvcc"]()
    monkeypatch.setenv("LRC_CUDA", "yes")
    with pytest.raises(SystemExit, match="LRC_CUDA must be 0, 1 or unset, got 'yes'"):
        setup_module["find_nvcc"]()


def test_broken_nvcc_stops_the_build_and_names_the_way_out(sdist: Path, tmp_path: Path):
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho 'unsupported GNU version' >&2\nexit 1\n")
    nvcc.chmod(0o755)
    folders = {"CUDA_HOME": str(tmp_path), "LRC_BUILD_DIR": str(tmp_path / "build")}
    done = run("setup.py", "-q", "build_ext", cwd=sdist, **folders)
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1].startswith(f"lrc_kernels: CMake failed with {nvcc}; LRC_CUDA=0 builds the CPU")
    assert "Traceback" not in done.stderr


def test_wheel_of_the_sdist_imports_from_an_empty_folder(sdist: Path, tmp_path: Path):
    # Without optimisation, which is most of the time that a build takes and nothing of what a wheel carries.
    options = {"LRC_CUDA": "0", "LRC_BUILD_DIR": str(tmp_path / "build"), "CMAKE_BUILD_TYPE": "None"}
    wheel = build("build_wheel", sdist, tmp_path / "out", **options)
    target = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(target)
    done = run("-m", "lrc_kernels.env", cwd=tmp_path, PYTHONPATH=str(target))
    assert done.returncode == 0, done.stderr
    assert str(target / "lrc_kernels") in done.stdout.splitlines()[0]
    assert "cpu        yes" in done.stdout
    assert "cuda       yes" not in done.stdout


def test_env_reports_versions_and_every_backend():
    done = run("-m", "lrc_kernels.env", cwd=ROOT, LRC_CHECK="1")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    wanted = ("lrc_kernels", "python", "torch", "triton", "numpy", "driver", "cpu", "lrc::", "LRC_CHECK=1")
    for start in (*wanted, *(f"  {name}" for name in env.BACKENDS)):
        assert any(line.startswith(start) for line in lines), f"no line starts with {start!r}:\n{done.stdout}"


def test_package_imports_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "from lrc_kernels import backend\n"
        "print({row['triton'] for row in backend.describe().values()})"
    )
    done = run("-c", code, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "triton is not installed" in done.stdout


@pytest.mark.parametrize(
    ("name", "value", "read"), [("LRC_BACKEND", "gpu", env.backend), ("LRC_CHECK", "yes", env.check)]
)
def test_a_bad_variable_is_named(monkeypatch: pytest.MonkeyPatch, name: str, value: str, read):
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"{name} must be .*got '{value}'"):
        read()


def test_every_variable_in_use_is_documented():
    files = [ROOT / "setup.py", *ROOT.glob("lrc_kernels/**/*.py"), *ROOT.glob("tests/**/*.py"), *ROOT.glob("tools/*")]
    read = re.compile(r"""(?:environ(?:\.get)?[\[(]|getenv\()["'](LRC_\w+)""")
    used = {name for path in files if path.is_file() for name in read.findall(path.read_text())}
    assert used <= set(env.VARIABLES)
    assert len(env.VARIABLES) <= 8
