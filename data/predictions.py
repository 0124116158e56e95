"""The rows of predictions.csv and generations.csv: make, read, check. docs/metrics.md describes their columns."""

import re
import zlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from data.baselines import baseline_margins, film_counts
from data.errors import UserError
from data.pairs import ORDERS, Pair, other_letter, recommended
from data.runs import Lineage

MARGINS = ("decision_margin", "response_margin")
LOG_PROBS = ("chosen_log_prob", "rejected_log_prob")
ARM_NAME = re.compile(r"\w[\w.+ -]{0,29}(@\w{1,9})?")  # means nothing to a terminal, Markdown, LaTeX or matplotlib
KEY = ["arm", "seed", "pair_id", "order", "history"]
IN_EACH = ("arm", "kind", "seed", "pair_id", "order", "history", "decision_margin")
COUNTED = ("preferred_count", "other_count")
COLUMNS = {  # of predictions.csv, by version
    1: (*IN_EACH, "response_margin", "preferred_more_popular"),
    2: (*IN_EACH[:3], "user_id", *IN_EACH[3:], *LOG_PROBS, *COUNTED, *Lineage._fields),
}
WHOLE = (*COUNTED, "pairs_seen")
NUMBERS = (*MARGINS, *LOG_PROBS, *WHOLE, "beta")
REMEDY = "Give a predictions.csv of evaluate_dpo.py."


def prediction_rows(
    arm: str, kind: str, seed: str, history: str, pairs: Sequence[Pair], popularity: Counter[str], decision: np.ndarray,
    chosen: np.ndarray | None = None, rejected: np.ndarray | None = None, about: Lineage | None = None,
) -> pd.DataFrame:
    """Rows of predictions.csv for one arm, seed and history, `completed`.

    kind: model or baseline.
    history: own or stranger.
    popularity: how many training users watched each title.
    decision: margins in nats, (pairs, orders A and B).
    chosen, rejected: log-probabilities of the responses in nats, (pairs, orders); None where not scored.
    """
    content = {
        "arm": arm, "kind": kind, "seed": seed,
        "user_id": np.repeat([pair.user_id for pair in pairs], 2),
        "pair_id": np.repeat([pair.pair_id for pair in pairs], 2),
        "order": list(ORDERS) * len(pairs),
        "history": history,
        "decision_margin": decision.ravel().round(6),
        "chosen_log_prob": np.nan if chosen is None else chosen.ravel().round(6),
        "rejected_log_prob": np.nan if rejected is None else rejected.ravel().round(6),
        "preferred_count": np.repeat([popularity[pair.preferred.title] for pair in pairs], 2),
        "other_count": np.repeat([popularity[pair.other.title] for pair in pairs], 2),
    }
    return completed(pd.DataFrame(content).assign(**(about or Lineage())._asdict()))


def baseline_rows(train: Sequence[Pair], test: Sequence[Pair]) -> list[pd.DataFrame]:
    """Rows of predictions.csv for each baseline."""
    about, margins = ("baseline", "", "own", test, film_counts(train)), baseline_margins(train, test)
    return [prediction_rows(arm, *about, decision) for arm, decision in margins.items()]


def completed(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of either version with the columns of both; what version 1 cannot give is nan or ""."""
    if "chosen_log_prob" in rows:
        difference = rows["preferred_count"] - rows["other_count"]
        popular = difference.map(lambda more: "true" if more > 0 else "false" if more < 0 else "tie")
        response = (rows["chosen_log_prob"] - rows["rejected_log_prob"]).round(6)
        return rows.assign(response_margin=response, preferred_more_popular=popular)
    popular = rows["preferred_more_popular"].str.lower()  # a spreadsheet's
    unknown = dict.fromkeys([name for name in NUMBERS if name not in rows], np.nan)
    return rows.assign(user_id=rows["pair_id"], reference="", **unknown, preferred_more_popular=popular)


def version_of(rows: pd.DataFrame) -> int:
    return 1 if rows["preferred_count"].isna().all() else 2


def left_out(rows: pd.DataFrame) -> list[str]:
    """A note on what rows of version 1 cannot give."""
    lacking = "every pair counts as a user. Log-probabilities, film counts, references and pairs seen are not known."
    return [f"note: these predictions are of version 1: {lacking}"] if version_of(rows) == 1 else []


def as_csv(rows: pd.DataFrame) -> str:
    """The text of a predictions.csv of the version that `completed` rows come from."""
    whole = rows.astype(dict.fromkeys(WHOLE, "Int64"))
    return whole.to_csv(index=False, lineterminator="\n", columns=COLUMNS[version_of(rows)])


def read_predictions(path: Path) -> pd.DataFrame:
    """The rows of predictions.csv of either version, `completed`; UserError where evaluate_dpo.py did not write it."""
    types = {name: float if name in NUMBERS else str for columns in COLUMNS.values() for name in columns}
    empty = {name: [""] for name in NUMBERS}
    try:
        packed = "gzip" if path.suffix == ".gz" else None
        predictions = pd.read_csv(path, dtype=types, keep_default_na=False, na_values=empty, compression=packed)
        there = {*predictions.columns}
        if missing := {*COLUMNS[2 if {"user_id", *LOG_PROBS} & there else 1]} - there:
            problem = f"has no column {', '.join(sorted(missing))}"
        else:
            predictions = completed(predictions)
            problem = problem_of(predictions)
    except (OSError, ValueError, EOFError, zlib.error) as error:
        raise UserError(f"cannot read {path}: {str(error).splitlines()[0]}", REMEDY) from None
    if problem:
        raise UserError(f"{path} {problem}", REMEDY)
    return predictions


def problem_of(rows: pd.DataFrame) -> str:
    """Why no measures can be computed from these `completed` rows; "" if they can."""
    if rows.empty:
        return "holds no rows"
    if not (rows["order"].isin(ORDERS) & rows["history"].isin(("own", "stranger"))).all():
        return "has an order that is neither A nor B, or a history that is neither own nor stranger"
    if rows.duplicated(KEY).any():
        return f"has two rows for the same {', '.join(KEY)}"
    if not all(ARM_NAME.fullmatch(name) for name in {*rows["arm"], *rows["seed"]} - {""}) or (rows["arm"] == "").any():
        return "has an arm or a seed whose name is long, or holds other than letters, digits and . _ + - @"
    if not rows["kind"].isin(("model", "baseline")).all() or (rows.groupby("arm")["kind"].nunique() > 1).any():
        return "has an arm that is neither a model nor a baseline, or both"
    if not (rows["kind"] == "model").any():
        return "holds no arm of a model"
    if not rows["preferred_more_popular"].isin(("true", "false", "tie")).all():
        return "has a preferred_more_popular that is not true, false or tie"
    if rows["decision_margin"].isna().any() or (rows[list(NUMBERS)].abs() > 1e9).any(axis=None):
        return "has a margin that is missing, or a number above a billion"
    lacking = version_of(rows) == 2 and rows[list(COUNTED)].isna().any(axis=None)
    if lacking or (rows[list(WHOLE)].fillna(0) % 1 > 0).any(axis=None):
        return "has a count that is missing or no whole number"
    if (rows.groupby(["arm", "seed"])[[*Lineage._fields]].nunique() > 1).any(axis=None):
        return "has two references, betas or pairs_seen for one run"
    own = rows[rows["history"] == "own"]
    pairs, users = own["pair_id"].nunique(), own["user_id"].nunique()
    if users < 2 or (own.groupby(["arm", "seed"]).size() != 2 * pairs).any():
        return f"does not have each of its {pairs} pairs, of two users at least, in both orders under every arm"
    if (own.groupby("pair_id")[["user_id", *COUNTED, "preferred_more_popular"]].nunique() > 1).any(axis=None):
        return "has a pair of two users, or of two counts of a film"
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
    arm: str, seed: str, pairs: Sequence[Pair], orders: Sequence[str], answers: Sequence[Sequence[str]],
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
