"""Texts that begin alike as one tree of tokens, so that a model computes each shared beginning once.

A node is a token after all that leads to it. It may attend to its ancestors alone and stands at the position of its
depth, so that what the model says at a node is what it would say in the text by itself. Nodes are in depth-first
order: node i is an ancestor of node j just where i <= j < ends[i], so one number a node makes the attention mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch


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
    tokens: list[int] = []
    positions: list[int] = []
    parents: list[int] = []
    ends: list[int] = []
    paths: dict[int, np.ndarray] = {}
    before: list[int] = []  # the path of the text before this one
    last: Sequence[int] = ()
    for index in sorted(range(len(texts)), key=lambda index: list(texts[index])):  # sorted, so that branches stay together
        text = texts[index]
        shared = next((depth for depth, (a, b) in enumerate(zip(text, last, strict=False)) if a != b), min(len(text), len(last)))
        path = before[:shared]
        for depth in range(shared, len(text)):
            parents.append(path[-1] if path else -1)
            path.append(len(tokens))
            tokens.append(text[depth])
            positions.append(depth)
            ends.append(0)
        for node in path:
            ends[node] = len(tokens)
        paths[index] = np.array(path)
        before, last = path, text
    arrays = (np.array(values, dtype=np.int64) for values in (tokens, positions, parents, ends))
    return Tree(*arrays, [paths[index] for index in range(len(texts))])


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


def ancestor_mask(ends: torch.Tensor) -> torch.Tensor:
    """Which node may attend to which, (trees, 1, nodes, nodes) of bool, from the ends of shape (trees, nodes)."""
    import torch

    node = torch.arange(ends.shape[1], device=ends.device)
    return ((node[:, None] >= node) & (node[:, None] < ends[:, None]))[:, None]
