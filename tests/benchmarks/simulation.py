"""Do the interval and the verdict keep their promises? Simulated studies whose truth is known.

    python tests/benchmarks/simulation.py

Each study has pairs of differing difficulty, two arms, both orders, and training runs whose skill differs by chance.
Writes docs/results/simulation.json and, as a table, simulation.md: for each case how often the 95% interval covers the
true difference, and how often each verdict is given. The truth is that of the verdict's scope: the expected difference
over all runs where it is on the method, that of the runs at hand where it is on these adapters.
"""

import argparse
import json
import math
import sys
from collections import Counter
from pathlib import Path

import numpy as np
from scipy.special import ndtr, ndtri

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from data import measures, verdict  # noqa: E402

VERDICTS = ("SUPPORTED", "NOT SUPPORTED", "PARTIAL: comparable", "PARTIAL: small gain", "INCONCLUSIVE")
ACCURACY = 0.66  # of SFT, as in the study
# Shares of the variance of a decision margin: what a user and a pair are to both arms and to one arm, what one run makes
# of a pair, and what is left to the order of the options. By them an answer differs between arms and runs as in the study.
SHARES = {"user": 0.1, "pair": 0.35, "arm and user": 0.05, "arm and pair": 0.15, "run and pair": 0.2, "order": 0.15}
ALIKE = dict.fromkeys(SHARES, 0) | {"pair": 1}  # arms differ on few users, all in one direction
# Differences of arms correlate by 0.24 between the pairs of a user
MANY_PAIRS = {"user": 0.1, "pair": 0.35, "arm and user": 0.19, "arm and pair": 0.06, "run and pair": 0.1, "order": 0.2}
PLAIN = {"users": 1208, "pairs": 1, "shared": 0.0, "lean": 0.0, "collapse": 0.0, "alike": False}
SPECIAL = {  # what is not plain
    "runs correlated by seed": {"shared": 0.8},
    "letter lean varies by run": {"lean": 0.5},
    "100 users": {"users": 100},
    "6,040 users": {"users": 6040},
    "10 pairs a user": {"users": 121, "pairs": 10},
    "a run answers one letter (20%)": {"collapse": 0.2},
}
ARMS_ALIKE = {f"arms alike, {users:,} users": {"users": users, "alike": True} for users in (100, 600, 1208, 6040)}
CASES = [("plain", (runs, runs), spread, gain) for runs in (1, 2, 3, 5, 10) for spread in (0.5, 1, 2) for gain in (0, 5)]
CASES += [(case, (runs, runs), 1, 0) for case in SPECIAL for runs in (1, 3, 5)]
CASES += [(case, (5, 3), 1, gain) for case in ("plain", "runs correlated by seed") for gain in (0, 5)]
CASES += [(case, (runs, runs), 0, 1.001) for case in ARMS_ALIKE for runs in (1, 3)]

INTRODUCTION = """# Simulated studies

Written by `python tests/benchmarks/simulation.py`: how often intervals and verdicts are right where the truth is known.
Shares are in %. *Spread* is the standard deviation between the training runs of an arm, in points of ranking accuracy. A
false verdict is SUPPORTED where the true difference is 0 or less, NOT SUPPORTED where it is 0 or more, or PARTIAL:
comparable where it is more than 1 either way. *Arms alike* differ on few users, all in one direction. The truth is the
expected difference over all runs for a verdict on the method, that of the runs at hand for one on these adapters. A row
is of {studies:,} studies, with a standard error of {error:.2f} points where a share is 95%; each has 1,208 users with
one pair each, where nothing else is said.

"""


def simulate(case: str, runs: tuple[int, int], spread: float, difference: float, studies: int) -> dict:
    """Studies of one case: the share whose interval covers the truth, and the shares of verdicts, in all and false.

    runs: of DPO and of SFT, with the seeds 0, 1, ... spread: standard deviation between runs of an arm, in points of
    ranking accuracy. difference: true DPO - SFT in points, where no run answers one letter.
    """
    about = PLAIN | (SPECIAL | ARMS_ALIKE).get(case, {})
    shares = ALIKE if about["alike"] else MANY_PAIRS if about["pairs"] > 1 else SHARES
    random = np.random.default_rng([len(case), *runs, int(10 * spread), int(difference), about["users"]])
    user_of = np.repeat(np.arange(about["users"]), about["pairs"])
    luck = spread / 100 / (math.exp(-(ndtri(ACCURACY) ** 2) / 2) / math.sqrt(2 * math.pi))  # on the scale of margins
    whole = math.sqrt(1 + luck**2 + about["lean"] ** 2)
    means = [whole * ndtri(ACCURACY + gain / 100) for gain in (difference, 0)]

    def normal(share: str, *shape: int) -> np.ndarray:
        return math.sqrt(shares[share]) * random.standard_normal(shape, dtype=np.float32)

    tally: Counter[str] = Counter()
    for _ in range(studies):
        common = normal("user", about["users"])[user_of] + normal("pair", len(user_of))
        of_seed = random.normal(size=max(runs))
        arms, true = [], []
        for mean, count in zip(means, runs, strict=True):
            own = common + normal("arm and user", about["users"])[user_of] + normal("arm and pair", len(user_of))
            skill = math.sqrt(about["shared"]) * of_seed[:count] + math.sqrt(1 - about["shared"]) * random.normal(size=count)
            skill = mean + luck * skill
            lean = about["lean"] * random.normal(size=count)[:, None] * [1, -1]  # (runs, orders)
            margins = normal("order", count, len(user_of), 2) + (own + normal("run and pair", count, len(user_of)))[..., None]
            right = (margins + (skill[:, None] + lean)[:, None] > 0).mean(axis=2)
            of_runs = ndtr(skill[:, None] + lean).mean(axis=1)
            fallen = random.random(count) < about["collapse"]
            right[fallen], of_runs[fallen] = 0.5, 0.5
            arms.append(measured(right, user_of))
            true.append(of_runs.mean())
        parts = measures.difference(*arms)
        found, scope = measures.difference_interval(parts, len(user_of), about["users"]), measures.scope_of(parts)
        truth = (1 - about["collapse"]) * difference if scope == "method" else 100 * (true[0] - true[1])
        given = verdict.verdict(found["value"], found["low"], found["high"])
        tally[given] += 1
        tally["coverage"] += found["low"] <= truth <= found["high"]
        tally["false SUPPORTED"] += given == "SUPPORTED" and truth <= 0
        tally["false NOT SUPPORTED"] += given == "NOT SUPPORTED" and truth >= 0
        tally["false comparable"] += given == "PARTIAL: comparable" and abs(truth) > 1
        tally["on the method"] += scope == "method"
        tally["width"] += found["high"] - found["low"]
    names = ("on the method", "coverage", "false SUPPORTED", "false NOT SUPPORTED", "false comparable", *VERDICTS)
    return {
        "case": case, "users": about["users"], "pairs_per_user": about["pairs"], "runs": list(runs), "spread_of_runs": spread,
        "true_difference": difference, "studies": studies, "coverage_error": round(math.sqrt(0.95 * 0.05 / studies), 4),
        "mean_width": round(tally["width"] / studies, 2), **{name: round(tally[name] / studies, 4) for name in names},
    }  # fmt: skip


def measured(right: np.ndarray, user_of: np.ndarray) -> measures.Measured:
    """Ranking accuracy as `measures` has it, from the right answers of each run to each pair, (runs, pairs)."""
    values, influence, _ = zip(*(measures.mean_of(100 * run) for run in right), strict=True)
    seeds = tuple(str(seed) for seed in range(len(right)))
    by_user = np.array([np.bincount(user_of, weights=run) for run in influence])
    return measures.Measured(seeds, np.array(values), by_user, measures.NO_EXCESS, True)


def page(records: list[dict]) -> str:
    """The records as Markdown, with what a reader must know."""
    shares = ("coverage", "false SUPPORTED", "false NOT SUPPORTED", "false comparable", *VERDICTS)
    heads = ["case", "runs", "spread", "true difference", "verdict on", "mean width", "covers", *shares[1:]]
    rows = [heads, ["---"] * len(heads)]
    for record in records:
        runs = " and ".join(str(count) for count in dict.fromkeys(record["runs"]))
        scope = {0: "these adapters", 1: "the method"}[record["on the method"]]
        about = [record["case"], runs, record["spread_of_runs"], record["true_difference"], scope, record["mean_width"]]
        rows.append([*map(str, about), *(f"{100 * record[name]:.1f}" for name in shares)])
    introduction = INTRODUCTION.format(studies=records[0]["studies"], error=100 * records[0]["coverage_error"])
    return introduction + "".join(f"| {' | '.join(row)} |\n" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=4000)
    parser.add_argument("--results", type=Path, default=ROOT / "docs" / "results" / "simulation.json")
    options = parser.parse_args()
    records = []
    for case in CASES:
        records.append(simulate(*case, options.studies))
        print(json.dumps(records[-1]), flush=True)
    options.results.write_text(json.dumps(records, indent=1) + "\n")
    options.results.with_suffix(".md").write_text(page(records))


if __name__ == "__main__":
    main()
