"""Measures of an arm, intervals over users and seeds, and tests of a difference."""

from math import comb

import numpy as np
import pandas as pd
import pytest
from benchmarks import simulation
from conftest import predictions_of
from scipy import stats
from scipy.special import expit

from data.measures import (
    MEASURES,
    bootstrap_means,
    calibration_columns,
    compute_metrics,
    detectable_difference,
    difference_interval,
    estimate,
    generation_measures,
    holm,
    mcnemar,
    over_seeds,
    percentile_interval,
    reduce_columns,
    user_measures,
)

# ---------------------------------------------------------------------------------------- measures of one arm


def test_measures_are_what_arithmetic_says():
    always_a = np.tile([1.0, -1.0], (40, 1))
    perfect = np.full((40, 2), 2.0)
    only_in_a = np.tile([3.0, -1.0], (40, 1))
    metrics = compute_metrics(predictions_of(a=always_a, perfect=perfect, only_a=only_in_a), 100, 0)
    found = {arm: {name: measures[name]["value"] for name in MEASURES} for arm, measures in metrics["arms"].items()}
    assert (found["a"]["ranking_accuracy"], found["a"]["position_bias"], found["a"]["swap_consistency"]) == (50, 100, 0)
    assert found["a"]["order_free_accuracy"] == 50, "ties count one half"
    assert (found["perfect"]["ranking_accuracy"], found["perfect"]["position_bias"]) == (100, 0)
    assert (found["perfect"]["swap_consistency"], found["perfect"]["decision_margin"]) == (100, 2)
    assert (found["only_a"]["ranking_accuracy"], found["only_a"]["order_free_accuracy"]) == (50, 100)
    assert metrics["comparisons"] == {}


def test_calibration_is_that_of_the_probability_of_option_a():
    random = np.random.default_rng(3)
    decision = random.normal(0.3, 1.5, (500, 2))
    p_a = np.concatenate([1 / (1 + np.exp(-decision[:, 0])), 1 / (1 + np.exp(decision[:, 1]))])
    is_a = np.concatenate([np.ones(500), np.zeros(500)])
    edges = np.linspace(0, 1, 16)
    wanted = 0.0
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        inside = (p_a >= low) & (p_a < high)
        if inside.any():
            wanted += inside.mean() * abs(is_a[inside].mean() - p_a[inside].mean())
    columns = user_measures(decision, decision, decision, decision, np.ones(500))
    found = {name: reduce_columns(name, value.mean(axis=0)) for name, value in columns.items()}
    assert found["calibration_error"] == pytest.approx(wanted)
    assert found["brier_score"] == pytest.approx(np.mean((p_a - is_a) ** 2))
    assert reduce_columns("calibration_error", calibration_columns(np.zeros((9, 2))).mean(axis=0)) == 0


def test_popularity_and_personalisation_measures():
    decision = np.array([[1.0, 1.0], [1.0, -1.0], [-1.0, -1.0], [2.0, 2.0]])
    stranger = np.array([[1.0, -1.0], [1.0, -1.0], [-1.0, -1.0], [-2.0, -2.0]])
    more_popular = np.array([1.0, 0.0, 0.0, np.nan])
    columns = user_measures(decision, decision, stranger, -decision, more_popular)
    found = {name: float(reduce_columns(name, value.mean(axis=0))) for name, value in columns.items()}
    assert found["accuracy_with_popularity"] == 1
    assert found["accuracy_against_popularity"] == 0.25
    assert found["personalisation_gap"] == pytest.approx((0.5 + 0 + 0 + 1) / 4)
    assert found["precision_consistency"] == 0


def test_shares_of_generated_answers_count_those_that_recommend_nothing():
    said = {"answer": ["A", "B", "", ""], "own_genre": [True, False, False, False], "foreign_genre": [False] * 4}
    rows = pd.DataFrame({"seed": "1", "pair_id": "x", "order": "A", **said})
    found = generation_measures(rows)
    assert (found["answers"], found["cites_foreign_genre"]) == (4, 0)
    shares = (found["parsed"], found["right"], found["repeat_consistency"], found["cites_own_genre"])
    assert shares == (0.5, 0.25, 0.25, 0.25)
    torn = [rows.assign(seed=seed, answer=answer) for seed, answer in (("1", "A"), ("2", "B"))]
    assert generation_measures(pd.concat(torn))["repeat_consistency"] == 1, "each run agrees with itself"


def test_differences_are_given_for_each_measure_that_is_compared():
    random = np.random.default_rng(2)
    sft, dpo = random.normal(size=(2, 300, 2))
    rows = predictions_of(sft=sft, dpo=dpo)
    rows.loc[rows["arm"] == "dpo", "response_margin"] = 1.0
    metrics = compute_metrics(rows, 300, 0)
    found, arms = metrics["comparisons"]["dpo - sft"], metrics["arms"]
    for name in ("order_free_accuracy", "response_accuracy"):
        assert found[name]["value"] == pytest.approx(arms["dpo"][name]["value"] - arms["sft"][name]["value"], abs=1e-6)
        assert found[name]["low"] < found[name]["value"] < found[name]["high"]
    assert found["response_accuracy"]["low"] > 40


# -------------------------------------------------------------------------------------------------- intervals


def test_seeds_widen_the_interval_by_their_spread():
    random = np.random.default_rng(1)
    users = 400
    sft = np.repeat(random.choice([-1.0, 1.0], users, p=[0.4, 0.6])[:, None], 2, axis=1)
    drawn = [random.choice([-1.0, 1.0], users, p=[1 - right, right]) for right in (0.5, 0.65, 0.8)]
    runs = [np.repeat(margin[:, None], 2, axis=1) for margin in drawn]
    rows = [predictions_of(sft=sft)]
    for seed, margin in enumerate(runs):
        rows.append(predictions_of(dpo=margin).assign(seed=str(seed)))
    many = compute_metrics(pd.concat(rows), 2000, 0)
    backwards = pd.concat([rows[0], *rows[:0:-1]])
    assert compute_metrics(backwards, 2000, 0) == many, "in whatever order runs are given"
    one = compute_metrics(pd.concat([rows[0], rows[2]]), 2000, 0)
    assert many["arms"]["dpo"]["seeds"] == 3
    value = many["arms"]["dpo"]["ranking_accuracy"]
    assert value["value"] == pytest.approx(100 * np.mean([(run[:, 0] > 0).mean() for run in runs]))
    width = [np.ptp([found["comparisons"]["dpo - sft"][end] for end in ("low", "high")]) for found in (many, one)]
    assert width[0] > 1.5 * width[1]


def test_the_spread_of_seeds_counts_where_a_resample_has_no_user_of_a_kind():
    """As of users whose preferred film is the less popular one, where there are few."""
    values = np.random.default_rng(0).normal([60, 70, 80], 1, (2000, 3))
    some = values.copy()
    some[::100] = np.nan
    spread = [np.ptp(percentile_interval(over_seeds(part, 1))) for part in (values, some)]
    assert spread[1] == pytest.approx(spread[0], rel=0.1) and spread[0] > 20
    assert np.isnan(over_seeds(np.full((9, 3), np.nan), 1)).all()


def test_no_interval_leaves_what_a_measure_can_be():
    runs = [predictions_of(dpo=np.full((40, 2), margin)) for margin in (1.0, 1.0, -1.0)]
    rows = pd.concat([run.assign(seed=str(seed)) for seed, run in enumerate(runs)])
    found = compute_metrics(rows, 500, 0)["arms"]["dpo"]
    accuracy, brier = found["ranking_accuracy"], found["brier_score"]
    assert (accuracy["low"], accuracy["high"], brier["low"]) == (0, 100, 0)
    assert found["decision_margin"]["low"] < -1, "a margin has no limits"


def test_the_interval_of_the_calibration_error_is_about_the_error():
    """A resample adds to it what chance had added already: percentiles of resamples lie above the truth."""
    random = np.random.default_rng(3)
    many = random.normal(0, 1.2, 1_000_000)
    truth = np.abs(expit(many) - expit(many / 1.5)).mean()  # of an arm that is too sure
    covered = 0
    for _ in range(100):
        towards_a = random.normal(0, 1.2, 1000)
        right = random.random(1000) < expit(towards_a / 1.5)
        decision = np.column_stack([towards_a[right][:200], -towards_a[~right][:200]])
        columns = calibration_columns(decision)
        value = reduce_columns("calibration_error", columns.mean(axis=0))
        samples = reduce_columns("calibration_error", bootstrap_means(columns, 300, 0))
        found = estimate("calibration_error", value, samples)
        assert found["low"] <= found["value"] <= found["high"]
        covered += found["low"] <= truth <= found["high"]
    assert covered >= 80, "by percentiles 8 of 100"


def test_intervals_cover_the_truth_and_chance_is_not_called_support():
    """4,000 simulated studies of 300 users; tests/benchmarks/simulation.py has more users, differences and seeds."""
    none = simulation.simulate(users=300, difference=0, seeds=1, studies=4000, resamples=2000)
    assert 0.94 <= none["coverage"] <= 0.97 and none["SUPPORTED"] <= 0.025
    three = simulation.simulate(users=300, difference=0, seeds=3, studies=1000, resamples=1000, spread=8)
    assert three["coverage"] >= 0.93, "plain resampling of three seeds covers 80%"
    seen = simulation.simulate(users=300, difference=10, seeds=1, studies=1000, resamples=1000)
    assert seen["SUPPORTED"] > 0.8 and 0.93 <= seen["coverage"] <= 0.97


def test_the_paired_bootstrap_agrees_with_scipy():
    random = np.random.default_rng(5)
    values = np.column_stack([random.random(150) < 0.7, random.random(150) < 0.6]).astype(float)
    samples = bootstrap_means(values, 20_000, seed=1)
    low, high = percentile_interval(samples[:, 0] - samples[:, 1])
    how = {"paired": True, "n_resamples": 20_000, "method": "percentile", "rng": 2}
    drawn = stats.bootstrap((values[:, 0], values[:, 1]), lambda x, y, axis: x.mean(axis) - y.mean(axis), **how)
    assert (low, high) == pytest.approx(tuple(drawn.confidence_interval), abs=0.01)


# -------------------------------------------------------------------------------------- tests of a difference


def test_the_interval_of_a_difference_is_moved_apart_by_one_user_on_each_side():
    assert difference_interval(np.full(10, 5.0), users=50) == (3, 7)


def test_mcnemar_and_detectable_difference():
    one, other = np.array([1] * 15 + [0] * 5 + [1] * 30), np.array([0] * 15 + [1] * 5 + [1] * 30)
    by_hand = 2 * sum(comb(20, k) for k in range(6)) / 2**20
    assert mcnemar(one, other) == mcnemar(other, one) == pytest.approx(by_hand)
    assert mcnemar(one, one) == 1, "no user tells them apart"
    assert mcnemar(np.ones(6), np.zeros(6)) == pytest.approx(2 / 2**6)
    ties = np.array([0.5] * 9)
    assert mcnemar(np.concatenate([one, ties]), np.concatenate([other, np.ones(9)])) == pytest.approx(by_hand)
    differences = np.random.default_rng(0).normal(0, 10, 400)
    shift = detectable_difference(differences)
    power = stats.norm.cdf(shift / (differences.std(ddof=1) / 20) - stats.norm.ppf(0.975))
    assert power == pytest.approx(0.8, abs=1e-6)


def test_holm_is_the_step_down_correction():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []
