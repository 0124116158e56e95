"""MovieLens ratings become pairs."""

import re
import subprocess
import sys
import zipfile

import numpy as np
import pandas as pd
import pytest

from data import build_pairs as script
from data.build_pairs import build_pairs, read_movielens
from data.errors import UserError
from data.files import file_sha256
from data.pairs import load_pairs, write_pairs

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


def test_users_of_the_same_films_and_of_ids_below_0_make_a_file_that_can_be_read(tmp_path):
    ratings = pd.concat([ratings_of(user, list(range(6))) for user in range(-9, 30)] + [ratings_of(99, [20, 21])])
    pairs = build_pairs(ratings, FILMS)
    assert len(pairs) == 2, "the other film is one of two"
    write_pairs(tmp_path / "pairs.jsonl", pairs)
    assert load_pairs(tmp_path / "pairs.jsonl") == pairs


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
        counts = dict.fromkeys(range(1, 9), 9) | {9: 2}  # the last has too few for a pair
        rows = [f"{user}::{1 + (user * 3 + k) % 29}::5::{k}\n" for user in counts for k in range(counts[user])]
        archive.writestr("ml-1m/ratings.dat", "".join(rows))
    return path


def test_ml_1m_is_read_from_a_zip_or_a_folder(ml_1m, tmp_path):
    zipfile.ZipFile(ml_1m).extractall(tmp_path)
    for source in (ml_1m, tmp_path / "ml-1m"):
        ratings, films = read_movielens(source)
        assert len(ratings) == 74
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
    assert "ratings.csv and movies.csv, or ratings.dat" in missing.stderr and "Traceback" not in missing.stderr
    for wrong, problem in (
        (["--pairs-per-user", "0"], "--pairs-per-user is below 1"),
        (["--seed", "-1"], "--seed below 0"),
        (["--min-rating", "6"], "no user has 6 films of a rating of 6.0 or more"),
        (["--output", str(tmp_path)], "is a folder"),
        (["--source", "ml-100k"], "ml-100k comes from the package index"),
    ):
        refused = subprocess.run([*command, "--from", ml_1m, *wrong], capture_output=True, text=True)
        assert (refused.returncode, refused.stdout) == (2, "") and problem in refused.stderr, wrong


def test_a_downloaded_archive_is_checked_before_it_is_opened(tmp_path, monkeypatch):
    source = tmp_path / "source.zip"
    source.write_bytes(b"PK another file")
    monkeypatch.setattr(script, "ML_1M_URL", source.as_uri())
    with pytest.raises(UserError, match="not the file that was expected"):
        script.download_ml_1m(tmp_path)
    monkeypatch.setattr(script, "ML_1M_SHA256", file_sha256(source))
    assert script.download_ml_1m(tmp_path).read_bytes() == source.read_bytes()


def test_a_film_that_no_pairs_file_can_hold_is_skipped_and_the_first_one_named(capsys):
    odd = {3: "Babylon 5", 4: "Fawlty Towers (1975-1979)"}
    films = FILMS.assign(title=[odd.get(film, f"Film {film} ({1950 + film})") for film in FILMS["film"]])
    films["genres"] = [["(no genres listed)"] if film == 5 else ["Drama"] for film in films["film"]]
    pairs = build_pairs(pd.concat([ratings_of(1, list(range(10))), ratings_of(2, [20, 21])]), films)
    said = capsys.readouterr().err
    assert "skipped 3 of 40 films, the first 'Babylon 5', since its title ends in no (year)" in said
    assert "ratings" not in said
    build_pairs(pd.concat([ratings_of(1, list(range(10))), ratings_of(2, [20, 99])]), films)
    assert "skipped 1 of 12 ratings, whose film is not listed" in capsys.readouterr().err
    assert [[number(title) for title in pair.history] for pair in pairs] == [[0, 1, 2, 6, 7]]


@pytest.mark.parametrize("fault", ["no name", "huge id", "encrypted"])
def test_what_is_no_movielens_is_refused(tmp_path, fault):
    header = "user,film,stars,time" if fault == "no name" else "userId,movieId,rating,timestamp"
    row = "99999999999999999999,1,5,1" if fault == "huge id" else "1,1,5,1"
    with zipfile.ZipFile(tmp_path / "ml.zip", "w") as archive:
        archive.writestr("ratings.csv", f"{header}\n{row}\n")
        archive.writestr("movies.csv", "movieId,title,genres\n1,Heat (1995),Drama\n")
    if fault == "encrypted":
        content = bytearray((tmp_path / "ml.zip").read_bytes())
        for header, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
            for found in re.finditer(header, content):
                content[found.start() + flags] |= 1
        (tmp_path / "ml.zip").write_bytes(content)
    with pytest.raises(UserError, match="no MovieLens at .*\nGive --from"):
        read_movielens(tmp_path / "ml.zip")


@pytest.mark.parametrize("form", ["dat", "latin-1", "csv", "zip"])
def test_every_form_of_movielens_is_read(tmp_path, form):
    rows = [(1, "Pépé le Moko (1937)", "Crime|Drama"), (2, "Fiancée, La (1991)", "Comedy")]
    if form in ("dat", "latin-1"):
        text = "".join(f"{film}::{title}::{genres}\n" for film, title, genres in rows)
        (tmp_path / "movies.dat").write_bytes(text.encode("utf-8" if form == "dat" else "latin-1"))
        (tmp_path / "ratings.dat").write_text("7::1::3.5::100\n7::2::4::101\n")
    else:
        text = "".join(f'{film},"{title}",{genres}\n' for film, title, genres in rows)
        (tmp_path / "movies.csv").write_text("movieId,title,genres\n" + text, encoding="utf-8")
        text = "\ufefftimestamp,userId,movieId,rating\n100,7,1,3.5\n101,7,2,4\n"
        (tmp_path / "ratings.csv").write_text(text, encoding="utf-8")
    source = tmp_path
    if form == "zip":
        source = tmp_path / "ml-latest-small.zip"
        with zipfile.ZipFile(source, "w") as archive:
            for name in ("movies.csv", "ratings.csv"):
                archive.write(tmp_path / name, f"ml-latest-small/{name}")
    ratings, films = script.read_movielens(source)
    assert ratings.to_dict("list") == {"user": [7, 7], "film": [1, 2], "rating": [3.5, 4], "time": [100, 101]}
    assert films.to_dict("list") == {
        "film": [1, 2],
        "title": ["Pépé le Moko (1937)", "Fiancée, La (1991)"],
        "genres": [["Crime", "Drama"], ["Comedy"]],
    }
