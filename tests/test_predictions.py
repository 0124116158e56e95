"""Rows of predictions.csv and of generations.csv."""

import pytest
from conftest import make_pairs

from data.errors import UserError
from data.predictions import generation_rows, genre_pattern, read_predictions

HEADER = "arm,kind,seed,pair_id,order,history,decision_margin,response_margin,preferred_more_popular\n"


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "cannot read"),
        ("arm,kind\na,b\n", "has no column"),
        (HEADER, "holds no rows"),
        (HEADER + "sft,model,,x,C,own,1,1,true\n", "neither A nor B"),
        (HEADER + "sft,model,,x,A,own,1,1,true\n" * 2, "two rows for the same"),
        (HEADER + "sft,model,,x,A,own,high,1,true\n", "cannot read"),
    ],
)
def test_a_file_that_holds_no_predictions_is_refused(tmp_path, content, problem):
    path = tmp_path / "p.csv"
    path.write_text(content)
    with pytest.raises(UserError, match=problem):
        read_predictions(path)


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
