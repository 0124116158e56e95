"""The pairs format: read, refuse, write, split, show in either order."""

import json
import resource
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pytest
from conftest import FUZZ_TIMES, REAL_PAIRS, make_pairs
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import UserError
from data.machine import ROOT
from data.pairs import (
    LONGEST_LINE,
    Movie,
    Pair,
    PairsError,
    hold_back,
    ids_digest,
    load_pairs,
    make_pair,
    preference_row,
    preference_rows,
    read_split,
    split_pairs,
    warnings_on,
    with_strangers,
    write_pairs,
)

TITANIC = Movie("Titanic (1997)", ("Drama", "Romance"))
ALIEN = Movie("Alien, L' (The Other: Part 1) (1979)", ("Sci-Fi",))
WATCHED = ("Bug's Life, A (1998)", "Heat (1995)", "54 (1998)", "Naked Gun: Files, The (1988)", "Big (1988)")
PAIR = Pair(WATCHED, TITANIC, ALIEN)


def input_of(pair: Pair) -> str:
    return preference_row(pair, "A")["prompt"].split("### Input:\n")[1].split("\n")[0]


INPUT = input_of(PAIR)
real = pytest.mark.skipif(not REAL_PAIRS.exists(), reason="the 6,040 real pairs are not on this machine")


def line(**changes: object) -> str:
    text = {"instruction": "x", "input": INPUT, "output": "The better recommendation is Option B. ..."}
    return json.dumps(text | changes)


def test_a_line_becomes_a_pair_with_the_answer_as_preferred_film(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text(line() + "\n\n", encoding="utf-8")
    [pair] = load_pairs(path)
    assert pair.history == PAIR.history
    assert (pair.preferred, pair.other, pair.order) == (ALIEN, TITANIC, "B")
    loose = INPUT.replace("(1995), ", "(1995),  ").replace(" (Drama|Romance)", "  (Drama | Romance )")
    path.write_text(line(input=loose, user_id=" 4 "), encoding="utf-8")
    [same] = load_pairs(path)
    assert same == replace(pair, user="4"), "blanks around a name are not part of it"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{not json", "not JSON"),
        ("[" * 9_000, "not JSON"),
        ('["a list"]', "not a JSON object"),
        ('{"instruction": "x", "input": "y"}', "no key 'output'"),
        (line(output=3), "'output' is no text"),
        (line(input=INPUT.replace("Heat (1995), ", "")), "4 film(s) and not 5"),
        (line(input=INPUT.replace("Option B", "Choice B")), "the input is not"),
        (line(input=INPUT.replace(" (Sci-Fi)", "")), "the input is not"),
        (line(input=INPUT.replace("Drama|Romance", "Drama| ")), "a genre is empty"),
        (line(output="I recommend nothing."), "neither option"),
        (line(output="Option A and Option B are both good."), "both options"),
        (line(input=INPUT.replace(str(ALIEN), str(TITANIC))), "same film"),
        (line(input=INPUT.replace("Heat", "He\x1b[2Jat")), "control characters"),
        (line() + "\n" + line(), "line 2: the same pair as line 1"),
        (b"\xff\xfe" + line().encode(), "not UTF-8 at byte 1"),
        ("", "the file holds no pairs"),
    ],
)
def test_a_broken_file_is_refused_with_line_and_reason(tmp_path, content, reason):
    path = tmp_path / "broken.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(PairsError) as error:
        load_pairs(path)
    assert reason in str(error.value)
    if content:
        assert "line " in str(error.value)


def test_all_problems_are_collected_and_the_first_20_shown(tmp_path):
    path = tmp_path / "broken.jsonl"
    path.write_text(line() + "\n" + "junk\n" * 30, encoding="utf-8")
    with pytest.raises(PairsError) as error:
        load_pairs(path)
    message = str(error.value)
    assert "30 problem(s)" in message
    assert "line 21:" in message and "line 22:" not in message
    assert message.endswith("and 10 more")


def test_written_pairs_are_read_back_equal(tmp_path):
    pairs = make_pairs(40)
    write_pairs(tmp_path / "p.jsonl", pairs)
    assert load_pairs(tmp_path / "p.jsonl") == pairs


def test_a_pair_that_would_not_be_read_back_is_not_written(tmp_path):
    trap = Pair(PAIR.history, ALIEN, Movie("X (1990) (War). Option B: Y (1990)", ("War",)))
    with pytest.raises(PairsError):
        write_pairs(tmp_path / "p.jsonl", [PAIR, Pair(("No year", *PAIR.history[1:]), TITANIC, ALIEN)])
    with pytest.raises(PairsError):
        write_pairs(tmp_path / "p.jsonl", [PAIR, trap])
    assert not list(tmp_path.iterdir())


@given(content=st.binary(max_size=300))
def test_any_bytes_give_pairs_or_the_documented_error(tmp_path, content):
    path = tmp_path / "p.jsonl"
    path.write_bytes(content)
    with pytest.raises(PairsError):
        load_pairs(path)


letters = st.characters(
    exclude_categories=["Cs", "Cc"],
    exclude_characters="\u2028\u2029\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069",
)
odd_names = ["Seven (Se7en)", "Option B: X", "A. Option A: B", "54", "M*A*S*H", "a (b|c)"]
names = st.text(letters, min_size=1, max_size=20) | st.sampled_from(odd_names)
titles = st.builds(lambda name, year: f"{name} ({year})", names, st.integers(1900, 2030))
genres = st.sampled_from(["War", "Sci-Fi", "Children's", "Film-Noir"]) | names
movies = st.builds(Movie, titles, st.lists(genres, min_size=1, max_size=3).map(tuple))
any_pairs = st.builds(Pair, st.tuples(*[titles] * 5), movies, movies, st.sampled_from("AB"))


@settings(max_examples=200 * FUZZ_TIMES)
@given(pair=any_pairs)
def test_a_pair_that_is_written_is_read_back_equal(tmp_path, pair):
    try:
        write_pairs(tmp_path / "p.jsonl", [pair])
    except PairsError:
        return  # said so, and wrote nothing
    assert load_pairs(tmp_path / "p.jsonl") == [pair]


LINES = [line(input=input_of(pair), output=preference_row(pair, "A")["chosen"]).encode() for pair in make_pairs(5)]


@st.composite
def damaged_lines(draw) -> bytes:
    """A good line with a few bytes deleted, changed, doubled or put elsewhere."""
    text = bytearray(draw(st.sampled_from(LINES)))
    for _ in range(draw(st.integers(0, 4))):
        at, length = draw(st.integers(0, len(text))), draw(st.integers(0, 12))
        known = [b"", b". Option B: ", b"(1999), ", b'"', b"\\u0000", bytes(text[at : at + 2 * length])]
        text[at : at + length] = draw(st.binary(max_size=6) | st.sampled_from(known))
    return bytes(text)


@settings(max_examples=300 * FUZZ_TIMES)
@given(lines=st.lists(damaged_lines() | st.binary(max_size=40), min_size=1, max_size=3))
def test_any_lines_give_pairs_or_the_documented_error(tmp_path, lines):
    path = tmp_path / "p.jsonl"
    path.write_bytes(b"\n".join(lines))
    try:
        found = load_pairs(path)
    except PairsError as error:
        assert str(path) in str(error)
        return
    write_pairs(path, found)
    assert load_pairs(path) == found


HOSTILE = ["X\x1b[2J (1990)", "X\u202e (1990)", "X" * 400 + " (1990)", "X" * 1_000_000 + " (1990)"]


@pytest.mark.parametrize("title", HOSTILE, ids=["escape", "right to left", "long", "endless"])
def test_a_title_that_would_steer_a_terminal_or_fill_it_is_refused(tmp_path, title):
    [pair] = make_pairs(1)
    with pytest.raises(PairsError):
        write_pairs(tmp_path / "p.jsonl", [Pair(pair.history, Movie(title, ("War",)), pair.other)])
    films = f"History: {', '.join(pair.history)}. Option A: {title} (War). Option B: {pair.other}."
    (tmp_path / "p.jsonl").write_text(line(input=films) + "\n")
    with pytest.raises(PairsError, match="control characters|title is longer than|longer than 10,000 bytes"):
        load_pairs(tmp_path / "p.jsonl")


def test_a_pairs_file_of_a_gigabyte_is_refused_unread(tmp_path):
    with open(tmp_path / "p.jsonl", "wb") as file:
        file.truncate(10**9)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match="1.0 GB, more than .*\nFix these lines, or build the file again"):
        read_split(str(tmp_path / "p.jsonl"), 0.2)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000


def test_a_line_made_to_keep_the_parser_busy_is_refused_at_once(tmp_path):
    busy = line(input="History: " + ". Option A: . Option B: " * 500)  # unguarded: seconds
    (tmp_path / "p.jsonl").write_text(busy)
    with pytest.raises(PairsError, match=f"longer than {LONGEST_LINE:,} bytes"):
        load_pairs(tmp_path / "p.jsonl")


def test_a_pair_of_ones_own_is_checked_as_a_line_of_a_file():
    history = [f"Film {number} (1990)" for number in range(5)]
    pair = make_pair([*history, " "], (" X (1991) ", "War | Drama"), ("Y (1992)", "Comedy"))
    assert (pair.preferred.title, pair.preferred.genres) == ("X (1991)", ("War", "Drama"))
    for wrong, problem in [
        ((history[:4], ("X (1991)", "War"), ("Y (1992)", "War")), "the history has 4 film"),
        ((["no year", *history[1:]], ("X (1991)", "War"), ("Y (1992)", "War")), "a title ends in its"),
        (([*history[1:], "no year"], ("X (1991)", "War"), ("Y (1992)", "War")), "a title ends in its"),
        ((history, ("X (1991)", "War"), ("X (1991)", "Drama")), "are the same film"),
        ((history, ("X (1991)", ""), ("Y (1992)", "Drama")), "the input is not"),
    ]:
        with pytest.raises(PairsError, match=problem):
            make_pair(*wrong)


def test_the_rejected_response_argues_for_the_other_film():
    row = preference_row(PAIR, "B")
    assert row["prompt"].endswith("\n\n### Response:\n")
    assert f"Option A: {ALIEN}. Option B: {TITANIC}." in row["prompt"]
    why = "The user has shown a strong preference for themes found in"
    tail = "does not align with their recent viewing patterns."
    stem = "The better recommendation is Option"
    assert row["chosen"] == f"{stem} B. Reasoning: {why} Drama|Romance. Option A (Sci-Fi) {tail}"
    assert row["rejected"] == f"{stem} A. Reasoning: {why} Sci-Fi. Option B (Drama|Romance) {tail}"


def test_every_rejected_response_is_the_chosen_one_of_the_swapped_pair(pairs):
    for pair in pairs:
        swapped = Pair(pair.history, pair.other, pair.preferred)
        for order, contrary in (("A", "B"), ("B", "A")):
            row, mirror = preference_row(pair, order), preference_row(swapped, contrary)
            assert row["prompt"] == mirror["prompt"]
            assert (row["chosen"], row["rejected"]) == (mirror["rejected"], mirror["chosen"])


def test_the_split_is_by_user_and_the_same_in_another_process(pairs_file, pairs):
    same_user = Pair(pairs[0].history, TITANIC, ALIEN)
    train, test = split_pairs([*pairs, same_user])
    assert not {pair.user_id for pair in train} & {pair.user_id for pair in test}
    assert sorted(pair.pair_id for pair in train + test) == sorted(pair.pair_id for pair in [*pairs, same_user])

    train, test = split_pairs(pairs)
    assert len(test) == 12
    code = f"from data.pairs import *; print(ids_digest(split_pairs(load_pairs({str(pairs_file)!r}))[1]))"
    command = [sys.executable, "-c", code]
    environment = {"PYTHONHASHSEED": "7", "PYTHONPATH": str(ROOT)}
    elsewhere = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()
    assert elsewhere == ids_digest(test) == ids_digest(split_pairs(pairs[::-1])[1])


def test_a_missing_pairs_file_names_the_command_that_makes_it():
    command = "python data/build_pairs.py --source ml-100k --output 'no where/pairs_ml-100k.jsonl'"
    with pytest.raises(UserError, match=command):
        read_split("no where/pairs_ml-100k.jsonl", 0.2)
    with pytest.raises(UserError, match="no pairs file my books.jsnl\nGive --pairs a file that is there"):
        read_split("my books.jsnl", 0.2)


def test_a_pairs_file_that_cannot_be_split_is_refused(tmp_path):
    write_pairs(tmp_path / "p.jsonl", make_pairs(2))
    with pytest.raises(UserError, match="holds 2 pair.s. of . user.s., too few to split"):
        read_split(str(tmp_path / "p.jsonl"), 0.2)
    of_two = [replace(pair, user=str(number % 2)) for number, pair in enumerate(make_pairs(20))]
    for written, share in ((make_pairs(20), 0.05), (of_two, 0.5)):
        write_pairs(tmp_path / "p.jsonl", written)
        problem = r"1 test user\(s\) are too few for an interval\nGive pairs of more users, or raise --test_share"
        with pytest.raises(UserError, match=problem):
            read_split(str(tmp_path / "p.jsonl"), share)
    with pytest.raises(UserError, match="too few to split\nGive pairs of more users, or lower --test_share"):
        read_split(str(tmp_path / "p.jsonl"), 0.999)
    with pytest.raises(UserError, match="cannot read the pairs file .*: Is a directory"):
        read_split(str(tmp_path), 0.2)


def test_pairs_held_back_are_of_users_that_are_not_trained_on(pairs):
    train = [*pairs, Pair(pairs[0].history, TITANIC, ALIEN)]
    for count in range(len(train)):
        used, validation = hold_back(train, count, None)
        assert count <= len(validation) <= count + 1
        assert {*used, *validation} == {*train} and len(used) + len(validation) == len(train)
        assert not {pair.user_id for pair in used} & {pair.user_id for pair in validation}
        assert hold_back(train[::-1], count, 10) == (used[:10], validation), "in whatever order they come"


def test_a_user_of_many_pairs_leaves_room_for_others():
    many = [replace(pair, user="often") for pair in make_pairs(150)]  # early by its hash
    for share in (0.2, 0.4):
        train, test = split_pairs([*many, *make_pairs(300)[150:]], share)
        assert len(test) == share * 300 and {pair.user for pair in test} == {""}
    of_five = [replace(pair, user=str(number % 5)) for number, pair in enumerate(make_pairs(60))]
    used, _ = hold_back(of_five, 0, 7)
    assert sorted(Counter(pair.user for pair in used).values()) == [1, 1, 1, 2, 2]


def test_a_stranger_is_another_user_and_always_the_same_one():
    pairs = make_pairs(20)
    strange = with_strangers(pairs)
    assert all(own.history != other.history for own, other in zip(pairs, strange, strict=True))
    assert {pair.history for pair in pairs} == {pair.history for pair in strange}
    assert [(pair.preferred, pair.other) for pair in pairs] == [(pair.preferred, pair.other) for pair in strange]
    backwards = with_strangers(pairs[::-1])
    assert [pair.history for pair in backwards[::-1]] == [pair.history for pair in strange]


def test_pair_id_depends_on_content_and_not_on_order():
    assert PAIR.pair_id == Pair(PAIR.history, TITANIC, ALIEN, "B").pair_id == "52f02c1fb37dd2fe"
    assert PAIR.pair_id != Pair(PAIR.history, ALIEN, TITANIC).pair_id


def starts(rows: list[dict[str, str]]) -> list[str]:
    return [row["chosen"].removeprefix("The better recommendation is Option ")[0] for row in rows]


def test_training_orders(pairs):
    assert starts(preference_rows(pairs, "balanced", seed=1)).count("A") == 30
    assert starts(preference_rows(pairs, "balanced", seed=1)) == starts(preference_rows(pairs, "balanced", seed=1))
    assert starts(preference_rows(pairs, "balanced", seed=1)) != starts(preference_rows(pairs, "balanced", seed=2))
    assert starts(preference_rows(pairs, "both")) == ["A", "B"] * 60
    assert starts(preference_rows(pairs, "original")) == [pair.order for pair in pairs]


@real
def test_the_real_pairs_are_read_split_and_shown():
    pairs = load_pairs(REAL_PAIRS)
    train, test = split_pairs(pairs)
    assert (len(pairs), len(train), len(test)) == (6040, 4832, 1208)
    for option_order, rows, in_a in (("balanced", 6040, 3020), ("both", 12080, 6040), ("original", 6040, 6040)):
        shown = starts(preference_rows(pairs, option_order, seed=3407))
        assert (len(shown), shown.count("A")) == (rows, in_a)
    for pair, text in zip(pairs, REAL_PAIRS.read_text(encoding="utf-8").splitlines(), strict=True):
        row = json.loads(text)
        assert preference_row(pair, "A")["chosen"] == row["output"]
        assert f"### Input:\n{row['input']}\n\n" in preference_row(pair, "A")["prompt"]


# ------------------------------------------------------------------------------ users, and what is told of pairs


def windows(users: int, of_each: int, named: bool) -> list[Pair]:
    """Sliding windows over each user's films: five as the history, the next one preferred."""
    pairs = []
    for user in range(users):
        films = [f"Film {user} {k} (1990)" for k in range(of_each + 5)]
        for k in range(of_each):
            preferred, other = Movie(films[k + 5], ("Drama",)), Movie(f"Other {k} (1991)", ("War",))
            pairs.append(Pair(tuple(films[k : k + 5]), preferred, other, "AB"[k % 2], str(user) if named else ""))
    return pairs


def test_the_split_follows_the_users_that_a_file_names(tmp_path):
    write_pairs(tmp_path / "pairs.jsonl", windows(20, 6, named=True))
    pairs = load_pairs(tmp_path / "pairs.jsonl")
    assert pairs == windows(20, 6, named=True) and len({pair.user_id for pair in pairs}) == 20
    train, test = split_pairs(pairs, 0.2)
    assert len(test) == 24 and not {pair.user for pair in train} & {pair.user for pair in test}
    assert warnings_on(train, test) == []
    assert [pair.pair_id for pair in windows(2, 2, True)] == [pair.pair_id for pair in windows(2, 2, False)]


@pytest.mark.parametrize("user", [None, 1.5, ["x"], True, "\u001b[2J"])
def test_a_user_is_a_text_or_a_whole_number(tmp_path, user):
    write_pairs(tmp_path / "pairs.jsonl", make_pairs(1))
    line = json.loads((tmp_path / "pairs.jsonl").read_text())
    (tmp_path / "pairs.jsonl").write_text(json.dumps(line | {"user_id": user}))
    with pytest.raises(PairsError, match="'user_id' is neither a text nor a whole number"):
        load_pairs(tmp_path / "pairs.jsonl")
    (tmp_path / "pairs.jsonl").write_text(json.dumps(line | {"user_id": 0}))
    assert load_pairs(tmp_path / "pairs.jsonl")[0].user == "0"


def test_windows_of_one_user_on_both_sides_of_the_split_are_told_as_a_leak():
    train, test = split_pairs(windows(20, 6, named=False), 0.2)
    [told] = warnings_on(train, test)
    assert told.startswith("24 of 24 test pairs share four films in a row with a training pair")
    assert "give each line its user_id" in told


def test_pairs_without_a_user_among_others_with_one_are_told():
    pairs = [replace(pair, user="x" * (number < 4)) for number, pair in enumerate(make_pairs(10))]
    assert warnings_on(pairs, []) == ["6 of 10 pairs name no user, where others do"]


def test_a_preferred_film_in_its_history_and_contrary_twins_are_told():
    pairs = make_pairs(10)
    seen = replace(pairs[0], preferred=Movie(pairs[0].history[2], ("Drama",)))
    assert warnings_on([*pairs[1:], seen], []) == ["1 of 10 pairs prefer a film that stands in their own history"]
    twin = replace(pairs[3], preferred=pairs[3].other, other=pairs[3].preferred)
    told = ["2 pairs have a twin that prefers the other film after the same history"]
    assert warnings_on([*pairs, twin], []) == told


@real
def test_of_the_real_pairs_nothing_is_told():
    assert warnings_on(*split_pairs(load_pairs(REAL_PAIRS), 0.2)) == []
