"""MGD's mask: the generator's known answers, its statistics, and what reproduces it."""

import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import kdops
from kdops import _mask

#: Word 0 of Philox4x32-10 for a key and a counter, from the known answers that come with Random123. The mask's
#: counters end in two zeros, which the first of them has.
KNOWN_KEY, KNOWN_INDEX, KNOWN_WORD = 0, 0, 0x6627E8D5


def philox(key, index):
    """All of the generator once more, on Python integers."""
    words, keys = [index & 0xFFFFFFFF, index >> 32, 0, 0], [key & 0xFFFFFFFF, key >> 32]
    for _ in range(10):
        a, b = 0xD2511F53 * words[0], 0xCD9E8D57 * words[2]
        words = [(b >> 32) ^ words[1] ^ keys[0], b & 0xFFFFFFFF, (a >> 32) ^ words[3] ^ keys[1], a & 0xFFFFFFFF]
        keys = [(keys[0] + 0x9E3779B9) & 0xFFFFFFFF, (keys[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return words[0]


def by_kernel(seed, threshold, shape):
    return torch.ops.kdops.mgd_mask(seed, threshold, shape)


def test_known_answer():
    assert philox(KNOWN_KEY, KNOWN_INDEX) == KNOWN_WORD
    for draw in (_mask.draw_ref, by_kernel):
        below, above = (draw(torch.tensor(KNOWN_KEY), KNOWN_WORD + more, (1, 1, 1, 1)).item() for more in (0, 1))
        assert (below, above) == (False, True)


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1, 2**40 + 17, 2**63 - 2])
def test_kernel_and_definition_agree_in_every_bit(seed, device):
    shape, threshold = (3, 1, 13, 29), _mask.threshold(0.65)
    words = [philox(seed, i) for i in range(math.prod(shape))]
    expected = torch.tensor([w < threshold for w in words]).view(shape)
    assert 0 < expected.sum() < expected.numel()
    key = torch.tensor(seed, device=device)
    assert torch.equal(_mask.draw_ref(key, threshold, shape).cpu(), expected)
    assert torch.equal(by_kernel(key, threshold, shape).cpu(), expected)


@pytest.mark.parametrize("lambda_mgd", [0.15, 0.45, 0.65, 0.75])
def test_the_kept_fraction(lambda_mgd):
    """10^6 draws, within 4 standard deviations of 1 - lambda."""
    keep = by_kernel(torch.tensor(2024), _mask.threshold(lambda_mgd), (10, 1, 250, 400)).double()
    assert abs(keep.mean() - (1 - lambda_mgd)) < 4 * math.sqrt(lambda_mgd * (1 - lambda_mgd) / keep.numel())


def test_nothing_and_everything():
    shape = (2, 1, 100, 100)
    assert by_kernel(torch.tensor(5), _mask.threshold(0.0), shape).all()
    assert not by_kernel(torch.tensor(5), _mask.threshold(1.0), shape).any()


def correlation(a, b):
    a, b = a.double().flatten(), b.double().flatten()
    a, b = a - a.mean(), b - b.mean()
    return float((a * b).mean() / (a.square().mean() * b.square().mean()).sqrt())


@pytest.mark.parametrize("lambda_mgd", [0.45, 0.65])
def test_independent_over_images_positions_and_steps(lambda_mgd):
    """The correlation of n independent pairs has the standard deviation 1/sqrt(n)."""
    torch.manual_seed(11)
    threshold, shape = _mask.threshold(lambda_mgd), (16, 1, 200, 200)
    steps = [by_kernel(_mask.draw_seed(torch.device("cpu")), threshold, shape) for _ in range(3)]
    keep = steps[0]
    pairs = {
        "step": (keep, steps[1]),
        "two steps": (keep, steps[2]),
        "image": (keep[1:], keep[:-1]),
        "row": (keep[:, :, 1:], keep[:, :, :-1]),
        "column": (keep[..., 1:], keep[..., :-1]),
        "diagonal": (keep[:, :, 1:, 1:], keep[:, :, :-1, :-1]),
    }
    for name, (a, b) in pairs.items():
        assert abs(correlation(a, b)) < 4 / math.sqrt(a.numel()), name


def test_neighbouring_seeds_are_independent():
    masks = [by_kernel(torch.tensor(seed), _mask.threshold(0.65), (1, 1, 1000, 1000)) for seed in (6, 7)]
    assert abs(correlation(*masks)) < 4 / 1000


@pytest.fixture
def step(device):
    torch.manual_seed(0)
    module = kdops.MGDLoss(24, 32, backend="fused").to(device)
    return (
        module,
        torch.randn(2, 24, 9, 11, device=device, requires_grad=True),
        torch.randn(2, 32, 9, 11, device=device),
    )


def outcome(module, student, loss):
    return [loss.detach(), *torch.autograd.grad(loss, [student, *module.parameters()])]


def test_manual_seed_and_generator_reproduce_it(step):
    module, student, teacher = step

    def seeded(seed):
        torch.manual_seed(seed)
        return outcome(module, student, module(student, teacher))

    def generated(seed):
        generator = torch.Generator(student.device).manual_seed(seed)
        return outcome(module, student, module(student, teacher, generator=generator))

    for run in (seeded, generated):
        first, again, other = run(4), run(4), run(5)
        assert all(torch.equal(a, b) for a, b in zip(first, again))
        assert not any(torch.equal(a, b) for a, b in zip(first[1:3], other[1:3]))
    torch.manual_seed(4)
    draws = [module(student, teacher) for _ in range(3)]
    assert len({float(x.detach()) for x in draws}) == 3


def test_a_generator_leaves_the_default_one_alone(step):
    module, student, teacher = step
    torch.manual_seed(4)
    expected = module(student, teacher)
    torch.manual_seed(4)
    module(student, teacher, generator=torch.Generator(student.device).manual_seed(1))
    assert torch.equal(module(student, teacher), expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_recomputes_with_the_same_mask(step, reentrant):
    module, student, teacher = step

    def run(call):
        student.grad = None
        module.zero_grad()
        torch.manual_seed(9)
        loss = call()
        torch.rand(3, device=student.device)  # what else happens before the backward
        loss.backward()
        return [loss.detach(), student.grad, *(p.grad for p in module.parameters())]

    plain = run(lambda: module(student, teacher))
    again = run(lambda: checkpoint(module, student, teacher, use_reentrant=reentrant))
    for a, b in zip(plain, again):
        assert torch.equal(a, b)


def test_a_seed_stands_for_its_mask(step):
    module, student, _ = step
    p = module.parameters_of_chain()
    align = {"align_weight": p.align_weight, "align_bias": p.align_bias}
    for on_channel in (False, True):
        shape = _mask.shape_of(student, on_channel, 32)
        seed = torch.tensor(77, device=student.device)
        keep = _mask.draw_ref(seed, _mask.threshold(0.65), shape)
        options = {"mask_on_channel": on_channel, **align}
        by_seed = kdops.masked_generation(student, *p[:4], seed=seed, **options)
        by_mask = kdops.masked_generation(student, *p[:4], mask=keep, **options)
        eager = kdops.masked_generation(student, *p[:4], seed=seed, backend="reference", **options)
        assert torch.equal(by_seed, by_mask)
        torch.testing.assert_close(by_seed, eager, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
def test_a_cuda_graph_draws_a_new_mask_at_every_replay():
    torch.manual_seed(0)
    module = kdops.MGDLoss(32, 32).cuda()
    student, teacher = torch.randn(2, 2, 32, 16, 16, device="cuda")
    with torch.no_grad():
        module(student, teacher)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss = module(student, teacher)
        values = set()
        for _ in range(4):
            graph.replay()
            values.add(float(loss))
    assert len(values) == 4
