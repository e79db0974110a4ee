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
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np

from rlhf_trl.compare.evidence import Judged, Trajectory
from rlhf_trl.compare.verdict import compare_groups, name_winner
from rlhf_trl.stats.intervals import Estimate, compare_runs, estimate_mean, estimate_rate

PROMPTS = 100
ABOUT = """# What the verdicts are worth

Percent of {:,} experiments a row on {} prompts; of intervals, of {:,} data sets a row (`make simulate`). With one
seed, a spread is a true difference of two adapters: a winner is then right about the adapters, and nothing is claimed
of methods.
"""
# Standard deviation of an answer's score around its prompt's level, which has the rest of the variance of 1.
NOISE = math.sqrt(0.4)
NOBODY = Judged({}, {}, None, "there is no judge")
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
    winners: str = ""
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
    Design("9 + final against final alone, 1 seed", (rise(10), rise(1))),
    Design("9 + final against final alone, 3 seeds", (rise(10), rise(1)), 3),
    Design("4 + final against final alone, 1 seed", (rise(5), rise(1))),
    Design("both 4 + final, one flat, one rising, 1 seed", (FLAT, rise(5))),
    *(Design(f"{'two' if n == 2 else 'three'} equal methods, seeds: {seeds}, spread: {spread}", (rise(5),) * n, seeds,
             spread) for n in (2, 3) for seeds in (1, 3, 5) for spread in (0, 1, 3)),
    Design("one went further on the same curve, 1 seed", (rise(5, 4.0, 0.2), rise(5))),
    Design("unequal numbers of checkpoints, seeds: 3, spread: 1", (rise(5), rise(9)), 3, 1.0),
]  # fmt: skip
TRAPS = [
    Design("a collapses after its peak", ([(1, 0.3), (2, 0.6), (5, 0.0), (10, -1.0)],
                                          [(1, 0.1), (2, 0.15), (5, 0.2), (10, 0.3)]), winners="b"),
    Design("both below the reference", ([(1, -0.2), (10, -5.0)], [(1, -0.3), (10, -0.5)]), winners="b"),
    Design("b saturates further out", ([(1, 0.30)], [(1.45, 0.33)])),
]  # fmt: skip
POWER = [
    Design(f"a better by 0.3, seeds: {seeds}, no spread", (rise(5, gain=0.6), rise(5)), seeds, winners="a")
    for seeds in (1, 3)
]


def draw(design: Design, generator: np.random.Generator) -> tuple[dict[str, list[str]], dict[str, Trajectory]]:
    """Draw the answers of every run at every point."""
    # A gain is the policy's score less the reference's: a prompt's level cancels.
    reference = generator.normal(0, NOISE, PROMPTS)
    groups, trajectories = {}, {}
    for name, path in zip("abc", design.paths, strict=False):
        groups[name] = [f"{name}-{seed}" for seed in range(design.seeds)]
        kls, gains = (np.array(column)[:, None] for column in zip(*path, strict=True))
        for stage in groups[name]:
            gain = gains + generator.normal(0, design.spread * math.sqrt(2) * NOISE / math.sqrt(PROMPTS))
            numbers = {
                "kl": kls * generator.gamma(4.0, 0.25, (len(path), PROMPTS)),
                "gold_gain": gain + generator.normal(0, NOISE, (len(path), PROMPTS)) - reference,
            }
            trajectories[stage] = Trajectory([*range(1, len(path)), None], [*map(str, range(PROMPTS))], numbers)
    return groups, trajectories


def judge(design: Design, seed: int) -> tuple[bool, bool, bool, bool]:
    """Run one experiment, as `Outcome` counts it."""
    groups, trajectories = draw(design, np.random.default_rng((seed, len(design.name))))
    pairs, _ = compare_groups(list(combinations(groups, 2)), groups, trajectories, NOBODY, {"gold": 0.1})
    verdict = name_winner(list(groups), pairs, {"gold": []})
    winner = verdict["winner"] if verdict else None
    wanted = {"better"} if design.winners == "a" else {"better", "worse"}
    claims = [found for found in (pair["measures"]["gold"] for pair in pairs)
              if {found[question]["outcome"] for question in ("equal_kl", "as_trained")} & wanted]  # fmt: skip
    right = winner is not None and winner in design.winners
    about_methods = any(found["unit"] == "methods" for found in claims)
    return winner is not None and not right, bool(claims), about_methods, right


def simulate(design: Design, experiments: int) -> Outcome:
    return Outcome(*np.mean([judge(design, seed) for seed in range(experiments)], axis=0).tolist())


# --- coverage --------------------------------------------------------------------------------------------------------

# Name -> how N values are drawn, and their true mean.
SHAPES: dict[str, tuple[Callable[[np.random.Generator, int], np.ndarray], float]] = {
    "normal": (lambda of, n: of.normal(size=n), 0.0),
    "gamma(.7)": (lambda of, n: of.gamma(0.7, size=n), 0.7),
    "lognormal": (lambda of, n: of.lognormal(size=n), math.exp(0.5)),
    "t3": (lambda of, n: of.standard_t(3, size=n), 0.0),
}


def cover(draws: Callable[[np.random.Generator], Estimate], truth: float, data_sets: int) -> float:
    """Share of intervals that hold the truth."""
    generator = np.random.default_rng(0)
    return float(np.mean([found.low <= truth <= found.high for found in (draws(generator) for _ in range(data_sets))]))


def cover_means(shape: str, n: int, data_sets: int) -> float:
    values, truth = SHAPES[shape]
    return cover(lambda generator: estimate_mean(values(generator, n)), truth, data_sets)


def cover_rates(rate: float, n: int, data_sets: int, ties: float = 0.0) -> float:
    """Of a win rate with this share of ties, which count half."""
    wins = (rate - ties / 2) / (1 - ties)
    return cover(lambda of: estimate_rate(np.where(of.random(n) < ties, 0.5, of.random(n) < wins)), rate, data_sets)


def cover_seeds(seeds: int, spread: float, data_sets: int) -> float:
    """Of the difference of two equal methods."""

    def runs(of: np.random.Generator) -> np.ndarray:
        return of.normal(size=(seeds, PROMPTS)) + of.normal(size=(seeds, 1)) * spread / 10

    return cover(lambda of: compare_runs(runs(of), runs(of))[0], 0.0, data_sets)


def write(experiments: int, folder: Path) -> None:
    """Run everything on the CPUs that there are, and write the JSON and the table."""
    begin, many = time.monotonic(), 10 * experiments
    jobs = {(kind, design.name): (simulate, design, experiments)
            for kind, designs in (("no difference", DESIGNS), ("traps", TRAPS), ("power", POWER))
            for design in designs}  # fmt: skip
    for n in (20, 50, 200):
        jobs |= {("means", f"{shape}, n = {n}"): (cover_means, shape, n, many) for shape in SHAPES}
        jobs |= {("win rates", f"{rate}, {ties:.0%} ties, n = {n}"): (cover_rates, rate, n, many, ties)
                 for rate, ties in ((0.5, 0.0), (0.5, 0.2), (0.7, 0.0), (0.7, 0.2), (0.9, 0.0), (0.525, 0.95))
                }  # fmt: skip
    jobs |= {("difference of methods", f"seeds: {seeds}, spread: {spread}"): (cover_seeds, seeds, spread, many)
             for seeds in (2, 3, 5) for spread in (0, 1, 3)}  # fmt: skip
    with ProcessPoolExecutor() as pool:
        running = {key: pool.submit(*job) for key, job in jobs.items()}
        found: dict[str, dict[str, dict[str, float]]] = {}
        for (kind, name), future in running.items():
            result = future.result()
            found.setdefault(kind, {})[name] = vars(result) if isinstance(result, Outcome) else {"covers": result}
    document = {"experiments": experiments, "data_sets": many, "seconds": round(time.monotonic() - begin), **found}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "simulations.json").write_text(json.dumps(document, indent=2) + "\n")
    lines = [ABOUT.format(experiments, PROMPTS, many)]
    titles = {"winner": "wrong winner", "better": "any “better”", "about_methods": "claims of methods",
              "named": "right winner", "covers": "covers"}  # fmt: skip
    for kind, rows in found.items():
        keys = list(next(iter(rows.values())))
        lines += [f"## {kind.capitalize()}", "", f"| | {' | '.join(titles[key] for key in keys)} |",
                  "|---" * (len(keys) + 1) + "|"]  # fmt: skip
        lines += [f"| {name} | {' | '.join(f'{100 * row[key]:.1f}' for key in keys)} |" for name, row in rows.items()]
        lines.append("")
    (folder / "simulations.md").write_text("\n".join(lines))


if __name__ == "__main__":
    write(int(sys.argv[1]) if len(sys.argv) > 1 else 1000, Path(sys.argv[2] if len(sys.argv) > 2 else "docs"))
