"""MGDLoss as a module: published state dicts, errors, the graph of its node, torch.compile, peak memory."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import ProfilerActivity, profile

import kdops
from kdops.testing import MGDCase, relative_error


class Published(nn.Module):
    """The module tree of the published MGD connector."""

    def __init__(self, student_channels, teacher_channels):
        super().__init__()
        self.align = None
        if student_channels != teacher_channels:
            self.align = nn.Conv2d(student_channels, teacher_channels, kernel_size=1)
        self.generation = nn.Sequential(
            nn.Conv2d(teacher_channels, teacher_channels, kernel_size=3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(teacher_channels, teacher_channels, kernel_size=3, padding=1),
        )

    def forward(self, feature, mask):
        if self.align is not None:
            feature = self.align(feature)
        return self.generation(torch.mul(feature, mask))


@pytest.mark.parametrize("widths", [(32, 32), (24, 32)])
def test_loads_published_state_dicts_and_gives_their_loss(widths):
    torch.manual_seed(1)
    published = Published(*widths)
    module = kdops.MGDLoss(*widths)
    module.load_state_dict(published.state_dict())
    align = ["align.weight", "align.bias"] if widths[0] != widths[1] else []
    convolutions = [f"generation.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")]
    assert list(module.state_dict()) == align + convolutions
    student, teacher = torch.randn(2, widths[0], 9, 7), torch.randn(2, widths[1], 9, 7)
    mask = (torch.rand(2, 1, 9, 7) <= 0.35).float()
    expected = F.mse_loss(published(student, mask), teacher, reduction="sum") / 2 * 2e-5
    assert relative_error(module(student, teacher, mask), expected) <= 1e-6
    module = kdops.MaskedGeneration(*widths)
    module.load_state_dict(published.state_dict())
    assert relative_error(module(student, mask), published(student, mask)) <= 1e-6


def student_and_teacher(student_channels=8, teacher_channels=12):
    return torch.randn(2, student_channels, 5, 7), torch.randn(2, teacher_channels, 5, 7)


@pytest.mark.parametrize(
    "options, error, text",
    [
        ({"lambda_mgd": 1.5}, ValueError, r"MGDLoss: lambda_mgd must be in \[0, 1\], got 1.5"),
        ({"lambda_mgd": -0.1}, ValueError, r"MGDLoss: lambda_mgd must be in \[0, 1\], got -0.1"),
        ({"lambda_mgd": float("nan")}, ValueError, "MGDLoss: lambda_mgd must be finite, got nan"),
        ({"lambda_mgd": "0.65"}, TypeError, "MGDLoss: lambda_mgd must be a number, got str"),
        ({"alpha_mgd": float("inf")}, ValueError, "MGDLoss: alpha_mgd must be finite, got inf"),
        ({"backend": "gpu"}, ValueError, "MGDLoss: backend must be one of 'auto', 'fused', 'reference', got 'gpu'"),
        ({"student_channels": 0}, ValueError, "MGDLoss: student_channels must be at least 1, got 0"),
        ({"teacher_channels": 12.0}, TypeError, "MGDLoss: teacher_channels must be an integer, got float"),
    ],
)
def test_refused_options(options, error, text):
    with pytest.raises(error, match=text):
        kdops.MGDLoss(**{"student_channels": 8, "teacher_channels": 12, **options})


@pytest.mark.parametrize("backend", ["fused", "reference"])
def test_refused_maps(backend):
    module = kdops.MGDLoss(8, 12, backend=backend)
    student, teacher = student_and_teacher()
    channels = r"must have student_channels=8 channels, got 6 in shape \(2, 6, 5, 7\)"
    refused = [
        ((student[:, :6], teacher), ValueError, f"MGDLoss: preds_S {channels}"),
        ((student, teacher[:, :8]), ValueError, r"preds_T must have teacher_channels=12 channels, got 8 in"),
        ((student, teacher[..., :3]), ValueError, r"same shape, got \(2, 12, 5, 7\) and \(2, 12, 5, 3\)"),
        ((student, teacher[:1]), ValueError, r"same shape, got \(2, 12, 5, 7\) and \(1, 12, 5, 7\)"),
        ((student, teacher.clone().requires_grad_()), ValueError, "teacher must not require grad"),
        (([student], teacher), TypeError, "MGDLoss: preds_S must be a tensor, got list"),
        (
            (student.bfloat16(), teacher),
            TypeError,
            "same dtype outside torch.autocast, got torch.bfloat16 and torch.fl",
        ),
        ((student[0], teacher), ValueError, r"preds_S must have 4 dimensions \(N, C, H, W\), got 3"),
        ((student[:0], teacher[:0]), ValueError, "preds_S must not be empty"),
    ]
    for arguments, error, text in refused:
        with pytest.raises(error, match=text):
            module(*arguments)


@pytest.mark.parametrize("on_channel", [False, True])
def test_refused_masks(on_channel):
    module = kdops.MGDLoss(8, 12, mask_on_channel=on_channel)
    student, teacher = student_and_teacher()
    shape, other = ((2, 12, 1, 1), (2, 1, 5, 7)) if on_channel else ((2, 1, 5, 7), (2, 12, 1, 1))
    text = str(shape).replace("(", r"\(").replace(")", r"\)")
    for wrong in (other, (1, *shape[1:]), (2, 12, 5, 7), (2, 5, 7)):
        with pytest.raises(ValueError, match=f"MGDLoss: mask must have shape {text}, got"):
            module(student, teacher, torch.ones(wrong))
    for wrong in (torch.ones(shape, dtype=torch.int64), torch.ones(shape, dtype=torch.uint8)):
        with pytest.raises(TypeError, match="mask must be bool, or 0 and 1 in a floating dtype, got torch"):
            module(student, teacher, wrong)
    with pytest.raises(ValueError, match="mask must not require grad"):
        module(student, teacher, torch.ones(shape, requires_grad=True))
    with pytest.raises(TypeError, match="mask must be a tensor, got list"):
        module(student, teacher, [1])


def test_refused_parameters_and_seeds():
    student, _ = student_and_teacher()
    weight, bias = torch.zeros(12, 12, 3, 3), torch.zeros(12)
    align = {"align_weight": torch.zeros(12, 8, 1, 1), "align_bias": bias}

    def call(*parameters, **options):
        return kdops.masked_generation(student, *parameters, **options)

    assert call(weight, bias, weight, bias, **align).shape == (2, 12, 5, 7)
    with pytest.raises(ValueError, match="student must have the parameters' 12 channels, got 8"):
        call(weight, bias, weight, bias)
    with pytest.raises(ValueError, match="align_weight and align_bias must be given together"):
        call(weight, bias, weight, bias, align_bias=bias)
    with pytest.raises(ValueError, match=r"weight2 must have shape \(12, 12, 3, 3\), got \(12, 12, 1, 1\)"):
        call(weight, bias, weight[..., :1, :1], bias, **align)
    with pytest.raises(TypeError, match="bias1 must be a tensor, got NoneType"):
        call(weight, None, weight, bias, **align)
    for seed in (7, torch.tensor(7.0), torch.tensor([7, 8])):
        with pytest.raises(TypeError, match="seed must be an int64 tensor with one value, got"):
            call(weight, bias, weight, bias, seed=seed, **align)
    with pytest.raises(TypeError, match="mgd_loss: generated must be a tensor, got list"):
        kdops.mgd_loss([student], [student])
    with pytest.raises(ValueError, match=r"must have the same shape, got \(2, 8, 5, 7\) and \(2, 6, 5, 7\)"):
        kdops.mgd_loss(student, student[:, :6])


WIDTHS = pytest.mark.parametrize("widths", [(12, 12), (24, 32)])


@WIDTHS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_kept_graph_gives_every_backward_its_gradient(widths, dtype):
    step = MGDCase(*widths, (2, 9, 8), dtype=dtype, explicit=True).step()
    inputs = [step.student, *step.module.parameters()]
    expected = step.run(1024.0)[1:]
    loss = step.module(step.student, step.teacher, step.mask)
    for weight in (1024.0, 0.0, 512.0):
        scaled = torch.autograd.grad(loss, inputs, torch.tensor(weight), retain_graph=True)
        for g, e in zip(scaled, expected):
            assert relative_error(g.double() * 1024, e.double() * weight) <= (1e-6 if dtype == torch.float32 else 2e-3)
    torch.autograd.grad(loss, inputs)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, inputs)


@WIDTHS
def test_gradients_accumulate(widths):
    step = MGDCase(*widths, (2, 9, 8), explicit=True).step()
    expected = step.run(1.0)[1:]
    for _ in range(2):
        step.module(step.student, step.teacher, step.mask).backward()
    for x, e in zip([step.student, *step.module.parameters()], expected):
        assert relative_error(x.grad, 2 * e) <= 1e-6


@WIDTHS
def test_saved_tensor_hooks_see_what_is_kept(widths):
    """Everything between forward and backward may be offloaded."""
    step = MGDCase(*widths, (2, 9, 8), explicit=True).step()
    expected = step.run()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.clone(), lambda x: x):
        got = step.run()
    for a, b in zip(got, expected):
        assert torch.equal(a, b)


def test_double_backward_is_refused_where_it_is_asked_for():
    step = MGDCase(24, 32, (2, 9, 8), explicit=True).step()
    generator = kdops.MaskedGeneration(24, 32)
    for name, value in (
        ("MGDLoss", step.module(step.student, step.teacher, step.mask)),
        ("masked_generation", generator(step.student, step.mask).square().sum()),
    ):
        (gradient,) = torch.autograd.grad(value, step.student, create_graph=True)
        with pytest.raises(RuntimeError, match=f"{name}: double backward is not supported by the fused kernels"):
            (value + gradient.square().sum()).backward()


def test_gradcheck():
    step = MGDCase(3, 4, (2, 4, 3), lambda_mgd=0.5, dtype=torch.float64, explicit=True).step()
    inputs = (step.student, *step.module.parameters())

    def loss(student, *values):
        names = [name for name, _ in step.module.named_parameters()]
        arguments = (student, step.teacher, step.mask)
        return torch.func.functional_call(step.module, dict(zip(names, values)), arguments)

    assert torch.autograd.gradcheck(loss, inputs, nondet_tol=0.0)


@WIDTHS
def test_compiles_without_a_break(widths):
    step = MGDCase(*widths, (2, 9, 8), explicit=True).step()
    expected = step.run()
    inputs = [step.student, *step.module.parameters()]
    compiled = torch.compile(step.module, fullgraph=True)
    loss = compiled(step.student, step.teacher, step.mask)
    for a, b in zip([loss, *torch.autograd.grad(1.5 * loss, inputs)], expected):
        assert relative_error(a, b) <= 1e-5

    def drawn(seed):
        torch.manual_seed(seed)
        return compiled(step.student, step.teacher).detach()

    assert torch.equal(drawn(3), drawn(3)) and not torch.equal(drawn(3), drawn(4))


def test_operators_that_the_compiler_sees():
    generated, teacher = torch.randn(2, 3, 5, 7, requires_grad=True), torch.randn(2, 3, 5, 7)
    for save in (0, 1, 2, 3):
        torch.library.opcheck(torch.ops.kdops.mgd_loss.default, ([generated], [teacher], 2e-5, 0, save))
    torch.library.opcheck(torch.ops.kdops.mgd_mask.default, (torch.tensor(5), 2**31, [2, 1, 5, 7]))


def peak_bytes(run):
    """The most that PyTorch's CPU allocator held above its start."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    held, most = 0, 0
    for event in sorted(recorded.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("widths", [(64, 64), (48, 64), (72, 72), (48, 72)])
def test_peak_memory(widths, layout):
    """Above inputs and parameters (and their gradients) at most 60 % of what the eager chain takes."""
    case = MGDCase(*widths, (4, 40, 40), layout=layout, teacher_layout=layout)
    step = case.step()
    published = Published(*widths)
    published.load_state_dict(step.module.state_dict())
    if layout == "channels_last":
        published = published.to(memory_format=torch.channels_last)

    def eager():
        mask = torch.where(torch.rand(4, 1, 40, 40) > 0.35, 0, 1)
        generated = published(step.student, mask)
        (F.mse_loss(generated, step.teacher, reduction="sum") / 4 * 2e-5).backward()

    def fused():
        step.module(step.student, step.teacher).backward()

    gradients = sum(p.numel() * 4 for p in published.parameters())
    peaks = []
    for run in (eager, fused):
        run()
        step.student.grad = None
        published.zero_grad()
        step.module.zero_grad()
        peaks.append(peak_bytes(run) - gradients)
    a_map = step.teacher.numel() * 4
    assert peaks[0] > 3 * a_map
    assert peaks[1] <= 0.6 * peaks[0], f"{peaks[1] / a_map:.2f} maps, eager {peaks[0] / a_map:.2f}"
