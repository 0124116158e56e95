"""The pairs format: read, refuse, write, split, show in either order."""

import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

import config
from conftest import REAL_PAIRS, make_pairs
from data.pairs import (
    OPTION_ORDERS,
    Movie,
    Pair,
    PairsError,
    ids_digest,
    load_pairs,
    preference_row,
    preference_rows,
    split_pairs,
    write_pairs,
)

TITANIC = Movie("Titanic (1997)", ("Drama", "Romance"))
ALIEN = Movie("Alien, L' (The Other: Part 1) (1979)", ("Sci-Fi",))
PAIR = Pair(("Bug's Life, A (1998)", "Heat (1995)", "54 (1998)", "Naked Gun: Files, The (1988)", "Big (1988)"), TITANIC, ALIEN)
INPUT = preference_row(PAIR, "A")["prompt"].split("### Input:\n")[1].split("\n")[0]
real = pytest.mark.skipif(not REAL_PAIRS.exists(), reason="the 6,040 real pairs are not on this machine")


def line(**changes: object) -> str:
    return json.dumps({"instruction": "x", "input": INPUT, "output": "The better recommendation is Option B. ..."} | changes)


def test_a_line_becomes_a_pair_with_the_answer_as_preferred_film(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text(line() + "\n\n", encoding="utf-8")
    [pair] = load_pairs(path)
    assert pair.history == PAIR.history
    assert (pair.preferred, pair.other, pair.order) == (ALIEN, TITANIC, "B")


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
def test_any_bytes_give_pairs_or_the_documented_error(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("fuzz") / "p.jsonl"
    path.write_bytes(content)
    with pytest.raises(PairsError):
        load_pairs(path)


def test_the_rejected_response_argues_for_the_other_film():
    row = preference_row(PAIR, "B")
    assert row["prompt"].endswith("\n\n### Response:\n")
    assert f"Option A: {ALIEN}. Option B: {TITANIC}." in row["prompt"]
    why = "The user has shown a strong preference for themes found in"
    tail = "does not align with their recent viewing patterns."
    assert row["chosen"] == f"The better recommendation is Option B. Reasoning: {why} Drama|Romance. Option A (Sci-Fi) {tail}"
    assert row["rejected"] == f"The better recommendation is Option A. Reasoning: {why} Sci-Fi. Option B (Drama|Romance) {tail}"


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
    environment = {"PYTHONHASHSEED": "7", "PYTHONPATH": str(config.ROOT)}
    elsewhere = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()
    assert elsewhere == ids_digest(test) == ids_digest(split_pairs(pairs[::-1])[1])


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
    for option_order, rows, in_a in zip(OPTION_ORDERS, (6040, 12080, 6040), (3020, 6040, 6040), strict=True):
        shown = starts(preference_rows(pairs, option_order, seed=3407))
        assert (len(shown), shown.count("A")) == (rows, in_a)
    for pair, text in zip(pairs, REAL_PAIRS.read_text(encoding="utf-8").splitlines(), strict=True):
        row = json.loads(text)
        assert preference_row(pair, "A")["chosen"] == row["output"]
        assert f"### Input:\n{row['input']}\n\n" in preference_row(pair, "A")["prompt"]
