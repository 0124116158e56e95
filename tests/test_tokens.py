"""Does a tokenizer serve, and are a trainer's rows ours? With tokenizers that cut a text by a pattern."""

import re

import pytest
from conftest import REAL_PAIRS, make_pairs
from datasets import Dataset

import config
from data.errors import UserError
from data.pairs import load_pairs, preference_rows
from data.tokens import check_tokenized, check_tokens, longest_in_tokens, pair_tree, prompt_length, tree_of

LETTERS = r"."
LLAMA3 = config.CACHE / "llama-3-tokenizer"  # where tests/benchmarks/gpu.py fetches it to


class Pieces:
    """A tokenizer whose tokens are a pattern's matches."""

    eos_token_id = 0

    def __init__(self, pattern: str):
        self.pattern, self.known = re.compile(pattern, re.DOTALL), ["<end>"]

    def __call__(self, text: str | list[str]) -> dict[str, list]:
        if isinstance(text, list):
            return {"input_ids": [self(one)["input_ids"] for one in text]}
        found = self.pattern.findall(text)
        self.known += sorted({*found} - {*self.known})
        return {"input_ids": [self.known.index(piece) for piece in found]}

    def decode(self, tokens: list[int]) -> str:
        return "".join(self.known[token] for token in tokens)


@pytest.fixture
def rows() -> list[dict[str, str]]:
    return preference_rows(make_pairs(6), "both")


def test_the_longest_row_is_counted_with_its_end_of_text(rows):
    longest = max(len(row["prompt"] + row[response]) for row in rows for response in ("chosen", "rejected")) + 1
    assert check_tokens(rows, Pieces(LETTERS), longest) == longest
    problem = f"the longest row has {longest} tokens, more than max_length {longest - 1}\nGive --max_length {longest}"
    with pytest.raises(UserError, match=problem):
        check_tokens(rows, Pieces(LETTERS), longest - 1)


def test_a_tokenizer_that_merges_prompt_and_response_is_refused(rows):
    with pytest.raises(UserError, match="row 0: this tokenizer merges the prompt's end with the response's beginning"):
        check_tokens(rows, Pieces(r"\nThe|."), 10_000)


def test_a_tokenizer_that_adds_its_end_of_text_by_itself_is_refused(rows):
    """Prompts would end in it, and SFT would learn to write after the end."""

    class Ending(Pieces):
        def __call__(self, text: str | list[str]) -> dict[str, list]:
            found = super().__call__(text)
            return found if isinstance(text, list) else {"input_ids": [*found["input_ids"], self.eos_token_id]}

    with pytest.raises(UserError, match="this tokenizer adds its end-of-text token to every text by itself"):
        check_tokens(rows, Ending(LETTERS), 10_000)


def test_a_tokenizer_in_which_the_options_letter_is_no_token_is_refused():
    [pair] = make_pairs(1)
    assert len(pair_tree(pair, Pieces(r" \w+|.")).paths) == 2
    with pytest.raises(UserError, match="makes 'Option A' and 'Option B' where the options' letters stand"):
        pair_tree(pair, Pieces(r"Option \w|."))
    with pytest.raises(UserError, match="makes 'A' and 'B' where the options' letters"):  # after a space of its own
        pair_tree(pair, Pieces(LETTERS))


def test_rows_that_a_trainer_lost_cut_or_changed_are_found(rows):
    cut, end = Pieces(LETTERS), [Pieces.eos_token_id]
    for_sft = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
    tokens = [{"input_ids": cut(row["prompt"] + row["completion"])["input_ids"] + end} for row in for_sft]
    check_tokenized(Dataset.from_list(tokens), for_sft, cut)
    with pytest.raises(RuntimeError, match=f"the trainer kept {len(rows) - 1} of {len(rows)} rows"):
        check_tokenized(Dataset.from_list(tokens[1:]), for_sft, cut)
    with pytest.raises(RuntimeError, match="tokens of a completion response are not those of its text"):
        check_tokenized(Dataset.from_list([{"input_ids": tokens[0]["input_ids"][1:]}, *tokens[1:]]), for_sft, cut)

    parts = [{f"{name}_ids": cut(text)["input_ids"] for name, text in row.items()} for row in rows]
    parts = [row | {name: row[name] + end for name in ("chosen_ids", "rejected_ids")} for row in parts]
    check_tokenized(Dataset.from_list(parts), rows, cut)
    swapped = parts[0] | {"rejected_ids": parts[0]["chosen_ids"]}
    with pytest.raises(RuntimeError, match="tokens of a rejected response are not those of its text"):
        check_tokenized(Dataset.from_list([swapped, *parts[1:]]), rows, cut)


def test_what_is_computed_for_the_longest_row_counts_its_prompt_as_often_as_it_is_computed():
    rows = [{"prompt": "p" * 9, "chosen": "c" * 2, "rejected": "r"}]
    rows.append({"prompt": "p" * 5, "chosen": "c", "rejected": "r" * 8})
    assert longest_in_tokens(rows, Pieces(LETTERS), ["chosen"], 1) == 11
    assert longest_in_tokens(rows, Pieces(LETTERS), ["chosen", "rejected"], 1) == 14
    assert longest_in_tokens(rows, Pieces(LETTERS), ["chosen", "rejected"], 2) == 21


def test_a_tokenized_pair_is_a_tree_of_its_two_texts():
    tree = tree_of({"prompt_ids": [1, 2], "chosen_ids": [3, 4], "rejected_ids": [3, 5, 6]})
    assert [tree.tokens[path].tolist() for path in tree.paths] == [[1, 2, 3, 4], [1, 2, 3, 5, 6]]
    assert len(tree.tokens) == 6


def test_a_tokenized_row_of_sft_is_a_tree_of_one_branch_however_its_response_is_marked():
    tokens = {"input_ids": [1, 2, 3, 4, 5]}
    tree = tree_of(tokens)
    assert [tree.tokens[path].tolist() for path in tree.paths] == [[1, 2, 3, 4, 5]]
    assert prompt_length(tokens | {"labels": [-100, -100, -100, 4, 5]}) == 3
    assert prompt_length(tokens | {"completion_mask": [0, 0, 0, 1, 1]}) == 3
    assert prompt_length({"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4]}) == 2


@pytest.mark.skipif(not (LLAMA3.is_dir() and REAL_PAIRS.is_file()), reason="no tokenizer of Llama 3, or no pairs")
def test_llama_3s_tokenizer_serves_every_pair():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(LLAMA3)
    assert len(tokenizer) == 128_256 and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    pairs = load_pairs(REAL_PAIRS)
    assert check_tokens(preference_rows(pairs, "balanced"), tokenizer, 512) < 300, "none is cut"
    for pair in pairs[::100]:
        pair_tree(pair, tokenizer, decision_only=True)  # which finds the letters, and raises where they are no tokens
