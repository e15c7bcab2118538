"""Installation: the source distribution, the wheel built from it, and the package without a compiler."""

import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from kdops import _extension

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs a source checkout")


def run(*command, **environment):
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, check=True
    )


def test_extension_is_built_where_there_is_a_compiler():
    if shutil.which("c++") is None:
        pytest.skip("there is no C++ compiler")
    assert _extension.extension is not None
    assert _extension.build_info()["torch"].split(".")[0] == "2"
    assert _extension.extension.instruction_sets()[-1] == "portable"


def test_unknown_instruction_set_is_refused():
    with pytest.raises(ValueError, match="use_instruction_set: this processor has no 'avx1024'"):
        _extension.extension.use_instruction_set("avx1024")


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    """The unpacked source distribution."""
    folder = tmp_path_factory.mktemp("sdist")
    copy = folder / "source"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv*", "build", "runs", "*.so", "*.egg-info"))
    code = f"import setuptools.build_meta as b, os; os.chdir({str(copy)!r}); print(b.build_sdist({str(folder)!r}))"
    run(sys.executable, "-c", code)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder)
    return next(p for p in folder.iterdir() if p.is_dir() and p.name.startswith("kdops-"))


def test_sdist_holds_the_sources(unpacked):
    for name in ("csrc/bindings.cpp", "csrc/cpu/vec.h", "kdops/_triton/scale.py", "integrations/__init__.py",
                 "tests/test_package.py", "benchmarks/run.py", "Makefile", "constraints.txt", "LICENSE", "README.md",
                 "CITATION.cff", "DESIGN.md", "docs/design/notation.md",
                 "examples/cwd_training_loop.py"):  # fmt: skip
        assert (unpacked / name).exists(), name
    assert not list(unpacked.rglob("*.so"))


def test_installs_without_a_compiler(unpacked, tmp_path):
    """The wheel is built, the reason for the missing extension is printed, and the losses run on the CPU."""
    pip = [sys.executable, "-m", "pip", "-v", "install", "--no-build-isolation", "--no-deps", "--no-index"]
    built = run(*pip, "--target", str(tmp_path), str(unpacked), CXX="no-such-compiler")
    assert (
        "without the extension kdops._C, as the C++ compiler 'no-such-compiler' was not found"
        in built.stdout + built.stderr
    )
    code = (
        "import torch, warnings, kdops; warnings.simplefilter('ignore'); print(kdops.__file__);"
        "s = torch.randn(2, 3, 4, 5, requires_grad=True); kdops.cwd_loss(s, s.detach() * 2, norm='batch').backward();"
        "import kdops.integrations.pytorch.demo; print(bool(s.grad.any()))"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    assert Path(shown[0]).is_relative_to(tmp_path) and shown[1] == "True"


def test_a_required_extension_is_not_left_out(unpacked, tmp_path):
    with pytest.raises(subprocess.CalledProcessError) as failed:
        run(sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index", "--target",
            str(tmp_path), str(unpacked), CXX="no-such-compiler", KDOPS_REQUIRE_EXTENSION="1")  # fmt: skip
    assert (
        "the extension was required, but the C++ compiler 'no-such-compiler' was not found"
        in failed.value.stderr + failed.value.stdout
    )


def test_wheel_holds_integrations(unpacked, tmp_path):
    code = (
        f"import setuptools.build_meta as b, os; os.chdir({str(unpacked)!r}); print(b.build_wheel({str(tmp_path)!r}))"
    )
    run(sys.executable, "-c", code, CXX="no-such-compiler")
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "kdops/py.typed" in names and "kdops/integrations/__init__.py" in names
    configs = [p.relative_to(ROOT) for p in (ROOT / "integrations").rglob("configs/**/*.py")]
    missing = [str(c) for c in configs if f"kdops/{c}" not in names]
    assert not missing
    assert importlib.util.find_spec("kdops.integrations") is not None
