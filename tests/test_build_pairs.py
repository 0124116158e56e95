"""MovieLens ratings become pairs."""

import subprocess
import sys
import zipfile

import numpy as np
import pandas as pd
import pytest

from data import build_pairs as script
from data.build_pairs import build_pairs, read_ml_1m
from data.errors import UserError
from data.files import file_sha256
from data.pairs import load_pairs

FILMS = pd.DataFrame(
    {"film": range(40), "title": [f"Film {film} ({1950 + film})" for film in range(40)], "genres": [["Drama"]] * 40}
)


def ratings_of(user: int, films: list[int], times: list[int] | None = None, rating: float = 4.0) -> pd.DataFrame:
    times = list(range(len(films))) if times is None else times
    return pd.DataFrame({"user": user, "film": films, "rating": rating, "time": times})


def number(title: str) -> int:
    return int(title.split()[1])


def test_history_is_the_first_five_by_time_then_id_and_the_sixth_is_preferred():
    ratings = ratings_of(1, [9, 8, 7, 6, 5, 4, 3], [0, 1, 1, 2, 3, 3, 9])
    [pair] = build_pairs(pd.concat([ratings, ratings_of(2, [20, 21])]), FILMS)
    assert [number(title) for title in pair.history] == [9, 7, 8, 6, 4]
    assert number(pair.preferred.title) == 5
    assert number(pair.other.title) in (20, 21)


def test_min_rating_and_pairs_per_user():
    liked, disliked = ratings_of(1, list(range(8))), ratings_of(1, [30, 31], [-2, -1], rating=2.0)
    ratings = pd.concat([liked, disliked, ratings_of(2, [20, 21, 22])])
    pairs = build_pairs(ratings, FILMS, min_rating=4, pairs_per_user=2)
    assert [[number(title) for title in pair.history] for pair in pairs] == [[0, 1, 2, 3, 4]] * 2
    assert [number(pair.preferred.title) for pair in pairs] == [5, 6]
    assert len({pair.other.title for pair in pairs}) == 2
    assert all(number(pair.other.title) in (20, 21, 22) for pair in pairs), "a film that was disliked was rated"


def test_popular_negatives_take_the_popularity_shortcut_away():
    random = np.random.default_rng(0)
    weight = 1 / np.arange(1, 41) ** 1.2
    draws = [random.choice(40, size=10, replace=False, p=weight / weight.sum()).tolist() for _ in range(400)]
    ratings = pd.concat([ratings_of(user, films) for user, films in enumerate(draws)])
    count = ratings[ratings["time"] < 6]["film"].value_counts()

    def popular_wins(negatives: str) -> float:
        pairs = build_pairs(ratings, FILMS, negatives=negatives)
        return np.mean([count.get(number(p.preferred.title), 0) > count.get(number(p.other.title), 0) for p in pairs])

    assert popular_wins("random") > 0.65
    assert popular_wins("popularity") < 0.55


def test_the_seed_draws_other_films_and_orders():
    ratings = pd.concat([ratings_of(user, [(user + k) % 40 for k in range(8)]) for user in range(30)])
    first = build_pairs(ratings, FILMS, seed=1)
    assert first == build_pairs(ratings, FILMS, seed=1) != build_pairs(ratings, FILMS, seed=2)
    assert {pair.order for pair in build_pairs(ratings, FILMS)} == {"A", "B"}


def test_two_ids_of_one_film_are_one_film():
    films = FILMS.assign(title=FILMS["title"].replace("Film 7 (1957)", "Film 0 (1950)"))
    pairs = build_pairs(pd.concat([ratings_of(1, [0, 7, 1, 2, 3, 4, 5]), ratings_of(2, [20, 21])]), films)
    assert [number(title) for title in pairs[0].history] == [0, 1, 2, 3, 4]


@pytest.fixture
def ml_1m(tmp_path):
    """A made-up MovieLens-1M: latin-1, `::` between fields."""
    path = tmp_path / "ml-1m.zip"
    with zipfile.ZipFile(path, "w") as archive:
        films = "".join(f"{film}::Misérables, Les: {film} ({1950 + film})::Drama|War\n" for film in range(1, 30))
        archive.writestr("ml-1m/movies.dat", films.encode("latin-1"))
        rows = [f"{user}::{1 + (user * 3 + k) % 29}::5::{k}\n" for user in range(1, 9) for k in range(9)]
        archive.writestr("ml-1m/ratings.dat", "".join(rows))
    return path


def test_ml_1m_is_read_from_a_zip_or_a_folder(ml_1m, tmp_path):
    zipfile.ZipFile(ml_1m).extractall(tmp_path)
    for source in (ml_1m, tmp_path / "ml-1m"):
        ratings, films = read_ml_1m(source)
        assert len(ratings) == 72
        assert films["title"][0] == "Misérables, Les: 1 (1951)"


def test_the_command_writes_a_pairs_file(ml_1m, tmp_path):
    command = [sys.executable, str(script.HERE / "build_pairs.py"), "--source", "ml-1m"]
    output = tmp_path / "new" / "p.jsonl"
    done = subprocess.run([*command, "--from", ml_1m, "--output", output], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "8 pairs of 8 users" in done.stdout
    assert len(load_pairs(output)) == 8

    missing = subprocess.run([*command, "--from", tmp_path / "absent"], capture_output=True, text=True)
    assert missing.returncode == 2
    assert "--download" in missing.stderr and "Traceback" not in missing.stderr


def test_a_downloaded_archive_is_checked_before_it_is_opened(tmp_path, monkeypatch):
    source = tmp_path / "source.zip"
    source.write_bytes(b"PK another file")
    monkeypatch.setattr(script, "ML_1M_URL", source.as_uri())
    with pytest.raises(UserError, match="not the file that was expected"):
        script.download_ml_1m(tmp_path)
    monkeypatch.setattr(script, "ML_1M_SHA256", file_sha256(source))
    assert script.download_ml_1m(tmp_path).read_bytes() == source.read_bytes()
