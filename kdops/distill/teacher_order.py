"""In which order to learn from several teachers: adaptation costs between frozen networks.

Progressive distillation (MTPD, Cao et al. 2023) orders its teachers by what it costs to adapt one network's features
to another's with a linear map. No code for it was published; the definition here is this project's own and makes no
claim to give the paper's numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from kdops.distill._capture import captured_once
from kdops.distill.taps import Place
from kdops.files import write_atomically

__all__ = ["TeacherOrder", "order_teachers"]

STUDENT = "student"


@dataclass(frozen=True)
class TeacherOrder:
    """The result of `order_teachers`.

    Attributes:
        order: names of the teachers to learn from, in their order; the last one is the strongest.
        names: names of the networks, the student first.
        costs: float64 Tensor[len(names), len(names) - 1]; ``costs[i, j]`` is the cost from network ``names[i]`` to
            teacher ``names[j + 1]``.
    """

    order: tuple[str, ...]
    names: tuple[str, ...]
    costs: Tensor

    def cost(self, source: str, target: str) -> float:
        """Return the cost from a network to a teacher."""
        return self.costs[self.names.index(source), self.names.index(target) - 1].item()

    def table(self) -> str:
        """Return the cost matrix and the order as text."""
        width = max(len(name) for name in self.names) + 2
        lines = ["from \\ to".ljust(width) + "".join(name.rjust(width) for name in self.names[1:])]
        for name, row in zip(self.names, self.costs.tolist()):
            lines.append(name.ljust(width) + "".join(f"{cost:.4f}".rjust(width) for cost in row))
        lines.append(f"order: {' -> '.join((STUDENT, *self.order))}")
        return "\n".join(lines)

    def plot(self, path: str | Path) -> Path:
        """Write the cost matrix as an image; it appears under its name when it is complete."""
        from matplotlib.figure import Figure

        path = Path(path)
        count = len(self.names)
        figure = Figure(figsize=(1.6 + 1.1 * count, 1.4 + 0.8 * count), layout="constrained")
        axes = figure.add_subplot()
        image = axes.imshow(self.costs.numpy(), cmap="viridis", vmin=0.0, vmax=max(self.costs.max().item(), 1e-9))
        axes.set_xticks(range(count - 1), self.names[1:], rotation=20, ha="right")
        axes.set_yticks(range(count), self.names)
        axes.set_xlabel("to the features of")
        axes.set_ylabel("from the features of")
        middle = image.norm.vmax / 2
        for row, costs in enumerate(self.costs.tolist()):
            for column, cost in enumerate(costs):
                axes.text(column, row, f"{cost:.3f}", ha="center", va="center", color="wk"[cost > middle])
        axes.set_title(" \N{RIGHTWARDS ARROW} ".join((STUDENT, *self.order)), fontsize=10)
        figure.colorbar(image, ax=axes, label="share of variance left by a linear map")
        image_format = path.suffix.lstrip(".") or "png"
        write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=150, format=image_format))
        return path


def order_teachers(
    student: nn.Module,
    teachers: Mapping[str, nn.Module],
    batches: Iterable[Any],
    *,
    layers: Sequence[str] | Mapping[str, Sequence[str]],
    strongest: str | None = None,
    run: Callable[[nn.Module, Any], Any] | None = None,
    ridge: float = 1e-4,
    plot: str | Path | None = None,
) -> TeacherOrder:
    r"""Order teachers for progressive distillation by the cost of adapting one network's features to another's.

    Let x and y be the feature vectors of networks A and B at the same position of the same image, A's maps resized to
    B's (bilinearly, align_corners=False) where their sizes differ, and Sxx, Sxy, Syy their centred second moments over
    all positions of all batches (one pass, float64). With the ridge regression (a 1x1 convolution with bias)

        W = (Sxx + lambda I)^-1 Sxy,    lambda = ridge * trace(Sxx) / channels(A)

    the cost from A to B on one level is the share of B's variance that W leaves,

        (trace(Syy) - 2 trace(W' Sxy) + trace(W' Sxx W)) / trace(Syy),

    0 where B's features are a linear map of A's and 1 where A's tell nothing of them, and the cost is its mean over
    the levels. The sequence is built backwards from the strongest teacher: of the teachers left and the student, the
    one with the lowest cost to the present head of the sequence is put before it, until that is the student.

    All networks run in eval mode without gradients, only as deep as they are tapped (in the first batch to the end),
    and are left as they were.

    Args:
        student: the network to be trained, in the state in which it starts.
        teachers: the trained networks by name.
        batches: an iterable of batches on the networks' device; gone through once.
        layers: names of the layers whose maps are compared, one per level, for all networks alike or by network's
            name (``"student"`` and the teachers'). Written as in `kdops.Tap`.
        strongest: name of the teacher at the end of the sequence; by default the last of ``teachers``.
        run: ``run(network, batch)`` runs a network; by default ``network(batch)``.
        ridge: regularisation, relative to the mean variance of a channel.
        plot: file to which the cost matrix is drawn (needs matplotlib).

    Returns:
        TeacherOrder: the order and the matrix of costs. The matrix is also printed.

    Raises:
        TypeError: teachers is no mapping of names to modules.
        ValueError: no teacher or batch, an unknown name or layer, numbers of layers that differ, costs that are not
            finite. RuntimeError: a layer did not run, or ran twice.
    """
    networks = _networks(student, teachers)
    places = _places(layers, tuple(networks))
    strongest = tuple(teachers)[-1] if strongest is None else strongest
    if strongest not in teachers:
        raise ValueError(f"order_teachers: strongest must be one of {list(teachers)}, got {strongest!r}")
    if not ridge > 0:
        raise ValueError(f"order_teachers: ridge must be greater than 0, got {ridge}")
    names = tuple(networks)
    levels = range(len(places[STUDENT]))
    moments = {(a, b, level): _Moments() for a in names for b in names[1:] for level in levels if a != b}
    count = 0
    for batch in tqdm(batches, desc="teacher order", unit="batch"):
        maps = {
            name: _maps(name, network, places[name], batch, run, whole=count == 0) for name, network in networks.items()
        }
        for (a, b, level), moment in moments.items():
            moment.add(maps[a][level], maps[b][level])
        count += 1
    if not count:
        raise ValueError("order_teachers: batches must hold at least one batch, got none")
    costs = torch.zeros(len(names), len(names) - 1, dtype=torch.float64)
    for (a, b, _), moment in moments.items():
        costs[names.index(a), names.index(b) - 1] += moment.cost(ridge) / len(levels)
    if not costs.isfinite().all():
        raise ValueError(f"order_teachers: costs must be finite, got {costs.tolist()}: a network's maps are not")
    result = TeacherOrder(_backwards(strongest, names, costs), names, costs)
    print(result.table())
    if plot is not None:
        result.plot(plot)
    return result


class _Moments:
    """Centred second moments of the vectors (x, y), batch by batch, merged by Chan's formula in float64."""

    def __init__(self) -> None:
        self.count = 0
        self.width = 0
        self.mean: Tensor | None = None
        self.square: Tensor | None = None

    def add(self, source: Tensor, target: Tensor) -> None:
        if source.shape[2:] != target.shape[2:]:
            source = F.interpolate(source.float(), size=target.shape[2:], mode="bilinear", align_corners=False)
        self.width = source.shape[1]
        both = torch.cat([x.double().movedim(1, -1).flatten(0, 2) for x in (source, target)], dim=1)
        count, mean = both.shape[0], both.mean(0)
        both -= mean
        square = both.T @ both
        if self.mean is None:
            self.count, self.mean, self.square = count, mean, square
            return
        total, shift = self.count + count, mean - self.mean
        self.square += square + torch.outer(shift, shift) * (self.count * count / total)
        self.mean += shift * (count / total)
        self.count = total

    def cost(self, ridge: float) -> float:
        k = self.width
        xx, xy = self.square[:k, :k], self.square[:k, k:]
        left = total = self.square.diagonal()[k:].sum()
        if total == 0:
            return 0.0
        scale = xx.diagonal().mean()
        if scale > 0:
            w = torch.linalg.solve(xx + ridge * scale * torch.eye(k, dtype=xx.dtype, device=xx.device), xy)
            left = total - 2 * (w * xy).sum() + (w * (xx @ w)).sum()
        return (left / total).clamp(min=0.0).item()


def _maps(name: str, network: nn.Module, places: Sequence[Place], batch: Any, run: Any, whole: bool) -> list[Tensor]:
    call = (lambda net: net(batch)) if run is None else (lambda net: run(net, batch))
    maps = captured_once(f"order_teachers: '{name}'", network, places, call, whole)
    return [maps[place] for place in places]


def _backwards(strongest: str, names: tuple[str, ...], costs: Tensor) -> tuple[str, ...]:
    order, left = [strongest], [name for name in names if name != strongest]
    while True:
        column = costs[:, names.index(order[0]) - 1]
        cheapest = min(left, key=lambda name: column[names.index(name)].item())  # the student wins a tie: it is first
        if cheapest == STUDENT:
            return tuple(order)
        order.insert(0, cheapest)
        left.remove(cheapest)


def _networks(student: nn.Module, teachers: Any) -> dict[str, nn.Module]:
    if not isinstance(teachers, Mapping) or not all(isinstance(t, nn.Module) for t in teachers.values()):
        raise TypeError(
            f"order_teachers: teachers must be a mapping of names to modules, got {type(teachers).__name__}"
        )
    if not teachers or STUDENT in teachers:
        raise ValueError(f"order_teachers: teachers must have names other than '{STUDENT}', got {list(teachers)}")
    return {STUDENT: student, **teachers}


def _places(layers: Any, names: tuple[str, ...]) -> dict[str, list[Place]]:
    given = dict(layers) if isinstance(layers, Mapping) else dict.fromkeys(names, layers)
    missing = [name for name in names if name not in given]
    if missing:
        raise ValueError(f"order_teachers: layers must name those of every network, got none for {missing}")
    counts = {name: len(given[name]) for name in names}
    if len(set(counts.values())) != 1 or not counts[STUDENT]:
        raise ValueError(f"order_teachers: layers must be equally many for every network, got {counts}")
    return {name: [Place.parse(layer) for layer in given[name]] for name in names}
