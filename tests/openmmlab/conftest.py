"""Tests of the OpenMMLab integrations on the real packages: `make test-openmmlab`, in their own environment."""
from __future__ import annotations

import importlib.util
import shutil

import pytest

if importlib.util.find_spec("mmengine") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    from mmengine.registry import DefaultScope

    @pytest.fixture(autouse=True)
    def scope(request):
        """Every test starts from its module's SCOPE, whatever Runner the test before has left behind."""
        with DefaultScope.overwrite_default_scope(getattr(request.module, "SCOPE", "mmengine")):
            yield

    @pytest.fixture(scope="session")
    def coco(tmp_path_factory):
        """A folder for the trainers' tools to run in, with a small data set at data/coco."""
        from real_runs import write_coco

        folder = tmp_path_factory.mktemp("real_runs")
        write_coco(folder / "data" / "coco")
        yield folder
        shutil.rmtree(folder)  # gigabytes of weights

    @pytest.fixture
    def stock_names():
        """MMRazor's names are kdops' for the length of one test."""
        from kdops.integrations.mmrazor import give_back, take_over

        take_over()
        yield
        give_back()
