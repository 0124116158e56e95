"""Measures of an arm, intervals over users and seeds, and tests of a difference."""

from collections import Counter
from math import comb

import numpy as np
import pandas as pd
import pytest
from benchmarks import simulation
from conftest import make_pairs, predictions_of
from scipy import stats
from scipy.special import expit

from data.errors import UserError
from data.measures import (
    MEASURES,
    Measured,
    by_user,
    calibration_error,
    compute_metrics,
    difference,
    difference_interval,
    estimate,
    generation_measures,
    half_width,
    interaction,
    mcnemar,
    mean_of,
    temperature,
)
from data.predictions import completed, prediction_rows
from data.runs import Lineage

# ---------------------------------------------------------------------------------------- measures of one arm


def test_measures_are_what_arithmetic_says():
    always_a = np.tile([1.0, -1.0], (40, 1))
    perfect = np.full((40, 2), 2.0)
    only_in_a = np.tile([3.0, -1.0], (40, 1))
    metrics = compute_metrics(predictions_of(a=always_a, perfect=perfect, only_a=only_in_a))
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
    found = compute_metrics(predictions_of(sft=decision))["arms"]["sft"]
    assert found["calibration_error"]["value"] == pytest.approx(wanted, abs=1e-6)
    assert found["brier_score"]["value"] == pytest.approx(np.mean((p_a - is_a) ** 2), abs=1e-6)
    assert calibration_error(np.zeros((9, 2)), np.arange(9))[0] == 0


def test_the_temperature_is_the_one_that_makes_probabilities_true():
    random = np.random.default_rng(0)
    margin = random.normal(0, 1, (40_000, 1))
    shown = np.where(random.random(margin.shape) < expit(margin), 1, -1) * margin * 12  # twelve times too sure
    found = compute_metrics(predictions_of(sft=np.repeat(shown, 2, axis=1)[:2000]))["arms"]["sft"]["temperature"]
    assert temperature(shown)[0] == pytest.approx(12, rel=0.03) and found["low"] < 12 < found["high"]
    for none in (np.ones((9, 2)), -np.ones((9, 2))):
        assert np.isnan(temperature(none)[0]), "always right, or no better than chance"


def test_popularity_and_personalisation_measures():
    decision = np.array([[1.0, 1.0], [1.0, -1.0], [-1.0, -1.0], [2.0, 2.0]]).repeat(30, axis=0)
    stranger = np.array([[1.0, -1.0], [1.0, -1.0], [-1.0, -1.0], [-2.0, -2.0]]).repeat(30, axis=0)
    own = predictions_of(sft=decision, **{"sft@16bit": -decision})
    rows = pd.concat([own, predictions_of(sft=stranger).assign(history="stranger")])
    rows = rows.assign(user_id=rows["pair_id"], preferred_count=0, other_count=0)
    order = own["pair_id"].unique()  # the more popular, the less popular twice, as popular
    for number, counts in enumerate(((3, 1), (1, 2), (1, 5), (4, 4))):
        of = rows["pair_id"].isin(order[30 * number : 30 * number + 30])
        rows.loc[of, ["preferred_count", "other_count"]] = counts
    arms = compute_metrics(completed(rows))["arms"]
    found = {name: measure["value"] for name, measure in arms["sft"].items() if name in MEASURES}
    assert found["accuracy_with_popularity"] == 100
    assert found["accuracy_against_popularity"] == 25
    assert found["popularity_balanced_accuracy"] == 62.5
    assert found["accuracy_similar_popularity"] == 75, "1 and 2, 4 and 4"
    assert found["personalisation_gap"] == pytest.approx(100 * (0.5 + 0 + 0 + 1) / 4)
    assert arms["sft@16bit"]["precision_consistency"]["value"] == 0
    few = compute_metrics(completed(rows[rows["pair_id"] != order[0]]))["arms"]["sft"]
    assert few["accuracy_with_popularity"]["value"] is None, "29 users: an interval would cover too seldom"
    assert few["accuracy_against_popularity"]["value"] == 25


def test_dpo_is_measured_by_its_own_probability_against_its_reference():
    """sigma(beta (m - m_ref)), of the reference's run of the same seed, or its only one, in the same precision."""
    random = np.random.default_rng(1)
    pairs, parts, chosen = make_pairs(300), [], {}
    for arm, seed in [("sft", "1"), ("sft", "2"), ("dpo", "1"), ("dpo", "2"), ("sft@8bit", "1"), ("dpo@8bit", "2")]:
        scores = random.normal([[[-20.0]], [[-30.0]]], 3, (2, 300, 2)).round(6)
        chosen[arm, seed] = scores
        about = Lineage("sft", 0.1, 90) if arm.startswith("dpo") else Lineage(pairs_seen=30)
        decision = random.normal(size=(300, 2))
        parts.append(prediction_rows(arm, "model", seed, "own", pairs, Counter(), decision, *scores, about=about))
    arms = compute_metrics(pd.concat(parts))["arms"]
    changes = [chosen["dpo", seed] - chosen["sft", seed] for seed in "12"]
    for number, name in enumerate(("chosen_change", "rejected_change")):
        assert arms["dpo"][name]["value"] == pytest.approx(np.mean([change[number] for change in changes]), abs=1e-6)
        assert arms["sft"][name]["value"] is None
    own = [expit(0.1 * (change[0] - change[1])) for change in changes]
    wanted = np.mean([(1 - probability) ** 2 for probability in own])
    assert arms["dpo"]["dpo_brier_score"]["value"] == pytest.approx(wanted, abs=1e-6)
    alone = chosen["dpo@8bit", "2"][0] - chosen["sft@8bit", "1"][0]
    assert arms["dpo@8bit"]["chosen_change"]["value"] == pytest.approx(alone.mean(), abs=1e-6)
    assert (arms["dpo"]["reference"], arms["dpo"]["beta"], arms["dpo"]["pairs_seen"]) == ("sft", 0.1, 90)
    assert (arms["sft"]["reference"], arms["sft"]["beta"], arms["sft"]["pairs_seen"]) == (None, None, 30)


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
    metrics = compute_metrics(rows)
    found, arms = metrics["comparisons"]["dpo - sft"], metrics["arms"]
    for name in ("order_free_accuracy", "response_accuracy"):
        assert found[name]["value"] == pytest.approx(arms["dpo"][name]["value"] - arms["sft"][name]["value"], abs=1e-6)
        assert found[name]["low"] < found[name]["value"] < found[name]["high"]
    assert found["response_accuracy"]["low"] > 40


# -------------------------------------------------------------------------------------------------- intervals


def runs_of(*shares: float, users: int = 400, arm: str = "dpo") -> list[pd.DataFrame]:
    """Rows of one run per share: the share of users for whom it is right in both orders."""
    random = np.random.default_rng(1)
    right = [random.choice([-1.0, 1.0], users, p=[1 - share, share]) for share in shares]
    made = [predictions_of(**{arm: np.repeat(margin[:, None], 2, axis=1)}) for margin in right]
    return [rows.assign(seed=str(seed)) for seed, rows in enumerate(made)]


def test_three_runs_widen_the_interval_by_their_spread_and_two_do_not():
    sft, dpo = runs_of(0.6, 0.6, 0.6, arm="sft"), runs_of(0.5, 0.65, 0.8)
    found = {count: compute_metrics(pd.concat([*sft[:count], *dpo[:count]])) for count in (1, 2, 3)}
    assert compute_metrics(pd.concat([*sft, *dpo[::-1]])) == found[3], "in whatever order runs are given"
    value = found[3]["arms"]["dpo"]["ranking_accuracy"]
    assert value["value"] == pytest.approx(np.mean([*value["runs"].values()])) and len(value["runs"]) == 3
    compared = {count: metrics["comparisons"]["dpo - sft"] for count, metrics in found.items()}
    assert [compared[count]["scope"] for count in found] == ["adapters", "adapters", "method"]
    assert list(compared[3]["runs"]) == ["0", "1", "2"], "of each seed"
    width = {count: difference["high"] - difference["low"] for count, difference in compared.items()}
    assert width[3] > 3 * width[1] > 3 * width[2], "two runs: over users alone"


def test_runs_are_paired_by_their_seed_where_two_arms_have_the_same():
    """Where a run's luck is its seed's, its arms go up and down together, and their difference does not."""
    sft, dpo = (runs_of(0.5, 0.6, 0.7, 0.7, arm=arm) for arm in ("sft", "dpo"))
    paired, unpaired, of_others = (
        compute_metrics(pd.concat(runs))["comparisons"]["dpo - sft"]
        for runs in (
            [*sft[:3], *dpo[:3]],
            [*sft, *dpo[:3]],
            [*sft[:3], *(rows.assign(seed=f"9{seed}") for seed, rows in enumerate(dpo[:3]))],
        )
    )
    widths = [found["high"] - found["low"] for found in (paired, unpaired, of_others)]
    assert 10 * widths[0] < widths[1] < widths[2] and "runs" not in unpaired | of_others
    assert {found["scope"] for found in (paired, unpaired, of_others)} == {"method"}


def test_several_pairs_of_a_user_do_not_narrow_the_interval():
    one = predictions_of(sft=np.where(np.arange(100) % 5 > 1, 1.0, -1.0)[:, None] * np.ones((1, 2)))
    copies = [one.assign(pair_id=one["pair_id"] + str(copy)) for copy in range(10)]
    users, pairs = (compute_metrics(rows) for rows in (one, pd.concat(copies)))
    assert (users["users"], users["pairs"]) == (100, 100) and (pairs["users"], pairs["pairs"]) == (100, 1000)
    assert pairs["arms"] == users["arms"]
    few = pd.concat([copies[0], copies[1][copies[1]["user_id"].isin(one["user_id"].unique()[:40])]])
    ratio = compute_metrics(few)["arms"]["sft"]["ranking_accuracy"]["value"]
    right = few["decision_margin"] > 0
    assert ratio == pytest.approx(100 * right.mean(), abs=1e-6), "a mean over pairs"


def test_the_variance_over_users_is_that_of_leaving_each_out():
    """Influences are what a jackknife over users finds, for a ratio and a temperature as for a mean."""
    random = np.random.default_rng(2)
    margin, users = random.normal(0.5, 1, (900, 2)), random.integers(0, 300, 900)
    users = np.unique(users, return_inverse=True)[1]
    among = (random.random(900) < 0.3) * 1.0
    measures = {
        "mean": lambda part: mean_of(margin[part].mean(axis=1)),
        "ratio": lambda part: mean_of((margin[part] > 0).mean(axis=1), among[part]),
        "temperature": lambda part: temperature(margin[part]),
    }
    for name, measure in measures.items():
        influence = by_user(measure(slice(None))[1], users)
        left_out = np.array([measure(users != user)[0] for user in range(users.max() + 1)])
        jackknife = len(left_out) * left_out.var()
        assert (influence**2).sum() == pytest.approx(jackknife, rel=0.05), name


def test_no_interval_leaves_what_a_measure_can_be():
    runs = [predictions_of(dpo=np.full((40, 2), margin)) for margin in (1.0, 1.0, -1.0)]
    rows = pd.concat([run.assign(seed=str(seed)) for seed, run in enumerate(runs)])
    found = compute_metrics(rows)["arms"]["dpo"]
    accuracy, brier = found["ranking_accuracy"], found["brier_score"]
    assert (accuracy["low"], accuracy["high"], brier["low"]) == (0, 100, 0)
    assert found["decision_margin"]["low"] < -1, "a margin has no limits"


@pytest.mark.parametrize("too_sure", [1.0, 1.5])
def test_the_interval_of_the_calibration_error_is_about_the_error(too_sure):
    """Chance adds to a sum of absolute values: an interval about the sum itself lies above the truth."""
    random = np.random.default_rng(3)
    many = random.normal(0, 1.2, 1_000_000)
    truth = np.abs(expit(many) - expit(many / too_sure)).mean()
    covered = 0
    for _ in range(100):
        towards_a = random.normal(0, 1.2, 1000)
        right = random.random(1000) < expit(towards_a / too_sure)
        decision = np.column_stack([towards_a[right][:200], -towards_a[~right][:200]])
        value, influence, excess = calibration_error(decision, np.arange(len(decision)))
        one_run = Measured(("1",), np.array([value]), influence[None], excess, True)
        found = estimate("calibration_error", one_run)
        assert found["low"] <= found["value"] <= found["high"]
        covered += found["low"] <= truth <= found["high"]
    assert covered >= 90


@pytest.mark.parametrize("case", ["plain", "runs correlated by seed", "100 users", "10 pairs a user"])
def test_intervals_of_three_runs_cover_the_truth_and_chance_is_not_called_a_verdict(case):
    """800 simulated studies of no difference; tests/benchmarks/simulation.py has more of them, and more cases."""
    found = simulation.simulate(case, (3, 3), 1, 0, 800)
    assert found["coverage"] >= 0.94 and found["on the method"] == 1
    assert max(found["false SUPPORTED"], found["false NOT SUPPORTED"]) <= 0.025


def test_an_interval_of_one_run_is_of_that_run_and_no_verdict_on_the_method():
    found = simulation.simulate("plain", (1, 1), 2, 0, 800)
    assert 0.93 <= found["coverage"] <= 0.98 and found["on the method"] == 0
    seen = simulation.simulate("plain", (5, 5), 0.5, 5, 300)
    assert seen["SUPPORTED"] > 0.95


# -------------------------------------------------------------------------------------- tests of a difference


def test_the_interval_of_a_difference_is_moved_apart_by_one_pair_on_each_side():
    one = Measured(("1",), np.array([5.0]), np.tile([1.0, -1.0], 25)[None], 0.0, True)
    found, half = difference_interval([one], pairs=100, users=50), half_width([one])
    assert half > 7 and (found["low"], found["high"]) == pytest.approx((5 - half - 1, 5 + half + 1))
    alike = difference_interval([one._replace(influence=np.zeros((1, 3)))], pairs=600, users=3)
    assert alike["high"] > 70, "three users tell little, however many their pairs"


def test_an_interval_on_few_of_the_users_is_no_narrower_than_for_these_alone():
    rows = predictions_of(**dict.fromkeys(("sft", "dpo"), np.ones((400, 2))))
    few = rows["pair_id"].isin(rows["pair_id"].unique()[:40])  # the less popular film, by little
    rows = rows.assign(preferred_count=np.where(few, 4, 9), other_count=np.where(few, 5, 1))
    found = compute_metrics(completed(rows))["comparisons"]["dpo - sft"]
    ends = {name: found[name]["high"] for name in ("accuracy_similar_popularity", "popularity_balanced_accuracy")}
    wanted = [100 * (1 - 0.025 ** (1 / count)) for count in (40, 80, 400)]
    assert [*ends.values(), found["high"]] == pytest.approx(wanted, abs=1e-5)


def test_p_is_of_single_runs_alone_and_corrected_among_them():
    right = {"sft": 0.5, "dpo": 0.7, "strong": 0.6}
    runs = {arm: runs_of(share, share, users=200, arm=arm) for arm, share in right.items()}
    rows = [runs["sft"][0], runs["dpo"][0], *runs["strong"]]
    found = compute_metrics(pd.concat(rows))["comparisons"]
    assert found["dpo - sft"]["p_holm"] == found["dpo - sft"]["p"] < 0.05, "one test"
    assert (found["strong - sft"]["p"], found["strong - sft"]["p_holm"]) == (None, None)


def test_mcnemar_and_the_detectable_difference():
    one, other = np.array([1] * 15 + [0] * 5 + [1] * 30), np.array([0] * 15 + [1] * 5 + [1] * 30)
    by_hand = 2 * sum(comb(20, k) for k in range(6)) / 2**20
    assert mcnemar(one, other) == mcnemar(other, one) == pytest.approx(by_hand)
    assert mcnemar(one, one) == 1, "no user tells them apart"
    assert mcnemar(np.ones(6), np.zeros(6)) == pytest.approx(2 / 2**6)
    ties = np.array([0.5] * 9)
    assert mcnemar(np.concatenate([one, ties]), np.concatenate([other, np.ones(9)])) == pytest.approx(by_hand)
    found = compute_metrics(pd.concat([*runs_of(0.5, arm="sft"), *runs_of(0.6)]))["comparisons"]["dpo - sft"]
    error = min(found["high"] - found["value"], found["value"] - found["low"]) / stats.norm.ppf(0.975)
    power = stats.norm.cdf(found["detectable_points"] / error - stats.norm.ppf(0.975))
    assert power == pytest.approx(0.8, abs=1e-6)


def test_p_values_are_corrected_by_the_step_down_of_holm():
    rows = [run for arm, share in {"sft": 0.5, "dpo": 0.7, "other": 0.65}.items() for run in runs_of(share, arm=arm)]
    found = sorted((found["p"], found["p_holm"]) for found in compute_metrics(pd.concat(rows))["comparisons"].values())
    wanted = np.maximum.accumulate([min(1, (3 - place) * p) for place, (p, _) in enumerate(found)])
    assert [p for _, p in found] == pytest.approx(wanted) and len({p for p, _ in found}) == 3


# ------------------------------------------------------------------------------ does the lead depend on something


def study_of(random: np.random.Generator, lead: float, seeds: int, users: int = 300) -> pd.DataFrame:
    """Predictions of sft, its control and dpo, of several runs; the users' difficulty is the same in each."""
    pair = np.random.default_rng(0).normal(size=(users, 1))
    parts = []
    for seed in range(seeds):
        gains = {"sft": 0, "sft_more": 0.2, "dpo": lead}
        arms = {arm: pair + gain + random.normal(size=(users, 2)) for arm, gain in gains.items()}
        parts.append(predictions_of(**arms).assign(seed=str(seed)))
    return pd.concat(parts)


def test_the_change_of_a_lead_is_the_difference_of_both_leads():
    here, there = (study_of(np.random.default_rng(number), lead, 4) for number, lead in ((1, 0.9), (2, 0.4)))
    found = interaction(here, there)
    leads = [compute_metrics(rows)["comparisons"] for rows in (here, there)]
    for name in ("dpo - sft", "dpo - sft_more"):
        change = found[name]
        assert change["value"] == pytest.approx(leads[0][name]["value"] - leads[1][name]["value"], abs=1e-5)
        assert change["low"] < change["value"] < change["high"] and change["scope"] == "method"
        runs = [leads[0][name]["runs"][seed] - leads[1][name]["runs"][seed] for seed in "0123"]
        assert list(change["runs"].values()) == pytest.approx(runs, abs=1e-5)
    widths = [one["high"] - one["low"] for one in (found["dpo - sft"], leads[0]["dpo - sft"])]
    assert widths[0] > widths[1], "it is less certain than one lead"
    assert change["detectable_points"] == pytest.approx(1.43 * (change["high"] - change["low"]) / 2, rel=0.01)


def test_leads_of_other_seeds_are_compared_too_and_less_surely():
    here, there = (study_of(np.random.default_rng(number), 0.5, 4) for number in (1, 2))
    paired = interaction(here, there)["dpo - sft"]
    other = interaction(here, there.assign(seed=there["seed"].map(lambda seed: f"1{seed}")))["dpo - sft"]
    assert other["value"] == paired["value"] and "runs" not in other


def test_leads_over_other_pairs_are_not_compared():
    random = np.random.default_rng(0)
    with pytest.raises(UserError, match="not of the same test pairs"):
        interaction(study_of(random, 0.5, 3), study_of(random, 0.5, 3, 200))
    with pytest.raises(UserError, match="no arms dpo and sft in common"):
        rows = study_of(random, 0.5, 3)
        interaction(rows, rows[rows["arm"] == "sft"])


def test_what_users_do_to_both_arms_cancels_where_runs_are_not_paired():
    influence = np.random.default_rng(0).normal(size=(1, 50))
    one = Measured(("1",), np.array([60.0]), influence, 0.0, True)
    assert half_width([one]) > 1
    assert half_width(difference(one, one._replace(seeds=("2",)))) == 0


def test_arms_stand_in_one_order_whatever_the_order_of_their_rows():
    rows = predictions_of(dpo=np.ones((4, 2)), other=np.ones((4, 2)), sft_more=np.ones((4, 2)), sft=np.ones((4, 2)))
    assert list(compute_metrics(rows)["arms"]) == ["sft", "sft_more", "dpo", "other"]
