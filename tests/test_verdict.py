"""Verdict, caveats and the sentence to quote."""

import json

import numpy as np
import pandas as pd
import pytest
from conftest import predictions_of
from scipy import stats

import config
from data.files import read_json
from data.measures import NO_EXCESS, Measured, compute_metrics, difference_interval
from data.report import summary
from data.verdict import NO_CONTROL, SAYS, conclusion, interval_text, judge, rounded, verdict


def judged(rows: pd.DataFrame) -> dict:
    return judge(compute_metrics(rows))


def test_verdict_rules():
    for difference, low, high, wanted in [
        (3.0, 0.5, 5.5, "SUPPORTED"),
        (-2.0, -3.5, -0.5, "NOT SUPPORTED"),
        (0.3, -0.4, 0.9, "PARTIAL: comparable"),
        (1.5, 0.4, 2.6, "PARTIAL: small gain"),
        (3.0, -1.0, 7.0, "INCONCLUSIVE"),
        (-3.0, -7.0, 1.0, "INCONCLUSIVE"),
        (0.5, 0.1, 0.9, "PARTIAL: comparable"),  # the first rule that holds
        (-0.5, -0.9, -0.1, "PARTIAL: comparable"),
    ]:
        assert verdict(difference, low, high) == wanted
    assert verdict(0.0, 0.0, 0.0, undecided=True) == "INCONCLUSIVE"


def margins_of_share(users: int, right: float, seed: int = 0) -> np.ndarray:
    """Margins (users, orders) of an arm that is right for this share of users in both orders."""
    level = np.random.default_rng(seed).uniform(size=(users, 1))
    return np.repeat(np.where(level < right, 1.0, -1.0), 2, axis=1)


def runs_of(count: int, seen: dict[str, float] | None = None, **shares: float) -> pd.DataFrame:
    """Arms of so many runs each, which are right for these shares of 600 users, and saw so many pairs."""
    arms = {arm: margins_of_share(600, share) for arm, share in shares.items()}
    rows = pd.concat([predictions_of(**arms).assign(seed=str(seed)) for seed in range(count)])
    return rows.assign(pairs_seen=rows["arm"].map(seen or {}))


@pytest.mark.parametrize("users", [300, 1208, 6040])
@pytest.mark.parametrize("points", [1, 3, 5])
def test_a_dpo_that_is_better_on_some_users_gets_the_verdict_of_arithmetic(users, points):
    """DPO is right where SFT is, and on `points` percent of the users more: an interval of their number."""
    gained = round(points * users / 100)
    right = np.arange(users) < 0.6 * users
    better = right | (np.arange(users) >= users - gained)
    is_right = {"sft": right, "dpo": better}
    arms = {name: np.repeat(np.where(users_of, 1.0, -1.0)[:, None], 2, axis=1) for name, users_of in is_right.items()}
    metrics = judged(predictions_of(**arms))
    found = metrics["comparisons"]["dpo - sft"]
    share = gained / users
    low = 100 / users * (stats.binom.ppf(0.025, users, share) - 1)
    high = 100 * stats.beta.ppf(0.975, gained + 1, users - gained)  # Clopper and Pearson's
    assert found["value"] == pytest.approx(100 * share)
    assert found["low"] == pytest.approx(low, abs=110 / users)
    assert found["high"] == pytest.approx(high, abs=60 / users)
    assert found["p"] == pytest.approx(2 * 0.5**gained)
    wanted = {(300, 1): "INCONCLUSIVE", (1208, 1): "PARTIAL: small gain", (6040, 1): "PARTIAL: small gain"}
    assert metrics["verdict"] == wanted.get((users, points), "SUPPORTED") + " (these adapters)"
    assert f"The difference is {found['value']:+.1f} points" in metrics["sentence"]


def test_without_both_arms_there_is_no_verdict():
    for others in (("a", "sft"), ("sft_more", "dpo")):
        metrics = judged(predictions_of(**dict.fromkeys(others, np.ones((40, 2)))))
        assert not {"verdict", "caveats", "sentence"} & set(metrics) and "no verdict" in summary(metrics)


def test_an_arm_that_answers_one_letter_is_told_so():
    always_b = np.tile([-1.0, 1.0], (40, 1))
    found = judged(predictions_of(sft=always_b, dpo=always_b))
    assert "DPO: it answers B almost always. Its ranking accuracy is about 50% for that reason." in found["caveats"]


def test_two_arms_that_answer_one_letter_are_not_called_comparable():
    always_b = np.tile([-1.0, 1.0], (400, 1))
    metrics = judged(predictions_of(sft=always_b, dpo=always_b))
    assert metrics["comparisons"]["dpo - sft"]["low"] == pytest.approx(100 * (0.025 ** (1 / 400) - 1), abs=1e-6)
    assert metrics["verdict"] == "INCONCLUSIVE (these adapters)"
    assert "DPO and SFT answer one letter almost always, so" in metrics["sentence"]
    assert "always decide" not in summary(metrics)
    each_its_own = [predictions_of(sft=sign * always_b, dpo=sign * always_b) for sign in (1, -1)]
    metrics = judged(pd.concat([run.assign(seed=str(seed)) for seed, run in enumerate(each_its_own)]))
    assert metrics["verdict"] == "INCONCLUSIVE (these adapters)"
    assert any("DPO: it keeps its letter when the options are swapped" in caveat for caveat in metrics["caveats"])
    fair = np.where(np.arange(400)[:, None] % 2, [1.0, 1.0], [-1.0, -1.0])
    metrics = judged(predictions_of(sft=fair, dpo=fair))
    assert metrics["verdict"] == "PARTIAL: comparable (these adapters)"


def test_a_hundred_users_who_do_not_differ_do_not_show_that_arms_are_comparable():
    """A difference of 1.05 points leaves no trace in a third of such studies."""
    same = np.ones((104, 2))
    for runs in (1, 3):
        rows = pd.concat([predictions_of(sft=same, dpo=same).assign(seed=str(seed)) for seed in range(runs)])
        metrics = judged(rows)
        found = metrics["comparisons"]["dpo - sft"]
        assert metrics["verdict"].startswith("INCONCLUSIVE")
        assert (1 - found["high"] / 100) ** 104 == pytest.approx(0.025)
        assert found["detectable_points"] == pytest.approx(790 / 104, abs=1e-4)
        assert found["users_needed_for_2_points"] in (None, 646)


@pytest.mark.parametrize("direction", [1, -1])
@pytest.mark.parametrize("users", [400, 600, 800, 1208])
def test_arms_are_seldom_called_comparable_where_one_is_a_point_better(users, direction):
    """It is right where the other is, and on some users more; their number has an exact distribution."""
    comparable = []
    for number in range(20):
        differs = 100.0 * direction * (np.arange(users) < number)
        influence = (differs - differs.mean()) / users
        one = Measured(("1",), np.array([differs.mean()]), influence[None], NO_EXCESS, True)
        found = difference_interval([one], users, users)
        if verdict(found["value"], found["low"], found["high"]) == "PARTIAL: comparable":
            comparable.append(number)
    assert 0 in comparable and stats.binom.pmf(comparable, users, 0.01).sum() <= 0.025


@pytest.mark.parametrize(("users", "wanted"), [(5, "INCONCLUSIVE (these adapters)"), (6, "SUPPORTED (these adapters)")])
def test_fewer_than_six_users_show_nothing(users, wanted):
    assert judged(predictions_of(sft=-np.ones((users, 2)), dpo=np.ones((users, 2))))["verdict"] == wanted


def test_one_user_of_many_pairs_is_one_user():
    rows = predictions_of(sft=-np.ones((120, 2)), dpo=np.ones((120, 2)))
    pairs = rows["pair_id"].unique()
    heavy = rows.assign(user_id=np.where(rows["pair_id"].isin(pairs[:100]), "one", rows["pair_id"]))
    metrics = judged(heavy)
    assert metrics["verdict"].startswith("INCONCLUSIVE") and metrics["effective_users"] < 2
    assert any("the 21 test users have most of the pairs: they count as 1 " in told for told in metrics["caveats"])


def test_users_who_are_said_to_decide_are_more_than_those_who_do_not():
    """5 of 1,100 differ, all in one direction: the end of the interval that moved out is beyond a point."""
    differ = np.where(np.arange(1100) < 5, -1.0, 1.0)[:, None].repeat(2, axis=1)
    metrics = judged(predictions_of(sft=differ, dpo=np.ones((1100, 2))))
    assert metrics["verdict"].startswith("INCONCLUSIVE")
    assert metrics["comparisons"]["dpo - sft"]["users_needed_to_decide"] > 1100


def test_a_control_of_fewer_pairs_than_sft_is_not_called_longer():
    rows = pd.concat(
        [
            predictions_of(**{arm: np.ones((200, 2))}).assign(pairs_seen=seen)
            for arm, seen in {"sft": 600.0, "sft_tenth": 60.0, "dpo": 1800.0}.items()
        ]
    )
    assert "or another SFT." in judged(rows)["conclusion"] and "longer" not in summary(judged(rows))
    wrong = (rows["arm"] == "sft") & rows["pair_id"].isin(rows["pair_id"].unique()[:80])
    found = judged(rows.assign(decision_margin=np.where(wrong, -1.0, 1.0)))
    assert found["verdict"].startswith("SUPPORTED") and "may explain its lead" not in found["conclusion"]


def test_runs_that_saw_other_numbers_of_pairs_are_not_said_to_have_seen_as_many_as_dpo():
    rows = runs_of(3, {"dpo": 1800.0, "sft": 1800.0, "sft_more": 1800.0}, sft=0.6, sft_more=0.6, dpo=0.7)
    assert "as many pairs as DPO" in judged(rows)["sentence"]
    rows.loc[(rows["arm"] == "sft_more") & (rows["seed"] == rows["seed"].iloc[0]), "pairs_seen"] = 600.0
    assert "as many pairs as DPO" not in judged(rows)["sentence"]


@pytest.mark.parametrize("arm", ["sft", "sft_more"])
def test_a_lean_that_hides_or_feigns_a_difference_is_told_of_each_arm_that_dpo_is_compared_with(arm):
    films, users = np.tile(np.where(np.arange(400) % 3, 1.0, -1.0)[:, None], 2), 400
    leaning = films + np.array([3.0, -3.0]) * (np.arange(users)[:, None] % 2)
    fair = {"sft": films, "sft_more": films, "dpo": films}
    feigned = judged(predictions_of(**fair | {arm: leaning}))["caveats"]
    name = {"sft": "SFT", "sft_more": "SFT, continued"}[arm]
    told = f"Order-free accuracy against {name}: the difference is "
    assert any(caveat.startswith(told) and "which may be 0" in caveat for caveat in feigned)
    better = np.tile(np.where(np.arange(400) % 10, 1.0, -1.0)[:, None], 2) + np.array([3.0, -3.0])
    hidden = judged(predictions_of(**fair | {arm: films + np.array([3.0, -3.0]), "dpo": better}))["caveats"]
    assert any(caveat.startswith(told) and "A lean to one letter hides" in caveat for caveat in hidden)


@pytest.mark.parametrize(
    ("first", "second", "says"),
    [
        ("INCONCLUSIVE", "INCONCLUSIVE", "DPO is not shown to rank better or worse than SFT or continued SFT."),
        ("INCONCLUSIVE", "PARTIAL: comparable", "better or worse than SFT, and ranks within a point of continued SFT."),
        ("PARTIAL: small gain", "INCONCLUSIVE", "SFT, but is not shown to rank better or worse than continued SFT. So"),
        ("SUPPORTED", "PARTIAL: small gain", "ranks better than SFT, and ranks a little better than continued SFT."),
    ],
)
def test_what_both_verdicts_say(first, second, says):
    arms = {arm: {"pairs_seen": 4.0, "reference": "sft"} for arm in ("sft", "sft_more", "dpo")}
    about = {"arms": arms, "control": "sft_more"}
    about |= {"comparisons": {"dpo - sft": {"scope": "method"}}, "verdict": first, "control_verdict": second}
    assert says in conclusion(about)
    arms["dpo"]["reference"], arms["sft"]["pairs_seen"] = "base", 1.0  # where the control begins, too
    assert says.replace("continued", "longer") in conclusion(about)


def test_a_difference_shows_on_which_side_of_0_and_of_a_point_its_bounds_lie():
    bounds = {(0.46, 0.031, 0.888): "+0.46 [+0.03, +0.89]", (0.5, -0.05, 1.04): "+0.50 [-0.05, +1.04]"}
    bounds |= {(0.75, -0.13, 1.63): "+0.8 [-0.1, +1.6]", (0, 0, 0): "0.0 [0.0, 0.0]", (0, -1e-9, 0): "0.0 [0.0, 0.0]"}
    for values, text in bounds.items():
        assert interval_text(dict(zip(("value", "low", "high"), values, strict=True))) == text


@pytest.mark.parametrize(
    ("shares", "wanted", "says"),
    [
        ({"dpo": 0.8, "sft_more": 0.7}, "SUPPORTED", "DPO ranks better than SFT and continued SFT."),
        ({"dpo": 0.7, "sft_more": 0.8}, "NOT SUPPORTED", "So more training may explain its lead."),
        ({"dpo": 0.7, "sft_more": 0.7}, "PARTIAL: comparable", "So more training may explain its lead."),
        ({"dpo": 0.5, "sft_more": 0.55}, "NOT SUPPORTED", "DPO ranks worse than SFT and continued SFT."),
        ({"dpo": 0.7}, "no control was trained", "an SFT that saw a quarter as many pairs. No control was trained"),
        ({"dpo": 0.7, "sft_long": 0.65, "sft_x": 0.8}, "NOT SUPPORTED", "The control, longer SFT (sft_x), reached"),
        ({"dpo": 0.7, "sft_long": 0.8, "sft_more": 0.65}, "SUPPORTED", "The control, continued SFT, reached"),
        ({"dpo": 0.8, "sft_long": 0.65, "sft_more": 0.7}, "SUPPORTED", "The control, continued SFT, reached"),
    ],
)
def test_both_verdicts_stand_together_and_one_sentence_follows(shares, wanted, says):
    seen = dict.fromkeys(shares, 400.0) | {"sft": 100.0}
    metrics = judged(runs_of(3, seen, sft=0.6, **shares))
    first = "NOT SUPPORTED" if shares["dpo"] < 0.6 else "SUPPORTED"
    assert (metrics["verdict"], metrics["control_verdict"], metrics["scope"]) == (first, wanted, "method")
    assert says in metrics["sentence"] and "3 training runs each, seeds 0 to 2" in metrics["sentence"]
    shown = summary(metrics)
    verdicts = shown.partition("\n\n")[0]
    assert verdicts.startswith(f"verdict: {first} against ") and f"\n         {wanted}" in verdicts
    assert ("an SFT that saw a quarter as many pairs" in verdicts) == (len(shares) == 1)
    assert "these adapters" not in json.dumps(metrics) + shown
    if "sft_long" in shares and "sft_more" in shares:
        told = any("DPO: it ranks worse than sft_long (-" in caveat for caveat in metrics["caveats"])
        assert told == (shares["sft_long"] > shares["dpo"])


def test_more_training_may_gain_as_much_only_where_sft_had_less():
    for seen, may in ((100.0, True), (400.0, False), (800.0, False)):
        metrics = judged(runs_of(3, {"sft": seen, "dpo": 400.0}, sft=0.6, dpo=0.7))
        assert ("so more training may gain as much" in metrics["conclusion"]) is may
        one = judged(runs_of(1, {"sft": seen, "dpo": 400.0}, sft=0.6, dpo=0.7))
        assert max(len(line) for found in (metrics, one) for line in summary(found).splitlines()) <= 80
    assert "so more training may gain as much" in judged(runs_of(3, sft=0.6, dpo=0.7))["conclusion"], "not known"


def test_the_control_of_a_dpo_from_the_base_model_continues_no_sft():
    rows = runs_of(1, sft=0.6, sft_more=0.7, dpo=0.8)
    for reference, name in (("base", "longer SFT"), ("sft", "SFT, continued")):
        metrics = judged(rows.assign(reference=np.where(rows["arm"] == "dpo", reference, "")))
        assert f"against {name} (sft_more)" in summary(metrics)
        caveats = " ".join(metrics["caveats"])
        assert f"{name}: " in caveats and ("SFT, continued" in caveats) == (name == "SFT, continued")


def test_a_value_beside_2_points_shows_on_which_side_it_lies():
    near = {"low": 0.3, "high": 3.7}
    told = [interval_text({"value": value, **near}) for value in (1.97, 2.04, 2.3)]
    assert told == ["+1.97 [+0.30, +3.70]", "+2.04 [+0.30, +3.70]", "+2.3 [+0.3, +3.7]"]


def test_another_seed_than_numpy_can_hold_is_told_as_it_is():
    rows = predictions_of(sft=np.ones((100, 2)), dpo=np.ones((100, 2)))
    runs = [rows.assign(seed=str(10**20 + number)) for number in range(3)]
    assert f"seeds {10**20} to {10**20 + 2}" in judged(pd.concat(runs))["sentence"]


def test_what_was_seen_in_training_is_not_said_where_it_is_not_known():
    rows = runs_of(1, sft=0.6, dpo=0.8)
    for sft, dpo, told in ((None, 200, True), (100, None, True), (200, 200, False)):
        seen = {"sft": sft, "dpo": dpo}
        metrics = judged(rows.assign(pairs_seen=rows["arm"].map(seen).astype(float)))
        assert ("so more training may gain as much" in metrics["conclusion"]) is told
        assert ("than SFT." in metrics["conclusion"]) is (None in seen.values())
    other = judged(runs_of(1, sft=0.6, sft_r8=0.7, dpo=0.8).assign(pairs_seen=np.nan))
    assert "another SFT" in other["conclusion"] and "longer" not in other["conclusion"]


def test_arms_that_answer_each_pair_with_its_own_letter_are_not_said_to_answer_one():
    margins = np.where(np.arange(100)[:, None] % 2, [1.0, -1.0], [-1.0, 1.0])  # whatever stands under it
    metrics = judged(predictions_of(sft=margins, dpo=margins))
    assert metrics["arms"]["dpo"]["position_bias"]["value"] == 0 and metrics["verdict"].startswith("INCONCLUSIVE")
    assert "DPO and SFT seldom prefer a film in both orders, so" in metrics["sentence"]
    assert "one letter" not in metrics["sentence"]


def test_fewer_than_100_users_give_no_sentence_to_quote():
    for users, quoted in ((99, False), (100, True)):
        metrics = judged(predictions_of(sft=np.ones((users, 2)), dpo=np.ones((users, 2))))
        for text in (metrics["sentence"], summary(metrics)):
            assert ("DPO reached a ranking accuracy" in text) is quoted
            assert ("it takes 100 test users, and these are 99." in text) is not quoted
        assert ("\n\nto quote: " in summary(metrics)) is quoted


@pytest.mark.parametrize("over_sft", [*SAYS])
@pytest.mark.parametrize("over_control", [*SAYS, NO_CONTROL])
def test_what_follows_is_said_in_short_sentences_with_a_capital(over_sft, over_control):
    about = {"verdict": f"{over_sft} (these adapters)", "control_verdict": over_control, "control": "sft_more"}
    arms = {"sft": {"pairs_seen": 1}, "dpo": {"pairs_seen": 4, "seeds": 2, "reference": "sft"}}
    text = conclusion(about | {"comparisons": {"dpo - sft": {"scope": "adapters"}}, "arms": arms})
    assert text[0].isupper() and text.endswith(".") and "{" not in text
    assert max(len(part.split()) for part in text.split(". ")) <= 30


@pytest.mark.parametrize("results", ["", "small"])
def test_caveats_of_the_published_results_are_sentences_of_at_most_30_words(results):
    metrics = judge(read_json(config.ROOT / "docs" / "results" / results / "metrics.json"))
    for caveat in metrics["caveats"]:
        assert len(caveat.split()) <= 30 and caveat.endswith("."), caveat


def test_what_rounds_to_0_has_no_sign():
    assert [rounded(value, sign="+") for value in (0.04, -0.04, 0.05001, -2)] == ["0.0", "0.0", "+0.1", "-2.0"]
    assert rounded(-0.0004, 3) == "0.000" and rounded(-0.0006, 3) == "-0.001"


@pytest.mark.parametrize("dpo_runs", [1, 2, 3])
@pytest.mark.parametrize("sft_runs", [1, 2, 3])
def test_fewer_than_three_runs_of_either_arm_are_a_verdict_on_these_adapters(sft_runs, dpo_runs):
    sft, dpo = runs_of(sft_runs, sft=0.6), runs_of(dpo_runs, dpo=0.9)
    metrics = judged(pd.concat([sft, dpo]))
    enough = min(sft_runs, dpo_runs) == 3
    assert metrics["scope"] == metrics["comparisons"]["dpo - sft"]["scope"] == ("method" if enough else "adapters")
    assert metrics["verdict"] == "SUPPORTED" + ("" if enough else " (these adapters)")
    assert ("This result is on these adapters only." in metrics["sentence"]) is not enough
    assert any("Fewer than 3 training runs" in caveat for caveat in metrics["caveats"]) is not enough


def test_a_control_of_one_run_makes_the_conclusion_one_on_adapters():
    metrics = judged(pd.concat([runs_of(3, sft=0.6, dpo=0.8), runs_of(1, sft_more=0.7)]))
    assert metrics["verdict"] == "SUPPORTED" and metrics["control_verdict"] == "SUPPORTED (these adapters)"
    told = "(SFT, continued: 1): the verdict against the control is on these adapters"
    assert metrics["scope"] == "adapters" and told in " ".join(metrics["caveats"])
    assert "These users can tell" in summary(metrics), "and not these runs"
    assert metrics["conclusion"].startswith("DPO ranks"), "the result against SFT is on the method"
    other = judged(pd.concat([runs_of(3, sft=0.6, sft_more=0.7, dpo=0.8), runs_of(1, sft_long=0.7)]))
    assert other["scope"] == "method" and "on these adapters" not in " ".join(other["caveats"])
    assert "These users and runs can tell" in summary(other)


def test_a_run_that_answers_one_letter_is_named_and_its_p_is_none():
    rows = runs_of(3, sft=0.66, dpo=0.75)
    fallen = (rows["arm"] == "dpo") & (rows["seed"] == "1")
    rows.loc[fallen, "decision_margin"] = np.where(rows.loc[fallen, "order"] == "A", -1.0, 1.0)
    metrics = judged(rows)
    assert any("DPO: the run of seed 1 answers B almost always" in caveat for caveat in metrics["caveats"])
    assert metrics["arms"]["dpo"]["ranking_accuracy"]["runs"]["1"] == 50
    assert metrics["verdict"] == "INCONCLUSIVE" and metrics["comparisons"]["dpo - sft"]["p"] is None
    assert "McNemar" not in summary(metrics)


@pytest.mark.parametrize(("falls", "told"), [(-3.0, True), (-0.5, False)])
def test_a_chosen_response_that_becomes_less_likely_is_told(falls, told):
    rows = runs_of(3, sft=0.6, dpo=0.7)
    of_dpo = rows["arm"] == "dpo"
    rows = rows.assign(reference=np.where(of_dpo, "sft", ""), beta=np.where(of_dpo, 0.1, np.nan))
    rows["chosen_log_prob"], rows["rejected_log_prob"] = np.where(of_dpo, -20 + falls, -20), np.where(of_dpo, -29, -20)
    found = [caveat for caveat in judged(rows)["caveats"] if "likelihood displacement" in caveat]
    assert bool(found) is told
    assert not told or "-3.0 [-3.0, -3.0] nats from the reference (rejected: -9.0 [-9.0, -9.0])" in found[0]
    assert not told or "This is likelihood" in found[0]
    rows.loc[of_dpo, "chosen_log_prob"] += rows.loc[of_dpo, "seed"].map({"0": -9.0, "1": 0.0, "2": 9.0})
    found = [caveat for caveat in judged(rows)["caveats"] if "likelihood displacement" in caveat]
    assert not told or "This may be likelihood" in found[0], "the interval holds 0"


def test_unequal_training_is_told():
    shares = {"sft": 0.6, "sft_more": 0.7, "dpo": 0.7}
    for seen, told in ((100, "a quarter as many pairs"), (370, "92% as many pairs"), (400, "")):
        metrics = judged(runs_of(3, {"sft": 100.0, "sft_more": seen, "dpo": 400.0}, **shares))
        found = [caveat for caveat in metrics["caveats"] if caveat.startswith("SFT, continued: it saw")]
        assert [told in caveat for caveat in found] == [True] * bool(told)
        assert ("as many pairs as DPO" in metrics["sentence"]) is not bool(told)
    assert not any(" saw " in caveat for caveat in judged(runs_of(3, **shares))["caveats"]), "not known"


def test_a_learned_baseline_that_wins_is_told():
    rows = runs_of(3, sft=0.6, dpo=0.7)
    learned = predictions_of(learned=margins_of_share(600, 0.9)).assign(kind="baseline", seed="")
    told = judged(pd.concat([rows, learned]))["caveats"]
    assert "DPO: it ranks worse than a logistic regression on counts." in told


def test_an_arm_loses_to_a_baseline_only_where_the_interval_says_so():
    level = np.random.default_rng(4).uniform(size=(400, 1))
    order = np.random.default_rng(5).permutation(400)  # right for other users, so that the difference is uncertain
    models = {"sft": 0.69, "dpo": 0.7, "sft_long": 0.71}
    shares = models | {"popularity": 0.8, "co-occurrence": 0.72, "genre overlap": 0.5}
    margins = {arm: np.repeat(np.where(level < share, 1.0, -1.0), 2, axis=1) for arm, share in shares.items()}
    margins["co-occurrence"] = margins["co-occurrence"][order]
    rows = predictions_of(**margins)
    rows.loc[~rows["arm"].isin(models), "kind"] = "baseline"
    told = judged(rows)["caveats"]
    for arm in ("DPO: ", "SFT: ", "sft_long: "):
        [lost] = [caveat for caveat in told if caveat.startswith(arm) and "ranks worse than" in caveat]
        assert "the more popular film" in lost and "co-occurrence" not in lost
        says = "not shown to rank better than co-occurrence"
        [open_] = [caveat for caveat in told if caveat.startswith(arm) and says in caveat]
        assert "popular" not in open_
    assert not any("genre overlap" in caveat for caveat in told)


def test_chance_against_popularity_is_told():
    popular = np.arange(90) % 3 > 0
    follows = np.repeat(np.where(popular, 1.0, -1.0)[:, None], 2, axis=1)
    rows = predictions_of(sft=follows, dpo=np.ones((90, 2)))
    margins = np.tile(rows[rows["arm"] == "sft"]["decision_margin"], 2)
    rows["preferred_more_popular"] = [str(bool(margin > 0)).lower() for margin in margins]
    told = [text for text in judged(rows)["caveats"] if "less popular film is the right one" in text]
    assert len(told) == 1 and told[0].startswith("SFT: it is not shown to beat chance")


def test_a_gain_that_is_only_less_position_bias_is_told_so():
    """Both arms prefer the same films; one of them leans so much to B that its letter says so half the time."""
    random = np.random.default_rng(0)
    preference = random.normal(0.5, 1, 400)
    leaning, fair = (np.column_stack([preference - lean, preference + lean]) for lean in (1.5, 0.0))
    metrics = judged(predictions_of(sft=leaning, dpo=fair))
    assert metrics["verdict"] == "SUPPORTED (these adapters)"
    assert any("prefer the same films" in caveat for caveat in metrics["caveats"])
    better = np.column_stack([preference + 1, preference + 1])
    metrics = judged(predictions_of(sft=fair, dpo=better))
    assert metrics["verdict"] == "SUPPORTED (these adapters)"
    assert not any("prefer the same films" in caveat for caveat in metrics["caveats"])
