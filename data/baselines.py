"""The arms that are no language model, fitted on the training part alone."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np

from data.pairs import Movie, Pair

BASELINES = ("always A", "genre overlap", "co-occurrence", "popularity")


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
    """Decision margins (users, orders) by baseline: differences of counts, no log-probabilities.

    Popularity takes the film that more training users watched, co-occurrence the one more often watched together
    with the history's films, genre overlap the one that shares more genres with them, film by film.
    """
    watched = film_counts(train)
    genres = {film.title: set(film.genres) for pair in train for film in (pair.preferred, pair.other)}
    together: dict[str, Counter[str]] = defaultdict(Counter)
    for titles in films_watched(train).values():
        for title in titles:
            together[title].update(titles - {title})

    def overlap(pair: Pair, film: Movie) -> int:
        return sum(len(genres.get(title, set()) & set(film.genres)) for title in pair.history)

    scores = {
        "genre overlap": overlap,
        "co-occurrence": lambda pair, film: sum(together[title][film.title] for title in pair.history),
        "popularity": lambda pair, film: watched[film.title],
    }
    margins = {"always A": np.tile([1.0, -1.0], (len(test), 1))}
    for arm, value in scores.items():
        difference = [value(pair, pair.preferred) - value(pair, pair.other) for pair in test]
        margins[arm] = np.repeat(np.array(difference, dtype=float)[:, None], 2, axis=1)
    return margins
