"""Every figure, drawn from made-up predictions: is what it shows what they hold?"""

import numpy as np
import pandas as pd
import pytest
from conftest import predictions_of

from data.figures import draw_all, draw_losses, draw_reliability, plot_all
from data.measures import compute_metrics
from data.predictions import margins_by_user
from data.verdict import judge

ALWAYS = {"accuracy", "popularity", "position_bias"}  # the figures of what metrics.json holds


@pytest.fixture(scope="module")
def predictions() -> pd.DataFrame:
    """A baseline, a run of SFT, and two of DPO; the preferred film is the more popular one for every second user."""
    random = np.random.default_rng(3)
    sft, first, second = (random.normal(mean, 2.0, (60, 2)) for mean in (0.5, 1.5, 1.5))
    baseline = predictions_of(popularity=np.ones((60, 2))).assign(kind="baseline", seed="")
    runs = [predictions_of(sft=sft, dpo=first), predictions_of(dpo=second).assign(seed="2")]
    rows = pd.concat([baseline, *runs], ignore_index=True)
    popular = rows["pair_id"].factorize()[0] % 2 == 0
    response = rows["decision_margin"].where(rows["kind"] == "model") + 0.5
    counts = {"preferred_count": 3, "other_count": np.where(popular, 2, 9)}
    return rows.assign(response_margin=response, preferred_more_popular=np.where(popular, "true", "false"), **counts)


def metrics_of(predictions: pd.DataFrame) -> dict:
    return judge(compute_metrics(predictions))


@pytest.fixture(scope="module")
def figures(predictions):
    return draw_all(predictions, metrics_of(predictions))


def axis_of(figures, name):
    [axis] = figures[name].axes
    return axis


def test_every_figure_is_drawn_that_the_results_allow(predictions, figures):
    assert set(figures) == ALWAYS | {"reliability", "margins", "seeds"}
    assert all(figure.axes[0].get_xlabel() for figure in figures.values())
    metrics = metrics_of(predictions)
    assert set(draw_all(None, metrics)) == ALWAYS | {"seeds"}
    one_run = predictions[predictions["seed"].isin(["", "1"])]
    assert set(draw_all(one_run, metrics_of(one_run))) == ALWAYS | {"reliability", "margins"}
    one_arm = predictions[predictions["arm"] != "sft"]
    assert set(draw_all(one_arm, metrics_of(one_arm))) == ALWAYS | {"reliability", "seeds"}


@pytest.mark.parametrize(
    ("name", "measures"),
    [
        ("accuracy", ["ranking_accuracy", "response_accuracy"]),
        ("popularity", ["accuracy_with_popularity", "accuracy_against_popularity", "accuracy_similar_popularity"]),
        ("position_bias", ["position_bias"]),
    ],
)
def test_measures_are_drawn_with_their_intervals(predictions, figures, name, measures):
    arms, axis = metrics_of(predictions)["arms"], axis_of(figures, name)
    shown = [label.get_text() for label in axis.get_yticklabels()]
    assert shown == [arm for arm in arms if name != "position_bias" or arms[arm]["kind"] == "model"]
    for container, measure in zip(axis.containers, measures, strict=True):
        rows = [row for row, arm in enumerate(shown) if arms[arm][measure]["value"] is not None]
        points, _, (bars,) = container.lines
        values, at = points.get_data()
        assert list(np.round(at)) == rows and len(rows) >= 2
        for row, value, bar in zip(rows, values, bars.get_segments(), strict=True):
            found = arms[shown[row]][measure]
            assert (value, *bar[:, 0]) == pytest.approx((found["value"], found["low"], found["high"]))


def test_margins_are_those_of_each_user_over_orders_and_runs(predictions, figures):
    [points] = axis_of(figures, "margins").collections
    wide = margins_by_user(predictions)
    assert np.allclose(points.get_offsets(), wide[["sft", "dpo"]])
    texts = {text.get_text(): text.get_position() for text in axis_of(figures, "margins").texts}
    assert texts["only DPO right"] == pytest.approx((0.02, 0.98)), "to the left and up"


def test_each_run_is_one_circle(predictions, figures):
    right = predictions[predictions["kind"] == "model"].assign(right=lambda rows: 100 * (rows["decision_margin"] > 0))
    expected = right.groupby(["arm", "seed"], sort=False)["right"].mean()
    [points] = axis_of(figures, "seeds").collections
    assert np.allclose(points.get_offsets()[:, 0], expected) and list(points.get_offsets()[:, 1]) == [0, 1, 1]


def test_reliability_shows_how_often_option_a_is_right(figures):
    sft, dpo = axis_of(figures, "reliability").containers
    assert (sft.get_label(), dpo.get_label()) == ("sft", "dpo")
    for container in (sft, dpo):
        p_a, share = container.lines[0].get_data()
        assert (np.diff(p_a) > 0).all() and ((share >= 0) & (share <= 1)).all()
        assert len(set((15 * p_a).astype(int))) == len(p_a), "one point per bin"


def test_reliability_is_of_option_a_wherever_the_preferred_film_stands():
    """An arm that always gives Option A the odds e^2 is right in half of the cases, and has one point."""
    axis = draw_reliability(predictions_of(a=np.tile([2.0, -2.0], (20, 1))), ["a"]).axes[0]
    [p_a], [share] = axis.containers[0].lines[0].get_data()
    assert p_a == pytest.approx(1 / (1 + np.exp(-2))) and share == 0.5


def test_figures_are_written_for_screen_and_print(predictions, tmp_path):
    plot_all(None, metrics_of(predictions), tmp_path / "figures")
    drawn = {path.name for path in (tmp_path / "figures").iterdir()}
    assert drawn == {f"{name}.{ending}" for name in ALWAYS | {"seeds"} for ending in ("png", "pdf")}


def test_the_loss_of_sft_is_drawn_so_that_its_end_can_be_read():
    history = [{"step": step, "loss": loss} for step, loss in enumerate((3.0, 1.0, 0.02, 0.015), 1)]
    assert draw_losses(history, "sft").axes[0].get_yscale() == "log"
    history = [{"step": step, "loss": loss, "rewards/margins": 0.1} for step, loss in enumerate((0.69, 0.6, 0.5), 1)]
    assert [axis.get_yscale() for axis in draw_losses(history, "dpo").axes] == ["linear"] * 4


def test_the_log_of_dpo_shows_both_responses_and_the_loss_of_a_policy_that_is_its_reference():
    entry = {"loss": 0.69, "logps/chosen": -40.0, "logps/rejected": -42.0, "eval_logps/chosen": -41.0}
    loss, log_probs, *_ = draw_losses([{"step": step} | entry for step in (1, 2)], "dpo").axes
    heights = {line.get_label(): line.get_ydata()[0] for line in (*loss.lines, *log_probs.lines)}
    assert heights["ln 2"] == pytest.approx(np.log(2))
    shown = ("chosen, training", "rejected, training", "chosen, held out")
    assert [heights[label] for label in shown] == [-40, -42, -41]
    assert {text.get_text() for text in log_probs.get_legend().get_texts()} == set(shown)


def test_losses_of_training_and_of_held_out_pairs_are_told_apart():
    history = [{"step": 1, "loss": 0.7}, {"step": 2, "eval_loss": 0.65}, {"step": 2, "loss": 0.6}, {"train_loss": 0.6}]
    [axis] = draw_losses(history, "sft").axes
    lines = {line.get_label(): [*zip(*line.get_data(), strict=True)] for line in axis.lines}
    assert lines == {"training": [(1, 0.7), (2, 0.6)], "held out": [(2, 0.65)]}
