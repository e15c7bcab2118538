"""The order of teachers: the cost against a plain regression, the greedy sequence, the table and the plot."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from distill_networks import Detector, images, maps_of
from torch import Tensor, nn

from kdops.distill import order_teachers


def _networks() -> tuple[Detector, dict[str, nn.Module]]:
    torch.manual_seed(0)
    return Detector(6), {"small": Detector(8), "large": Detector(12)}


def _regression(x: Tensor, y: Tensor, ridge: float) -> float:
    """Ridge regression from all rows at once, by stacking the penalty under the data."""
    x, y = (v.double().movedim(1, -1).flatten(0, 2) for v in (x, y))
    x, y = x - x.mean(0), y - y.mean(0)
    penalty = ridge * x.square().sum() / x.shape[1]
    rows = torch.cat([x, penalty.sqrt() * torch.eye(x.shape[1], dtype=x.dtype)])
    w = torch.linalg.lstsq(rows, torch.cat([y, y.new_zeros(x.shape[1], y.shape[1])])).solution
    return ((y - x @ w).square().sum() / y.square().sum()).item()


@pytest.mark.parametrize("ridge", [1e-4, 0.3])
def test_costs_equal_a_plain_regression_over_all_rows(ridge, capsys):
    student, teachers = _networks()
    batches = [images(n, seed=n) + 30.0 for n in (2, 3, 4)]
    result = order_teachers(student, teachers, batches, layers=["neck.out.0", "stage"], ridge=ridge)
    networks = {"student": student, **teachers}
    with torch.no_grad():
        maps = {
            name: [torch.cat(level) for level in zip(*(maps_of(n.eval(), ("neck.out.0", "stage"), b) for b in batches))]
            for name, n in networks.items()
        }
    for a in networks:
        for b in teachers:
            wanted = 0.0 if a == b else sum(_regression(x, y, ridge) for x, y in zip(maps[a], maps[b])) / 2
            assert result.cost(a, b) == pytest.approx(wanted, rel=1e-6, abs=1e-9)
    assert 0 < result.cost("student", "large") < 1
    printed = capsys.readouterr().out
    assert f"{result.cost('student', 'small'):.4f}" in printed and "order: student -> " in printed


def test_maps_of_different_sizes_are_resized_to_the_target():
    student, teachers = _networks()
    layers = {"student": ["stage"], "small": ["neck.out.0"], "large": ["neck.out.0"]}
    result = order_teachers(student, teachers, [images()], layers=layers)
    with torch.no_grad():
        (s,), (t,) = (
            maps_of(student.eval(), ("stage",), images()),
            maps_of(teachers["large"].eval(), ("neck.out.0",), images()),
        )
    resized = F.interpolate(s, size=t.shape[2:], mode="bilinear", align_corners=False)
    assert s.shape[2:] != t.shape[2:]
    assert result.cost("student", "large") == pytest.approx(_regression(resized, t, 1e-4), rel=1e-6)


class _Features(nn.Module):
    """Gives chosen channels of a fixed feature map, which makes the costs known in advance."""

    def __init__(self, channels: list[int]) -> None:
        super().__init__()
        self.channels = channels
        self.layer = nn.Identity()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x[:, self.channels] * self.weight)


def test_sequence_is_built_backwards_and_ends_at_the_student():
    noise = torch.randn(8, 6, 10, 10, generator=torch.Generator().manual_seed(0))
    student = _Features([0])
    teachers = {
        "far": _Features([5]),
        "middle": _Features([0, 1, 2]),
        "low": _Features([0, 1]),
        "top": _Features([0, 1, 2, 3]),
    }
    result = order_teachers(student, teachers, [noise], layers=["layer"], ridge=1e-9)
    assert result.order == ("low", "middle", "top")
    assert result.cost("middle", "top") == pytest.approx(0.25, abs=0.05)
    assert result.cost("student", "top") == pytest.approx(0.75, abs=0.05)
    assert result.cost("far", "top") == pytest.approx(1.0, abs=0.05)
    assert result.cost("top", "low") == pytest.approx(0.0, abs=1e-6)
    # A network that is a linear map of the head costs nothing, so the larger one comes first here.
    assert order_teachers(student, teachers, [noise], layers=["layer"], strongest="middle").order[-2:] == (
        "top",
        "middle",
    )


def test_networks_are_left_as_they_were_and_run_no_deeper_than_tapped():
    student, teachers = _networks()
    student.stem[1].eval()
    before = {k: v.clone() for k, v in student.state_dict().items()}
    heads = []
    student.head.register_forward_hook(lambda *_: heads.append(torch.is_grad_enabled()))
    order_teachers(student, teachers, [images(), images()], layers=["stage"], run=lambda net, batch: net(batch * 2))
    assert heads == [False, False], "the head's two runs of the first batch"
    assert student.training and not student.stem[1].training and teachers["large"].training
    assert all(torch.equal(v, before[k]) for k, v in student.state_dict().items())
    assert all(p.requires_grad for p in teachers["large"].parameters())
    assert not student.stage._forward_hooks


def test_plot_is_an_image_and_replaces_an_old_one(tmp_path):
    student, teachers = _networks()
    path = tmp_path / "report" / "order.png"
    for _ in range(2):
        order_teachers(student, teachers, [images()], layers=["stage"], plot=path)
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and path.stat().st_size > 10_000
    assert [p.name for p in path.parent.iterdir()] == ["order.png"]


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"teachers": [nn.Identity()]}, TypeError, "teachers must be a mapping of names to modules, got list"),
        ({"teachers": {}}, ValueError, r"teachers must have names other than 'student', got \[\]"),
        ({"batches": []}, ValueError, "batches must hold at least one batch, got none"),
        ({"layers": {"student": ["stage"]}}, ValueError, r"got none for \['small', 'large'\]"),
        (
            {"layers": {"student": ["stage"], "small": ["stage", "stem"], "large": ["stage"]}},
            ValueError,
            "equally many",
        ),
        ({"layers": ["stag"]}, ValueError, "order_teachers: 'student' has no layer 'stag'; did you mean 'stage'"),
        ({"layers": ["head"]}, RuntimeError, "order_teachers: 'student' layer 'head' ran 2 times"),
        ({"strongest": "huge"}, ValueError, r"strongest must be one of \['small', 'large'\], got 'huge'"),
        ({"ridge": 0.0}, ValueError, "ridge must be greater than 0, got 0.0"),
        ({"batches": [images() * float("nan")]}, ValueError, "costs must be finite"),
    ],
)
def test_order_teachers_refuses(change, error, text):
    student, teachers = _networks()
    arguments = {"teachers": teachers, "batches": [images()], "layers": ["stage"], **change}
    with pytest.raises(error, match=text):
        order_teachers(student, arguments.pop("teachers"), arguments.pop("batches"), **arguments)
