"""Any input gives what is documented, or the documented error; FUZZ_TIMES=100 in the environment tries a hundred times more often."""

import json
import math
import os
import tempfile
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import evaluate_dpo
from config import EvaluationSettings, TrainingSettings, UserError, parse_settings
from conftest import make_pairs
from data.pairs import Movie, Pair, PairsError, load_pairs, preference_row, write_pairs

TIMES = int(os.environ.get("FUZZ_TIMES", 1))
settings.register_profile("fuzz", deadline=None, database=None, suppress_health_check=list(HealthCheck))
settings.load_profile("fuzz")


@pytest.fixture(scope="module")
def path() -> Path:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / "file"


letters = st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="\u2028\u2029\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
names = st.text(letters, min_size=1, max_size=20) | st.sampled_from(["Seven (Se7en)", "Option B: X", "A. Option A: B", "54", "M*A*S*H", "a (b|c)"])
titles = st.builds(lambda name, year: f"{name} ({year})", names, st.integers(1900, 2030))
genres = st.lists(st.sampled_from(["War", "Sci-Fi", "Children's", "Film-Noir"]) | names, min_size=1, max_size=3).map(tuple)
movies = st.builds(Movie, titles, genres)
pairs = st.builds(Pair, st.tuples(*[titles] * 5), movies, movies, st.sampled_from("AB"))


@settings(max_examples=200 * TIMES)
@given(pair=pairs)
def test_a_pair_that_is_written_is_read_back_equal(path, pair):
    try:
        write_pairs(path, [pair])
    except PairsError:
        return  # said so, and wrote nothing
    assert load_pairs(path) == [pair]


LINES = [json.dumps({"instruction": "", "input": preference_row(pair, "A")["prompt"].split("### Input:\n")[1].split("\n\n")[0],
                     "output": preference_row(pair, "A")["chosen"]}) for pair in make_pairs(5)]


@st.composite
def damaged_lines(draw) -> bytes:
    """A good line with a few bytes deleted, changed, doubled or put elsewhere."""
    line = bytearray(draw(st.sampled_from(LINES)).encode())
    for _ in range(draw(st.integers(0, 4))):
        at, length = draw(st.integers(0, len(line))), draw(st.integers(0, 12))
        line[at : at + length] = draw(st.binary(max_size=6) | st.sampled_from([b"", b". Option B: ", b"(1999), ", b'"', b"\\u0000", bytes(line[at : at + 2 * length])]))
    return bytes(line)


@settings(max_examples=300 * TIMES)
@given(lines=st.lists(damaged_lines() | st.binary(max_size=40), min_size=1, max_size=3))
def test_any_lines_give_pairs_or_the_documented_error(path, lines):
    path.write_bytes(b"\n".join(lines))
    try:
        found = load_pairs(path)
    except PairsError as error:
        assert str(path) in str(error)
        return
    write_pairs(path, found)
    assert load_pairs(path) == found


flags = st.sampled_from([f"--{name}" for kind in (TrainingSettings, EvaluationSettings) for name in kind.__dataclass_fields__])
values = st.sampled_from(["-1", "0", "1", "2.5", "nan", "inf", "-inf", "1e999", "true", "none", "", "4", "small", "sft", "[]", "é"]) | st.text(max_size=5)


@settings(max_examples=100 * TIMES)
@example(arguments=[("--gradient_checkpointing", "\x1e")], kind=TrainingSettings)
@example(arguments=[("--seed", "1"), ("\n", "--x")], kind=TrainingSettings)
@given(arguments=st.lists(st.tuples(flags, values), max_size=3), kind=st.sampled_from([TrainingSettings, EvaluationSettings]))
def test_any_flags_give_settings_or_an_error_of_two_lines(arguments, kind):
    try:
        found = parse_settings(kind, [word for flag in arguments for word in flag if word not in ("-h", "--help")])
    except UserError as error:
        assert len(str(error).splitlines()) == 2
        return
    numbers = [value for value in vars(found).values() if isinstance(value, float)]
    assert all(map(math.isfinite, numbers)), "no run can be told to learn at the rate nan"


@settings(max_examples=50 * TIMES)
@given(text=st.text(max_size=60) | st.builds(lambda d: json.dumps(d), st.dictionaries(st.sampled_from(["beta", "bits", "x", "seed"]), st.none() | st.floats() | st.text(max_size=4) | st.lists(st.integers(), max_size=2))))
def test_any_settings_file_gives_settings_or_an_error_of_two_lines(path, text):
    file = path.with_suffix(".yaml")
    file.write_text(text, encoding="utf-8")
    try:
        parse_settings(TrainingSettings, [str(file)])
    except UserError as error:
        assert len(str(error).splitlines()) == 2


def predictions_text(arms: list[tuple[str, str, str]], users: int, margins: list[float]) -> str:
    rows = []
    for arm, kind, seed in arms:
        for user in range(users):
            for order in "AB":
                decision, response = (margins[(len(rows) * 2 + k) % len(margins)] for k in (0, 1))
                rows.append([arm, kind, seed, f"u{user}", order, "own", decision, response, ["true", "false", "tie"][user % 3]])
    columns = ["arm", "kind", "seed", "pair_id", "order", "history", "decision_margin", "response_margin", "preferred_more_popular"]
    return pd.DataFrame(rows, columns=columns).to_csv(index=False)


arms = st.lists(st.sampled_from([("sft", "model", "1"), ("dpo", "model", "1"), ("dpo", "model", "2"), ("base", "model", ""), ("popularity", "baseline", ""), ("dpo@16bit", "model", "1")]), min_size=1, max_size=5, unique=True)
margin_values = st.floats(-50, 50) | st.sampled_from([0.0, 1e300, -1e-300, math.nan, math.inf, 999_999.0])


@st.composite
def damaged_predictions(draw) -> bytes:
    lines = predictions_text(draw(arms), draw(st.integers(1, 4)), draw(st.lists(margin_values, min_size=1, max_size=9))).splitlines(keepends=True)
    for _ in range(draw(st.integers(0, 2))):
        number = draw(st.integers(0, len(lines) - 1))
        cells = lines[number].rstrip("\n").split(",")
        cells[draw(st.integers(0, len(cells) - 1))] = draw(st.sampled_from(["", "x", "nan", "-1", "own", "stranger", "A", '"', "1,2", "\x00", "\n", "baseline"]))
        lines[number] = draw(st.sampled_from([",".join(cells) + "\n", "", lines[number] * 2]))
    return "".join(lines).encode() or b"\xff"


@settings(max_examples=60 * TIMES)
@given(content=damaged_predictions() | st.binary(max_size=60))
def test_any_predictions_give_valid_measures_or_the_documented_error(path, content):
    path.write_bytes(content)
    try:
        predictions = evaluate_dpo.read_predictions(path)
    except UserError as error:
        assert len(str(error).splitlines()) == 2
        return
    metrics = evaluate_dpo.compute_metrics(predictions, resamples=20, seed=1)
    json.dumps(metrics, allow_nan=False)
    for measures in metrics["arms"].values():
        for name, (_, unit) in evaluate_dpo.MEASURES.items():
            found = measures[name]
            assert (found["value"] is None) == (found["low"] is None)
            assert found["value"] is None or unit != "%" or 0 <= found["value"] <= 100
    assert evaluate_dpo.report(metrics) and evaluate_dpo.table(metrics) and evaluate_dpo.latex(metrics) and evaluate_dpo.summary(metrics)
