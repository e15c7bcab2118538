"""Every memory order of student and teacher, with sizes of 1 in every place: nothing but the map itself is read."""

import itertools

import pytest
import torch

from kdops import testing

ORDERS = list(itertools.permutations(range(4)))
SHAPES = [(3, 18, 7, 1), (3, 5, 1, 9), (2, 1, 6, 5), (1, 19, 4, 3), (3, 1, 17, 1), (5, 18, 1, 1), (2, 33, 2, 2)]
OPTIONS = {"cwd_loss": {"norm": "batch", "tau": 2.0}, "pkd_loss": {"norm": "pkd"}}


def dense(x, order):
    return x.permute(order).contiguous().permute([order.index(d) for d in range(4)])


def in_nan(x, order):
    """The same order, every element between others that are NaN."""
    spread = x.new_full([2 * x.shape[d] + 1 for d in order], torch.nan)[(slice(1, None, 2),) * 4]
    return spread.permute([order.index(d) for d in range(4)]).copy_(x)


def assert_right(loss, student, teacher):
    case = testing.Case(loss, OPTIONS[loss], (tuple(student.shape),))
    student = student.detach().requires_grad_()
    value = case.call(student, teacher)
    (expected,), (slope,) = case.oracle(student, teacher)
    assert testing.relative_error(value, expected) < testing.VALUE_BUDGET[torch.float32]
    (gradient,) = torch.autograd.grad(value, student)
    assert testing.relative_error(gradient, slope) < testing.GRADIENT_BUDGET[torch.float32]


@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
@pytest.mark.parametrize("loss", OPTIONS)
def test_all_pairs_of_orders(loss, shape, poisoned):
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
    for student_order, teacher_order in itertools.product(ORDERS, ORDERS):
        assert_right(loss, dense(student, student_order), dense(teacher, teacher_order))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("loss", OPTIONS)
def test_every_order_with_gaps(loss, shape, instruction_set, poisoned):
    generator = torch.Generator().manual_seed(1)
    student, teacher = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
    for order in ORDERS:
        assert_right(loss, in_nan(student, order), in_nan(teacher, order))
        assert_right(loss, in_nan(student, order), dense(teacher, ORDERS[0]))
        assert_right(loss, dense(student, order), in_nan(teacher, order))


@pytest.mark.parametrize("loss", OPTIONS)
def test_a_column_of_a_wider_map(loss, instruction_set, poisoned):
    generator = torch.Generator().manual_seed(2)
    maps = []
    for _ in range(2):
        around = torch.full((3, 5, 21, 6), torch.nan)
        around[..., 2] = torch.randn(3, 5, 21, generator=generator)
        maps.append(around[..., 2:3])
    assert_right(loss, *maps)
    assert_right(loss, maps[0], maps[1].contiguous())
    assert_right(loss, maps[0].contiguous(), maps[1])
