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
    parts: list[tuple[np.ndarray, ...]] = []  # tokens, positions and parents that each text adds
    paths: dict[int, np.ndarray] = {}
    count = 0
    before = last = np.empty(0, dtype=np.int64)  # path and tokens of the text before this one
    for index in sorted(range(len(texts)), key=lambda index: list(texts[index])):  # sorted, so that branches stay together
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


def ancestor_mask(ends: torch.Tensor) -> torch.Tensor:
    """Which node may attend to which, (trees, 1, nodes, nodes) of bool, from the ends of shape (trees, nodes)."""
    import torch

    node = torch.arange(ends.shape[1], device=ends.device)
    return ((node[:, None] >= node) & (node[:, None] < ends[:, None]))[:, None]
