"""Texts that begin alike as one tree of tokens, so that a model computes each shared beginning once.

A node is a token after all that leads to it. It may attend to its ancestors alone and stands at the position of its
depth, so what the model says at a node is what it would say in the text by itself. Nodes are in depth-first order:
node i is an ancestor of node j just where i <= j < ends[i], so one number per node makes the attention mask.

Trees lie in a batch in one of two ways: each in a row of its own (`pad_trees`, with `ancestor_mask`), or all in one
row (`row_starts` and `one_row`, for Unsloth's kernel).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

ATTENTION_BLOCK, ATTENTION_TILE = 128, 64  # nodes, of Unsloth's kernel


@dataclass(frozen=True)
class Tree:
    """Tokens of several texts.

    tokens, positions, parents, ends: (n,) of each node: its token, its depth, the node before it in its texts (-1 for
        the first), and the first node after it that does not descend from it.
    paths: the nodes of each text, in its order, or what the maker puts in their place.
    """

    tokens: np.ndarray
    positions: np.ndarray
    parents: np.ndarray
    ends: np.ndarray
    paths: list[Any]


def token_tree(texts: Sequence[Sequence[int]]) -> Tree:
    """The tree of some texts' tokens; texts[i] runs along paths[i]."""
    parts: list[tuple[np.ndarray, ...]] = []  # tokens, positions and parents that each text adds
    paths: dict[int, np.ndarray] = {}
    count = 0
    before = last = np.empty(0, dtype=np.int64)  # path and tokens of the text before this one
    for index in sorted(range(len(texts)), key=lambda index: list(texts[index])):  # branches stay together
        text = np.asarray(texts[index], dtype=np.int64)
        length = min(len(text), len(last))
        differing = np.flatnonzero(text[:length] != last[:length])
        shared = int(differing[0]) if len(differing) else length
        added = np.arange(count, count + len(text) - shared)
        path = np.concatenate([before[:shared], added])
        parts.append((text[shared:], np.arange(shared, len(text)), np.concatenate([[-1], path])[shared:-1]))
        count += len(added)
        paths[index] = before = path
        last = text
    tokens, positions, parents = (np.concatenate(values) for values in zip(*parts, strict=True))
    ends = np.zeros(count, dtype=np.int64)
    for path in paths.values():  # in the order of the tree
        ends[path] = path[-1] + 1
    return Tree(tokens, positions, parents, ends, [paths[index] for index in range(len(texts))])


def pad_trees(trees: Sequence[Tree], multiple: int = 1) -> dict[str, np.ndarray]:
    """`tokens`, `positions` and `ends` of several trees, each (trees, nodes); padding attends to itself alone.

    nodes: those of the longest tree, rounded up to a multiple.
    """
    length = -(-max(len(tree.tokens) for tree in trees) // multiple) * multiple
    batch = {name: np.zeros((len(trees), length), dtype=np.int64) for name in ("tokens", "positions")}
    batch["ends"] = np.tile(np.arange(1, length + 1), (len(trees), 1))
    for row, tree in enumerate(trees):
        for name, values in batch.items():
            values[row, : len(tree.tokens)] = getattr(tree, name)
    return batch


def ancestor_mask(ends: Any) -> Any:
    """Which node may attend to which, (trees, 1, nodes, nodes) of bool, from the tensor of ends, (trees, nodes)."""
    import torch

    node = torch.arange(ends.shape[1], device=ends.device)
    return ((node[:, None] >= node) & (node[:, None] < ends[:, None]))[:, None]


def row_starts(trees: Sequence[Tree]) -> np.ndarray:
    """Where in a row each tree begins, (trees,), so that attention takes its nodes in the same order in every row.

    In bfloat16 another order is another rounding, by about a nat per response. The reference was computed with other
    pairs beside it, and would no longer fit its policy. Attention goes through tiles, those of whole blocks last. So
    a tree that can hold two whole blocks has its own place within a block, and a shorter one within a tile. The place
    is as good as random: trees come in the order that leaves the fewest nodes between them.
    """
    sizes = np.array([len(tree.tokens) for tree in trees])
    periods = np.where(sizes < 2 * ATTENTION_BLOCK, ATTENTION_TILE, ATTENTION_BLOCK)
    places = np.array([tree.tokens.sum() for tree in trees]) % periods
    starts = np.full(len(trees), -1)
    end = 0
    for _ in trees:
        gaps = np.where(starts < 0, (places - end) % periods, ATTENTION_BLOCK)
        nearest = gaps.argmin()
        starts[nearest] = end + gaps[nearest]
        end = starts[nearest] + sizes[nearest]
    return starts


def row_lengths(trees: Sequence[Tree], count: int) -> list[int]:
    """The few lengths, in nodes, that rows of `count` such trees are filled up to, the shortest first.

    Every length costs memory and seconds, every node that fills a row up costs time. A quarter of the rows fit the
    first, 3 of 5 the next, then 19 of 20, and the last all but one in a million, as 200 rows drawn from the trees tell.
    """
    generator = np.random.default_rng(0)
    drawn = [generator.choice(len(trees), min(count, len(trees)), replace=False) for _ in range(200)]
    nodes = [row_nodes(row, row_starts(row)) for row in ([trees[number] for number in numbers] for numbers in drawn)]
    wanted = [*np.quantile(nodes, [0.25, 0.6, 0.95]), np.mean(nodes) + 6 * np.std(nodes)]
    return sorted({whole_blocks(length) for length in wanted})


def row_nodes(trees: Sequence[Tree], starts: np.ndarray) -> int:
    """Nodes of a row up to the end of its last tree."""
    return int(max(starts + [len(tree.tokens) for tree in trees]))


def whole_blocks(nodes: float) -> int:
    return -(-math.ceil(nodes) // ATTENTION_BLOCK) * ATTENTION_BLOCK


def one_row(trees: Sequence[Tree], starts: np.ndarray, lengths: Sequence[int] = ()) -> dict[str, np.ndarray]:
    """Trees of one or two branches in one row, each beginning where `starts` says.

    The row has the first of the `lengths` that it fits, and whole blocks of attention where it fits none.

    Returns:
        `tokens` and `positions`, (1, all nodes); `pairs` and `responses`, (all nodes,): which tree and which of its
        branches a node belongs to, -1 for the stem. Nodes between trees and after the last are one more tree's stem.
    """
    ends = starts + [len(tree.tokens) for tree in trees]
    nodes = row_nodes(trees, starts)
    length = next((length for length in lengths if length >= nodes), whole_blocks(nodes))
    row = {name: np.zeros((1, length), dtype=np.int64) for name in ("tokens", "positions")}
    row["pairs"] = len(trees) + np.searchsorted(np.sort(starts), np.arange(length))
    row["responses"] = np.full(length, -1)
    for number, (tree, start, end) in enumerate(zip(trees, starts, ends, strict=True)):
        row["tokens"][0, start:end], row["positions"][0, start:end] = tree.tokens, tree.positions
        row["pairs"][start:end] = number
        node, first = np.arange(end - start), np.argmin(tree.ends == end - start)  # the first that not all descend from
        row["responses"][start:end] = np.where(node < first, -1, 2 * number + (node >= tree.ends[first]))
    return row
