"""What the notebook shows: results, one user under every arm, and pickers."""

import json
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ipywidgets
import numpy as np
import pandas as pd
import pytest
from conftest import make_pairs, predictions_of

import config
import evaluate_dpo
from data import display
from data.errors import UserError
from data.figures import CAPTIONS
from data.measures import SCHEMA_VERSION
from data.pairs import PairsError, make_pair, preference_row, write_pairs
from data.predictions import MARGINS, genre_pattern, read_predictions
from data.runs import training_runs

HISTORY = ["<b>One</b> (1990)", "A (1991)", "B (1992)", "C (1993)", "D (1994)"]


@pytest.fixture(scope="module")
def evaluation(evaluated):
    return Path(evaluated.outputs) / "evaluation"


def test_without_adapters_of_the_three_arms_the_base_model_is_there_alone(evaluated, monkeypatch):
    monkeypatch.setattr(evaluate_dpo, "find_adapters", lambda *_: ({}, []))
    train, test = config.load_split(evaluated)
    arms = evaluate_dpo.load_arms(evaluated, test)
    assert arms.names == ("base",) and "base" in set(evaluate_dpo.predict_with(arms, train, test[:2], 2)["arm"])


def test_users_side_by_side_are_those_of_the_evaluation(evaluated, evaluation):
    train, test = config.load_split(evaluated)
    _, predictions = display.read_results(evaluation)
    arms = evaluate_dpo.load_arms(evaluated, test)
    scored = evaluate_dpo.predict_with(arms, train, test[:4], 2)
    keys = ["arm", "pair_id", "order"]
    both = scored.merge(predictions, on=keys, suffixes=("", "_recorded"))
    assert len(both) == len(scored) == 8 * 4 * 2
    for name in MARGINS:
        assert np.allclose(both[name], both[f"{name}_recorded"], atol=2e-4, equal_nan=True)
    steps = evaluate_dpo.side_by_side(arms, test[2])
    assert set(next(steps)["answer"]) == {display.BEING_WRITTEN}, "the choices come first"
    live = list(steps)[-1]
    recorded = display.recorded_choices(predictions, test[2])
    b_first = predictions.sort_values("order", ascending=False, kind="stable")
    pd.testing.assert_frame_equal(display.recorded_choices(b_first, test[2]), recorded)
    of_b = predictions[(predictions["arm"] == "dpo") & (predictions["order"] == "B")]
    of_b = of_b.assign(seed="9", decision_margin=9.0)
    two_runs = pd.concat([of_b, predictions, of_b.assign(order="A")])  # as a spreadsheet may sort them
    pd.testing.assert_frame_equal(display.recorded_choices(two_runs, test[2]), recorded)
    assert list(live["arm"]) == list(recorded["arm"]) == ["base", "base", "sft", "sft", "dpo", "dpo"]
    assert list(live["letter"]) == list(recorded["letter"]) and list(live["film"]) == list(recorded["film"])
    assert np.allclose(live["probability"], recorded["probability"], atol=1e-4) and (live["probability"] >= 0.5).all()
    assert display.BEING_WRITTEN not in set(live["answer"]) and live["answer"].str.len().gt(0).all()
    assert live["probability"].round(6).nunique() > 2
    for row in live.itertuples():
        option = preference_row(test[2], row.order)["prompt"].partition(f"Option {row.letter}: ")[2]
        assert option.startswith(row.film), "the film is the one under the letter"


def test_one_user_is_shown_escaped_with_the_cited_genres_marked():
    pair = make_pair(HISTORY, ("X & Y (1995)", "War|R&B"), ("Z (1996)", "Drama"))
    rows = display.choices("dpo", pair, [1.0, 2.0])
    assert list(rows["letter"]) == ["A", "B"] and set(rows["film"]) == {"X & Y (1995)"}
    recommends = "The better recommendation is Option A. Reasoning: <i> War, R&B, not Drama <script>"
    rows["answer"] = [recommends, "I like Drama."]
    genres = genre_pattern([pair])
    shown = display.choices_html(pair, rows, genres)
    assert "&lt;b&gt;One&lt;/b&gt; (1990)" in shown and "&lt;script&gt;" in shown
    assert re.findall("X &amp; Y .*? \\(p = 0.73\\) <b style=[^>]*>&nbsp;(.*?)&nbsp;</b>", shown) == ["✓ right"]
    assert "<b>DPO</b>" in shown, "the arm's readable name"
    assert "&lt;i&gt; <b>War</b>, <b>R&amp;B</b>, not <u>Drama</u>" in shown and "I like <u>Drama</u>." in shown
    own = display.choices_html(pair, rows, genres, known=False)
    assert "right" not in own and "wrong" not in own
    torn = display.choices("sft", pair, [-1.0, 0.5])
    assert list(torn["letter"]) == ["B", "B"] and list(torn["film"]) == ["Z (1996)", "X & Y (1995)"]
    both_orders = display.choices_html(pair, torn, genres).rpartition("<td")[2]
    assert re.findall(r"Z \(1996\) <b style=.*?background-color:(\S+);.*?✗ wrong", both_orders) == ["#b04a00"]
    assert "#b04a00" not in shown, "right choices have another colour"


def test_the_users_whom_one_arm_gets_right_and_the_other_wrong_the_clearest_first():
    sft = np.array([[4.0, 4], [1, 1], [-2, 1], [3, -1]])
    dpo = np.array([[-1.0, -1], [2, 2], [3, 1], [-1, -1]])
    rows = predictions_of(sft=sft, dpo=dpo)
    test = make_pairs(4)
    users = [pair.pair_id for pair in test]  # by their preferred films' titles, too
    test = [test[number] for number in (2, 0, 3, 1)]
    groups = display.user_groups(test, rows, live=False)
    assert groups == {
        "all test users": users,
        "SFT right, DPO wrong": [users[0], users[3]],
        "DPO right, SFT wrong": [users[2]],
    }
    again = pd.concat([rows, rows.assign(seed="2", decision_margin=-9 * rows["decision_margin"])])
    assert display.user_groups(test, again, live=False) == groups, "of the first run, as they are shown"
    without_one = rows[rows["pair_id"] != users[0]]
    assert display.user_groups(test, without_one, live=False)["SFT right, DPO wrong"] == [users[3]]
    assert display.user_groups(test, None, live=True)["all test users"] == users
    assert not any(display.user_groups(test, None, live=False).values())


def test_users_are_named_by_what_they_watched_next_each_by_another_name():
    test = make_pairs(24)  # of 11 films
    names = display.user_names(test)
    assert len({*names.values()}) == 24
    assert names[test[3].pair_id] == "Film 3, The (1994)" and names[test[14].pair_id] == "Film 3, The (1994), user 2"


def test_the_example_is_of_two_films_that_share_no_genre():
    alike = make_pair(HISTORY, ("X (1995)", "War|Comedy"), ("Y (1996)", "War"))
    unlike = make_pair(HISTORY, ("X (1995)", "War|Comedy"), ("Z (1996)", "Drama"))
    assert display.example_of([alike, unlike]) is unlike and display.example_of([alike]) is alike


def test_the_pairs_are_described_as_they_are():
    train = make_pairs(60)
    found = display.described(train[:20], train, "both", 0)
    assert found == {
        "pairs": "20",
        "users": "20",
        "different films as options": str(len({film.title for p in train[:20] for film in (p.preferred, p.other)})),
        "genres per film, mean": "1.50",
        "preferred film is Option A in the file, %": "80.0",
        "preferred film is Option A as models see it, %": "50.0",
        "preferred film is the more popular one, %": "100.0",
    }
    assert display.described(train[:1], train[:1], "both", 0)["preferred film is the more popular one, %"] == "0.0", (
        "by its own user alone"
    )
    films = display.films_of(train[:20], train)
    assert list(films["role"].value_counts()) == [20, 20]
    assert dict(zip(films["title"], films["watched"], strict=True))[train[0].preferred.title] == 6, "0, 11, …, 55 of 60"


def test_figures_and_widgets_have_a_text_where_they_are_not_seen(monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda *what, **how: shown.append((*what, how)))
    display.picture("a figure", "accuracy")
    display.show_widget(ipywidgets.VBox())
    [(figure, alt), (caption, _), (bundle, _)] = shown
    assert caption.data == f"*{CAPTIONS['accuracy']}.*"
    assert figure == "a figure" and alt == {"metadata": {"image/png": {"alt": CAPTIONS["accuracy"]}}}
    assert "application/vnd.jupyter.widget-view+json" in bundle and bundle["text/plain"].startswith("Run the notebook")


def page_in(area):
    [output] = area.outputs
    return output["data"]["text/html"]


def wait_for(area, text):
    until = time.monotonic() + 20
    while page_in(area) != text and time.monotonic() < until:
        time.sleep(0.005)
    assert page_in(area) == text


def test_picking_a_user_shows_that_user():
    groups = {"all": ["u1", "u2", "u3"], "none": [], "some": ["u3", "u2"]}
    names = {"u1": "Heat", "u2": "Alien", "u3": "Fargo"}
    picker = display.user_picker(lambda user: [f"first {user}", user], groups, names, "u2")
    (group, user), area = picker.children[0].children, picker.children[1]
    assert [label for label, _ in group.options] == ["all (3)", "some (2)"]
    wait_for(area, "u2")
    user.label = "Heat"
    wait_for(area, "u1")
    group.index = 1
    wait_for(area, "u3")
    assert list(user.options) == [("Fargo", "u3"), ("Alien", "u2")]


def test_a_second_pick_ends_what_the_first_one_shows():
    asked, go_on = [], threading.Event()

    def pages(user):
        yield f"first {user}"
        go_on.wait(120)
        asked.append(user)
        yield user
        asked.append(f"more {user}")

    area = ipywidgets.Output()
    show = display.newest_in(area, pages)
    one = show("u1")
    wait_for(area, "first u1")
    two = show("u2")  # at once, whatever the first one still does
    wait_for(area, "first u2")
    go_on.set()
    one.join(120)
    two.join(120)
    assert page_in(area) == "u2" and sorted(asked) == ["more u2", "u1", "u2"]


def test_what_fails_in_a_widget_is_said_in_it():
    def refuse(error):
        yield "begun"
        raise error

    area = ipywidgets.Output()
    show = display.newest_in(area, refuse)
    show(PairsError("no <year>")).join(120)
    assert page_in(area) == "<pre>no &lt;year&gt;</pre>"
    show(KeyError("a bug")).join(120)
    assert page_in(area) == "<pre>KeyError: &#x27;a bug&#x27;</pre>"


def test_the_form_for_ones_own_pair_hands_over_what_is_written_in_it():
    films = (("C (1992)", "War"), ("D (1993)", "Drama"))
    box = display.own_pair_box(lambda *given: [repr(given)], ["A (1990)", "B (1991)"], *films)
    titles, one, genres, *_, area = box.children
    titles.value, one.value, genres.value = "E (1990)\nF (1991)", "G (1992)", "Comedy|War"
    next(child for child in box.children if isinstance(child, ipywidgets.Button)).click()
    wait_for(area, repr((["E (1990)", "F (1991)"], ("G (1992)", "Comedy|War"), ("D (1993)", "Drama"))))


def test_what_the_user_must_fix_is_said_and_nothing_else(capsys):
    def refuse(error):
        raise error

    assert display.or_say(max, 1, 2) == 2
    for error in (UserError("no such file \x1b[2J", "Give another."), PairsError("line 1: not JSON")):
        assert display.or_say(refuse, error) is None
    for error in (ModuleNotFoundError("No module named 'ipywidgets'"), PermissionError(13, "Permission denied", "x")):
        assert display.or_say(refuse, error) is None
    said = "no such file ?[2J\nGive another.\nline 1: not JSON\nNo module named 'ipywidgets'\n"
    assert capsys.readouterr().out == said + "[Errno 13] Permission denied: 'x'\n"
    with pytest.raises(KeyError):
        display.or_say(refuse, KeyError("a bug"))


def test_results_of_another_version_are_refused_with_the_command_that_makes_them(tmp_path):
    (tmp_path / "metrics.json").write_text(json.dumps({"schema_version": SCHEMA_VERSION + 1}))
    with pytest.raises(UserError, match="is of another version\nMake it .* --from_predictions .*/predictions.csv"):
        display.read_results(tmp_path)


def test_results_are_found_with_their_settings_and_runs(evaluated, evaluation, tmp_path, monkeypatch):
    assert display.results_folder(evaluation) == evaluation
    runs = training_runs(evaluation)
    assert list(runs) == ["sft 3407", "dpo 3407"]
    found = evaluate_dpo.settings_of_results(evaluation, runs, evaluated.outputs)
    assert (found.base_model, found.pairs, found.outputs) == (evaluated.base_model, evaluated.pairs, evaluated.outputs)

    monkeypatch.chdir(config.ROOT)
    folder = display.results_folder(tmp_path)
    assert folder in display.PUBLISHED
    for results in display.PUBLISHED:
        assert [*training_runs(results)] == ["sft", "sft_more", "dpo"]

    published = tmp_path / "results"
    (published / "adapters" / "dpo").mkdir(parents=True)
    (published / "metrics.json").write_bytes((evaluation / "metrics.json").read_bytes())
    (published / "adapters" / "dpo" / "run.json").write_text(json.dumps(runs["dpo 3407"]))
    (published / "run.json").write_text(json.dumps({"seconds": {}}))  # of the evaluation
    assert display.read_results(published)[1] is None
    recorded = read_predictions(evaluation / "predictions.csv")
    recorded.to_csv(published / "predictions.csv.gz", index=False)
    pd.testing.assert_frame_equal(display.read_results(published)[1], recorded)
    assert len(recorded) == 8 * 18 * 2
    runs = training_runs(published)
    assert list(runs) == ["dpo"]
    assert evaluate_dpo.settings_of_results(published, runs, "o").base_model == evaluated.base_model
    monkeypatch.chdir(tmp_path)
    write_pairs("data/elsewhere.jsonl", make_pairs(2))
    runs["dpo"]["settings"]["pairs"] = "/another/machine/elsewhere.jsonl"
    assert evaluate_dpo.settings_of_results(published, runs, "o").pairs == "data/elsewhere.jsonl"
    for adapters in (["sft"], {"sft": ["a"]}):  # somebody's run.json may say anything
        (tmp_path / "run.json").write_text(json.dumps({"adapters": adapters, "settings": {"bits": 4}}))
        assert training_runs(tmp_path) == {}
        assert evaluate_dpo.settings_of_results(tmp_path, {}, "o").preset == "small"


def test_two_threads_on_one_loaded_model_see_each_arm_as_it_is_alone(evaluated):
    """JupyterLab runs widgets in several threads: an adapter switched under a running pass is another arm's numbers."""
    _, test = config.load_split(evaluated)
    arms, pairs = evaluate_dpo.load_arms(evaluated, test), test[:4]

    def numbers(pair) -> list[float]:
        return list(next(evaluate_dpo.side_by_side(arms, pair))["margin"])

    alone = [numbers(pair) for pair in pairs]
    with ThreadPoolExecutor(4) as threads:
        for _ in range(10):
            for together, wanted in zip(threads.map(numbers, pairs), alone, strict=True):
                assert np.allclose(together, wanted, atol=1e-4)
