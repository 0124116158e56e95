"""Any predictions give measures, verdict and report, or the documented error; tests/conftest.py has FUZZ_TIMES."""

import json
import math

import pandas as pd
from conftest import FUZZ_TIMES
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import UserError
from data.measures import MEASURES, compute_metrics
from data.predictions import COLUMNS, as_csv, read_predictions
from data.report import latex, report, summary, table
from data.verdict import judge

models = [("sft", "model", "1"), ("dpo", "model", "1"), ("dpo", "model", "2"), ("base", "model", "")]
arms = st.sampled_from([*models, ("popularity", "baseline", ""), ("dpo@16bit", "model", "1")])
margins = st.floats(-50, 50) | st.sampled_from([0.0, 1e300, -1e-300, math.nan, math.inf, 999_999.0])
cells = ["", "x", "nan", "-1", "own", "stranger", "A", '"', "1,2", "\x00", "\n", "baseline"]


def predictions_text(version: int, runs: list[tuple[str, str, str]], users: int, values: list[float]) -> str:
    """Rows of a version; in the second, two pairs in three are of one user, and DPO is referred to SFT."""
    rows = []
    for arm, kind, seed in runs:
        reference, beta = ("sft", 0.1) if arm.startswith("dpo") else ("", "")
        for pair in range(users):
            for order in "AB":
                decision, chosen, rejected = (values[(len(rows) * 3 + k) % len(values)] for k in range(3))
                row = {"arm": arm, "kind": kind, "seed": seed, "user_id": f"u{max(pair, 2)}", "pair_id": f"p{pair}"}
                row |= {"order": order, "history": "own", "decision_margin": decision, "response_margin": chosen}
                row |= {"chosen_log_prob": chosen, "rejected_log_prob": rejected, "preferred_count": pair}
                row |= {"other_count": 1, "reference": reference, "beta": beta, "pairs_seen": 10 * len(arm)}
                rows.append(row | {"preferred_more_popular": ["true", "false", "tie"][pair % 3]})
    return pd.DataFrame(rows)[list(COLUMNS[version])].to_csv(index=False)


@st.composite
def damaged_predictions(draw) -> bytes:
    runs = draw(st.lists(arms, min_size=1, max_size=5, unique=True))
    values = draw(st.lists(margins, min_size=1, max_size=9))
    version = draw(st.sampled_from([1, 2]))
    lines = predictions_text(version, runs, draw(st.integers(1, 6)), values).splitlines(keepends=True)
    for _ in range(draw(st.integers(0, 2))):
        number = draw(st.integers(0, len(lines) - 1))
        row = lines[number].rstrip("\n").split(",")
        row[draw(st.integers(0, len(row) - 1))] = draw(st.sampled_from(cells))
        lines[number] = draw(st.sampled_from([",".join(row) + "\n", "", lines[number] * 2]))
    return "".join(lines).encode() or b"\xff"


@settings(max_examples=60 * FUZZ_TIMES)
@given(content=damaged_predictions() | st.binary(max_size=60))
def test_any_predictions_give_valid_measures_or_the_documented_error(tmp_path, content):
    path = tmp_path / "predictions.csv"
    path.write_bytes(content)
    try:
        predictions = read_predictions(path)
    except UserError as error:
        assert len(str(error).splitlines()) == 2
        return
    assert as_csv(predictions)
    metrics = judge(compute_metrics(predictions))
    json.dumps(metrics, allow_nan=False)
    for measures in metrics["arms"].values():
        for name, (_, unit) in MEASURES.items():
            found = measures[name]
            assert (found["value"] is None) == (found["low"] is None)
            assert found["value"] is None or unit != "%" or 0 <= found["value"] <= 100
    assert report(metrics, {}) and table(metrics) and latex(metrics) and summary(metrics)
