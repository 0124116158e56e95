"""Measures with 95% intervals, and comparisons of arms, from predictions. docs/metrics.md defines each of them.

Each measure of a run is a value and, for every user, how far this user moves it (its influence). The variance over
users is the sum of the squared influences, whatever the measure: a mean, a ratio, a fitted temperature (linearisation;
Deville 1999, Survey Methodology 25). Several pairs of a user add up to one influence.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy.optimize import brentq
from scipy.special import expit, ndtr, ndtri, stdtrit
from statsmodels.stats import contingency_tables
from statsmodels.stats.multitest import multipletests

from data.baselines import BASELINES
from data.errors import UserError
from data.predictions import LOG_PROBS, MARGINS, margins_of
from data.runs import Lineage

SCHEMA_VERSION = 2  # of metrics.json
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
    "popularity_balanced_accuracy": ("popularity-balanced accuracy", "%"),
    "accuracy_similar_popularity": ("ranking accuracy where popularity is within a factor of 2", "%"),
    "personalisation_gap": ("loss of ranking accuracy with a stranger's history", "points"),
    "precision_consistency": ("decisions that are the same in the first precision", "%"),
    "brier_score": ("Brier score of the decision", ""),
    "calibration_error": ("expected calibration error of the decision", ""),
    "temperature": ("temperature that fits the decision best", ""),
    "dpo_brier_score": ("Brier score of DPO's own probability", ""),
    "dpo_calibration_error": ("expected calibration error of DPO's own probability", ""),
    "dpo_temperature": ("temperature that fits DPO's own probability best", ""),
    "chosen_change": ("change of log p(chosen) from the reference", "nats"),
    "rejected_change": ("change of log p(rejected) from the reference", "nats"),
}
UNITS = {  # scale, lowest and highest value
    "%": (100, 0, 100), "points": (100, -100, 100),
    "nats": (1, -math.inf, math.inf), "": (1, 0, math.inf),
}
FIRST = (*BASELINES, "base", "sft", "sft_more")  # of all arms, whatever the order of their rows
COMPARED = (  # arms are compared by these
    *("ranking_accuracy", "order_free_accuracy", "response_accuracy"),
    *("popularity_balanced_accuracy", "accuracy_similar_popularity"),
)
PROBABILITY_MEASURES = ("decision_margin", "brier_score", "calibration_error", "temperature")  # a baseline has none
NEAR_TIE = 0.01  # nats
FEWEST_USERS = 30  # with a kind of pair, for measures of it: intervals of fewer cover too seldom
RUNS_FOR_METHOD = 3  # of an arm, for intervals over runs and verdicts on the method
OF_ANSWERS = ("answers", "repeat_consistency", "parsed", "right", "cites_own_genre", "cites_foreign_genre")
NO_EXCESS = np.zeros(2)
Scores = dict[str, np.ndarray]  # of one run: (pairs, orders A and B) by name


class Measured(NamedTuple):
    """One measure of an arm's runs."""

    seeds: tuple[str, ...]
    values: np.ndarray  # (runs,)
    influence: np.ndarray  # (runs, users): how far each user moves each run's value
    excess: np.ndarray  # (2,): how much chance adds to the value, at most and on average
    trained: bool  # its runs are draws of training; base and baselines have none


def compute_metrics(predictions: pd.DataFrame) -> dict[str, Any]:
    """All measures and comparisons, from the rows of predictions.csv; `data.verdict.judge` adds the verdict.

    An arm with several runs is the mean over them. Users are paired between arms, and so are runs where two arms
    have the same seeds.
    """
    pairs, users, runs, measured = measures_of_arms(predictions)
    count = int(users.max()) + 1
    arms = {}
    rows_of = dict(iter(predictions[predictions["history"] == "own"].groupby("arm")))
    for arm, of_arm in measured.items():
        rows = rows_of[arm]
        kind, near_ties = rows["kind"].iloc[0], int((rows["decision_margin"].abs() < NEAR_TIE).sum())
        about = {"kind": kind, "seeds": len(runs[arm]), "near_ties": near_ties if kind == "model" else None}
        first = rows.iloc[0]  # what is not the same in all runs is of no one arm
        of_arm_itself = {name: first[name] for name in Lineage._fields if rows[name].nunique(dropna=False) == 1}
        about |= {"reference": of_arm_itself.get("reference") or None}
        about |= {name: number(of_arm_itself.get(name, math.nan)) for name in ("beta", "pairs_seen")}
        arms[arm] = about | {name: estimate(name, found) for name, found in of_arm.items()}

    comparisons, sizes = {}, sizes_of(pairs, users)
    for one, other in compared_arms(arms):
        parts = {name: difference(measured[one][name], measured[other][name]) for name in COMPARED}
        differences = {name: difference_interval(part, *sizes[name]) for name, part in parts.items()}
        ranking, scope = differences.pop("ranking_accuracy"), scope_of(parts["ranking_accuracy"])
        right = [wins(scores["decision_margin"].sum(axis=1)) for arm in (one, other) for scores in runs[arm].values()]
        single = len(pairs) == count and len(right) == 2  # McNemar's test knows users alone: no runs, no other pairs
        p = mcnemar(*right) if single else None
        found = {"scope": scope, "p": p, "p_holm": None} | users_needed(ranking, count, scope)
        comparisons[f"{one} - {other}"] = ranking | differences | found
    if tested := [found for found in comparisons.values() if found["p"] is not None]:
        corrected = multipletests([found["p"] for found in tested], method="holm")[1]
        for found, p in zip(tested, corrected.tolist(), strict=True):
            found["p_holm"] = p
    about = {"schema_version": SCHEMA_VERSION, "users": count, "pairs": len(pairs)}
    about["effective_users"] = number(sizes["ranking_accuracy"][1])
    return about | {"arms": arms, "comparisons": comparisons}


def measures_of_arms(predictions: pd.DataFrame) -> tuple[pd.DataFrame, np.ndarray, dict, dict]:
    """(a row per pair, the number of each pair's user, `scores_of_runs`, each arm's measures by name)."""
    own = predictions[predictions["history"] == "own"]
    pairs = own.drop_duplicates("pair_id").sort_values("pair_id")
    users = pairs["user_id"].factorize()[0]
    runs, kinds, popular = scores_of_runs(predictions, pairs), own.groupby("arm")["kind"].first(), popularity_of(pairs)
    arms = sorted(own["arm"].unique(), key=lambda arm: FIRST.index(arm) if arm in FIRST else len(FIRST))
    measured = {arm: measures_of_runs(arm, kinds[arm], runs[arm], popular, users) for arm in arms}
    return pairs, users, runs, measured


def interaction(predictions: pd.DataFrame, others: pd.DataFrame) -> dict[str, Any]:
    """How much more DPO leads SFT, and each control, in these predictions than in others: those of 16 bits, say.

    Returns:
        By comparison, such as `dpo - sft_more`: the difference of the two leads in ranking accuracy, in points, with
        its 95% interval, its scope, and the smallest difference that these users and runs can tell from 0.

    Raises:
        UserError: the two are not of the same pairs, or have no lead in common.
    """
    check_same_pairs(predictions, others)
    (pairs, users, _, here), (_, _, _, there) = map(measures_of_arms, (predictions, others))
    found = {}
    for arm in ("sft", *sft_controls(here)):
        if {"dpo", arm} <= here.keys() & there.keys():
            leads = [difference(*(arms[name]["ranking_accuracy"] for name in ("dpo", arm))) for arms in (here, there)]
            paired = all(len(lead) == 1 for lead in leads)
            parts = difference(*leads[0], *leads[1]) if paired else [*leads[0], *map(negated, leads[1])]
            interval, scope = difference_interval(parts, *sizes_of(pairs, users)["ranking_accuracy"]), scope_of(parts)
            detectable = users_needed(interval, int(users.max()) + 1, scope)["detectable_points"]
            found[f"dpo - {arm}"] = interval | {"scope": scope, "detectable_points": detectable}
    if not found:
        raise UserError("the two evaluations have no arms dpo and sft in common", "Give those of both trainings.")
    return found


def check_same_pairs(*evaluations: pd.DataFrame) -> None:
    """Raise UserError unless the rows of two evaluations are of the same pairs, and these of the same users."""
    pairs = [rows.drop_duplicates("pair_id").sort_values("pair_id") for rows in evaluations]
    one, other = (dict(zip(of["pair_id"], of["user_id"].factorize()[0], strict=True)) for of in pairs)
    if one != other:
        raise UserError("the two evaluations are not of the same test pairs and users", "Score both on one pairs file.")


def compared_arms(arms: dict[str, Any]) -> list[tuple[str, str]]:
    """(one, other): models with SFT in their precision, DPO with all but it, SFT and its controls with baselines."""
    models = [(arm, *arm.partition("@")) for arm in arms if arms[arm]["kind"] == "model"]
    pairs = [(arm, "sft" + at + bits) for arm, name, at, bits in models if name != "sft"]
    pairs += [("dpo", arm) for arm in arms if arm not in ("dpo", "sft", "always A") and "@" not in arm]
    baselines = [arm for arm in arms if arms[arm]["kind"] == "baseline" and arm != "always A"]
    pairs += itertools.product(("sft", *sft_controls(arms)), baselines)
    return [(one, other) for one, other in pairs if one in arms and other in arms]


def sft_controls(arms: dict[str, Any]) -> list[str]:
    """The arms of SFT beside `sft`, by name (sft_...), in the same precision: controls for DPO's further training."""
    return [arm for arm in arms if arm.startswith("sft_") and "@" not in arm]


# ---------------------------------------------------------------------------------------- measures of one run

def scores_of_runs(predictions: pd.DataFrame, pairs: pd.DataFrame) -> dict[str, dict[str, Scores]]:
    """What each run gave to every pair, by arm and seed; nan where it gave nothing.

    An arm in a second precision, such as `dpo@16bit`, is referred to the reference in that precision. The reference
    of a run is the run of the same seed or, where there is none, the only run.
    """
    pair_ids = pairs["pair_id"]
    groups = dict(iter(predictions.groupby(["arm", "seed", "history"], sort=False)))
    runs: dict[str, dict[str, Scores]] = {arm: {} for arm in predictions["arm"].unique()}
    for arm, seed, history in sorted(groups):
        if history == "own":
            rows, strangers = groups[arm, seed, "own"], groups.get((arm, seed, "stranger"), predictions.iloc[:0])
            runs[arm][seed] = {name: margins_of(rows, name, pair_ids) for name in (*MARGINS, *LOG_PROBS)}
            runs[arm][seed]["stranger"] = margins_of(strangers, "decision_margin", pair_ids)
    nothing = dict.fromkeys((*MARGINS, *LOG_PROBS), np.full((len(pairs), 2), math.nan))
    for arm, seeds in runs.items():
        first, at, bits = arm.partition("@")
        for seed, scores in seeds.items():
            about = groups[arm, seed, "own"].iloc[0]
            known = runs.get(about["reference"] + at + bits, {}) if about["reference"] else {}
            reference = known.get(seed) or (next(iter(known.values())) if len(known) == 1 else nothing)
            scores["chosen_change"], scores["rejected_change"] = (scores[name] - reference[name] for name in LOG_PROBS)
            scores["reward_margin"] = about["beta"] * (scores["response_margin"] - reference["response_margin"])
            scores["first"] = (runs.get(first, {}).get(seed, nothing) if at else nothing)["decision_margin"]
    return {arm: seeds for arm, seeds in runs.items() if seeds}


def measures_of_runs(
    arm: str, kind: str, runs: dict[str, Scores], popular: dict[str, np.ndarray], users: np.ndarray
) -> dict[str, Measured]:
    """Every measure of an arm's runs; popular, users: as `run_measures` takes them."""
    by_run = [run_measures(scores, popular, users) for scores in runs.values()]
    trained = kind == "model" and arm.partition("@")[0] != "base"
    measured = {}
    for name in MEASURES:
        values, influence, excess = (np.array(part) for part in zip(*(run[name] for run in by_run), strict=True))
        if kind == "baseline" and name in PROBABILITY_MEASURES:
            values = np.full(len(runs), math.nan)
        measured[name] = Measured(tuple(runs), values, influence, excess.mean(axis=0), trained)
    return measured


def popularity_of(pairs: pd.DataFrame) -> dict[str, np.ndarray]:
    """1 for pairs of a kind, 0 for others, (pairs,), by kind; nan where it is not known, or too few users have it."""
    more = pairs["preferred_more_popular"].to_numpy()
    counts = pairs[["preferred_count", "other_count"]].to_numpy(dtype=float)
    similar = np.where(np.isnan(counts).any(axis=1), math.nan, counts.max(axis=1) <= 2 * counts.min(axis=1))
    kinds = {"with": (more == "true") * 1.0, "against": (more == "false") * 1.0, "similar": similar}
    users = {kind: pairs.loc[among == 1, "user_id"].nunique() for kind, among in kinds.items()}
    return {kind: among if users[kind] >= FEWEST_USERS else among * math.nan for kind, among in kinds.items()}


def sizes_of(pairs: pd.DataFrame, users: np.ndarray) -> dict[str, tuple[float, float]]:
    """How many pairs a compared measure is on, and Kish's effective number of users: (sum of k)^2 / sum of k^2 for k
    pairs of a user. Of a mean of two kinds of pairs: twice the fewer."""
    counts = {kind: np.bincount(users, weights=among) for kind, among in popularity_of(pairs).items()}
    counts["all"] = np.bincount(users)
    sizes = {kind: (of.sum(), of.sum() ** 2 / (of**2).sum()) for kind, of in counts.items()}
    balanced = tuple(2 * min(both) for both in zip(sizes["with"], sizes["against"], strict=True))
    of_kinds = {"accuracy_similar_popularity": sizes["similar"], "popularity_balanced_accuracy": balanced}
    return dict.fromkeys(COMPARED, sizes["all"]) | of_kinds


def run_measures(scores: Scores, popular: dict[str, np.ndarray], users: np.ndarray) -> dict[str, tuple]:
    """Each measure of one run, in its unit, as (value, influence of each user, what chance adds to the value).

    Args:
        scores: of `scores_of_runs`.
        popular: of `popularity_of`.
        users: the number of each pair's user, (pairs,).
    """
    decision, right = scores["decision_margin"], wins(scores["decision_margin"])
    first = scores["first"]
    means = {
        "ranking_accuracy": right,
        "response_accuracy": wins(scores["response_margin"]),
        "order_free_accuracy": wins(decision.sum(axis=1, keepdims=True)),
        "position_bias": right[:, :1] - right[:, 1:],
        "swap_consistency": (right[:, :1] == right[:, 1:]) & (right[:, :1] != 0.5),
        "personalisation_gap": right - wins(scores["stranger"]),
        "precision_consistency": np.where(np.isnan(first), np.nan, wins(first) == right),
        **{name: scores[name] for name in (*MARGINS, "chosen_change", "rejected_change")},
    }
    found = {name: mean_of(values.mean(axis=1)) for name, values in means.items()}
    found |= {f"accuracy_{kind}_popularity": mean_of(right.mean(axis=1), part) for kind, part in popular.items()}
    halves = [found[f"accuracy_{kind}_popularity"] for kind in ("with", "against")]
    found["popularity_balanced_accuracy"] = tuple(sum(part) / 2 for part in zip(*halves, strict=True))
    for prefix, margin in (("", decision), ("dpo_", scores["reward_margin"])):
        found[f"{prefix}brier_score"] = mean_of(((1 - expit(margin)) ** 2).mean(axis=1))
        found[f"{prefix}calibration_error"] = calibration_error(margin, users)
        found[f"{prefix}temperature"] = temperature(margin)
    scales = {name: UNITS[unit][0] for name, (_, unit) in MEASURES.items()}
    return {
        name: (scale * found[name][0], scale * by_user(found[name][1], users), scale * found[name][2])
        for name, scale in scales.items()
    }


def wins(margin: np.ndarray) -> np.ndarray:
    """1 where the margin is above 0, one half where it is 0, nan where there is none."""
    return np.where(np.isnan(margin), np.nan, (margin > 0) + 0.5 * (margin == 0))


def mean_of(values: np.ndarray, among: np.ndarray | float = 1.0) -> tuple[float, np.ndarray, np.ndarray]:
    """The mean over pairs (pairs,), or over those `among` which are 1, as (value, influence of each pair, zeros)."""
    share = np.mean(among)
    if not share > 0:
        return math.nan, np.full(len(values), math.nan), NO_EXCESS
    value = np.mean(values * among) / share
    return value, among * (values - value) / (share * len(values)), NO_EXCESS


def by_user(influence: np.ndarray, users: np.ndarray) -> np.ndarray:
    """Influence of users (users, ...) from that of their pairs (pairs, ...)."""
    summed = np.zeros((users.max() + 1, *influence.shape[1:]))
    np.add.at(summed, users, influence)
    return summed


def calibration_error(margin: np.ndarray, users: np.ndarray, bins: int = 15) -> tuple[float, np.ndarray, np.ndarray]:
    """Expected calibration error of p(Option A) (Naeini et al. 2015) as (value, influence of each pair, excess).

    p(Option A) is sigma(margin) where the preferred film is Option A and sigma(-margin) where it is Option B. Chance
    moves the mean of a bin, and of absolute values that is always up: by the excess of a folded normal, the most where
    a bin's true mean is 0.
    """
    p_a = expit(margin * np.array([1, -1]))
    if np.isnan(p_a).any():
        return math.nan, np.full(len(margin), math.nan), NO_EXCESS
    index = np.minimum((p_a * bins).astype(int), bins - 1)
    gaps = ([[1.0, 0.0]] - p_a)[..., None] * (index[..., None] == np.arange(bins))
    gaps = gaps.mean(axis=1)  # (pairs, bins)
    means = gaps.mean(axis=0)
    influence = (gaps - means) / len(gaps)
    noise = np.sqrt((by_user(influence, users) ** 2).sum(axis=0))
    far = np.abs(means) / np.where(noise > 0, noise, np.inf)
    most = noise * math.sqrt(2 / math.pi)
    folded = most * np.exp(-(far**2) / 2) - 2 * np.abs(means) * ndtr(-far) * (noise > 0)
    return np.abs(means).sum(), influence @ np.sign(means), np.array([most.sum(), folded.sum()])


def temperature(margin: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """The T for which sigma(margin / T) is likeliest (Guo et al. 2017) as (value, influence of each pair, zeros).

    nan where no T from 0.01 to 100 is: where margins are right always, or no more often than wrong.
    """
    def slopes(inverse: float) -> np.ndarray:
        return (margin * expit(-inverse * margin)).mean(axis=1)

    if not slopes(0.01).mean() > 0 > slopes(100.0).mean() + 1e-12:
        return math.nan, np.full(len(margin), math.nan), NO_EXCESS
    inverse = brentq(lambda inverse: slopes(inverse).mean(), 0.01, 100.0)
    curvature = (margin**2 * expit(inverse * margin) * expit(-inverse * margin)).mean()
    return 1 / inverse, -slopes(inverse) / (curvature * inverse**2 * len(margin)), NO_EXCESS


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

def scope_of(parts: Sequence[Measured]) -> str:
    """`method` where each trained arm has three runs, so that another run's result can be told; else `adapters`."""
    return "method" if all(len(part.seeds) >= RUNS_FOR_METHOD for part in parts if part.trained) else "adapters"


def half_width(parts: Sequence[Measured]) -> float:
    """Half of the 95% interval of a sum of independent parts, each the mean over its runs.

    Over users and runs where the scope is the method, and over users alone where it is the adapters. The variance of
    run means S^2 holds the noise with which each run answers its users, so that this share is left out of the
    variance over users V. Both are estimates, and sqrt(t^2 V + sum of t_{k-1}^2 S^2 / k) covers at least as often as
    it says (Banerjee 1960, Sankhya 22).
    """
    users = parts[0].influence.shape[1]
    over_users = (sum(part.influence.mean(axis=0) for part in parts) ** 2).sum()
    over_runs = 0.0
    for part in parts if scope_of(parts) == "method" else ():
        if part.trained:
            runs = len(part.seeds)
            over_users -= ((part.influence - part.influence.mean(axis=0)) ** 2).sum() / (runs * (runs - 1))
            over_runs += stdtrit(runs - 1, 0.975) ** 2 * part.values.var(ddof=1) / runs
    over_users = np.maximum(0, over_users) * users / (users - 1)
    return float(np.sqrt(stdtrit(users - 1, 0.975) ** 2 * over_users + over_runs))


def estimate(name: str, measured: Measured) -> dict[str, Any]:
    """A measure's value and 95% interval, within the measure's limits, and the value of each trained run.

    The interval ends below at the value less the most that chance adds to it, above at the value less what it adds on
    average, and holds the value.
    """
    value, half = measured.values.mean(), half_width([measured])
    most, usual = measured.excess
    ends = np.clip([value - most - half, max(value, value - usual + half)], *UNITS[MEASURES[name][1]][1:])
    found = {"value": number(value), "low": number(ends[0]), "high": number(ends[1])}
    if measured.trained and measured.seeds != ("",) and not math.isnan(value):
        found["runs"] = {seed: number(one) for seed, one in zip(measured.seeds, measured.values, strict=True)}
    return found


def difference(one: Measured, other: Measured) -> list[Measured]:
    """One measure of two arms as the parts of their difference: one where their runs are paired by seed, else two."""
    if one.seeds == other.seeds and one.trained == other.trained:
        return [one._replace(values=one.values - other.values, influence=one.influence - other.influence)]
    return [one, negated(other)]


def negated(measured: Measured) -> Measured:
    return measured._replace(values=-measured.values, influence=-measured.influence)


def difference_interval(parts: Sequence[Measured], pairs: float, users: float) -> dict[str, Any]:
    """A difference of two arms' accuracies in points with its 95% interval and, where runs are paired, that of each.

    The ends are moved apart by the continuity correction 1/n on each side (Fleiss, Levin & Paik 2003, ch. 13, for
    paired proportions), since the difference moves in steps. Half of it is no less than the share of users who may
    differ where none of these does (Clopper & Pearson 1934). Where users' differences are skewed, the end on that side
    moves out (Hall 1992, J. R. Stat. Soc. B 54). The other end stays, to be safe. pairs, users: of `sizes_of`.
    """
    value = sum(part.values.mean() for part in parts)
    half = max(half_width(parts) + 100 / pairs, 100 * (1 - 0.025 ** (1 / users)))
    of_users = sum(part.influence.mean(axis=0) for part in parts)
    squares = (of_users**2).sum()
    further = (2 * ndtri(0.975) ** 2 + 1) / 6 * (of_users**3).sum() / squares if squares > 0 else 0.0
    low, high = value - half + min(0.0, further), value + half + max(0.0, further)
    found = {"value": number(value), "low": number(low), "high": number(high)}
    if len(parts) == 1 and len(parts[0].seeds) > 1 and not math.isnan(value):
        found["runs"] = {seed: number(one) for seed, one in zip(parts[0].seeds, parts[0].values, strict=True)}
    return found


# -------------------------------------------------------------------------------------- tests of a difference

def mcnemar(right_one: np.ndarray, right_other: np.ndarray) -> float:
    """p of McNemar's exact test on two arms' right (1) or wrong (0) answers to the same users; ties are left out."""
    only_one = np.sum((right_one == 1) & (right_other == 0))
    only_other = np.sum((right_one == 0) & (right_other == 1))
    return float(contingency_tables.mcnemar([[0, only_one], [only_other, 0]], exact=True).pvalue)


def users_needed(found: dict[str, Any], users: int, scope: str) -> dict[str, Any]:
    """What these users can tell, and how many would tell more; the latter are None where runs count, too.

    A difference is told from 0 with 80% power if it is (z_0.975 + z_0.8) / z_0.975 times half the interval, before an
    end of it moves out for the skewness.
    """
    half = min(found["high"] - found["value"], found["value"] - found["low"])
    smallest = (ndtri(0.975) + ndtri(0.8)) / ndtri(0.975) * half
    # Six users on one side are the fewest for which McNemar's exact p is below 0.05; 7.9 are expected where 80% of such
    # counts are six or more
    fewest = 100 * 7.9
    needed = {
        "users_needed_for_2_points": max(math.ceil(fewest / 2), math.ceil(users * (smallest / 2) ** 2)),
        "users_needed_to_decide": math.ceil(users * max(1.0, found["high"] - found["low"]) ** 2),
    }
    needed = needed if scope == "adapters" else dict.fromkeys(needed)
    return {"detectable_points": number(max(smallest, fewest / users)), **needed}
