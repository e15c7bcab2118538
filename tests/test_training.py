"""Autocast, GradScaler, deterministic mode and data-parallel training."""

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn

import kdops
from kdops.testing import relative_error


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype, device):
    """Maps that a convolution leaves in half precision are taken as they are; the loss is fp32."""
    torch.manual_seed(0)
    student = nn.Conv2d(3, 16, 3, padding=1).to(device)
    image, teacher = torch.randn(2, 3, 12, 12, device=device), torch.randn(2, 16, 12, 12, device=device)
    with torch.autocast(device, dtype):
        features = student(image)
        assert features.dtype == dtype
        loss = kdops.cwd_loss(features, teacher, norm="batch") + kdops.pkd_loss(features, teacher.to(dtype))
    assert loss.dtype == torch.float32
    scaler = torch.amp.GradScaler(device, init_scale=2.0**16)
    scaler.scale(loss).backward()
    got = student.weight.grad.clone() / 2.0**16
    with torch.autocast(device, dtype):
        wide = student(image).detach().double().requires_grad_()
    exact = kdops.cwd_loss(wide, teacher.double(), norm="batch", backend="reference")
    exact = exact + kdops.pkd_loss(wide, teacher.to(dtype).double(), backend="reference")
    (upstream,) = torch.autograd.grad(exact, wide)
    (expected,) = torch.autograd.grad(student.double()(image.double()), student.weight, upstream)
    assert relative_error(loss, exact) < 5e-6
    assert relative_error(got, expected) < 2e-2


def test_fp16_gradients_do_not_underflow():
    """Entries near 2e-8 are below fp16; with a GradScaler's factor they must arrive."""
    torch.manual_seed(0)
    shape = (4, 64, 40, 40)
    student, teacher = torch.randn(shape).half().requires_grad_(), torch.randn(shape).half()
    (got,) = torch.autograd.grad(kdops.cwd_loss(student, teacher) * 65536.0, student)
    wide = student.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(kdops.cwd_loss(wide, teacher.double(), backend="reference") * 65536.0, wide)
    assert (got == 0).float().mean() < 1e-3
    assert relative_error(got, expected) < 1e-3


def test_deterministic_algorithms(device):
    torch.use_deterministic_algorithms(True)
    try:
        student = torch.randn(2, 8, 9, 9, device=device, requires_grad=True)
        teacher = torch.randn(2, 8, 9, 9, device=device)
        (kdops.cwd_loss(student, teacher, norm="pkd") + kdops.pkd_loss(student, teacher)).backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert student.grad.isfinite().all() and student.grad.any()


class Student(nn.Module):
    """A wrapper module as DDP wants it: the forward returns the losses."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Conv2d(3, 8, 3, padding=1)
        self.align = nn.Conv2d(8, 12, 1)

    def forward(self, image, teacher):
        return kdops.cwd_loss(self.align(self.backbone(image).relu()), teacher, tau=2.0, loss_weight=3.0)


def batches():
    generator = torch.Generator().manual_seed(2)
    return [
        (torch.randn(4, 3, 8, 8, generator=generator), torch.randn(4, 12, 8, 8, generator=generator)) for _ in range(3)
    ]


def train(model, rank=0, ranks=1):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    for image, teacher in batches():
        mine = slice(rank * 4 // ranks, (rank + 1) * 4 // ranks)
        optimizer.zero_grad()
        model(image[mine], teacher[mine]).backward()
        optimizer.step()


def data_parallel(rank, ranks, store, out):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    model = nn.parallel.DistributedDataParallel(Student())
    train(model, rank, ranks)
    if rank == 0:
        torch.save(model.module.state_dict(), out)
    torch.distributed.destroy_process_group()


def test_data_parallel(tmp_path):
    """Two processes with half a batch each end where one with the whole batch does."""
    mp.spawn(data_parallel, (2, str(tmp_path / "store"), str(tmp_path / "out.pt")), nprocs=2)
    alone = Student()
    before = {k: v.clone() for k, v in alone.state_dict().items()}
    train(alone)
    for key, value in torch.load(tmp_path / "out.pt").items():
        assert relative_error(value, alone.state_dict()[key]) < 1e-5
        assert not torch.equal(value, before[key])


STEPS = {
    "cwd": lambda s, t: kdops.cwd_loss(s, t),
    "cwd batch": lambda s, t: kdops.cwd_loss(s, t, norm="batch"),
    "pkd": lambda s, t: kdops.pkd_loss(s, t),
    "mgd": lambda s, t: kdops.mgd_loss(s, t),
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", STEPS)
def test_side_stream(name):
    """Launches go to the current stream, not the default one: what they read is written there, late, on the device."""
    late = torch.randn(2, 8, 64, 80, 80, device="cuda")
    early = torch.zeros_like(late)
    expected = STEPS[name](*late)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    for _ in range(5):
        early.zero_()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)
            early.copy_(late)
            value = STEPS[name](*early)
        stream.synchronize()
        assert relative_error(value, expected) < 1e-6


@pytest.mark.gpu
@pytest.mark.parametrize("name", STEPS)
def test_cuda_graph(name):
    """Captured once, replayed on new values, forward and backward."""
    student = torch.randn(2, 32, 20, 20, device="cuda", requires_grad=True)
    teacher = torch.randn(2, 32, 20, 20, device="cuda")

    def step():
        value = STEPS[name](student, teacher)
        return value, torch.autograd.grad(value, student)[0]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value, gradient = step()
    with torch.no_grad():
        student.normal_(), teacher.normal_()
    graph.replay()
    expected, expected_gradient = step()
    assert relative_error(value, expected) < 1e-6
    assert relative_error(gradient, expected_gradient) < 1e-6
