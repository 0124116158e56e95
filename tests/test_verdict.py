"""Verdict, caveats and the sentence to quote."""

import numpy as np
import pandas as pd
import pytest
from conftest import predictions_of
from scipy import stats

from data.measures import compute_metrics
from data.report import summary
from data.verdict import judge, verdict


def judged(rows: pd.DataFrame, resamples: int) -> dict:
    return judge(compute_metrics(rows, resamples, 0))


def test_verdict_rules():
    for difference, low, high, wanted in [
        (3.0, 0.5, 5.5, "SUPPORTED"),
        (-2.0, -3.5, -0.5, "NOT SUPPORTED"),
        (0.3, -0.4, 0.9, "PARTIAL: comparable"),
        (1.5, 0.4, 2.6, "PARTIAL: small gain"),
        (3.0, -1.0, 7.0, "INCONCLUSIVE"),
        (-3.0, -7.0, 1.0, "INCONCLUSIVE"),
    ]:
        assert verdict(difference, low, high) == wanted


@pytest.mark.parametrize("users", [300, 1208, 6040])
@pytest.mark.parametrize("points", [1, 3, 5])
def test_a_dpo_that_is_better_on_some_users_gets_the_verdict_of_arithmetic(users, points):
    """DPO is right where SFT is, and on `points` percent of the users more: the bootstrap counts draws of those."""
    gained = round(points * users / 100)
    right = np.arange(users) < 0.6 * users
    better = right | (np.arange(users) >= users - gained)
    is_right = {"sft": right, "dpo": better}
    arms = {name: np.repeat(np.where(users_of, 1.0, -1.0)[:, None], 2, axis=1) for name, users_of in is_right.items()}
    metrics = judged(predictions_of(**arms), 2000)
    found = metrics["comparisons"]["dpo - sft"]
    share = gained / users
    ends = ((0.025, -1), (0.975, 1))
    low, high = (100 / users * (stats.binom.ppf(level, users, share) + step) for level, step in ends)
    assert found["value"] == pytest.approx(100 * share)
    assert found["low"] == pytest.approx(low, abs=110 / users)
    assert found["high"] == pytest.approx(high, abs=110 / users)
    assert found["p"] == pytest.approx(2 * 0.5**gained)
    wanted = {(300, 1): "INCONCLUSIVE", (1208, 1): "PARTIAL: small gain", (6040, 1): "PARTIAL: small gain"}
    assert metrics["verdict"] == wanted.get((users, points), "SUPPORTED")
    assert f"{found['value']:+.1f} percentage points" in metrics["sentence"]


def test_without_both_arms_there_is_no_verdict():
    metrics = judged(predictions_of(a=np.ones((40, 2)), sft=np.ones((40, 2))), 100)
    assert not {"verdict", "caveats", "sentence"} & set(metrics) and "no verdict" in summary(metrics)


def test_an_arm_that_answers_one_letter_is_told_so():
    always_b = np.tile([-1.0, 1.0], (40, 1))
    found = judged(predictions_of(sft=always_b, dpo=always_b), 100)
    assert any("dpo answers B" in caveat for caveat in found["caveats"])


def test_two_arms_that_answer_one_letter_are_not_called_comparable():
    always_b = np.tile([-1.0, 1.0], (400, 1))
    metrics = judged(predictions_of(sft=always_b, dpo=always_b), 100)
    assert (metrics["comparisons"]["dpo - sft"]["low"], metrics["verdict"]) == (-0.25, "INCONCLUSIVE")
    assert "both answer one letter" in metrics["sentence"] and "users needed" not in summary(metrics)
    each_its_own = [predictions_of(sft=sign * always_b, dpo=sign * always_b) for sign in (1, -1)]
    metrics = judged(pd.concat([run.assign(seed=str(seed)) for seed, run in enumerate(each_its_own)]), 100)
    assert metrics["verdict"] == "INCONCLUSIVE"
    assert any("dpo answers one letter" in caveat for caveat in metrics["caveats"])
    fair = np.where(np.arange(400)[:, None] % 2, [1.0, 1.0], [-1.0, -1.0])
    metrics = judged(predictions_of(sft=fair, dpo=fair), 100)
    assert metrics["verdict"] == "PARTIAL: comparable"


def test_dpo_is_compared_with_longer_sft_too():
    random = np.random.default_rng(1)
    level = random.uniform(size=(600, 1))
    sft, longer, dpo = (np.repeat(np.where(level < share, 1.0, -1.0), 2, axis=1) for share in (0.6, 0.7, 0.7))
    metrics = judged(predictions_of(sft=sft, sft_long=longer, dpo=dpo), 300)
    assert metrics["verdict"] == "SUPPORTED" and metrics["comparisons"]["dpo - sft_long"]["value"] == 0
    assert any("not clearly than sft_long" in caveat for caveat in metrics["caveats"])
    best = np.repeat(np.where(level < 0.8, 1.0, -1.0), 2, axis=1)
    metrics = judged(predictions_of(sft=sft, sft_long=best, dpo=dpo), 300)
    assert any("worse than sft_long" in caveat for caveat in metrics["caveats"])
    assert summary(metrics).endswith("verdict: SUPPORTED; against sft_long: NOT SUPPORTED")
    quoted = metrics["sentence"]
    assert "over this SFT. From the SFT control sft_long (8" in quoted, "a gain that more SFT beats is not quoted alone"
    assert "which speaks against DPO improving ranking adherence over that one" in quoted
    metrics = judged(predictions_of(sft=sft, sft_long=sft, dpo=dpo), 300)
    assert not any("than sft_long" in caveat for caveat in metrics["caveats"])


def test_an_arm_loses_to_a_baseline_only_where_the_interval_says_so():
    level = np.random.default_rng(4).uniform(size=(400, 1))
    order = np.random.default_rng(5).permutation(400)  # right for other users, so that the difference is uncertain
    models = {"sft": 0.6, "dpo": 0.7, "sft_long": 0.71}
    shares = models | {"popularity": 0.8, "co-occurrence": 0.72, "genre overlap": 0.5}
    margins = {arm: np.repeat(np.where(level < share, 1.0, -1.0), 2, axis=1) for arm, share in shares.items()}
    margins["co-occurrence"] = margins["co-occurrence"][order]
    rows = predictions_of(**margins)
    rows.loc[~rows["arm"].isin(models), "kind"] = "baseline"
    told = judged(rows, 300)["caveats"]
    for arm in ("dpo", "sft_long"):
        [lost] = [caveat for caveat in told if caveat.startswith(arm) and "loses to" in caveat]
        assert "taking the more popular film" in lost and "co-occurrence" not in lost
        says = "not shown to be better than co-occurrence"
        [open_] = [caveat for caveat in told if caveat.startswith(arm) and says in caveat]
        assert "popular" not in open_
    assert not any("genre overlap" in caveat for caveat in told)


def test_chance_against_popularity_is_told():
    popular = np.arange(60) % 3 > 0
    follows = np.repeat(np.where(popular, 1.0, -1.0)[:, None], 2, axis=1)
    rows = predictions_of(sft=follows, dpo=np.ones((60, 2)))
    margins = np.tile(rows[rows["arm"] == "sft"]["decision_margin"], 2)
    rows["preferred_more_popular"] = [str(bool(margin > 0)).lower() for margin in margins]
    told = [text for text in judged(rows, 100)["caveats"] if "less popular film is the right one" in text]
    assert len(told) == 1 and told[0].startswith("sft is not shown to be better than chance")


def test_a_gain_that_is_only_less_position_bias_is_told_so():
    """Both arms prefer the same films; one of them leans so much to B that its letter says so half the time."""
    random = np.random.default_rng(0)
    preference = random.normal(0.5, 1, 400)
    leaning, fair = (np.column_stack([preference - lean, preference + lean]) for lean in (1.5, 0.0))
    metrics = judged(predictions_of(sft=leaning, dpo=fair), 500)
    assert metrics["verdict"] == "SUPPORTED"
    assert any("not which film they prefer" in caveat for caveat in metrics["caveats"])
    better = np.column_stack([preference + 1, preference + 1])
    metrics = judged(predictions_of(sft=fair, dpo=better), 500)
    assert metrics["verdict"] == "SUPPORTED" and not any("not which film" in caveat for caveat in metrics["caveats"])


def test_an_arm_of_one_training_run_is_told():
    rows = [predictions_of(sft=np.ones((40, 2))), *(predictions_of(dpo=np.ones((40, 2))) for _ in range(3))]
    rows = [run.assign(seed=str(seed)) for seed, run in enumerate(rows)]
    assert [caveat for caveat in judged(pd.concat(rows), 100)["caveats"] if "one training run" in caveat] == [
        "one training run of sft: what another seed would give there is not in the intervals"
    ]
    told = judged(pd.concat(rows[:2]), 100)["caveats"]
    assert "one training run an arm: what another seed would give is not in the interval" in told
