"""The arms that are no language model, fitted on the training part alone."""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence, Set
from typing import Any

import numpy as np

from data.pairs import Movie, Pair

COUNTS = ("genre overlap", "co-occurrence", "popularity")
BASELINES = ("always A", *COUNTS, "learned")


def films_watched(train: Sequence[Pair]) -> dict[str, set[str]]:
    """The titles that each training user watched, in the history or next, by the user's id."""
    watched: dict[str, set[str]] = defaultdict(set)
    for pair in train:
        watched[pair.user_id].update((*pair.history, pair.preferred.title))
    return watched


def film_counts(train: Sequence[Pair]) -> Counter[str]:
    """How many training users watched each title."""
    return Counter(title for titles in films_watched(train).values() for title in titles)


def baseline_margins(train: Sequence[Pair], test: Sequence[Pair]) -> dict[str, np.ndarray]:
    """Decision margins (pairs, orders) by baseline: differences of counts and, of `learned`, log-odds.

    Popularity takes the film that more training users watched, co-occurrence the one more often watched together
    with the history's films, genre overlap the one that shares more genres with them, film by film. `learned` is a
    logistic regression on these three, on whether nobody watched the film, on its year and how far that lies from
    the history's years.
    """
    watched, users = film_counts(train), films_watched(train)
    genres = {film.title: set(film.genres) for pair in train for film in (pair.preferred, pair.other)}
    together: dict[str, Counter[str]] = defaultdict(Counter)
    for titles in users.values():
        for title in titles:
            together[title].update(titles - {title})

    def counts(pair: Pair, film: Movie, seen: Set[str]) -> tuple[int, ...]:
        """Of one film, in the order of COUNTS; a training user's own films, `seen`, don't count that user."""
        own = sum(title in seen and title != film.title for title in pair.history) if film.title in seen else 0
        overlap = sum(len(genres.get(title, set()) & set(film.genres)) for title in pair.history)
        co_occurrence = sum(together[title][film.title] for title in pair.history) - own
        return overlap, co_occurrence, watched[film.title] - (film.title in seen)

    def of_film(pair: Pair, film: Movie, seen: Set[str]) -> tuple[float, ...]:
        overlap, co_occurrence, popularity = counts(pair, film, seen)
        usual = np.mean([year_of(title) for title in pair.history])
        year = np.nan_to_num(year_of(film.title), nan=usual)
        return overlap, np.log1p(co_occurrence), np.log1p(popularity), popularity == 0, year, abs(year - usual)

    def differences(function: Callable[..., Any], pairs: Sequence[Pair], known: dict[str, set[str]]) -> np.ndarray:
        """(pairs, values of the function): of the preferred film minus of the other one."""
        films = [(pair, known.get(pair.user_id, set())) for pair in pairs]
        both = [[function(pair, film, seen) for film in (pair.preferred, pair.other)] for pair, seen in films]
        return np.subtract(*np.array(both, dtype=float).swapaxes(0, 1))

    margins = dict(zip(COUNTS, differences(counts, test, {}).T, strict=True))
    margins["learned"] = np.zeros(len(test))
    if train:
        margins["learned"] = log_odds(differences(of_film, train, users), differences(of_film, test, {}))
    in_orders = {arm: np.repeat(margin[:, None], 2, axis=1) for arm, margin in margins.items()}
    return {"always A": np.tile([1.0, -1.0], (len(test), 1))} | in_orders


def year_of(title: str) -> float:
    """Of a title such as `Heat (1995)`; nan where it has none. A film of a history has one."""
    found = re.search(r"\((\d{4})\)$", title)
    return float(found[1]) if found else math.nan


def log_odds(train: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Log-odds (pairs,) that the preferred film is the one, from differences of two films' features (pairs, features).

    There is no intercept and each training pair counts in both directions, so that a film's name or place is nothing.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    both, preferred = np.vstack([train, -train]), np.repeat([1, 0], len(train))
    model = make_pipeline(StandardScaler(with_mean=False), LogisticRegression(fit_intercept=False))
    return model.fit(both, preferred).decision_function(test)
