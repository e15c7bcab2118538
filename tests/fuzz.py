"""Random calls for a given time: python tests/fuzz.py --seconds 600 --seed 1, or make fuzz SECONDS=600.

--backend triton90 and others run the kernels for a GPU instead of the CPU's: see backends.py. Every miss becomes a line
of JSON in runs/fuzz, with its call, the simplest call found that misses likewise, and a command that repeats it. The
exit code is 1 if there was one.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shlex
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TextIO

import backends
import torch
from backends import Choice
from judge import Miss
from random_calls import LOSSES, Call, Level, Values, View, random_call
from tqdm import tqdm

_SIMPLIFICATIONS = 400  # calls that a miss may cost


def main(arguments: list[str] | None = None, backend: Choice | None = None) -> int:
    """The campaign; ``backend`` instead of the one that the arguments name."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--calls", type=int, default=10**9, help="most calls")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backend", choices=backends.NAMES, default="cpu", metavar="NAME", help=f"{backends.NAMES}")
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=LOSSES)
    parser.add_argument("--simplify", type=int, default=3, help="how many misses of a kind are made simple")
    parser.add_argument("--out", type=Path, default=Path("runs/fuzz"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeat", metavar="JSON", help="run this call alone")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    backend = backend or backends.choose(options.backend)
    if options.repeat:
        misses = backend.judge(Call.from_json(options.repeat))
        print("\n".join(map(str, misses)) or "no miss")
        return int(bool(misses))
    path = options.out / f"seed{options.seed}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lines:
        kinds, calls = campaign(options, lines, backend)
    for (loss, what), count in kinds.most_common():
        print(f"{count:6d} {loss}: {what}")
    print(f"{calls} calls, {sum(kinds.values())} missed" + (f"; see {path}" if kinds else ""))
    return int(bool(kinds))


def campaign(options: argparse.Namespace, lines: TextIO, backend: Choice) -> tuple[Counter, int]:
    """Calls until the time or their number is reached. Returns the misses of each kind, and the number of calls."""
    pick, kinds, calls = random.Random(options.seed).choice, Counter(), 0
    losses = [loss for loss in options.losses if loss in backend.losses]
    start = time.monotonic()
    form = "{l_bar}{bar}| {n:.0f}/{total:.0f} s{postfix}"
    with tqdm(total=options.seconds, unit="s", bar_format=form, mininterval=1) as bar:
        while (elapsed := time.monotonic() - start) < options.seconds and calls < options.calls:
            bar.update(min(elapsed, options.seconds) - bar.n)
            bar.set_postfix(calls=calls, missed=sum(kinds.values()), refresh=False)
            call, calls = random_call(pick, losses, backend.resize, backend.room), calls + 1
            misses = backend.judge(call)
            if not misses:
                continue
            kind = kind_of(call, misses[0])
            kinds[kind] += 1
            record = {"call": json.loads(call.json()), "misses": list(map(str, misses))}
            if kinds[kind] <= options.simplify:
                simple = simplest(call, kind, backend)
                misses = backend.judge(simple)
                record |= {"simple": json.loads(simple.json()), "simple_misses": list(map(str, misses))}
                bar.write(f"{call.loss}: {misses[0]}\n  {command(simple, options.backend)}")
            lines.write(json.dumps(record) + "\n")
            lines.flush()
    return kinds, calls


def command(call: Call, backend: str = "cpu") -> str:
    """The command that repeats a call."""
    return f"PYTHONPATH=. {sys.executable} tests/fuzz.py --backend {backend} --repeat {shlex.quote(call.json())}"


def kind_of(call: Call, miss: Miss) -> tuple[str, str]:
    return call.loss, re.sub(r"\d+", "#", miss.what)


def simplest(call: Call, kind: tuple[str, str], backend: Choice) -> Call:
    """A call with a miss of the same kind of which nothing can be left out; greedy, and limited in calls."""
    left, again = _SIMPLIFICATIONS, True
    while again:
        again = False
        for candidate in simpler(call):
            left -= 1
            if left < 0:
                return call
            if any(kind_of(candidate, m) == kind for m in backend.judge(candidate)):
                call, again = candidate, True
                break
    return call


def simpler(call: Call) -> Iterator[Call]:
    """Calls with one thing less, those that leave out most first."""
    for i in range(len(call.levels)):
        if len(call.levels) > 1:
            yield replace(call, levels=call.levels[:i] + call.levels[i + 1 :])
    for changed in ({"as_list": False}, {"twice": False}, {"weight": 1.0}):
        if any(getattr(call, k) != v for k, v in changed.items()):
            yield replace(call, **changed)
    if call.options.get("resize"):
        levels = tuple(replace(level, teacher_size=None) for level in call.levels)
        yield replace(call, levels=levels, options={**call.options, "resize": None})
    for name, plain in {"reduction": "mean", "eps": None, "loss_weight": 1.0, "tau": 1.0, "alpha_mgd": 1.0}.items():
        if call.options.get(name, plain) != plain:
            yield replace(call, options={**call.options, name: plain})
    if "student_channels" in call.options:
        yield replace(call, options={k: v for k, v in call.options.items() if k != "student_channels"})
    for name, plain in vars(Values()).items():
        if getattr(call.values, name) != plain:
            yield replace(call, values=replace(call.values, **{name: plain}))
    for i, level in enumerate(call.levels):
        for other in _simpler_levels(level, alone=not (call.options.get("norm") or call.options.get("resize"))):
            yield replace(call, levels=(*call.levels[:i], other, *call.levels[i + 1 :]))


def _simpler_levels(level: Level, alone: bool) -> Iterator[Level]:
    """alone: a channel may have one value, which is neither normalised nor resized."""
    for side in ("student", "teacher"):
        view = getattr(level, f"{side}_view")
        for changed in (View(), View(view.order), replace(view, step=View().step), replace(view, expanded=())):
            if changed != view:
                yield replace(level, **{f"{side}_view": changed})
        if getattr(level, f"{side}_dtype") != "float32":
            yield replace(level, **{f"{side}_dtype": "float32"})
    for d, n in enumerate(level.shape):
        for smaller in sorted({1, 2, 3, n // 2, n - 1} & set(range(1, n))):
            shape = (*level.shape[:d], smaller, *level.shape[d + 1 :])
            if alone or shape[0] * shape[2] * shape[3] > 1:
                yield replace(level, shape=shape)


if __name__ == "__main__":
    sys.exit(main())
