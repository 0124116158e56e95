"""The arms that are no language model."""

from dataclasses import replace

import numpy as np
import pytest
from conftest import REAL_PAIRS, make_pairs

from data import baselines
from data.baselines import BASELINES, baseline_margins, film_counts
from data.measures import wins
from data.pairs import Movie, Pair, load_pairs, split_pairs


@pytest.mark.skipif(not REAL_PAIRS.exists(), reason="the 6,040 real pairs are not on this machine")
def test_baselines_on_the_real_pairs():
    train, test = split_pairs(load_pairs(REAL_PAIRS))
    accuracy = {arm: wins(margin).mean() for arm, margin in baseline_margins(train, test).items()}
    assert accuracy["always A"] == 0.5
    assert accuracy["popularity"] == pytest.approx(0.83, abs=0.02)
    assert 0.7 < accuracy["co-occurrence"] < 0.8
    assert 0.6 < accuracy["genre overlap"] < 0.75
    assert accuracy["learned"] > 0.87


def test_each_baseline_takes_the_film_that_its_counts_say():
    """Heat was watched by more; Alien with what this user watched, and of its genre."""
    history = tuple(f"Old {number} (1990)" for number in range(5))
    others = tuple(f"Else {number} (1991)" for number in range(5))
    alien, heat = Movie("Alien (1979)", ("Sci-Fi",)), Movie("Heat (1995)", ("Crime",))
    last = Movie("Z (1999)", ("War",))
    old = Movie("Old 0 (1990)", ("Sci-Fi",))
    train = [Pair(history, alien, last), Pair((*others[:4], old.title), old, heat)]
    train += [Pair((*others[:4], f"Mine {number} (1992)"), heat, last) for number in range(3)]
    margins = baseline_margins(train, [Pair((*history[:4], "New (1993)"), alien, heat)])
    assert tuple(margins) == BASELINES
    assert {arm: margin.tolist() for arm, margin in margins.items() if arm != "learned"} == {
        "always A": [[1, -1]],
        "genre overlap": [[1, 1]],
        "co-occurrence": [[4, 4]],
        "popularity": [[-2, -2]],
    }


def test_a_user_with_several_pairs_counts_once():
    pairs = make_pairs(3)
    more = [*pairs, replace(pairs[0], other=pairs[1].other)]
    assert film_counts(more) == film_counts(pairs)
    together = [baseline_margins(part, pairs)["co-occurrence"].tolist() for part in (more, pairs)]
    assert together[0] == together[1]


def test_baselines_are_fitted_on_the_training_part_only():
    pairs = make_pairs(30)
    margins = baseline_margins([], pairs)
    assert not any(margins[arm].any() for arm in BASELINES[1:])
    changed = [replace(pair, other=make_pairs(60)[40].other) for pair in pairs[:5]]
    train = make_pairs(60)[30:]
    of_all, of_few = (baseline_margins(train, test)["learned"][5:] for test in (pairs, [*changed, *pairs[5:]]))
    assert (of_all == of_few).all(), "whatever else is tested"


def test_learned_looks_at_films_and_not_at_their_place():
    pairs = make_pairs(60)
    turned = [replace(pair, preferred=pair.other, other=pair.preferred) for pair in pairs]
    one, other = (baseline_margins(pairs[:40], test)["learned"] for test in (pairs[40:], turned[40:]))
    assert one == pytest.approx(-other) and one.any()


@pytest.mark.parametrize("titles", [5, 4])  # 4: one of the history stands there twice
def test_a_training_row_does_not_see_itself(titles):
    """Every user watched films that nobody else did: their own counts would name the preferred film, others' none."""
    pairs = []
    for user in range(200):
        history = tuple(f"Film {user} {number % titles} (1990)" for number in range(5))
        films = [Movie(f"{name} {user} (1990)", ("Drama",)) for name in ("Seen", "Other")]
        pairs.append(Pair(history, *films))
    popular = [replace(pair, other=pairs[0].preferred) for pair in pairs[100:]]
    margins = baseline_margins(pairs, popular)["learned"]
    assert np.abs(margins).max() < 0.1, "a count of one says nothing"


def test_what_a_training_row_sees_is_what_the_others_counted(monkeypatch):
    """Its features are those of the same pair in the test part, with its user left out of the training part."""
    seen = []
    monkeypatch.setattr(baselines, "log_odds", lambda train, test: seen.append((train, test)) or np.zeros(len(test)))
    pairs = [replace(pair, preferred=Movie(pair.history[0].replace("0 ", "1 "), ("War",))) for pair in make_pairs(40)]
    pairs += [replace(pair, history=(*pair.history[1:], "Shared (1980)")) for pair in pairs]
    baseline_margins(pairs, pairs[:1])
    for number in (0, 7, 50):
        baseline_margins([pair for pair in pairs if pair.user_id != pairs[number].user_id], [pairs[number]])
        assert seen[-1][1][0] == pytest.approx(seen[0][0][number])
