import pytest
import torch

from kdops import _extension

pytest_plugins = ["ptx.plugin"]
INSTRUCTION_SETS = _extension.extension.instruction_sets() if _extension.extension else []


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU, and PyTorch sees none")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(params=INSTRUCTION_SETS or ["extension not built"])
def instruction_set(request):
    """Every instruction set of this processor in turn."""
    if _extension.extension is None:
        pytest.skip("the extension kdops._C was not built")
    _extension.extension.use_instruction_set(request.param)
    yield request.param
    _extension.extension.use_instruction_set(INSTRUCTION_SETS[0])


@pytest.fixture
def poisoned():
    """Fresh memory is NaN, so that an element that no kernel writes is noticed."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    return request.param
