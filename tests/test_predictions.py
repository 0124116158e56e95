"""Rows of predictions.csv and of generations.csv."""

import gzip

import pytest
from conftest import make_pairs

from data.errors import UserError
from data.predictions import COLUMNS, as_csv, generation_rows, genre_pattern, left_out, read_predictions

HEADER = ",".join(COLUMNS[1]) + "\n"
SECOND = ",".join(COLUMNS[2]) + "\n"


def row(arm="dpo", seed="1", user="u", pair="x", order="A", margin="1", counts="3,1", about="sft,0.1,90") -> str:
    return f"{arm},model,{seed},{user},{pair},{order},own,{margin},-20,-21.5,{counts},{about}\n"


WHOLE = SECOND + "".join(row(user=f"u{pair}", pair=pair, order=order) for pair in "xy" for order in "AB")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "cannot read"),
        ("arm,kind\na,b\n", "has no column"),
        (HEADER, "holds no rows"),
        (HEADER + "sft,model,,x,C,own,1,1,true\n", "neither A nor B"),
        (HEADER + "sft,model,,x,A,own,1,1,true\n" * 2, "two rows for the same"),
        (HEADER + "sft,model,,x,A,own,high,1,true\n", "cannot read"),
        (SECOND.replace("beta,", "") + row(about="sft,90"), "has no column beta"),
        (WHOLE.replace("3,1", "3,", 1), "count that is missing or no whole number"),
        (WHOLE.replace("3,1", "2.5,1", 1), "count that is missing or no whole number"),
        (WHOLE.replace("sft,0.1", "base,0.1", 1), "two references, betas or pairs_seen for one run"),
        (WHOLE.replace(",uy,", ",ux,"), "of two users at least"),
        (WHOLE.replace(",uy,y,B", ",uz,y,B"), "has a pair of two users"),
        (WHOLE.replace("3,1", "4,1", 1), "two counts of a film"),
        (WHOLE.replace(",own,1,", ",own,,", 1), "margin that is missing"),
        (WHOLE.replace(",model,", ",baseline,"), "holds no arm of a model"),
        (WHOLE.replace("dpo", "d" * 31), "an arm or a seed whose name is long"),
        (WHOLE.replace("dpo", ""), "an arm or a seed whose name"),
        (WHOLE.replace("model,1,", "model,1|2,"), "an arm or a seed whose name"),
    ],
)
def test_a_file_that_holds_no_predictions_is_refused(tmp_path, content, problem):
    path = tmp_path / "p.csv"
    path.write_text(content)
    with pytest.raises(UserError, match=problem):
        read_predictions(path)


def test_a_compressed_file_that_was_cut_short_is_refused(tmp_path):
    whole = gzip.compress(WHOLE.encode())
    for broken in (whole[:-9], whole[:12] + bytes(9) + whole[21:]):
        (tmp_path / "p.csv.gz").write_bytes(broken)
        with pytest.raises(UserError, match="cannot read"):
            read_predictions(tmp_path / "p.csv.gz")


def test_the_longest_name_has_room_for_a_second_precision(tmp_path):
    (tmp_path / "p.csv").write_text(WHOLE.replace("dpo", "d" * 30 + "@16bit"))
    assert len(read_predictions(tmp_path / "p.csv")) == 4


def test_a_file_named_as_another_archive_is_no_archive(tmp_path):
    for ending in ("zip", "xz", "zst", "tar"):
        path = tmp_path / f"predictions.csv.{ending}"
        path.write_bytes(bytes(9))
        with pytest.raises(UserError, match="has no column"):
            read_predictions(path)
        path.write_text(WHOLE)
        assert len(read_predictions(path)) == 4


def test_both_versions_are_read_and_written_as_they_are(tmp_path):
    path = tmp_path / "p.csv"
    path.write_text(WHOLE)
    rows = read_predictions(path)
    assert set(rows["response_margin"]) == {1.5} and set(rows["preferred_more_popular"]) == {"true"}
    path.write_text(as_csv(rows))
    assert path.read_text().startswith(SECOND) and read_predictions(path).equals(rows) and left_out(rows) == []
    first = HEADER + "".join(f"sft,model,1,{pair},{order},own,1.5,2.5,tie\n" for pair in "xy" for order in "AB")
    path.write_text(first)
    rows = read_predictions(path)
    assert list(rows["user_id"]) == list(rows["pair_id"]) and rows["chosen_log_prob"].isna().all()
    assert as_csv(rows) == first
    [note] = left_out(rows)
    assert note.startswith("note: these predictions are of version 1: every pair counts as a user")


def test_generated_answers_are_read_by_what_they_recommend_and_cite():
    pair = make_pairs(1)[0]
    own, other = pair.preferred.genres[0], pair.other.genres[0]
    texts = [
        f"The better recommendation is Option A. Reasoning: themes found in {own}. Option B ({other}) does not align.",
        f"The better recommendation is Option B. Reasoning: themes found in {own}. Option A does not align.",
        "Option A and Option B are both good.",
        "I like films.",
    ]
    rows = generation_rows("dpo", "1", [pair], ["A"], [texts], genre_pattern([pair]))
    assert list(rows["answer"]) == ["A", "B", "", ""]
    assert list(rows["own_genre"]) == [True, False, False, False]
    assert not rows["foreign_genre"].any()
    stranger = make_pairs(8)
    texts = [["Option A. War and Sci-Fi."] for _ in stranger]
    rows = generation_rows("dpo", "1", stranger, ["A"] * 8, texts, genre_pattern(make_pairs(60)))
    wanted = [bool({"War", "Sci-Fi"} - {*pair.preferred.genres, *pair.other.genres}) for pair in stranger]
    assert list(rows["foreign_genre"]) == wanted


def test_what_a_spreadsheet_makes_of_true_is_read(tmp_path):
    path = tmp_path / "p.csv"
    rows = [f"sft,model,,{user},{order},own,1,1,TRUE\n" for user in "xy" for order in "AB"]
    path.write_text(HEADER + "".join(rows))
    assert set(read_predictions(path)["preferred_more_popular"]) == {"true"}
