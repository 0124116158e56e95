"""Texts that begin alike as one tree: what a node sees, and where trees lie in a batch."""

import itertools

import numpy as np
import torch

from data.trees import ancestor_mask, one_row, pad_trees, row_lengths, row_starts, token_tree


def test_a_tree_holds_each_text_and_lets_a_node_see_its_ancestors_alone():
    texts = [[1, 2, 3, 9, 4], [1, 2, 5, 6], [1, 2, 3, 7], [1, 2, 3, 7, 8]]
    tree = token_tree(texts)
    assert len(tree.tokens) == 9
    assert [tree.tokens[path].tolist() for path in tree.paths] == texts
    for path in tree.paths:
        assert (tree.positions[path] == range(len(path))).all() and (tree.parents[path[1:]] == path[:-1]).all()
    batch = pad_trees([tree, token_tree([[1, 2]])])
    mask = ancestor_mask(torch.from_numpy(batch["ends"]))[:, 0].numpy()
    wanted = {node: {*path[: depth + 1].tolist()} for path in tree.paths for depth, node in enumerate(path.tolist())}
    assert all({*mask[0, node].nonzero()[0].tolist()} == seen for node, seen in wanted.items())
    assert mask[1, 5].nonzero()[0].tolist() == [5], "padding sees itself"


def test_attention_takes_a_pair_in_the_same_order_whatever_pairs_are_beside_it():
    """Or bfloat16 rounds otherwise, and the reference does not fit: its tiles are of 64 nodes, in blocks of 128."""
    generator = np.random.default_rng(0)
    sizes = [*generator.integers(180, 250, 30), 255, 256, 300, 500]
    trees = [token_tree([generator.integers(0, 99, size).tolist()]) for size in sizes]
    alone = [row_starts([tree])[0] for tree in trees]
    for size in (2, 8, 34):
        for _ in range(10):
            row = generator.permutation(34)[:size]
            starts = row_starts([trees[number] for number in row])
            for number, start in zip(row, starts, strict=True):
                assert (start - alone[number]) % (128 if sizes[number] >= 256 else 64) == 0
            spans = sorted((start, start + sizes[number]) for number, start in zip(row, starts, strict=True))
            assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans)), "none lies on another"
    assert len({start % 64 for start in alone}) > 20
    assert spans[-1][1] < 1.08 * sum(sizes), "and few nodes lie between them"


def test_rows_are_filled_up_to_few_lengths_that_practically_all_fit():
    generator = np.random.default_rng(0)
    trees = [token_tree([generator.integers(0, 99, size).tolist()]) for size in generator.integers(170, 230, 300)]
    lengths = row_lengths(trees, 8)
    assert len(lengths) <= 4 and lengths == sorted(lengths)
    found = []
    for _ in range(300):
        row = [trees[number] for number in generator.choice(300, 8, replace=False)]
        found.append(one_row(row, row_starts(row), lengths)["tokens"].shape[1])
    assert {*found} <= {*lengths}
    assert np.mean(found) < 1.15 * 8 * 200, "and are filled up by little"
    longer = one_row(trees[:12], row_starts(trees[:12]), lengths)["tokens"].shape[1]
    assert longer not in lengths and longer % 128 == 0, "a row that fits none has whole blocks"
    assert row_lengths(trees[:3], 8), "fewer trees than a row takes"


def test_a_row_tells_of_each_node_which_tree_and_which_branch_it_is_of():
    trees = [token_tree([[1, 2, 3, 4], [1, 2, 5]]), token_tree([[6, 7], [6, 8, 9]])]
    row = one_row(trees, np.array([6, 1]))
    assert {name: values.shape for name, values in row.items()} == {
        **dict.fromkeys(("tokens", "positions"), (1, 128)),
        **dict.fromkeys(("pairs", "responses"), (128,)),
    }
    assert row["tokens"][0, :12].tolist() == [0, 6, 7, 8, 9, 0, 1, 2, 3, 4, 5, 0]
    assert row["positions"][0, :12].tolist() == [0, 0, 1, 1, 2, 0, 0, 1, 2, 3, 2, 0]
    assert row["responses"][:12].tolist() == [-1, -1, 2, 3, 3, -1, -1, -1, 0, 0, 1, -1]
    assert row["pairs"][1:5].tolist() == [1] * 4 and row["pairs"][6:11].tolist() == [0] * 5
    assert not {0, 1} & {*row["pairs"][[0, 5, *range(11, 128)]].tolist()}, "what lies between them is of no tree"
