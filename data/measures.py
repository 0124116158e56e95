"""Predictions -> measures with 95% intervals, and comparisons of arms. docs/metrics.md defines each of them.

The unit of every interval is the user. A measure is made of means over users of one or more columns, so that any
resample of users is a mean over rows.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import expit

from data.predictions import MARGINS, margins_of

SCHEMA_VERSION = 1  # of metrics.json
MEASURES = {  # name: (label, unit)
    "ranking_accuracy": ("ranking accuracy", "%"),
    "response_accuracy": ("response accuracy", "%"),
    "order_free_accuracy": ("order-free accuracy", "%"),
    "position_bias": ("position bias (A - B)", "points"),
    "swap_consistency": ("swap consistency", "%"),
    "decision_margin": ("decision margin", "nats"),
    "response_margin": ("response margin", "nats"),
    "accuracy_with_popularity": ("ranking accuracy where the preferred film is the more popular", "%"),
    "accuracy_against_popularity": ("ranking accuracy where it is the less popular", "%"),
    "personalisation_gap": ("loss of ranking accuracy with a stranger's history", "points"),
    "precision_consistency": ("decisions that are the same in the first precision", "%"),
    "brier_score": ("Brier score of the decision", ""),
    "calibration_error": ("expected calibration error of the decision", ""),
}
UNITS = {  # scale, lowest and highest value
    "%": (100, 0, 100), "points": (100, -100, 100),
    "nats": (1, -math.inf, math.inf), "": (1, 0, 1),
}
COMPARED = ("ranking_accuracy", "order_free_accuracy", "response_accuracy")  # arms are compared by these
PROBABILITY_MEASURES = ("decision_margin", "brier_score", "calibration_error")  # a baseline's counts have none
NEAR_TIE = 0.01  # nats
OF_ANSWERS = ("answers", "repeat_consistency", "parsed", "right", "cites_own_genre", "cites_foreign_genre")
Columns = dict[str, np.ndarray]  # (users, columns) by measure


def compute_metrics(predictions: pd.DataFrame, resamples: int, seed: int) -> dict[str, Any]:
    """All measures and comparisons, from the rows of predictions.csv; `data.verdict.judge` adds the verdict.

    An arm with several seeds is the mean over them; its intervals are over users and seeds. Users and, for arms of
    equally many seeds, seeds are drawn alike in every arm, so that differences are paired.
    """
    own = predictions[predictions["history"] == "own"]
    users = own["pair_id"].drop_duplicates().sort_values()
    runs = {arm: columns_of_runs(predictions, arm, users) for arm in own["arm"].unique()}
    samples = bootstrap_measures(runs, resamples, seed)
    arms: dict[str, Any] = {}
    for arm, rows in own.groupby("arm", sort=False):
        kind = rows["kind"].iloc[0]
        near_ties = int((rows["decision_margin"].abs() < NEAR_TIE).sum())
        arms[arm] = {"kind": kind, "seeds": len(runs[arm]), "near_ties": near_ties if kind == "model" else None}
        for name, (_, unit) in MEASURES.items():
            value = UNITS[unit][0] * np.mean([reduce_columns(name, run[name].mean(axis=0)) for run in runs[arm]])
            if kind == "baseline" and name in PROBABILITY_MEASURES:
                value = math.nan
            arms[arm][name] = estimate(name, value, over_seeds(samples[arm][name], seed))

    accuracy = {arm: np.mean([run["ranking_accuracy"][:, 0] for run in runs[arm]], axis=0) for arm in arms}
    order_free = {arm: wins(sum(run["margin_of_both_orders"][:, 0] for run in runs[arm])) for arm in arms}
    comparisons: dict[str, Any] = {}
    for one, other in compared_arms(arms):
        differences = {}
        for name in COMPARED:
            values = [arms[arm][name]["value"] for arm in (one, other)]
            value = low = high = math.nan
            if None not in values:
                drawn = paired_samples(samples[one][name], samples[other][name], seed)
                value, (low, high) = values[0] - values[1], difference_interval(drawn, len(users))
            differences[name] = {"value": number(value), "low": number(low), "high": number(high)}
        ranking = differences.pop("ranking_accuracy")
        smallest = detectable_difference(100 * (accuracy[one] - accuracy[other])) + 100 / len(users)
        comparisons[f"{one} - {other}"] = ranking | differences | {
            "p": mcnemar(order_free[one], order_free[other]),
            "detectable_points": number(smallest),
            # six users on one side are the fewest for which McNemar's exact p is below 0.05
            "users_needed_for_2_points": max(300, math.ceil(len(users) * (smallest / 2) ** 2)),
            "users_needed_to_decide": math.ceil(len(users) * max(1.0, ranking["high"] - ranking["low"]) ** 2),
        }  # fmt: skip
    for found, p in zip(comparisons.values(), holm([found["p"] for found in comparisons.values()]), strict=True):
        found["p_holm"] = p
    about = {"schema_version": SCHEMA_VERSION, "users": len(users), "resamples": resamples, "seed": seed}
    return about | {"arms": arms, "comparisons": comparisons}


def compared_arms(arms: dict[str, Any]) -> list[tuple[str, str]]:
    """(one, other): models with SFT in their precision, DPO with all but it, SFT's controls with the baselines."""
    models = [(arm, *arm.partition("@")) for arm in arms if arms[arm]["kind"] == "model"]
    pairs = [(arm, "sft" + at + bits) for arm, name, at, bits in models if name != "sft"]
    pairs += [("dpo", arm) for arm in arms if arm not in ("dpo", "sft", "always A") and "@" not in arm]
    baselines = [arm for arm in arms if arms[arm]["kind"] == "baseline" and arm != "always A"]
    pairs += itertools.product(sft_controls(arms), baselines)
    return [(one, other) for one, other in pairs if one in arms and other in arms]


def sft_controls(arms: dict[str, Any]) -> list[str]:
    """The arms of SFT beside `sft`, by name (sft_...), in the same precision: controls for DPO's further training."""
    return [arm for arm in arms if arm.startswith("sft_") and "@" not in arm]


# ---------------------------------------------------------------------------------------- measures of one arm


def columns_of_runs(predictions: pd.DataFrame, arm: str, users: pd.Series) -> list[Columns]:
    """What `user_measures` makes of each of an arm's runs, in the order of their seeds."""
    own, strange = (predictions[predictions["history"] == history] for history in ("own", "stranger"))
    popular = own.drop_duplicates("pair_id").set_index("pair_id")["preferred_more_popular"].reindex(users)
    more_popular = popular.map({"true": 1.0, "false": 0.0}).to_numpy(dtype=float)
    first = arm.partition("@")[0]
    runs = []
    for seed, rows in own[own["arm"] == arm].groupby("seed"):
        stranger = strange[(strange["arm"] == arm) & (strange["seed"] == seed)]
        in_first = own[(own["arm"] == first) & (own["seed"] == seed) & (arm != first)]
        decision, response = (margins_of(rows, name, users) for name in MARGINS)
        others = (margins_of(part, "decision_margin", users) for part in (stranger, in_first))
        runs.append(user_measures(decision, response, *others, more_popular))
    return runs


def user_measures(
    decision: np.ndarray, response: np.ndarray, stranger: np.ndarray, first: np.ndarray, more_popular: np.ndarray
) -> Columns:
    """Each measure of one run as columns over users.

    Args:
        decision, response: margins in nats, (users, orders A and B).
        stranger: decision margins with another user's history, (users, orders); nan where not scored.
        first: decision margins of the same adapter in the first precision, (users, orders); nan where there is none.
        more_popular: 1 where the preferred film is the more popular in training, 0 where the less, nan for a tie.

    Returns:
        (users, columns): one column for a mean over users; numerator and denominator for a mean over some of them;
        one column per bin for the calibration error. `reduce_columns` makes values of their means. A tie counts one
        half in accuracies, and is no consistent choice.
    """
    right = wins(decision)
    single = {
        "ranking_accuracy": right.mean(axis=1),
        "response_accuracy": wins(response).mean(axis=1),
        "order_free_accuracy": wins(decision.sum(axis=1)),
        "position_bias": right[:, 0] - right[:, 1],
        "swap_consistency": (right[:, 0] == right[:, 1]) & (right[:, 0] != 0.5),
        "decision_margin": decision.mean(axis=1),
        "response_margin": response.mean(axis=1),
        "brier_score": ((1 - expit(decision)) ** 2).mean(axis=1),
        "personalisation_gap": (right - wins(stranger)).mean(axis=1),
        "precision_consistency": np.where(np.isnan(first), np.nan, wins(first) == right).mean(axis=1),
        "margin_of_both_orders": decision.sum(axis=1),  # no measure: what order-free decisions are made by
    }
    columns = {name: value.astype(float)[:, None] for name, value in single.items()}
    for name, wanted in (("accuracy_with_popularity", 1), ("accuracy_against_popularity", 0)):
        part = (more_popular == wanted).astype(float)
        columns[name] = np.column_stack([part * right.mean(axis=1), part])
    return columns | {"calibration_error": calibration_columns(decision)}


def wins(margin: np.ndarray) -> np.ndarray:
    """1 where the margin is above 0, one half where it is 0, nan where there is none."""
    return np.where(np.isnan(margin), np.nan, (margin > 0) + 0.5 * (margin == 0))


def calibration_columns(decision: np.ndarray, bins: int = 15) -> np.ndarray:
    """(users, bins): how much more often Option A was right than p says, in each bin of p(Option A).

    p(Option A) is sigma(d) where the preferred film is Option A and sigma(-d) where it is Option B. The absolute
    means summed over bins are the expected calibration error (Naeini et al. 2015).
    """
    p_a = expit(decision * np.array([1, -1]))
    right = np.broadcast_to([1.0, 0.0], decision.shape)
    index = np.minimum((p_a * bins).astype(int), bins - 1)
    return np.stack([((right - p_a) * (index == number)).mean(axis=1) for number in range(bins)], axis=1)


def reduce_columns(name: str, means: np.ndarray) -> np.ndarray:
    """A measure's value from the means of its columns, (..., columns) -> (...)."""
    if name == "calibration_error":
        return np.abs(means).sum(axis=-1)
    if means.shape[-1] == 2:
        with np.errstate(invalid="ignore", divide="ignore"):
            return means[..., 0] / means[..., 1]
    return means[..., 0]


def number(value: float) -> float | None:
    """A number for JSON: six decimals, null where there is none."""
    return None if math.isnan(value) else round(float(value), 6) + 0.0


def generation_measures(rows: pd.DataFrame) -> dict[str, float | None]:
    """Shares of one arm's generated answers; an answer that recommends no single option stays in every denominator.

    repeat_consistency: share of answers that agree with the most frequent one, mean over users and training runs.
    """
    asked = [answers for _, answers in rows.groupby(["seed", "pair_id"])["answer"]]
    agree = [answers.value_counts().drop("", errors="ignore").max() / len(answers) for answers in asked]
    recommends, right = (rows["answer"] != "").mean(), (rows["answer"] == rows["order"]).mean()
    shares = (np.mean(np.nan_to_num(agree)), recommends, right, rows["own_genre"].mean(), rows["foreign_genre"].mean())
    return dict(zip(OF_ANSWERS, (len(rows), *(number(float(share)) for share in shares)), strict=True))


# ---------------------------------------------------------------------------------------------------- intervals


def bootstrap_measures(runs: dict[str, list[Columns]], resamples: int, seed: int) -> dict[str, Columns]:
    """Bootstrap samples of every arm's measures in their units, each (resamples, seeds)."""
    all_runs = [run for seeds in runs.values() for run in seeds]
    columns = np.column_stack([run[name] for run in all_runs for name in MEASURES])
    widths = [run[name].shape[1] for run in all_runs for name in MEASURES]
    means = iter(np.split(bootstrap_means(columns, resamples, seed), np.cumsum(widths)[:-1], axis=1))
    samples: dict[str, Columns] = {}
    for arm, seeds in runs.items():
        drawn = [{name: reduce_columns(name, next(means)) for name in MEASURES} for _ in seeds]
        scales = {name: UNITS[unit][0] for name, (_, unit) in MEASURES.items()}
        samples[arm] = {name: np.stack([scales[name] * run[name] for run in drawn], axis=1) for name in MEASURES}
    return samples


def bootstrap_means(values: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Means over resampled users, (resamples, columns), from values of shape (users, columns).

    The same users are drawn for every column and at every call, so that differences between columns are paired
    (Efron & Tibshirani 1993, ch. 8).
    """
    random, users = np.random.default_rng(seed), len(values)
    sizes = [min(500, resamples - start) for start in range(0, resamples, 500)]
    draws = (random.multinomial(users, np.full(users, 1 / users), size=size) for size in sizes)
    return np.concatenate([drawn @ values / users for drawn in draws])


def over_seeds(values: np.ndarray, seed: int) -> np.ndarray:
    """Means over resampled seeds, (resamples,) without nan, from values of shape (resamples, seeds).

    The second level of the bootstrap. With one seed nothing is drawn, and the interval leaves out what another seed
    would give. Two corrections keep intervals of few seeds honest (tests/benchmarks/simulation.py). Resampling k
    seeds shows a variance too small by (k - 1) / k, and the tails of a normal distribution where few values have
    Student's: deviations are scaled by sqrt(k / (k - 1)) t_{k-1} / z (at 97.5%). And seeds differ also because each
    answers the users a little differently, which the bootstrap over users holds already: that share of their
    variance, which its samples show, is taken out (the random-effects estimate; Searle, Casella & McCulloch 1992,
    ch. 3).
    """
    from scipy.stats import norm, t

    if not np.isnan(values).all():
        values = values[~np.isnan(values).any(axis=1)]  # a resample without users that the measure is of
    resamples, seeds = values.shape
    mean = values.mean(axis=1)
    if seeds == 1 or resamples < 2:
        return mean
    covariance = np.cov(values.T)
    own_noise = np.diag(covariance).mean() - covariance[~np.eye(seeds, dtype=bool)].mean()
    observed = values.mean(axis=0).var(ddof=1)
    between = max(0.0, 1 - own_noise / observed) if observed > 0 else 0.0
    scale = math.sqrt(between * seeds / (seeds - 1)) * t.ppf(0.975, seeds - 1) / norm.ppf(0.975)
    drawn = np.random.default_rng([seed, seeds]).integers(seeds, size=(resamples, seeds))
    return mean + scale * (np.take_along_axis(values, drawn, axis=1).mean(axis=1) - mean)


def paired_samples(one: np.ndarray, other: np.ndarray, seed: int) -> np.ndarray:
    """Bootstrap samples of the difference of two arms, (resamples,), from each arm's samples (resamples, seeds)."""
    if one.shape == other.shape:
        return over_seeds(one - other, seed)
    return over_seeds(one, seed) - over_seeds(other, seed)


def percentile_interval(samples: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    low, high = np.quantile(samples, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def difference_interval(samples: np.ndarray, users: int) -> tuple[float, float]:
    """95% interval of a difference of two arms' accuracies in points, from its bootstrap samples in points.

    The percentiles, moved apart by the continuity correction 1/n on each side (Fleiss, Levin & Paik 2003, ch. 13,
    for paired proportions). The difference moves in steps: without it a true difference of 0 is called SUPPORTED a
    little more often than 2.5% of the time.
    """
    low, high = percentile_interval(samples)
    return low - 100 / users, high + 100 / users


def estimate(name: str, value: float, samples: np.ndarray) -> dict[str, float | None]:
    """A measure's value and the percentile interval of its samples, within the measure's limits.

    The calibration error sums absolute values, which chance raises, and in a resample raises once more: percentiles
    would lie above the truth. Its interval is the basic bootstrap's, their reflection at the value (Davison &
    Hinkley 1997, ch. 5), as far as the value at least.
    """
    if math.isnan(value):
        return {"value": None, "low": None, "high": None}
    low, high = percentile_interval(samples[~np.isnan(samples)])
    if name == "calibration_error":
        low, high = 2 * value - high, max(value, 2 * value - low)
    low, high = np.clip((low, high), *UNITS[MEASURES[name][1]][1:])
    return {"value": number(value), "low": number(low), "high": number(high)}


# -------------------------------------------------------------------------------------- tests of a difference


def mcnemar(right_one: np.ndarray, right_other: np.ndarray) -> float:
    """p of McNemar's exact test on two arms' right (1) or wrong (0) answers to the same users; ties are left out."""
    from statsmodels.stats.contingency_tables import mcnemar as test

    only_one = np.sum((right_one == 1) & (right_other == 0))
    only_other = np.sum((right_one == 0) & (right_other == 1))
    return float(test([[0, only_one], [only_other, 0]], exact=True).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """p values corrected for their number (Holm 1979), in the order that they came in."""
    from statsmodels.stats.multitest import multipletests

    return multipletests(p_values, method="holm")[1].tolist() if p_values else []


def detectable_difference(differences: np.ndarray) -> float:
    """The smallest mean difference that these users could show with 80% power at the two-sided 5% level.

    (z_0.975 + z_0.8) standard errors of the paired difference (users,), in the same unit.
    """
    from scipy.stats import norm

    if len(differences) < 2:
        return math.nan
    return float((norm.ppf(0.975) + norm.ppf(0.8)) * differences.std(ddof=1) / math.sqrt(len(differences)))
