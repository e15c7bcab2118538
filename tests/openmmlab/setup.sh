#!/usr/bin/env bash
# Makes the environment of `make test-openmmlab`: setup.sh VENV [MMCV_WHEEL]. To be run in the repository's root.
# Without a wheel of mmcv (or with one that does not fit), mmcv is built from source, which takes about 20 minutes on
# two cores the first time; pip keeps the result.
set -euo pipefail
venv=$1
wheel=${2:-}
mmcv=2.1.0

[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
pip() { "$venv/bin/pip" install --disable-pip-version-check -q "$@"; }

pip "setuptools>=77,<80" wheel ninja
pip -r integrations/requirements-openmmlab.txt
mmcv_works() { [ "$("$venv/bin/python" -c "import mmcv.ops; print(mmcv.__version__)" 2>/dev/null)" = "$mmcv" ]; }
from_wheel() { [ -n "$wheel" ] && [ -f "$wheel" ] && pip "$wheel" && mmcv_works; }
if ! mmcv_works && ! from_wheel; then
    echo "building mmcv $mmcv from source"
    MMCV_WITH_OPS=1 FORCE_CUDA=0 MAX_JOBS="${MAX_JOBS:-2}" pip --no-build-isolation --force-reinstall --no-deps "mmcv==$mmcv"
fi
# MMYOLO 0.6.0 admits mmcv up to 2.0.1 by a constant alone; later ones work and are what builds on this PyTorch.
"$venv/bin/python" - <<'PY'
import importlib.util
import pathlib
import re

path = pathlib.Path(importlib.util.find_spec("mmyolo").origin)
path.write_text(re.sub(r"mmcv_maximum_version = '2\.1\.0'", "mmcv_maximum_version = '2.2.0'", path.read_text()))
PY
# Not editable: the extension in the work tree belongs to the PyTorch of another environment.
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
cp -r setup.py pyproject.toml MANIFEST.in README.md LICENSE csrc kdops integrations "$build"
find "$build/kdops" -name '*.so' -delete
"$venv/bin/pip" install --disable-pip-version-check -q --no-build-isolation --no-deps --force-reinstall "$build"
