"""What a pair is: read, check, write, split, and show it to a model in either order.

A pairs file holds one JSON object a line, with the keys `instruction`, `input` and `output`:

    History: t1, t2, t3, t4, t5. Option A: title (genre|genre). Option B: title (genre|genre).
    The better recommendation is Option A. Reasoning: ...

A line may also have a `user_id`: without one, the pairs that share a history are taken for one user's.

`preference_row` writes the sentences again: the preferred film may stand in either order, and the rejected response
reads as well as the chosen one.
"""

import hashlib
import json
import os
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from pathlib import Path

from data.errors import UserError
from data.files import write_text

INSTRUCTION = (
    "Analyze the user's history to identify their preference. "
    "Compare two potential movies and explain which one is the better recommendation."
)
STEM = "The better recommendation is Option"  # the token after it is the decision
ORDERS = ("A", "B")
HISTORY_LENGTH = 5
PROBLEMS_SHOWN = 20
LONGEST_TITLE = 300  # characters; the longest of MovieLens has 82
LONGEST_LINE = 10_000  # bytes
LARGEST_FILE = 500_000_000  # bytes, a million pairs: all are held in memory

_INPUT = re.compile(r"History: (?P<history>.+?)\. Option A: (?P<A>.+)\. Option B: (?P<B>.+)\.")
_OPTION = re.compile(r"(?P<title>.+) \((?P<genres>[^()|\d][^()|]*(?:\|[^()|]+)*)\)")
_BETWEEN_TITLES = re.compile(r"(?<=\(\d{4}\)), ")  # every title of a history ends in its year
_YEAR = re.compile(r"\(\d{4}\)$")
_DECISION = re.compile(r"better recommendation is Option ([AB])\b")
_MENTION = re.compile(r"\bOption ([AB])\b")
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")  # they steer a terminal


class PairsError(ValueError):
    """A pairs file that cannot be used; the message lists every problem by line number."""


@dataclass(frozen=True)
class Movie:
    """A film: its title with the year, such as `Heat (1995)`, and its genres."""

    title: str
    genres: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.title} ({'|'.join(self.genres)})"


@dataclass(frozen=True)
class Pair:
    """One user's five watched titles, the film watched next, and a film that was not.

    `order` is the letter that held the preferred film in the file, `user` the user that the file names; neither is
    part of the content, so `pair_id` does not depend on them.
    """

    history: tuple[str, ...]
    preferred: Movie
    other: Movie
    order: str = "A"
    user: str = ""

    @cached_property
    def pair_id(self) -> str:
        """16 hexadecimal digits, a hash of history, preferred and other film."""
        return _digest("pair", *self.history, str(self.preferred), str(self.other))

    @cached_property
    def user_id(self) -> str:
        """16 hexadecimal digits, a hash of the user that the file names, else of the history."""
        return _digest("user", *((self.user,) if self.user else self.history))


def load_pairs(path: str | Path) -> list[Pair]:
    """Read a pairs file; PairsError, where it is empty or a line is wrong, has number and reason of the first 20."""
    pairs: list[Pair] = []
    problems: list[str] = []
    line_of: dict[str, int] = {}
    if (size := os.path.getsize(path)) > LARGEST_FILE:
        most = LARGEST_FILE / 1e9
        raise PairsError(f"{path}: {size / 1e9:.1f} GB, more than the {most} GB that a pairs file may have")
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                pair = _parse_line(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line)
                first = line_of.setdefault(pair.pair_id, number)
                if first != number:
                    raise PairsError(f"the same pair as line {first}")
                pairs.append(pair)
            except PairsError as problem:
                problems.append(f"line {number}: {problem}")
    if not pairs and not problems:
        problems.append("the file holds no pairs")
    if problems:
        more = [f"and {len(problems) - PROBLEMS_SHOWN} more"] if len(problems) > PROBLEMS_SHOWN else []
        raise PairsError("\n  ".join([f"{path}: {len(problems)} problem(s)", *problems[:PROBLEMS_SHOWN], *more]))
    return pairs


def write_pairs(path: str | Path, pairs: Iterable[Pair]) -> None:
    """Write a pairs file, whole or not at all; PairsError where a pair would not be read back as it is."""
    write_text(Path(path), "".join(map(_as_line, pairs)))


def make_pair(history: Iterable[str], preferred: tuple[str, str], other: tuple[str, str]) -> Pair:
    """A pair of one's own, from titles with their year and (title, genres as `Action|Crime`), or PairsError."""

    def film(title: str, genres: str) -> Movie:
        return Movie(title.strip(), tuple(genre.strip() for genre in genres.split("|")))

    pair = Pair(tuple(title.strip() for title in history if title.strip()), film(*preferred), film(*other))
    _as_line(pair)
    return pair


def film_problem(film: Movie) -> str:
    """Why a film cannot stand in a pairs file; "" if it can."""
    try:
        _as_line(Pair((film.title,) * HISTORY_LENGTH, film, Movie("Any Other Film (1900)", ("Drama",))))
    except PairsError:
        has_year = _YEAR.search(film.title)
        return "a pairs file cannot hold its title or genres" if has_year else "its title ends in no (year)"
    return ""


def split_pairs(pairs: Sequence[Pair], test_share: float = 0.2) -> tuple[list[Pair], list[Pair]]:
    """(train, test), in the file's order: users by hash, as many as fit into `test_share` of the pairs, are tested."""
    wanted, test_users = round(test_share * len(pairs)), set[str]()
    for user, count in sorted(Counter(pair.user_id for pair in pairs).items()):
        if count <= wanted:
            wanted -= count
            test_users.add(user)
    train = [pair for pair in pairs if pair.user_id not in test_users]
    test = [pair for pair in pairs if pair.user_id in test_users]
    return train, test


def hold_back(train: Sequence[Pair], validation_pairs: int, max_pairs: int | None) -> tuple[list[Pair], list[Pair]]:
    """(used, validation): validation comes out of the training users, so that no test user is looked at.

    Of the others, each user's first pair comes before anybody's second: few pairs are of as many users as there are.
    """
    by_hash = sorted(train, key=lambda pair: (pair.user_id, pair.pair_id))
    held_back = {pair.user_id for pair in by_hash[:validation_pairs]}
    validation = [pair for pair in by_hash if pair.user_id in held_back]
    users = groupby((pair for pair in by_hash if pair.user_id not in held_back), key=lambda pair: pair.user_id)
    turns = [(turn, pair) for _, pairs in users for turn, pair in enumerate(pairs)]
    return [pair for _, pair in sorted(turns, key=lambda turn: turn[0])][:max_pairs], validation


def warnings_on(train: Sequence[Pair], test: Sequence[Pair]) -> list[str]:
    """What makes these pairs a worse test than they look, each in words with its count.

    Users who watched the same four films one after another are few (5% of MovieLens-100K's, fewer of MovieLens-1M's).
    More than a tenth are windows of one user's history, which the split has taken for several users.
    """

    def runs(pair: Pair) -> set[tuple[str, ...]]:
        films = (*pair.history, pair.preferred.title)
        return {films[start : start + 4] for start in range(len(films) - 3)}

    seen = {run for pair in train for run in runs(pair)}
    leaked = [pair for pair in test if runs(pair) & seen]
    everything = [*train, *test]
    labels = {(pair.history, pair.preferred.title, pair.other.title) for pair in everything}
    contrary = sum((history, other, preferred) in labels for history, preferred, other in labels)
    already = sum(pair.preferred.title in pair.history for pair in everything)
    found = []
    if len(leaked) > 0.1 * len(test):
        shared = f"{len(leaked):,} of {len(test):,} test pairs share four films in a row with a training pair"
        found.append(f"{shared}: training may have seen what is tested; give each line its user_id")
    if 0 < (nameless := sum(not pair.user for pair in everything)) < len(everything):
        found.append(f"{nameless:,} of {len(everything):,} pairs name no user, where others do")
    if already:
        found.append(f"{already:,} of {len(everything):,} pairs prefer a film that stands in their own history")
    if contrary:
        found.append(f"{contrary:,} pairs have a twin that prefers the other film after the same history")
    return found


def with_strangers(pairs: Sequence[Pair]) -> list[Pair]:
    """The same choices, each with the history of the next of these users by hash; the last one has the first's."""
    history = {pair.user_id: pair.history for pair in pairs}
    users = sorted(history)
    following = dict(zip(users, users[1:] + users[:1], strict=True))
    return [replace(pair, history=history[following[pair.user_id]]) for pair in pairs]


def read_split(path: str, test_share: float) -> tuple[list[Pair], list[Pair]]:
    """A pairs file as (train, test), split by user with a stable hash; UserError where it cannot be read."""
    try:
        pairs = load_pairs(path)
    except FileNotFoundError:
        sources = {"pairs_ml-100k": "ml-100k", "contrastive_rec_train": "ml-1m --download"}
        source = sources.get(Path(path).stem)
        script = os.path.relpath(Path(__file__).with_name("build_pairs.py"))
        command = f"python {shlex.quote(script)} --source {source} --output {shlex.quote(path)}"
        remedy = f"Make it with: {command}" if source else "Give --pairs a file that is there."
        raise UserError(f"no pairs file {path}", remedy) from None
    except OSError as error:
        raise UserError(f"cannot read the pairs file {path}: {error.strerror}", "Give --pairs a file.") from None
    except PairsError as error:
        raise UserError(error, "Fix these lines, or build the file again with data/build_pairs.py.") from None
    train, test = split_pairs(pairs, test_share)
    if not train or not test:
        few = f"{len(pairs)} pair(s) of {len({pair.user_id for pair in pairs})} user(s)"
        remedy = f"Give pairs of more users, or {'raise' if train else 'lower'} --test_share."
        raise UserError(f"{path} holds {few}, too few to split", remedy)
    if (users := len({pair.user_id for pair in test})) < 2:
        problem = f"{users} test user(s) are too few for an interval"
        raise UserError(problem, "Give pairs of more users, or raise --test_share.")
    return train, test


def other_letter(letter: str) -> str:
    return ORDERS[1 - ORDERS.index(letter)]


def preference_row(pair: Pair, order: str) -> dict[str, str]:
    """The pair as text: `prompt`, `chosen` and `rejected`, with the preferred film as option `order`.

    The rejected response is the same sentence arguing for the other film: letters and genres both change
    place. The prompt ends in one newline and the responses begin without white space, so that a tokenizer
    cuts prompt + response where the prompt ends.
    """
    contrary = other_letter(order)
    return {
        "prompt": f"### Instruction:\n{INSTRUCTION}\n\n### Input:\n{_input_text(pair, order)}\n\n### Response:\n",
        "chosen": _response(order, pair.preferred, contrary, pair.other),
        "rejected": _response(contrary, pair.other, order, pair.preferred),
    }


def preference_rows(pairs: Sequence[Pair], option_order: str = "balanced", seed: int = 0) -> list[dict[str, str]]:
    """Rows for training.

    `balanced` shows every pair once, half of them in each order, drawn from `seed`; `both` shows every pair in both
    orders; `original` keeps the file's order, and with it the shortcut that a file may hold.
    """
    if option_order == "both":
        return [preference_row(pair, order) for pair in pairs for order in ORDERS]
    if option_order == "original":
        return [preference_row(pair, pair.order) for pair in pairs]
    drawn = sorted(pairs, key=lambda pair: _digest(str(seed), pair.pair_id))
    in_order_a = {pair.pair_id for pair in drawn[: len(pairs) // 2]}
    return [preference_row(pair, "A" if pair.pair_id in in_order_a else "B") for pair in pairs]


def recommended(answer: str) -> str | None:
    """The option that an answer first calls the better one, or alone mentions, "A" or "B"; None where there is none."""
    decision = _DECISION.search(answer)
    letters = {decision[1]} if decision else set(_MENTION.findall(answer))
    return letters.pop() if len(letters) == 1 else None


def prompt_digest() -> str:
    """One hash of the words around the films: other words are another training."""
    first, second = (Movie(title, ("genre",)) for title in ("first", "second"))
    return _digest(*preference_row(Pair(("watched",) * HISTORY_LENGTH, first, second), "A").values())


def ids_digest(pairs: Iterable[Pair]) -> str:
    """One hash for a set of pairs, whatever their order: two splits are equal when it is equal."""
    return _digest(*sorted(pair.pair_id for pair in pairs))


def _digest(*parts: str) -> str:
    return hashlib.sha256("\x1f".join(parts).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _input_text(pair: Pair, order: str) -> str:
    first, second = (pair.preferred, pair.other) if order == "A" else (pair.other, pair.preferred)
    return f"History: {', '.join(pair.history)}. Option A: {first}. Option B: {second}."


def _as_line(pair: Pair) -> str:
    row = preference_row(pair, pair.order)
    text = {"instruction": INSTRUCTION, "input": _input_text(pair, pair.order), "output": row["chosen"]}
    text |= {"user_id": pair.user} if pair.user else {}
    line = json.dumps(text, ensure_ascii=False)
    if _parse_line(line.encode("utf-8", "surrogatepass")) != pair:
        raise PairsError(f"this pair cannot be written in the pairs format: {pair!r}")
    return line + "\n"


def _response(letter: str, film: Movie, contrary: str, against: Movie) -> str:
    themes, others = "|".join(film.genres), "|".join(against.genres)
    shown = f"{STEM} {letter}. Reasoning: The user has shown a strong preference for themes found in {themes}."
    return f"{shown} Option {contrary} ({others}) does not align with their recent viewing patterns."


def _parse_line(line: bytes) -> Pair:
    if len(line) > LONGEST_LINE:
        raise PairsError(f"longer than {LONGEST_LINE:,} bytes")
    try:
        text = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise PairsError(f"not UTF-8 at byte {error.start + 1}") from None
    except (ValueError, RecursionError) as error:
        raise PairsError(f"not JSON ({error})") from None
    if not isinstance(text, dict):
        raise PairsError("not a JSON object")
    for key in ("instruction", "input", "output"):
        if key not in text:
            raise PairsError(f"no key {key!r}")
        if not isinstance(text[key], str):
            raise PairsError(f"{key!r} is no text")
        if _UNPRINTABLE.search(text[key]):
            raise PairsError(f"{key!r} holds control characters")

    parts = _INPUT.fullmatch(text["input"])
    options = {order: parts and _OPTION.fullmatch(parts[order]) for order in ORDERS}
    if not all(options.values()):
        raise PairsError("the input is not 'History: t1, ..., t5. Option A: T (g|g). Option B: T (g|g).'")
    history = tuple(title.strip() for title in _BETWEEN_TITLES.split(parts["history"]))
    if len(history) != HISTORY_LENGTH or not _YEAR.search(history[-1]):
        raise PairsError(f"the history has {len(history)} film(s) and not {HISTORY_LENGTH}; a title ends in its (year)")
    films = {
        order: Movie(option["title"].strip(), tuple(genre.strip() for genre in option["genres"].split("|")))
        for order, option in options.items()
    }
    if not all((*films["A"].genres, *films["B"].genres)):
        raise PairsError("a genre is empty")
    if max(map(len, (*history, films["A"].title, films["B"].title))) > LONGEST_TITLE:
        raise PairsError(f"a title is longer than {LONGEST_TITLE} characters")
    if films["A"].title == films["B"].title:
        raise PairsError("Option A and Option B are the same film")

    order = recommended(text["output"])
    if order is None:
        which = "both options" if _MENTION.search(text["output"]) else "neither option"
        raise PairsError(f"the output recommends {which}")
    user = text.get("user_id", "")
    if isinstance(user, bool) or not isinstance(user, str | int) or _UNPRINTABLE.search(str(user)):
        raise PairsError("'user_id' is neither a text nor a whole number")
    return Pair(history, films[order], films[other_letter(order)], order, str(user).strip())
