"""Every drawing, one function per figure: of the width of a column, readable in print."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure
from scipy.special import expit

from data.files import whole_folder
from data.predictions import margins_by_user

STYLE = {"font.size": 8, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}


def draw_all(predictions: pd.DataFrame | None, metrics: dict[str, Any]) -> dict[str, Figure]:
    """Every figure that these results allow, by name; without predictions, those that metrics.json holds."""
    everyone = list(metrics["arms"])
    models = [arm for arm in everyone if metrics["arms"][arm]["kind"] == "model"]
    both = {"ranking_accuracy": "ranking", "response_accuracy": "response"}
    popular = {
        "accuracy_with_popularity": "preferred film more popular",
        "accuracy_against_popularity": "less popular",
        "accuracy_similar_popularity": "within a factor of 2",
    }
    figures = {
        "accuracy": draw_measures(metrics, everyone, both, "accuracy, %", 50),
        "popularity": draw_measures(metrics, everyone, popular, "ranking accuracy, %", 50),
        "position_bias": draw_measures(metrics, models, {"position_bias": ""}, "position bias, A - B, points", 0),
    }
    if predictions is not None:
        figures["reliability"] = draw_reliability(predictions, models)
        if {"sft", "dpo"} <= {*models}:
            figures["margins"] = draw_margins(predictions)
    if any(measures["seeds"] > 1 for measures in metrics["arms"].values()):
        figures["seeds"] = draw_seeds(metrics)
    return figures


def plot_all(predictions: pd.DataFrame | None, metrics: dict[str, Any], folder: Path) -> None:
    """Write every figure that these results allow as PNG and PDF into a folder, whole or not at all."""
    with rc_context(STYLE), whole_folder(folder) as made:
        for name, figure in draw_all(predictions, metrics).items():
            for ending in ("png", "pdf"):
                figure.savefig(made / f"{name}.{ending}", dpi=200)


def new_figure(height: float, columns: int = 1) -> tuple[Figure, Any]:
    """A figure, and its axis or its row of axes; height in inches."""
    figure = Figure(figsize=(3.5 * columns, height), layout="constrained")
    return figure, figure.subplots(ncols=columns)


def draw_measures(
    metrics: dict[str, Any], arms: Sequence[str], measures: dict[str, str], axis_label: str, middle: float
) -> Figure:
    """One row per arm: measures, {name: label}, with their 95% intervals."""
    figure, axis = new_figure(0.28 * len(arms) + 0.9)
    for number, (measure, label) in enumerate(measures.items()):
        shown = [(row, metrics["arms"][arm][measure]) for row, arm in enumerate(arms)]
        shown = [(row, found) for row, found in shown if found["value"] is not None]
        if not shown:
            continue
        centre = np.array([found["value"] for _, found in shown])
        spread = np.abs(np.array([[found["low"], found["high"]] for _, found in shown]).T - centre)
        rows = np.array([row for row, _ in shown]) + 0.24 * (number - (len(measures) - 1) / 2)
        style = {"fmt": "os^"[number], "color": ["black", "0.55", "0.75"][number], "capsize": 2, "markersize": 3.5}
        axis.errorbar(centre, rows, xerr=spread, label=label, linewidth=1, **style)
    axis.axvline(middle, color="0.8", linewidth=0.8, zorder=0)
    axis.set(yticks=range(len(arms)), yticklabels=arms, xlabel=f"{axis_label} (95% interval)")
    axis.invert_yaxis()
    if len(measures) > 1:
        figure.legend(loc="outside upper center", ncols=2)
    return figure


def draw_reliability(predictions: pd.DataFrame, arms: Sequence[str]) -> Figure:
    """How often Option A is right against p(Option A), in 15 bins; the diagonal is perfect calibration."""
    figure, axis = new_figure(3.0)
    axis.plot([0, 1], [0, 1], color="0.8", linewidth=0.8)
    own = predictions[predictions["history"] == "own"]
    for number, arm in enumerate(arms):
        rows = own[own["arm"] == arm]
        is_a = (rows["order"] == "A").to_numpy()
        p_a = expit(rows["decision_margin"].to_numpy() * np.where(is_a, 1, -1))
        bins = pd.DataFrame({"p": p_a, "right": is_a}).groupby(np.minimum((p_a * 15).astype(int), 14))
        bins = bins.agg(p=("p", "mean"), right=("right", "mean"), count=("p", "size"))
        bins = bins[bins["count"] >= 10]
        error = 1.96 * np.sqrt(bins["right"] * (1 - bins["right"]) / bins["count"])
        style = {"marker": "os^Dv"[number % 5], "linestyle": ["-", "--", ":", "-."][number % 4], "markersize": 3.5}
        axis.errorbar(bins["p"], bins["right"], yerr=error, label=arm, capsize=2, linewidth=1, **style)
    axis.set(xlabel="p(Option A)", ylabel="share of times that Option A is right", xlim=(0, 1), ylim=(0, 1))
    figure.legend(loc="outside upper center", ncols=3)
    return figure


def draw_margins(predictions: pd.DataFrame) -> Figure:
    """Decision margins of DPO against SFT, one point per user (mean over orders and seeds)."""
    wide = margins_by_user(predictions)
    figure, axis = new_figure(3.2)
    axis.scatter(wide["sft"], wide["dpo"], s=6, color="black", alpha=0.35, linewidths=0)
    axis.axhline(0, color="0.7", linewidth=0.8, zorder=0)
    axis.axvline(0, color="0.7", linewidth=0.8, zorder=0)
    corners = {"only DPO right": (0, 1), "both right": (1, 1), "both wrong": (0, 0), "only SFT right": (1, 0)}
    for text, (right, top) in corners.items():
        place = {"ha": "right" if right else "left", "va": "top" if top else "bottom", "color": "0.4"}
        axis.text(0.02 + 0.96 * right, 0.02 + 0.96 * top, text, transform=axis.transAxes, **place)
    axis.set(xlabel="SFT: decision margin, mean of both orders (nats)", ylabel="DPO: decision margin (nats)")
    return figure


def draw_seeds(metrics: dict[str, Any]) -> Figure:
    """Ranking accuracy of each training run."""
    accuracy = {arm: measures["ranking_accuracy"].get("runs") for arm, measures in metrics["arms"].items()}
    accuracy = {arm: [*runs.values()] for arm, runs in accuracy.items() if runs}
    figure, axis = new_figure(0.28 * len(accuracy) + 0.8)
    rows = np.repeat(range(len(accuracy)), [len(values) for values in accuracy.values()])
    axis.scatter(np.concatenate([*accuracy.values()]), rows, s=16, facecolors="none", edgecolors="black")
    axis.axvline(50, color="0.8", linewidth=0.8, zorder=0)
    axis.set(yticks=range(len(accuracy)), yticklabels=accuracy, xlabel="ranking accuracy of each training run, %")
    axis.invert_yaxis()
    return figure


def draw_losses(history: Sequence[dict[str, float]], stage: str) -> Figure:
    """A training log: loss on training and held-out pairs and, for DPO, log p of the responses, reward margin and
    reward accuracy. A line at ln 2 is the loss of a policy that is its reference."""
    panels = {"loss": {"loss": ""}}
    if stage == "dpo":
        panels |= {
            "log p of the response (nats)": {"logps/chosen": "chosen, ", "logps/rejected": "rejected, "},
            "reward margin (nats)": {"rewards/margins": ""},
            "reward accuracy": {"rewards/accuracies": ""},
        }
    figure, axes = new_figure(2.8, len(panels))
    axes = np.atleast_1d(axes)
    for axis, (label, lines) in zip(axes, panels.items(), strict=True):
        for (name, what), color in zip(lines.items(), ("tab:blue", "tab:orange"), strict=False):
            for prefix, style, who in (("", "-", "training"), ("eval_", "o--", "held out")):
                points = [(entry["step"], entry[prefix + name]) for entry in history if prefix + name in entry]
                if points:
                    shade = "black" if prefix and not what else color
                    axis.plot(*zip(*points, strict=True), style, color=shade, label=what + who, markersize=4)
        axis.set(xlabel="step", ylabel=label)
    losses = [entry["loss"] for entry in history if "loss" in entry]
    if stage == "dpo":
        axes[0].axhline(math.log(2), color="0.7", linewidth=0.8, zorder=0, label="ln 2")
        if axes[1].lines:
            axes[1].legend(frameon=False)
    if losses and min(losses) > 0 and max(losses) > 20 * min(losses):  # the first steps would flatten the rest
        axes[0].set_yscale("log")
    axes[0].legend(frameon=False)
    return figure
