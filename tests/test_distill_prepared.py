"""A prepared teacher gives the maps of the given one, folds what may be folded, and leaves the given one alone."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from distill_networks import teacher_maps
from teacher_networks import Branching, OwnBatchNorm, Residual, SharedConvolution, Student, Teacher, block, settle
from torch import Tensor, nn

from kdops import PKDLoss
from kdops.distill import Distiller, Tap, TeacherOptions

FOLD = TeacherOptions(compile=False)


def prepared(teacher: nn.Module, layers: list[str], options: TeacherOptions = FOLD, size: int = 12) -> Distiller:
    """A Distiller whose teacher has been prepared on a first batch."""
    student = Student()
    taps = [Tap("layer", layer, loss=PKDLoss(), name=layer) for layer in layers]
    return Distiller(student, teacher, taps, teacher_options=options).build(images(size))


def images(size: int = 12, seed: int = 3) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(seed))


def maps_of(distiller: Distiller, x: Tensor) -> list[Tensor]:
    """The tapped maps of the prepared teacher, as the losses get them."""
    return list(distiller._teach(x.device, (x,), {}).values())


def check_maps(distiller: Distiller, teacher: nn.Module, layers: list[str], tolerance: float = 1e-5) -> None:
    """Against the given teacher's maps, on another batch than the first."""
    x = images(seed=4)
    for name, found, expected in zip(layers, maps_of(distiller, x), teacher_maps(teacher, tuple(layers), x)):
        assert (found - expected).norm() <= tolerance * expected.norm(), name


@pytest.mark.parametrize(
    "middle, folded, reason",
    [
        (lambda: block(8, 8), ["middle.0"], None),
        (lambda: block(8, 8, groups=4), ["middle.0"], None),
        (lambda: block(8, 8, nn.BatchNorm2d(8, affine=False)), ["middle.0"], None),
        (lambda: block(8, 8, padding_mode="reflect"), ["middle.0"], None),
        (lambda: nn.Sequential(nn.ConvTranspose2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)), ["middle.0"], None),
        (
            lambda: nn.Sequential(nn.ConvTranspose2d(8, 8, 3, padding=1, groups=2), nn.BatchNorm2d(8)),
            [],
            "transposed convolution in groups",
        ),
        (lambda: block(8, 8, nn.BatchNorm2d(8, track_running_stats=False)), [], "statistics from the batch"),
        (lambda: block(8, 8, OwnBatchNorm(8)), [], "it is a OwnBatchNorm"),
        (lambda: block(8, 8, nn.SyncBatchNorm(8)), [], "it is a SyncBatchNorm"),
        (lambda: nn.Sequential(nn.ReLU(), nn.BatchNorm2d(8)), [], "does not follow one convolution"),
        (lambda: nn.Sequential(nn.Conv2d(8, 8, 1), nn.GroupNorm(2, 8)), [], None),
        (lambda: Residual(8), ["middle.conv2"], "the output of 'middle.conv1' is read elsewhere too"),
    ],
    ids=lambda value: None,
)
def test_what_is_folded_and_what_is_left(middle, folded, reason):
    torch.manual_seed(0)
    teacher = settle(Teacher(middle()))
    distiller = prepared(teacher, ["stem", "out"])
    report = distiller.teacher_report
    assert report.folded == ["stem.0", *folded]
    assert len(report.left) == (reason is not None)
    assert all(reason in text for text in report.left.values())
    assert max(report.differences.values()) < 1e-5
    check_maps(distiller, teacher, ["stem", "out"])


def test_convolutions_that_are_used_twice():
    torch.manual_seed(0)
    teacher = settle(Teacher(SharedConvolution(8)))
    distiller = prepared(teacher, ["out"])
    report = distiller.teacher_report
    assert report.folded == ["stem.0", "middle.pair.0"], "folded once, though it runs twice"
    assert set(report.left) == {"middle.bn_a", "middle.bn_b"}
    check_maps(distiller, teacher, ["out"])


def test_convolution_with_two_names_is_not_folded_into_two_batch_norms():
    torch.manual_seed(0)
    first, second = block(8, 8), block(8, 8)
    second[0] = first[0]
    teacher = settle(Teacher(nn.Sequential(first, second)))
    distiller = prepared(teacher, ["out"])
    assert distiller.teacher_report.folded == ["stem.0"]
    check_maps(distiller, teacher, ["out"])


def test_control_flow_is_left_and_traceable_parts_of_it_are_folded(caplog):
    torch.manual_seed(0)
    teacher = settle(Teacher(Branching(8)))
    with caplog.at_level(logging.WARNING, "kdops"):
        distiller = prepared(teacher, ["out"])
    assert distiller.teacher_report.folded == ["stem.0", "middle.block.0"]
    assert list(distiller.teacher_report.left) == ["middle.bn"]
    (message,) = [record.getMessage() for record in caplog.records]
    assert "'middle.bn'" in message and "Branching 'middle', which calls it, cannot be traced" in message
    caplog.clear()
    check_maps(distiller, teacher, ["out"])
    assert not caplog.records, "said once"


@pytest.mark.parametrize(
    "layer, folded",
    [
        ("stem.0", []),  # the convolution's own output
        ("stem.1", ["stem.0"]),
        ("stem", ["stem.0"]),
        ("head", []),  # a container that ends with the convolution
    ],
)
def test_taps_see_what_they_name(layer, folded):
    torch.manual_seed(0)
    if layer == "head":
        head = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
        teacher = nn.Sequential()
        teacher.add_module("head", head)
        teacher.add_module("norm", nn.BatchNorm2d(8))
    else:
        teacher = Teacher(nn.Identity())
        teacher.stem[2] = nn.ReLU()
    settle(teacher)
    distiller = prepared(teacher, [layer]) if layer != "head" else _unbuilt_head(teacher)
    assert distiller.teacher_report.folded == folded
    assert (len(distiller.teacher_report.left) == 1) == (not folded)
    check_maps(distiller, teacher, [layer])


def _unbuilt_head(teacher: nn.Module) -> Distiller:
    """The head shrinks the map, so that it fits no student; only the teacher is run."""
    distiller = Distiller(Student(), teacher, [Tap("layer", "head", loss=PKDLoss())], teacher_options=FOLD)
    maps_of(distiller, images())
    return distiller


def test_tap_before_an_inplace_activation_is_refused_as_without_options():
    torch.manual_seed(0)
    for options in (None, FOLD):
        with pytest.raises(RuntimeError, match="overwritten in place by a later layer"):
            prepared(settle(Teacher(nn.Identity())), ["stem.1"], options)


@pytest.mark.parametrize(
    "layer, reason",
    [
        ("middle.0", "a tap or a hook needs 'middle.0' as it is"),
        ("middle.1", "it has hooks"),
        ("middle", None),
    ],
)
def test_hooks_of_a_layer_keep_it(layer, reason):
    torch.manual_seed(0)
    teacher = settle(Teacher(block(8, 8)))
    seen = Seen()
    teacher.get_submodule(layer).register_forward_hook(seen.hook)
    distiller = prepared(teacher, ["out"])
    assert distiller.teacher_report.folded == ["stem.0"] + ["middle.0"] * (reason is None)
    assert list(distiller.teacher_report.left.values()) == [reason] * (reason is not None)
    assert seen.types == [Tensor] * 2, "its owner sees the copies run, and not their traces"
    maps_of(distiller, images())
    assert len(seen.types) == 3
    check_maps(distiller, teacher, ["out"])


class Seen:
    """Somebody's own hook."""

    def __init__(self) -> None:
        self.types: list[type] = []

    def hook(self, _module: nn.Module, _args: tuple, output: Tensor) -> None:
        self.types.append(type(output))


def _state(network: nn.Module) -> list:
    tensors = [*network.parameters(), *network.buffers()]
    return [
        [(id(t), t.data_ptr(), t.dtype, t.stride(), t._version, t.requires_grad, t.clone()) for t in tensors],
        [
            (id(m), m.training, list(m._forward_hooks), list(m._forward_pre_hooks), set(vars(m)))
            for m in network.modules()
        ],
    ]


@pytest.mark.parametrize("options", [FOLD, TeacherOptions(dtype=torch.bfloat16, compile=False)])
def test_given_teacher_is_not_touched(options):
    torch.manual_seed(0)
    teacher = settle(Teacher(block(8, 8))).train()
    teacher.middle.eval()
    before = _state(teacher)
    distiller = prepared(teacher, ["out"], options)
    maps_of(distiller, images())
    after = _state(teacher)
    assert after[1] == before[1]
    for old, new in zip(before[0], after[0]):
        assert old[:-1] == new[:-1] and torch.equal(old[-1], new[-1])
    assert distiller.teacher is not teacher
    assert not any(p.requires_grad for p in distiller.teacher.parameters())


def test_weights_that_stay_as_they_are_share_their_memory():
    torch.manual_seed(0)
    teacher = settle(Teacher(block(8, 8)))
    distiller = prepared(teacher, ["out"])
    twin = distiller.teacher
    assert twin.out.bias.data_ptr() == teacher.out.bias.data_ptr()
    own = [twin.stem[0].weight, twin.stem[0].bias, twin.middle[0].weight, twin.middle[0].bias]
    assert distiller.teacher_report.bytes == sum(t.untyped_storage().nbytes() for t in own) + _moved(twin, teacher)


def _moved(twin: nn.Module, teacher: nn.Module) -> int:
    """The last convolution's weights, where channels last is another order for them."""
    same = twin.out.weight.data_ptr() == teacher.out.weight.data_ptr()
    return 0 if same else twin.out.weight.untyped_storage().nbytes()


def test_channels_last_is_an_option():
    torch.manual_seed(0)
    teacher = settle(Teacher(block(8, 8)))
    for wanted in (True, False):
        twin = prepared(teacher, ["out"], TeacherOptions(channels_last=wanted, compile=False)).teacher
        assert twin.middle[0].weight.is_contiguous(memory_format=torch.channels_last) == wanted


def test_without_folding_nothing_is_traced_or_reported():
    torch.manual_seed(0)
    teacher = settle(Teacher(Branching(8)))
    report = prepared(teacher, ["out"], TeacherOptions(fold_batch_norm=False, compile=False)).teacher_report
    assert not report.folded and not report.left


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_holds_its_weights_in_it_and_gives_maps_in_the_students_dtype(dtype):
    torch.manual_seed(0)
    teacher = settle(Teacher(nn.Sequential(block(8, 8), nn.GroupNorm(2, 8))))
    distiller = prepared(teacher, ["out"], TeacherOptions(dtype=dtype, compile=False))
    twin = distiller.teacher
    assert twin.stem[0].weight.dtype == twin.out.weight.dtype == dtype
    assert twin.middle[1].weight.dtype == torch.float32
    (difference,) = distiller.teacher_report.differences.values()
    assert 1e-4 < difference < distiller.teacher_report.tolerance == {torch.bfloat16: 5e-2, torch.float16: 1e-2}[dtype]
    assert maps_of(distiller, images())[0].dtype == torch.float32
    check_maps(distiller, teacher, ["out"], 5e-2)


def test_autocast_around_the_step():
    torch.manual_seed(0)
    teacher = settle(Teacher(block(8, 8)))
    student = Student()
    for options in (FOLD, TeacherOptions(dtype=torch.bfloat16, compile=False)):
        distiller = Distiller(student, teacher, [Tap("layer", "out", loss=PKDLoss())], teacher_options=options)
        plain = Distiller(student, copy.deepcopy(teacher), [Tap("layer", "out", loss=PKDLoss())])
        for seed in range(2):
            with torch.autocast("cpu", torch.bfloat16):
                student(images(seed=seed))
            assert distiller.loss().total.item() == pytest.approx(plain.loss().total.item(), rel=2e-2)
        assert distiller.teacher_report.tolerance == 5e-2
        distiller.close()


class _InFloat32(nn.Module):
    """As a normalisation that autocast computes in float32."""

    def forward(self, x: Tensor) -> Tensor:
        return x.float()


def test_maps_in_float32_behind_layers_in_half_precision_are_not_refused():
    torch.manual_seed(0)
    student = Student()
    teacher = settle(Teacher(nn.Sequential(block(8, 8), _InFloat32())))
    distiller = Distiller(student, teacher, [Tap("layer", "middle", loss=PKDLoss())], teacher_options=FOLD)
    with torch.autocast("cpu", torch.bfloat16):
        student(images())
    assert distiller.loss().total > 0
    (difference,) = distiller.teacher_report.differences.values()
    assert 1e-4 < difference < 5e-2


def test_teacher_in_half_already():
    torch.manual_seed(0)
    teacher = settle(Teacher(block(8, 8))).to(torch.bfloat16)
    student = Student().to(torch.bfloat16)
    distiller = Distiller(student, teacher, [Tap("layer", "out", loss=PKDLoss())], teacher_options=FOLD)
    student(images().to(torch.bfloat16))
    assert distiller.loss().total > 0
    assert distiller.teacher_report.folded == ["stem.0", "middle.0"]
    assert distiller.teacher.stem[0].weight.dtype == torch.bfloat16
    other = TeacherOptions(dtype="float16", compile=False)
    distiller = Distiller(student, teacher, [Tap("layer", "out", loss=PKDLoss())], teacher_options=other)
    student(images().to(torch.bfloat16))
    assert distiller.loss().total > 0
    assert distiller.teacher_report.left["out"] == "its weights are in torch.bfloat16"


class _Unlike(nn.Module):
    """Reads a convolution behind the back of the block that it belongs to."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.out = block(3, 8), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > -1e9:  # not to be traced
            x = self.block(x) + self.block[0](x)
        return self.out(x)


def test_maps_that_differ_are_refused_with_the_numbers_and_every_time():
    torch.manual_seed(0)
    student = Student()
    taps = [Tap("layer", "out", loss=PKDLoss())]
    distiller = Distiller(student, settle(_Unlike()), taps, teacher_options=FOLD)
    for _ in range(2):
        student(images())
        with pytest.raises(
            RuntimeError, match=r"by more than 1e-04 .* 'out': \d\.\d+e[-+]\d\d; .*fold_batch_norm=False"
        ):
            distiller.loss()
    assert distiller.teacher_report is None
    tight = TeacherOptions(dtype=torch.bfloat16, compile=False, tolerance=1e-4)
    distiller = Distiller(student, settle(Teacher(nn.Identity())), taps, teacher_options=tight)
    student(images())
    with pytest.raises(RuntimeError, match="by more than 1e-04"):
        distiller.loss()


def test_maps_that_are_not_finite_are_refused():
    teacher = settle(Teacher(nn.Identity()))
    teacher.out.weight.data.fill_(1e6)  # beyond what float16 holds
    with pytest.raises(RuntimeError, match="'out': (nan|inf)"):
        prepared(teacher, ["out"], TeacherOptions(dtype=torch.float16, compile=False))


def test_teacher_that_goes_on_changing_is_refused():
    torch.manual_seed(0)
    teacher = settle(Teacher(nn.Identity()))
    student = Student()
    distiller = Distiller(student, teacher, [Tap("layer", "out", loss=PKDLoss())], teacher_options=FOLD)
    teacher.load_state_dict(settle(Teacher(nn.Identity()), seed=1).state_dict())  # before the first batch it may
    student(images())
    distiller.loss()
    check_maps(distiller, teacher, ["out"])
    teacher.out.bias.data.mul_(1.0)
    with torch.no_grad():
        teacher.out.weight.mul_(0.9)
    student(images())
    with pytest.raises(RuntimeError, match="weights were changed after it was prepared"):
        distiller.loss()


@pytest.mark.parametrize(
    "kwargs, error, text",
    [
        ({"dtype": torch.float32}, ValueError, "dtype must be None, bfloat16 or float16, got torch.float32"),
        ({"dtype": "int8"}, ValueError, "got 'int8'"),
        ({"channels_last": 1}, TypeError, "channels_last must be True or False, got 1"),
        ({"fold_batch_norm": None}, TypeError, "fold_batch_norm must be True or False, got None"),
        ({"compile": "yes"}, ValueError, "compile must be True, False or \"auto\", got 'yes'"),
        ({"tolerance": 0.0}, ValueError, "tolerance must be greater than 0, got 0.0"),
        ({"tolerance": "1"}, TypeError, "tolerance must be None or a number, got '1'"),
    ],
)
def test_options_are_checked(kwargs, error, text):
    with pytest.raises(error, match=text):
        TeacherOptions(**kwargs)


def test_options_of_the_wrong_type_and_unknown_layers_are_refused_at_once():
    with pytest.raises(TypeError, match="teacher_options must be TeacherOptions, got dict"):
        prepared(settle(Teacher(nn.Identity())), ["out"], {"dtype": None})
    with pytest.raises(ValueError, match="teacher has no layer 'outt'; did you mean 'out'"):
        prepared(settle(Teacher(nn.Identity())), ["outt"])
    assert TeacherOptions(dtype="bfloat16") == TeacherOptions(dtype=torch.bfloat16)


def test_teacher_that_cannot_be_copied_runs_as_it_is_and_says_so(caplog):
    torch.manual_seed(0)
    teacher = settle(Teacher(nn.Identity()))
    teacher.lock = (i for i in ())  # copy.deepcopy does not take a generator
    with caplog.at_level(logging.WARNING, "kdops"):
        distiller = prepared(teacher, ["out"])
    assert distiller.teacher is teacher
    assert "not prepared, as it cannot be copied" in caplog.text
