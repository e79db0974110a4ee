"""Simulate verdicts and intervals through the package's own functions, and write what they are worth.

    make simulate        # or: python tests/compare/simulate.py [EXPERIMENTS] [FOLDER]

Writes `simulations.json` and `simulations.md` into FOLDER (by default `docs`). An experiment draws the answers of all
methods on 100 prompts: a score is a prompt's level, which all policies share, plus noise of an answer; its standard
deviation is 1. Spreads between seeds are in standard errors of one run's mean gain.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_trl.compare.evidence import Judged, Trajectory
from rlhf_trl.compare.verdict import compare_groups, conclude
from rlhf_trl.stats.intervals import compare_runs, estimate_mean, estimate_rate

PROMPTS = 100
# Share of a score's variance that all policies share on a prompt.
SHARED = 0.6
NOBODY = Judged({}, {}, None, "there is no judge")
SURE = {"gold": None, "reward": None, "win_rate": None}
Points = Sequence[tuple[float, float]]  # KL and gain of each evaluated point, the final policy last


def rise(points: int, kl: float = 9.0, gain: float = 0.3) -> Points:
    """A gain that is linear in sqrt(KL)."""
    return [(kl * k / points, gain * math.sqrt(k / points)) for k in range(1, points + 1)]


@dataclass(frozen=True)
class Design:
    """Methods, each with its path; `spread` is between seeds, in standard errors of a run's mean."""

    name: str
    paths: tuple[Points, ...]
    seeds: int = 1
    spread: float = 0.0
    winners: tuple[str, ...] = ()
    """Who may be named, of a, b, c."""

    @property
    def alike(self) -> bool:
        """Whether the adapters themselves are equal: of one seed, a spread is a true difference of two adapters."""
        return self.spread == 0 or self.seeds > 1


@dataclass(frozen=True)
class Outcome:
    """Shares of the experiments."""

    winner: float
    """A winner who may not be named."""
    better: float
    """Any "better" or "scores higher" in one of the two questions; in power designs of the right one."""
    about_methods: float
    """Any claim about methods."""
    named: float
    """A winner who may be named."""


FLAT = [(k, 0.3) for k in (1.8, 3.6, 5.4, 7.2, 9.0)]
DESIGNS = [
    Design("9 + final against final alone", (rise(10), rise(1))),
    Design("9 + final against final alone, 3 seeds", (rise(10), rise(1)), 3),
    Design("4 + final against final alone", (rise(5), rise(1))),
    Design("both 4 + final, one flat, one rising", (FLAT, rise(5))),
    *(Design(f"two equal methods, {seeds} seeds, spread {spread}", (rise(5), rise(5)), seeds, spread)
      for seeds in (1, 3, 5) for spread in (0, 1, 3)),
    *(Design(f"three equal methods, {seeds} seeds, spread {spread}", (rise(5), rise(5), rise(5)), seeds, spread)
      for seeds in (1, 3) for spread in (0, 3)),
    Design("one went further on the same curve", (rise(5, 4.0, 0.2), rise(5))),
    Design("unequal numbers of checkpoints, 3 seeds, spread 1", (rise(5), rise(9)), 3, 1.0),
]  # fmt: skip
TRAPS = [
    Design("a collapses after its peak", ([(1, 0.3), (2, 0.6), (5, 0.0), (10, -1.0)],
                                          [(1, 0.1), (2, 0.15), (5, 0.2), (10, 0.3)]), winners=("b",)),
    Design("both below the reference", ([(1, -0.2), (10, -5.0)], [(1, -0.3), (10, -0.5)]), winners=("b",)),
    Design("b saturates further out", ([(1, 0.30)], [(1.45, 0.33)])),
]  # fmt: skip
POWER = [
    Design("a better by 0.3, 1 seed", (rise(5, gain=0.6), rise(5, gain=0.3)), 1, winners=("a",)),
    Design("a better by 0.3, 3 seeds, no spread", (rise(5, gain=0.6), rise(5, gain=0.3)), 3, winners=("a",)),
]


def draw(design: Design, generator: np.random.Generator) -> tuple[dict[str, list[str]], dict[str, Trajectory]]:
    """Draw the answers of every run at every point."""
    noise = math.sqrt(1 - SHARED)
    level = generator.normal(0, math.sqrt(SHARED), PROMPTS)
    reference = level + generator.normal(0, noise, PROMPTS)
    groups, trajectories = {}, {}
    for name, path in zip("abc", design.paths, strict=False):
        groups[name] = [f"{name}-{seed}" for seed in range(design.seeds)]
        for stage in groups[name]:
            shift = generator.normal(0, design.spread * math.sqrt(2) * noise / math.sqrt(PROMPTS))
            records = []
            for kl, gain in path:
                scores = level + gain + shift + generator.normal(0, noise, PROMPTS)
                kls = kl * generator.gamma(4.0, 0.25, PROMPTS)
                records.append([
                    {"id": str(i), "kl": kls[i], "gold": scores[i], "gold_gain": scores[i] - reference[i]}
                    for i in range(PROMPTS)
                ])  # fmt: skip
            trajectories[stage] = Trajectory([*range(1, len(path)), None], records)
    return groups, trajectories


def judge(design: Design, seed: int) -> tuple[bool, bool, bool, bool]:
    """Run one experiment: a false winner, any "better", any claim about methods, a winner who may be named."""
    groups, trajectories = draw(design, np.random.default_rng((seed, len(design.name))))
    pairs, _ = compare_groups(list(combinations(groups, 2)), groups, trajectories, NOBODY, {"gold": 0.1})
    verdict = conclude(list(groups), pairs, SURE)
    winner = verdict["winner"] if verdict else None
    measured = [pair["measures"]["gold"] for pair in pairs]
    wanted = {"better"} if design.winners == ("a",) else {"better", "worse"}
    claims = [found for found in measured
              if {found[question]["outcome"] for question in ("equal_kl", "as_trained")} & wanted]  # fmt: skip
    return (
        winner is not None and winner not in design.winners,
        bool(claims),
        any(found["unit"] == "methods" for found in claims),
        winner is not None and winner in design.winners,
    )


def simulate(design: Design, experiments: int) -> Outcome:
    found = np.mean([judge(design, seed) for seed in range(experiments)], axis=0)
    return Outcome(*(float(share) for share in found))


# --- coverage --------------------------------------------------------------------------------------------------------

SHAPES = {"normal": 0.0, "gamma": 0.7, "lognormal": math.exp(0.5), "t3": 0.0}


def cover_means(shape: str, n: int, data_sets: int) -> float:
    """Share of `estimate_mean`'s intervals that hold the mean."""
    generator, inside = np.random.default_rng(n), 0
    for _ in range(data_sets):
        values = {
            "normal": lambda: generator.normal(size=n),
            "gamma": lambda: generator.gamma(0.7, size=n),
            "lognormal": lambda: generator.lognormal(size=n),
            "t3": lambda: generator.standard_t(3, size=n),
        }[shape]()
        found = estimate_mean(values)
        inside += found.low <= SHAPES[shape] <= found.high
    return inside / data_sets


def cover_rates(rate: float, n: int, data_sets: int, ties: float = 0.2) -> float:
    """Share of `estimate_rate`'s intervals that hold a win rate with this share of ties, which count half."""
    generator, inside = np.random.default_rng(n), 0
    ties = min(ties, 2 * min(rate, 1 - rate) * 0.5)
    for _ in range(data_sets):
        wins = (rate - ties / 2) / (1 - ties)
        values = np.where(generator.random(n) < ties, 0.5, generator.random(n) < wins)
        found = estimate_rate(values)
        inside += found.low <= rate <= found.high
    return inside / data_sets


def cover_seeds(seeds: int, spread: float, data_sets: int) -> float:
    """Share of `compare_runs`' intervals that hold the difference of two equal methods."""
    generator, inside = np.random.default_rng(seeds), 0
    for _ in range(data_sets):
        a, b = (generator.normal(size=(seeds, PROMPTS)) + generator.normal(size=(seeds, 1)) * spread / 10
                for _ in range(2))  # fmt: skip
        found = compare_runs(a, b).estimate
        inside += found.low <= 0 <= found.high
    return inside / data_sets


def _jobs(experiments: int) -> Iterator[tuple[str, str, Any, tuple[Any, ...]]]:
    for kind, designs in (("no difference", DESIGNS), ("traps", TRAPS), ("power", POWER)):
        yield from ((kind, design.name, simulate, (design, experiments)) for design in designs)
    for n in (20, 50, 200):
        yield from (("means", f"{shape}, n = {n}", cover_means, (shape, n, experiments)) for shape in SHAPES)
        for rate in (0.5, 0.7, 0.9):
            yield "win rates", f"{rate}, n = {n}", cover_rates, (rate, n, experiments)
            yield "win rates without ties", f"{rate}, n = {n}", cover_rates, (rate, n, experiments, 0.0)
    for seeds in (2, 3, 5):
        yield from (("seeds", f"{seeds} seeds, spread {spread}", cover_seeds, (seeds, float(spread), experiments))
                    for spread in (0, 1, 3))  # fmt: skip


def write(experiments: int, folder: Path) -> None:
    """Run everything on the CPUs that there are, and write the JSON and the table."""
    begin, jobs = time.monotonic(), list(_jobs(experiments))
    with ProcessPoolExecutor() as pool:
        results = [pool.submit(job, *args) for _, _, job, args in jobs]
        rows = [(kind, name, future.result()) for (kind, name, *_), future in zip(jobs, results, strict=True)]
    found: dict[str, dict[str, Any]] = {}
    for kind, name, result in rows:
        found.setdefault(kind, {})[name] = asdict(result) if isinstance(result, Outcome) else result
    folder.mkdir(parents=True, exist_ok=True)
    document = {"experiments": experiments, "seconds": round(time.monotonic() - begin), **found}
    (folder / "simulations.json").write_text(json.dumps(document, indent=2) + "\n")
    heads = {
        "winner": "false winner",
        "better": "any “better”",
        "about_methods": "of methods",
        "named": "right winner",
    }
    lines = ["# What the verdicts are worth", "",
             f"Percent of {experiments} experiments a row, {PROMPTS} prompts (`make simulate`).", ""]  # fmt: skip
    for kind in ("no difference", "traps", "power"):
        lines += [f"## {kind.capitalize()}", "", f"| design | {' | '.join(heads.values())} |", "|---" * 5 + "|"]
        for name, row in found[kind].items():
            lines.append(f"| {name} | {' | '.join(f'{100 * row[key]:.1f}' for key in heads)} |")
        lines.append("")
    for kind in ("means", "win rates", "win rates without ties", "seeds"):
        lines += [f"## Coverage: {kind}", "", "| | covers |", "|---|---|"]
        lines += [f"| {name} | {100 * share:.1f} |" for name, share in found[kind].items()]
        lines.append("")
    (folder / "simulations.md").write_text("\n".join(lines))


if __name__ == "__main__":
    arguments = sys.argv[1:]
    write(int(arguments[0]) if arguments else 1000, Path(arguments[1] if len(arguments) > 1 else "docs"))
