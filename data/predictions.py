"""The rows of predictions.csv and generations.csv: make, read, check. docs/metrics.md describes their columns."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from data.baselines import baseline_margins, film_counts
from data.errors import UserError
from data.pairs import ORDERS, Pair, other_letter, recommended

MARGINS = ("decision_margin", "response_margin")
ARM_NAME = re.compile(r"\w[\w.+@ -]{0,59}")  # means nothing to a terminal, Markdown, LaTeX or matplotlib
TEXT = ("arm", "kind", "seed", "pair_id", "order", "history", "preferred_more_popular")
KEY = ["arm", "seed", "pair_id", "order", "history"]
REMEDY = "Give a predictions.csv of evaluate_dpo.py."


def prediction_rows(
    arm: str,
    kind: str,
    seed: str,
    history: str,
    pairs: Sequence[Pair],
    popularity: Counter[str],
    decision: np.ndarray,
    response: np.ndarray | None = None,
) -> pd.DataFrame:
    """Rows of predictions.csv for one arm, seed and history.

    Args:
        kind: model or baseline.
        history: own or stranger.
        popularity: how many training users watched each title.
        decision, response: margins in nats, (users, orders A and B); response None where not scored.
    """
    counts = [(popularity[pair.preferred.title], popularity[pair.other.title]) for pair in pairs]
    return pd.DataFrame(
        {
            "arm": arm,
            "kind": kind,
            "seed": seed,
            "pair_id": np.repeat([pair.pair_id for pair in pairs], 2),
            "order": list(ORDERS) * len(pairs),
            "history": history,
            "decision_margin": decision.ravel().round(6),
            "response_margin": np.nan if response is None else response.ravel().round(6),
            "preferred_more_popular": np.repeat(["tie" if a == b else str(a > b).lower() for a, b in counts], 2),
        }
    )


def baseline_rows(train: Sequence[Pair], test: Sequence[Pair]) -> list[pd.DataFrame]:
    """Rows of predictions.csv for each baseline."""
    counts = film_counts(train)
    margins = baseline_margins(train, test)
    return [prediction_rows(arm, "baseline", "", "own", test, counts, decision) for arm, decision in margins.items()]


def read_predictions(path: Path) -> pd.DataFrame:
    """The rows of predictions.csv.

    Raises:
        UserError: there is no such file, or evaluate_dpo.py did not write it.
    """
    types = dict.fromkeys(TEXT, str) | dict.fromkeys(MARGINS, float)
    empty = {name: [""] for name in MARGINS}
    try:
        predictions = pd.read_csv(path, dtype=types, keep_default_na=False, na_values=empty)
        if "preferred_more_popular" in predictions:
            predictions["preferred_more_popular"] = predictions["preferred_more_popular"].str.lower()  # a spreadsheet's
        problem = problem_of(predictions)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {str(error).splitlines()[0]}", REMEDY) from None
    if problem:
        raise UserError(f"{path} {problem}", REMEDY)
    return predictions


def problem_of(rows: pd.DataFrame) -> str:
    """Why no measures can be computed from these rows; "" if they can."""
    if missing := {*TEXT, *MARGINS} - {*rows.columns}:
        return f"has no column {', '.join(sorted(missing))}"
    if rows.empty:
        return "holds no rows"
    if not (rows["order"].isin(ORDERS) & rows["history"].isin(("own", "stranger"))).all():
        return "has an order that is neither A nor B, or a history that is neither own nor stranger"
    if rows.duplicated(KEY).any():
        return f"has two rows for the same {', '.join(KEY)}"
    if not rows["arm"].map(lambda arm: bool(ARM_NAME.fullmatch(arm))).all():
        return "has an arm whose name holds other than letters, digits and . _ + - @"
    if not rows["kind"].isin(("model", "baseline")).all() or (rows.groupby("arm")["kind"].nunique() > 1).any():
        return "has an arm that is neither a model nor a baseline, or both"
    if not rows["preferred_more_popular"].isin(("true", "false", "tie")).all():
        return "has a preferred_more_popular that is not true, false or tie"
    if rows["decision_margin"].isna().any() or (rows[list(MARGINS)].abs() > 1e6).any(axis=None):
        return "has a margin that is missing or above a million"
    own = rows[rows["history"] == "own"]
    users = own["pair_id"].nunique()
    if users < 2 or (own.groupby(["arm", "seed"]).size() != 2 * users).any():
        return f"does not have each of its {users} users (two at least) in both orders under every arm"
    return ""


def margins_of(rows: pd.DataFrame, name: str, users: pd.Series) -> np.ndarray:
    """One margin of one arm's run as (users, orders A and B), nan where there is no row."""
    wide = rows.pivot(index="pair_id", columns="order", values=name)
    return wide.reindex(index=users, columns=list(ORDERS)).to_numpy(dtype=float)


def margins_by_user(predictions: pd.DataFrame) -> pd.DataFrame:
    """Decision margins in nats, mean over orders and seeds, (users, arms)."""
    own = predictions[predictions["history"] == "own"]
    return own.pivot_table(index="pair_id", columns="arm", values="decision_margin", aggfunc="mean")


def genre_pattern(pairs: Sequence[Pair]) -> re.Pattern[str]:
    """Finds every genre of these pairs' films as a word of its own; the longer of two that begin alike."""
    known = {genre for pair in pairs for film in (pair.preferred, pair.other) for genre in film.genres}
    longest_first = sorted(known, key=len, reverse=True)
    return re.compile("|".join(rf"(?<![\w-]){re.escape(genre)}(?![\w-])" for genre in longest_first))


def generation_rows(
    arm: str,
    seed: str,
    pairs: Sequence[Pair],
    orders: Sequence[str],
    answers: Sequence[Sequence[str]],
    genres: re.Pattern[str],
) -> pd.DataFrame:
    """One row per generated answer: what it recommends, and which of the genres that `genres` finds it argues with.

    own_genre: a genre of the recommended film is cited before the answer turns to the other option.
    foreign_genre: a genre is cited there that neither film has. Both are false where nothing is recommended.
    """
    rows = []
    for pair, order, texts in zip(pairs, orders, answers, strict=True):
        films = {order: pair.preferred, other_letter(order): pair.other}
        for sample, text in enumerate(texts):
            letter = recommended(text)
            argument = re.split(rf"Option {other_letter(letter)}\b", text)[0] if letter else ""
            cited = set(genres.findall(argument))
            own = set(films[letter].genres) if letter else set()
            neither = cited - set(pair.preferred.genres) - set(pair.other.genres)
            about = {"arm": arm, "seed": seed, "pair_id": pair.pair_id, "order": order, "sample": sample}
            found = {"answer": letter or "", "own_genre": bool(cited & own), "foreign_genre": bool(neither)}
            rows.append(about | found | {"text": text})
    return pd.DataFrame(rows)
