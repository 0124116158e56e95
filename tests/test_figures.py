"""Every figure, drawn from made-up predictions: is what it shows what they hold?"""

import numpy as np
import pandas as pd
import pytest
from conftest import predictions_of

from data import figures as drawing
from data.figures import arm_name, draw_all, draw_losses, draw_reliability, plot_all
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
    shown = [arm for arm in arms if name != "position_bias" or arms[arm]["kind"] == "model"]
    assert [label.get_text() for label in axis.get_yticklabels()] == [arm_name(arm) for arm in shown]
    assert axis.yaxis_inverted(), "the first arm is on top"
    there = [(row, arms[arm][measure]) for measure in measures for row, arm in enumerate(shown)]
    there = [(row, found) for row, found in there if found["value"] is not None]
    assert len(there) > len(measures)
    for container, (row, found) in zip(axis.containers, there, strict=True):
        points, _, (bars,) = container.lines
        [value], [at] = points.get_data()
        [bar] = bars.get_segments()
        assert round(at) == row
        assert (value, *bar[:, 0]) == pytest.approx((found["value"], found["low"], found["high"]))


def test_an_arm_has_one_name_and_colour_in_every_figure(predictions):
    """Also beside arms that nobody knows, and in a second precision, where its marker is hollow."""
    again = predictions[predictions["arm"] == "dpo"]
    rows = pd.concat([predictions, again.assign(arm="dpo@16bit"), again.assign(arm="mine")])
    figures = draw_all(rows, metrics_of(rows))
    markers = {}
    for name in ("accuracy", "position_bias", "seeds"):
        axis = axis_of(figures, name)
        names = [label.get_text() for label in axis.get_yticklabels()]
        for container in axis.containers[: len(names)]:
            [at], line = container.lines[0].get_ydata(), container.lines[0]
            markers.setdefault(names[round(at)], set()).add((line.get_color(), line.get_markerfacecolor()))
    for axis in figures["reliability"].axes:
        if axis.containers:
            line = axis.containers[0].lines[0]
            markers[axis.get_title()].add((line.get_color(), line.get_markerfacecolor()))
    assert [*markers] == ["popularity", "SFT", "DPO", "DPO, 16-bit", "mine"]
    assert all(len(found) == 1 for found in markers.values()), "the same in every figure"
    colours = {name: colour for name, found in markers.items() for colour, _ in found}
    assert colours["DPO"] == colours["DPO, 16-bit"] and markers["DPO, 16-bit"] == {(colours["DPO"], "white")}
    assert len({*colours.values()}) == 4


def test_every_figure_says_how_many_users_and_runs_it_is_of(predictions, figures):
    said = {name: figure.get_supxlabel() for name, figure in figures.items()}
    assert all(text.startswith("60 users, 1 to 2 training runs per arm; ") for text in said.values())
    assert [name for name, text in said.items() if "95% intervals" not in text] == ["margins"], "it draws none"
    one_run = predictions[predictions["seed"].isin(["", "1"])]
    assert draw_all(None, metrics_of(one_run))["accuracy"].get_supxlabel().startswith("60 users, 1 training run per")
    assert {*drawing.CAPTIONS} == {*figures, "genres", "watched", "losses"}


def test_every_figure_fits_a_column_and_clips_no_marker(figures):
    extremes = predictions_of(a=np.tile([20.0, 20.0], (20, 1)))  # p(Option A) is 0 and 1, and so is its share
    for figure in (*figures.values(), draw_reliability(extremes, ["a"])):
        assert figure.get_figwidth() == drawing.WIDTH
        figure.draw_without_rendering()
        for axis in figure.axes:
            inside = axis.get_window_extent()
            for container in axis.containers:
                for x, y in axis.transData.transform(container.lines[0].get_xydata()):
                    assert inside.x0 + 2 < x < inside.x1 - 2 and inside.y0 + 2 < y < inside.y1 - 2


def test_margins_are_those_of_each_user_over_orders_and_runs(predictions, figures):
    [points] = axis_of(figures, "margins").collections
    wide = margins_by_user(predictions)
    assert np.allclose(points.get_offsets(), wide[["sft", "dpo"]])
    texts = {text.get_text(): text for text in axis_of(figures, "margins").texts}
    upper_left = f"only DPO right: {((wide['dpo'] > 0) & (wide['sft'] <= 0)).sum()}"
    assert texts[upper_left].get_position() == pytest.approx((0.02, 0.98)), "to the left and up"


def test_a_tie_is_on_no_side_of_the_margins():
    sides = np.array([[2.0, 1.0], [0.0, 0.0], [1.0, -1.0], [-1.0, -2.0]])
    [axis] = drawing.draw_margins(predictions_of(sft=sides, dpo=sides)).axes
    counts = {text.get_text() for text in axis.texts}
    assert counts == {"both right: 1", "both wrong: 1", "only SFT right: 0", "only DPO right: 0"}


def test_no_point_lies_under_a_label_of_the_margins():
    corners = np.array([[1.0, 1.0], [1.0, 1.0], [-1.0, -1.0], [-1.0, -1.0]])
    figure = drawing.draw_margins(predictions_of(sft=corners, dpo=corners[[0, 2, 1, 3]]))
    figure.draw_without_rendering()
    [axis] = figure.axes
    at = axis.transData.transform(axis.collections[0].get_offsets())
    assert [text.get_text().partition(": ")[2] for text in axis.texts] == ["1"] * 4
    assert not any(text.get_window_extent().contains(*point) for text in axis.texts for point in at)


def test_no_empty_figure_is_drawn_where_too_few_users_have_such_pairs(predictions):
    few = predictions[predictions["pair_id"].isin(predictions["pair_id"].unique()[:20])]
    assert "popularity" not in draw_all(None, metrics_of(few))


def test_each_run_is_one_cross_beside_the_mean(predictions, figures):
    right = predictions[predictions["kind"] == "model"].assign(right=lambda rows: 100 * (rows["decision_margin"] > 0))
    expected = right.groupby(["arm", "seed"], sort=False)["right"].mean()
    axis = axis_of(figures, "seeds")
    crosses = [line.get_xydata() for line in axis.lines if line.get_marker() == "x" and len(line.get_xdata())]
    values, rows = np.concatenate(crosses).T
    assert np.allclose(values, expected) and list(np.round(rows)) == [0, 1, 1]
    joined = [line.get_xdata() for line in axis.lines if line.get_color() == "0.8"]  # runs of one seed
    assert np.allclose(joined[0], expected[[("sft", "1"), ("dpo", "1")]])
    assert [len(of_seed) for of_seed in joined] == [2, 1], "of the second seed there is one"
    found = metrics_of(predictions)["arms"]["dpo"]["ranking_accuracy"]
    points, _, (bars,) = axis.containers[1].lines
    [bar] = bars.get_segments()
    assert (*points.get_xdata(), *bar[:, 0]) == pytest.approx((found["value"], found["low"], found["high"]))


def test_reliability_shows_how_often_option_a_is_right(figures):
    assert [axis.get_title() for axis in figures["reliability"].axes] == ["SFT", "DPO"]
    for axis in figures["reliability"].axes:
        points, _, (bars,) = axis.containers[0].lines
        p_a, share = points.get_data()
        assert (np.diff(p_a) > 0).all() and ((share >= 0) & (share <= 1)).all()
        ends = np.array([bar[:, 1] for bar in bars.get_segments()])
        assert ((ends[:, 0] <= share) & (share <= ends[:, 1])).all() and (np.ptp(ends, axis=1) > 0.1).all()
        assert len(set((15 * p_a).astype(int))) == len(p_a), "one point per bin"


def test_reliability_is_of_option_a_wherever_the_preferred_film_stands():
    """An arm that always gives Option A the odds e^2 is right in half of the cases, and has one point."""
    axis = draw_reliability(predictions_of(a=np.tile([2.0, -2.0], (20, 1))), ["a"]).axes[0]
    [p_a], [share] = axis.containers[0].lines[0].get_data()
    assert p_a == pytest.approx(1 / (1 + np.exp(-2))) and share == 0.5


def test_the_films_of_the_pairs_are_drawn_as_they_are():
    priced = "$10-$20 \\ $^$"
    rows = [("preferred film", (priced, "Drama"), 3), ("preferred film", (priced,), 1)]
    rows += [("other film", ("Drama",), 0), ("other film", ("Drama",), 2)]
    films = pd.DataFrame(rows, columns=["role", "genres", "watched"])
    [axis] = drawing.draw_genres(films).axes
    axis.figure.draw_without_rendering()  # where mathematics would be parsed
    shown = [label.get_text().replace("\\$", "$") for label in axis.get_yticklabels()]
    assert shown == [priced, "Drama"], "the most frequent one on top"
    shares = {bars.get_label(): [bar.get_width() for bar in bars] for bars in axis.containers}
    assert shares == {"preferred film": [100, 50], "other film": [0, 100]}
    [axis] = drawing.draw_watched(films).axes
    shares = {line.get_label(): dict(line.get_xydata()[1:]) for line in axis.lines}
    assert shares == {"preferred film": {1: 0.5, 3: 1}, "other film": {0: 0.5, 2: 1}}


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
    assert {line.get_label(): line.get_ydata()[0] for line in loss.lines}["ln 2"] == pytest.approx(np.log(2))
    drawn = [(line.get_label(), line.get_linestyle(), line.get_ydata()[0]) for line in log_probs.lines]
    assert drawn == [("chosen", "-", -40), ("chosen", "--", -41), ("rejected", "-", -42)]
    assert [text.get_text() for text in log_probs.get_legend().get_texts()] == ["chosen", "rejected"]


def test_losses_of_training_and_of_held_out_pairs_are_told_apart():
    history = [{"step": 1, "loss": 0.7}, {"step": 2, "eval_loss": 0.65}, {"step": 2, "loss": 0.6}, {"train_loss": 0.6}]
    [axis] = draw_losses(history, "sft").axes
    lines = {line.get_label(): [*zip(*line.get_data(), strict=True)] for line in axis.lines}
    assert lines == {"training": [(1, 0.7), (2, 0.6)], "held out": [(2, 0.65)]}
