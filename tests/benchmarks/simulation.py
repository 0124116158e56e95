"""Do the interval and the verdict keep their promises? Simulated studies whose truth is known.

    python tests/benchmarks/simulation.py

Each study has users of differing difficulty, two arms, both orders and, where there are several seeds, training runs
whose skill differs by chance. Writes docs/results/simulation.json: for each case how often the 95% interval covers
the true difference, and how often each verdict is given.
"""

import argparse
import json
import math
import sys
from collections import Counter
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from data import measures, verdict  # noqa: E402

CASES = [(users, difference, 1, 0) for users in (300, 1208, 6040) for difference in (0, 1, 3, 5)] + [
    (1208, difference, seeds, spread) for seeds in (3, 5) for spread in (0.5, 2, 5) for difference in (0, 5)
]


def simulate(users: int, difference: float, seeds: int, studies: int, resamples: int, spread: float = 0) -> dict:
    """Studies of one case: the share whose interval covers the truth, and the shares of verdicts.

    difference: true DPO - SFT in points of ranking accuracy. spread: standard deviation between training runs of an
    arm, in points (with one seed it is 0: the truth is that run's own difference).
    """
    random = np.random.default_rng([users, int(10 * difference), seeds])
    values = np.empty((users, studies * seeds), dtype=np.float32)
    for column in range(studies * seeds):
        if column % seeds == 0:
            skill = random.beta(4, 3, users)
        luck = random.normal(0, spread / 100, 2)
        sft = random.random((2, users)) < skill * (1 + luck[0] / skill.mean())
        # a share of the answers that SFT would get wrong becomes right: the mean rises by what is wanted
        gain = (difference / 100 + luck[1]) / (1 - skill.mean())
        dpo = random.random((2, users)) < skill + max(gain, 0) * (1 - skill) + min(gain, 0) * (1 - skill.mean())
        values[:, column] = 100 * (dpo.mean(axis=0) - sft.mean(axis=0))
    means = measures.bootstrap_means(values, resamples, seed=0)
    covered, verdicts = 0, Counter()
    for study in range(studies):
        runs = slice(study * seeds, (study + 1) * seeds)
        low, high = measures.difference_interval(measures.over_seeds(means[:, runs], 0), users)
        covered += low <= difference <= high
        verdicts[verdict.verdict(float(values[:, runs].mean()), low, high)] += 1
    names = ("SUPPORTED", "NOT SUPPORTED", "PARTIAL: comparable", "PARTIAL: small gain", "INCONCLUSIVE")
    shares = {name: round(verdicts[name] / studies, 4) for name in names}
    return {
        "users": users, "true_difference": difference, "seeds": seeds, "spread_of_seeds": spread, "studies": studies, "resamples": resamples,
        "coverage": round(covered / studies, 4), "coverage_error": round(math.sqrt(0.95 * 0.05 / studies), 4), **shares,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=4000)
    parser.add_argument("--resamples", type=int, default=2000)
    parser.add_argument("--results", type=Path, default=ROOT / "docs" / "results" / "simulation.json")
    options = parser.parse_args()
    records = []
    for users, difference, seeds, spread in CASES:
        records.append(simulate(users, difference, seeds, options.studies, options.resamples, spread))
        print(json.dumps(records[-1]), flush=True)
        options.results.write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
