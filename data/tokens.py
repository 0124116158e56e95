"""Texts as a tokenizer cuts them: does it serve, and the tree that a pair makes."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from data.errors import UserError
from data.pairs import ORDERS, STEM, Pair, other_letter, preference_row
from data.trees import Tree, one_row, pad_trees, row_starts, token_tree


def pair_tree(pair: Pair, tokenizer: Any, decision_only: bool = False) -> Tree:
    """A pair's four texts (two orders, two responses), tokenized as training does, as one tree.

    Its paths are, for [order][chosen, rejected], the nodes of the response's tokens from the option's letter, where
    the two part, to the end of text; decision_only leaves out what follows the letter. UserError where the tokenizer
    does not make the letter a token of its own.
    """
    texts: list[list[int]] = []
    starts: list[int] = []
    for order in ORDERS:
        row = preference_row(pair, order)
        whole = [tokenizer(row["prompt"] + row[response])["input_ids"] for response in ("chosen", "rejected")]
        both = [[*text, tokenizer.eos_token_id] for text in whole]
        parting = next(i for i, (chosen, rejected) in enumerate(zip(*both, strict=False)) if chosen != rejected)
        letters = [tokenizer.decode([text[parting]]).strip() for text in both]
        stem = len(tokenizer(row["prompt"] + STEM)["input_ids"])
        if parting != stem or letters != [order, other_letter(order)]:
            first = " and ".join(repr(letter[:20]) for letter in letters)
            problem = f"the tokenizer makes {first} where the options' letters stand, and not ' A' and ' B'"
            raise UserError(problem, "Use a base model whose tokenizer has ' A' and ' B' as tokens.")
        texts += [text[: parting + 1] if decision_only else text for text in both]
        starts += [parting, parting]
    tree = token_tree(texts)
    paths = [path[start:] for path, start in zip(tree.paths, starts, strict=True)]
    return replace(tree, paths=[paths[:2], paths[2:]])


def tree_of(example: dict[str, Any]) -> Tree:
    """A row as TRL tokenized it: its prompt with the chosen response and with the rejected one, or SFT's one text."""
    if "input_ids" in example:
        return token_tree([example["input_ids"]])
    return token_tree([example["prompt_ids"] + example[response] for response in ("chosen_ids", "rejected_ids")])


def prompt_length(example: dict[str, Any]) -> int:
    """How many tokens of such a row come before its response; of SFT's, TRL marks them by labels, Unsloth by a mask."""
    if "prompt_ids" in example:
        return len(example["prompt_ids"])
    return example["labels"].count(-100) if "labels" in example else example["completion_mask"].count(0)


def labels_of(examples: Sequence[dict[str, Any]]) -> np.ndarray:
    """What a trainer counts SFT's response tokens by: the tokens, -100 in their place elsewhere; (rows, tokens)."""
    labels = np.full((len(examples), max(len(row["input_ids"]) for row in examples)), -100)
    for row, values in zip(examples, labels, strict=True):
        values[prompt_length(row) : len(row["input_ids"])] = row["input_ids"][prompt_length(row) :]
    return labels


def placed_trees(
    examples: Sequence[dict[str, Any]], in_row: bool, lengths: Sequence[int] = ()
) -> dict[str, np.ndarray]:
    """Such rows as trees: what `one_row` makes of them, with its lengths, or `pad_trees`, with the only one.

    And `before`, `targets` and `texts`, each (response tokens,), of all chosen responses, then of all rejected ones:
    the node before each token, counted over the whole batch, the token itself, and the number of its response.
    """
    trees = [tree_of(example) for example in examples]
    if in_row:
        starts = row_starts(trees)
        made = one_row(trees, starts, lengths)
    else:
        # in bfloat16 log-probabilities depend on the padded length: multiples of 64 are few, and fit the reference's
        made = pad_trees(trees, *lengths or [64])
        starts = np.arange(len(trees)) * made["tokens"].shape[1]
    placed = [(tree, start, prompt_length(row)) for tree, start, row in zip(trees, starts, examples, strict=True)]
    texts = [
        tree.paths[response][prompt - 1 :] + start  # from the prompt's last token
        for response in range(len(trees[0].paths))
        for tree, start, prompt in placed
    ]
    made["before"] = np.concatenate([nodes[:-1] for nodes in texts])
    made["targets"] = made["tokens"].ravel()[np.concatenate([nodes[1:] for nodes in texts])]
    made["texts"] = np.repeat(np.arange(len(texts)), [len(nodes) - 1 for nodes in texts])
    return made


def check_tokens(rows: Sequence[dict[str, str]], tokenizer: Any, max_length: int) -> int:
    """The longest row in tokens, end-of-text included; UserError where it is too long or merges with its prompt."""
    longest = 0
    prompts = tokenizer([row["prompt"] for row in rows])["input_ids"]
    if prompts[0][-1] == tokenizer.eos_token_id:
        remedy = "Take add_eos_token, or the token in its post_processor, out of its files."
        raise UserError("this tokenizer adds its end-of-text token to every text by itself", remedy)
    for response in ("chosen", "rejected"):
        texts = tokenizer([row["prompt"] + row[response] for row in rows])["input_ids"]
        for number, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
            if text[: len(prompt)] != prompt:
                problem = f"row {number}: this tokenizer merges the prompt's end with the response's beginning"
                raise UserError(problem, "Use a base model whose tokenizer keeps a newline apart from what follows.")
            longest = max(longest, len(text) + 1)
    if longest > max_length:
        problem = f"the longest row has {longest} tokens, more than max_length {max_length}"
        raise UserError(problem, f"Give --max_length {longest}.")
    return longest


def check_tokenized(dataset: Any, rows: Sequence[dict[str, str]], tokenizer: Any) -> None:
    """Raise RuntimeError unless a trainer's rows are ours, token for token: all there, none cut, none changed."""
    if len(dataset) != len(rows):
        raise RuntimeError(f"the trainer kept {len(dataset)} of {len(rows)} rows")
    for row, text in zip(dataset.select(range(min(8, len(rows)))), rows, strict=False):
        for response in ["completion"] if "completion" in text else ["chosen", "rejected"]:
            found = row["input_ids"] if response == "completion" else row["prompt_ids"] + row[f"{response}_ids"]
            if list(found) != [*tokenizer(text["prompt"] + text[response])["input_ids"], tokenizer.eos_token_id]:
                raise RuntimeError(f"the trainer's tokens of a {response} response are not those of its text")


def longest_in_tokens(rows: Sequence[dict[str, str]], tokenizer: Any, responses: Sequence[str], prompts: int) -> int:
    """How many tokens are computed for the longest row, with its prompt computed so many times."""
    parts = [tokenizer([row[part] for row in rows])["input_ids"] for part in ("prompt", *responses)]
    return max(prompts * len(prompt) + sum(map(len, texts)) for prompt, *texts in zip(*parts, strict=True))
