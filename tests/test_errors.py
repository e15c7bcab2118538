"""Every error of an argument: raised before any kernel runs, with the loss, the rule and the value received."""

import pytest
import torch

import kdops
from kdops import _op, testing

LOSSES = {"cwd_loss": kdops.cwd_loss, "pkd_loss": kdops.pkd_loss}
MODULES = {"CWDLoss": kdops.CWDLoss, "PKDLoss": kdops.PKDLoss}


def maps(*shape, **options):
    return torch.randn(*(shape or (2, 3, 4, 5)), **options)


@pytest.fixture(params=LOSSES)
def name(request):
    return request.param


@pytest.fixture(params=["fused", "reference"])
def loss(name, request):
    """A loss whose kernels must not be reached."""
    return lambda *args, **options: LOSSES[name](*args, **{"backend": request.param, **options})


def refused(error, name, text):
    return pytest.raises(error, match=f"^{name}: {text}")


def test_shapes(loss, name):
    text = r"student and teacher must have the same shape, got \(2, 256, 50, 68\) and \(2, 256, 25, 34\)"
    with refused(ValueError, name, text):
        loss(maps(2, 256, 50, 68), maps(2, 256, 25, 34))
    with refused(ValueError, name, "level 1: student and teacher must have the same shape"):
        loss([maps(), maps()], [maps(), maps(2, 4, 4, 5)])


def test_levels(loss, name):
    with refused(ValueError, name, "student and teacher must have the same number of levels, got 2 and 1"):
        loss([maps(), maps()], [maps()])
    with refused(ValueError, name, "student and teacher must have at least one level, got empty lists"):
        loss([], [])
    with refused(TypeError, name, "student and teacher must both be tensors or both be lists .* got Tensor and list"):
        loss(maps(), [maps()])
    with refused(
        TypeError, name, "student and teacher must both be tensors or both be lists .* got ndarray and Tensor"
    ):
        loss(maps().numpy(), maps())
    with refused(TypeError, name, "student and teacher must both be tensors or both be lists .* got dict and dict"):
        loss({"0": maps()}, {"0": maps()})
    with refused(TypeError, name, "level 1: teacher must be a tensor, got NoneType"):
        loss([maps(), maps()], [maps(), None])


@pytest.mark.parametrize("shape", [(3, 4, 5), (2, 3, 4, 5, 6), (7,), ()])
def test_dimensions(loss, name, shape):
    with refused(ValueError, name, rf"student must have 4 dimensions \(N, C, H, W\), got {len(shape)} with shape"):
        loss(torch.randn(shape), torch.randn(shape))


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_dtypes(loss, name, dtype):
    with refused(TypeError, name, f"student must be float16, bfloat16, float32 or float64, got {dtype}"):
        loss(torch.zeros(2, 3, 4, 5).to(dtype), maps())
    with refused(TypeError, name, f"teacher must be float16, bfloat16, float32 or float64, got {dtype}"):
        loss(maps(), torch.zeros(2, 3, 4, 5).to(dtype))


def test_layout(loss, name):
    with refused(ValueError, name, r"student must be a dense \(strided\) tensor, got layout torch.sparse_coo"):
        loss(maps().to_sparse(), maps())


def test_devices(loss, name):
    with refused(ValueError, name, "student and teacher must be on the same device, got cpu and meta"):
        loss(maps(), maps().to("meta"))
    with refused(ValueError, name, "level 1: all levels must be on the same device, got meta after cpu"):
        loss([maps(), maps().to("meta")], [maps(), maps().to("meta")])


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0)])
def test_empty(loss, name, shape):
    with refused(ValueError, name, rf"student must not be empty, got shape \({', '.join(map(str, shape))}\)"):
        loss(torch.zeros(shape), torch.zeros(shape))


@pytest.mark.parametrize("norm", ["batch", "pkd"])
def test_one_value_per_channel(loss, name, norm):
    text = rf"norm='{norm}' needs more than one value per channel \(N\*H\*W > 1\), got shape \(1, 3, 1, 1\)"
    with refused(ValueError, name, text):
        loss(maps(1, 3, 1, 1), maps(1, 3, 1, 1), norm=norm)


def test_one_value_per_channel_without_normalisation():
    assert kdops.cwd_loss(maps(1, 3, 1, 1), maps(1, 3, 1, 1)) == 0


def test_teacher_that_requires_grad(loss, name):
    with refused(
        ValueError, name, "teacher must not require grad, .*got requires_grad=True: run the teacher under torch.no_grad"
    ):
        loss(maps(), maps(requires_grad=True))
    connector = torch.nn.Conv2d(3, 3, 1)
    text = "teacher must not require grad, .*trainable layer after the teacher .* put it on the student's side"
    with refused(ValueError, name, text):
        loss(maps(2, 3, 4, 5), connector(maps(2, 3, 4, 5)))


def test_options(loss, name):
    with refused(ValueError, name, "norm must be one of .*'pkd'.*, got 'bn'"):
        loss(maps(), maps(), norm="bn")
    with refused(ValueError, name, "norm must be one of"):
        loss(maps(), maps(), norm=["batch"])
    with refused(ValueError, name, "reduction must be one of 'mean', 'sum', 'none', got 'batchmean'"):
        loss(maps(), maps(), reduction="batchmean")
    with refused(ValueError, name, "reduction must be one of 'mean', 'sum', 'none', got None"):
        loss(maps(), maps(), reduction=None)
    with refused(ValueError, name, "backend must be one of 'auto', 'fused', 'reference', got 'triton'"):
        loss(maps(), maps(), backend="triton")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_numbers_are_finite(loss, name, bad):
    with refused(ValueError, name, f"loss_weight must be finite, got {bad}"):
        loss(maps(), maps(), loss_weight=bad)
    with refused(ValueError, name, f"eps must be finite, got {bad}"):
        loss(maps(), maps(), eps=bad, norm="batch")


def test_numbers_are_numbers(loss, name):
    with refused(TypeError, name, "loss_weight must be a number, got str"):
        loss(maps(), maps(), loss_weight="1")
    with refused(TypeError, name, "loss_weight must be a number, got Tensor"):
        loss(maps(), maps(), loss_weight=torch.tensor(1.0))
    with refused(TypeError, name, "loss_weight must be a number, got bool"):
        loss(maps(), maps(), loss_weight=True)
    with refused(ValueError, name, "eps must be at least 0, got -1e-05"):
        loss(maps(), maps(), eps=-1e-5, norm="batch")


@pytest.mark.parametrize("tau", [0, 0.0, -1.0])
def test_tau(tau):
    with refused(ValueError, "cwd_loss", f"tau must be greater than 0, got {float(tau)}"):
        kdops.cwd_loss(maps(), maps(), tau=tau)
    with refused(ValueError, "CWDLoss", "tau must be greater than 0"):
        kdops.CWDLoss(tau=tau)


@pytest.mark.parametrize("tau", [float("nan"), float("inf")])
def test_tau_is_finite(tau):
    with refused(ValueError, "cwd_loss", "tau must be finite"):
        kdops.cwd_loss(maps(), maps(), tau=tau)


def test_pkd_norm_is_needed():
    with refused(ValueError, "pkd_loss", "norm must be one of 'pkd', 'batch', got None"):
        kdops.pkd_loss(maps(), maps(), norm=None)


def test_resize():
    with refused(ValueError, "pkd_loss", "resize must be one of None, 'student', 'teacher', got True"):
        kdops.pkd_loss(maps(), maps(), resize=True)
    text = r"student and teacher must have the same batch size and number of channels, got \(2, 3, 4, 5\) and"
    with refused(ValueError, "pkd_loss", text):
        kdops.pkd_loss(maps(), maps(2, 4, 8, 9), resize="student")
    with refused(ValueError, "pkd_loss", "norm='pkd' needs more than one value per channel"):
        kdops.pkd_loss(maps(1, 3, 4, 5), maps(1, 3, 1, 1), resize="student")


@pytest.mark.parametrize("module", MODULES)
def test_modules_check_when_they_are_made(module):
    make = MODULES[module]
    with refused(ValueError, module, "norm must be one of"):
        make(norm="bn")
    with refused(ValueError, module, "reduction must be one of"):
        make(reduction="max")
    with refused(ValueError, module, "backend must be one of"):
        make(backend="cuda")
    with refused(TypeError, module, "loss_weight must be a number, got NoneType"):
        make(loss_weight=None)
    with refused(ValueError, module, "eps must be at least 0"):
        make(eps=-1.0)


def test_no_kernel_for_a_device(name):
    with pytest.raises(
        RuntimeError, match=f'{name}: backend="fused" has no kernel for device meta: kdops has kernels for'
    ):
        LOSSES[name](maps().to("meta"), maps().to("meta"), backend="fused")


def test_missing_extension_is_said_once(name, monkeypatch):
    monkeypatch.setattr(_op._extension, "extension", None)
    monkeypatch.setattr(_op, "_warned", set())
    student, teacher = maps(requires_grad=True), maps()
    with pytest.warns(
        UserWarning, match="running the eager reference on cpu, as the extension kdops._C was not built"
    ) as said:
        first = LOSSES[name](student, teacher)
        second = LOSSES[name](student, teacher)
    assert len(said) == 1
    assert torch.equal(first, LOSSES[name](student, teacher, backend="reference")) and torch.equal(first, second)
    with pytest.raises(
        RuntimeError, match=f'{name}: backend="fused" has no kernel for device cpu: the extension kdops._C was not'
    ):
        LOSSES[name](student, teacher, backend="fused")


def test_gpu_without_triton_never_falls_back(name, monkeypatch):
    monkeypatch.setattr(_op, "_HAS_TRITON", False)
    for backend in ("auto", "fused"):
        with pytest.raises(RuntimeError, match="no kernel for device cuda:0: triton is not installed"):
            _op.resolve(name, backend, torch.device("cuda", 0))
    assert _op.resolve(name, "reference", torch.device("cuda", 0)) == "reference"


def test_laid_out_names_its_layouts():
    with pytest.raises(ValueError, match="layout must be one of"):
        testing.laid_out(maps(), "nhwc")
