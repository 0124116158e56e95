"""Every drawing, one function per figure: one column wide, readable in print, one name and colour for an arm."""

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure
from scipy.special import expit
from statsmodels.stats.proportion import proportion_confint

from data.baselines import BASELINES
from data.files import whole_folder
from data.predictions import margins_by_user
from data.verdict import KINDS

STYLE = {"font.size": 8, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}
WIDTH = 3.5  # inches: a column of a paper
LINES = {"capsize": 2, "linewidth": 1}  # of intervals
ARM_NAMES = KINDS | {"base": "base model", "learned": "logistic regression"}  # any other keeps its own name
GREY = "0.45"
COLOURS = {"sft": "#0072B2", "sft_more": "#009E73", "dpo": "#D55E00", "base": "black"} | dict.fromkeys(BASELINES, GREY)
OTHERS = ("#CC79A7", "#56B4E9", "#E69F00")  # the rest of the palette (Okabe and Ito 2008), for other arms
ROLES = {  # of a pair's films
    "preferred film": {"color": "black", "linestyle": "-"},
    "other film": {"color": "0.6", "linestyle": "--"},
}
CAPTIONS = {  # of a figure: what it shows
    "accuracy": "Ranking and response accuracy of each arm, with 95% intervals; the line is chance",
    "position_bias": "Position bias of each model, with 95% intervals; the line is no bias",
    "margins": "Decision margin of each test pair under SFT (across) and DPO (up), mean of both orders and all runs",
    "reliability": "How often Option A is right against its probability, one panel per model",
    "popularity": "Ranking accuracy where the preferred film is the more, the less or similarly popular",
    "seeds": "Ranking accuracy of each training run (crosses; a line joins those of one seed), and their mean (points)",
    "genres": "Share of the preferred and of the other films that have each genre",
    "watched": "How many training users watched the preferred and the other films, as cumulative shares",
    "losses": "The training log: loss and, for DPO, log-probabilities, reward margin and accuracy by step",
}


def arm_name(arm: str) -> str:
    """An arm's name for a reader; that of a second precision ends in its bits."""
    name, at, precision = arm.partition("@")
    return ARM_NAMES.get(name, name) + (f", {precision.replace('bit', '-bit')}" if at else "")


def arm_styles(arms: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Colour and filling of each arm's marker: hollow in a second precision, which keeps the arm's colour."""
    names = [arm.partition("@")[0] for arm in arms]
    others = [name for name in dict.fromkeys(names) if name not in COLOURS]
    colours = COLOURS | {name: OTHERS[number % len(OTHERS)] for number, name in enumerate(others)}
    hollow = {True: {"markerfacecolor": "white"}, False: {}}
    return {arm: {"color": colours[name]} | hollow["@" in arm] for arm, name in zip(arms, names, strict=True)}


@rc_context(STYLE)
def draw_all(predictions: pd.DataFrame | None, metrics: dict[str, Any]) -> dict[str, Figure]:
    """Every figure that these results allow, by name; without predictions, those that metrics.json holds."""
    everyone = list(metrics["arms"])
    models = [arm for arm in everyone if metrics["arms"][arm]["kind"] == "model"]
    both = {"ranking_accuracy": "ranking", "response_accuracy": "response"}
    popular = {
        "accuracy_with_popularity": "preferred film more popular",
        "accuracy_against_popularity": "less",
        "accuracy_similar_popularity": "similar",
    }
    figures = {
        "accuracy": draw_measures(metrics, everyone, both, "accuracy, %", 50),
        "position_bias": draw_measures(metrics, models, {"position_bias": ""}, "position bias, A - B, points", 0),
    }
    if any(measures[name]["value"] is not None for measures in metrics["arms"].values() for name in popular):
        figures["popularity"] = draw_measures(metrics, everyone, popular, "ranking accuracy, %", 50)
    if predictions is not None:
        figures["reliability"] = draw_reliability(predictions, models)
        if {"sft", "dpo"} <= {*models}:
            figures["margins"] = draw_margins(predictions)
    if any(measures["seeds"] > 1 for measures in metrics["arms"].values()):
        figures["seeds"] = draw_seeds(metrics)
    error = {"margins": "means over orders and runs", "reliability": "runs pooled,\n95% intervals of Wilson over users"}
    for name, figure in figures.items():
        caption = f"{sample_text(metrics)}; {error.get(name, '95% intervals')}"
        figure.supxlabel(caption, fontsize=7, color=GREY)
    return figures


def sample_text(metrics: dict[str, Any]) -> str:
    """How many users and training runs results are from."""
    trained = {arm: found for arm, found in metrics["arms"].items() if arm.partition("@")[0] != "base"}
    runs = sorted({found["seeds"] for found in trained.values() if found["kind"] == "model"})
    counts = " to ".join(map(str, dict.fromkeys([*runs[:1], *runs[-1:]])))
    per_arm = f", {counts} training run{'' if counts == '1' else 's'} per arm" if runs else ""
    return f"{metrics['users']:,} users{per_arm}"


@rc_context(STYLE)
def plot_all(predictions: pd.DataFrame | None, metrics: dict[str, Any], folder: Path) -> None:
    """Write every figure that these results allow as PNG and PDF into a folder, whole or not at all."""
    with whole_folder(folder) as made:
        for name, figure in draw_all(predictions, metrics).items():
            for ending in ("png", "pdf"):
                figure.savefig(made / f"{name}.{ending}", dpi=200)


def new_figure(height: float, rows: int = 1, columns: int = 1, share: bool = False) -> tuple[Figure, np.ndarray]:
    """A figure of a column's width, and its axes, (rows, columns); height in inches."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplots(rows, columns, sharex=share, sharey=share and columns > 1, squeeze=False)
    for axis in axes.flat:  # ticks made later, when STYLE may be gone
        axis.tick_params(labelsize=STYLE["font.size"])
    return figure, axes


def figure_of_arms(arms: Sequence[str], axis_label: str) -> tuple[Figure, Any]:
    """A figure with one row per arm, and its axis."""
    figure, [[axis]] = new_figure(0.28 * len(arms) + 1.1)
    axis.set(yticks=range(len(arms)), yticklabels=map(arm_name, arms), xlabel=axis_label, ylim=(len(arms) - 0.5, -0.5))
    return figure, axis


def spread(found: dict[str, float]) -> list[list[float]]:
    """How far an interval reaches to either side of its value, as errorbar takes it."""
    return [[abs(found["value"] - found[end])] for end in ("low", "high")]


def draw_measures(
    metrics: dict[str, Any], arms: Sequence[str], measures: dict[str, str], axis_label: str, middle: float
) -> Figure:
    """One row per arm: measures, {name: label}, with their 95% intervals."""
    figure, axis = figure_of_arms(arms, axis_label)
    axis.axvline(middle, color="0.8", linewidth=0.8, zorder=0)
    styles, drawn = arm_styles([*metrics["arms"]]), {}
    for number, (measure, label) in enumerate(measures.items()):
        marker = {"marker": "os^"[number], "markersize": 4, "linestyle": ""}
        marker |= {"markerfacecolor": "white"} if number else {}
        for row, arm in enumerate(arms):
            found, place = metrics["arms"][arm][measure], row + 0.24 * (number - (len(measures) - 1) / 2)
            if found["value"] is not None:
                axis.errorbar(found["value"], place, xerr=spread(found), **LINES, **styles[arm] | marker)
                drawn[label] = axis.plot([], [], color="black", **marker)[0]
    if len(measures) > 1:
        figure.legend([*drawn.values()], [*drawn], loc="outside upper center", ncols=3)
    return figure


def draw_reliability(predictions: pd.DataFrame, arms: Sequence[str]) -> Figure:
    """How often Option A is right against p(Option A), in 15 bins; the diagonal is perfect calibration.

    Intervals are Wilson's for as many independent answers as a bin has users, who are ten at least.
    """
    columns, rows = min(2, len(arms)), -(-len(arms) // 2)
    figure, axes = new_figure(0.7 + 1.4 * rows + 1.2 * (columns == 1), rows, columns, share=True)
    own, styles = predictions[predictions["history"] == "own"], arm_styles(arms)
    for axis in axes.flat[len(arms) :]:
        axis.set_axis_off()
    for number, (axis, arm) in enumerate(zip(axes.flat, arms, strict=False)):
        rows = own[own["arm"] == arm]
        is_a = (rows["order"] == "A").to_numpy()
        p_a = expit(rows["decision_margin"].to_numpy() * np.where(is_a, 1, -1))
        bins = pd.DataFrame({"p": p_a, "right": is_a, "user": rows["user_id"].to_numpy()})
        bins = bins.groupby(np.minimum((p_a * 15).astype(int), 14))
        bins = bins.agg(p=("p", "mean"), right=("right", "mean"), users=("user", "nunique"))
        bins = bins[bins["users"] >= 10]
        low, high = proportion_confint(bins["right"] * bins["users"], bins["users"], method="wilson")
        error = np.abs([bins["right"] - low, high - bins["right"]])
        axis.plot([0, 1], [0, 1], color="0.8", linewidth=0.8)
        axis.errorbar(bins["p"], bins["right"], yerr=error, fmt="o-", markersize=3.5, **LINES, **styles[arm])
        axis.set(xlim=(-0.04, 1.04), ylim=(-0.04, 1.04), xticks=(0, 0.5, 1), yticks=(0, 0.5, 1))
        axis.set_title(textwrap.fill(arm_name(arm), 24), fontsize=8)
        if number >= len(arms) - columns:  # nothing below it
            axis.tick_params(labelbottom=True)
            axis.set_xlabel("p(Option A)")
    figure.supylabel("share of times that Option A is right", fontsize=8)
    return figure


def draw_margins(predictions: pd.DataFrame) -> Figure:
    """Decision margins of DPO against SFT, one point per pair (mean over orders and seeds)."""
    wide = margins_by_user(predictions)
    figure, [[axis]] = new_figure(3.4)
    sft, dpo = (np.sign(wide[arm]).to_numpy() for arm in ("sft", "dpo"))
    corners = {  # SFT right, DPO right: text, colour
        (-1, 1): ("only DPO right", COLOURS["dpo"]),
        (1, 1): ("both right", "0.3"),
        (-1, -1): ("both wrong", "0.55"),
        (1, -1): ("only SFT right", COLOURS["sft"]),
    }
    colours = [corners.get(sides, ("a tie", GREY))[1] for sides in zip(sft, dpo, strict=True)]
    axis.scatter(wide["sft"], wide["dpo"], s=7, c=colours, alpha=0.5, linewidths=0)
    axis.axhline(0, color="0.7", linewidth=0.8, zorder=0)
    axis.axvline(0, color="0.7", linewidth=0.8, zorder=0)
    for (right, top), (text, colour) in corners.items():
        place = {"ha": "right" if right > 0 else "left", "va": "top" if top > 0 else "bottom", "color": colour}
        count = ((sft == right) & (dpo == top)).sum()
        axis.text(0.5 + 0.48 * right, 0.5 + 0.48 * top, f"{text}: {count:,}", transform=axis.transAxes, **place)
    axis.margins(y=0.14)  # room for the corners' texts
    axis.set(xlabel="SFT: decision margin, mean of both orders (nats)", ylabel="DPO: decision margin (nats)")
    return figure


def draw_seeds(metrics: dict[str, Any]) -> Figure:
    """Ranking accuracy of each training run, those of one seed joined, and above it their mean with its interval."""
    accuracy = {arm: measures["ranking_accuracy"] for arm, measures in metrics["arms"].items()}
    styles, accuracy = arm_styles([*accuracy]), {arm: found for arm, found in accuracy.items() if found.get("runs")}
    figure, axis = figure_of_arms([*accuracy], "ranking accuracy, %")
    for seed in dict.fromkeys(seed for found in accuracy.values() for seed in found["runs"]):
        of_seed = {row + 0.18: found["runs"].get(seed) for row, found in enumerate(accuracy.values())}
        places = [(value, row) for row, value in of_seed.items() if value is not None]
        axis.plot(*zip(*places, strict=True), color="0.8", linewidth=0.6, zorder=0)
    for row, (arm, found) in enumerate(accuracy.items()):
        axis.errorbar(found["value"], row - 0.14, xerr=spread(found), fmt="o", markersize=4, **LINES, **styles[arm])
        axis.plot([*found["runs"].values()], [row + 0.18] * len(found["runs"]), "x", markersize=4, **styles[arm])
    legend = {"mean and 95% interval": "o", "one training run": "x"}
    shown = [axis.plot([], [], marker, color="black", markersize=4)[0] for marker in legend.values()]
    figure.legend(shown, [*legend], loc="outside upper center", ncols=2)
    return figure


@rc_context(STYLE)
def draw_losses(history: Sequence[dict[str, float]], stage: str) -> Figure:
    """A training log: loss on training and held-out pairs and, for DPO, log p of the responses, reward margin and
    reward accuracy. A line at ln 2 is the loss of a policy that is its reference."""
    panels = {"loss": {"loss": ""}}
    if stage == "dpo":
        panels |= {
            "log p (nats)": {"logps/chosen": "chosen", "logps/rejected": "rejected"},
            "reward margin (nats)": {"rewards/margins": ""},
            "reward accuracy": {"rewards/accuracies": ""},
        }
    figure, axes = new_figure(0.8 + 1.4 * len(panels), len(panels), share=True)
    axes = axes[:, 0]
    for axis, (label, lines) in zip(axes, panels.items(), strict=True):
        for (name, what), color in zip(lines.items(), ("black", OTHERS[0]), strict=False):
            for prefix, style, who in (("", "-", "training"), ("eval_", "o--", "held out")):
                points = [(entry["step"], entry[prefix + name]) for entry in history if prefix + name in entry]
                if points:
                    look = {"color": color, "alpha": 1 if prefix else 0.5, "linewidth": 1, "markersize": 3}
                    axis.plot(*zip(*points, strict=True), style, label=what or who, **look)
        axis.set_ylabel(label)
        axis.margins(x=0.02)
    axes[-1].set_xlabel("step")
    losses = [entry["loss"] for entry in history if "loss" in entry]
    if stage == "dpo":
        axes[0].axhline(math.log(2), color="0.7", linewidth=0.8, zorder=0, label="ln 2")
    if losses and min(losses) > 0 and max(losses) > 20 * min(losses):  # the first steps would flatten the rest
        axes[0].set_yscale("log")
        axes[0].tick_params(axis="y", which="minor", labelleft=False)  # there are decades, and little room
    for axis in axes[:2]:  # the others' lines are those of the first
        lines = {line.get_label(): line for line in axis.lines}
        above = {"loc": "lower left", "bbox_to_anchor": (0, 1), "borderaxespad": 0.2, "ncols": 3}
        axis.legend([*lines.values()], [*lines], **above)
    return figure


@rc_context(STYLE)
def draw_genres(films: pd.DataFrame) -> Figure:
    """How many of the preferred and of the other films have each genre, the most frequent one on top.

    films: one row per film of a pair: role (preferred or other film), genres.
    """
    each = films.explode("genres")
    shares = 100 * pd.crosstab(each["genres"], each["role"]) / films["role"].value_counts()
    shares = shares.loc[shares.sum(axis=1).sort_values().index]
    figure, [[axis]] = new_figure(0.22 * len(shares) + 0.9)
    for shift, (role, look) in zip((0.2, -0.2), ROLES.items(), strict=True):
        axis.barh(np.arange(len(shares)) + shift, shares[role], 0.4, label=role, color=look["color"])
    names = shares.index.str.replace("$", r"\$", regex=False)  # what stands between two would be mathematics
    axis.set(yticks=range(len(shares)), yticklabels=names, xlabel="share of the films that have the genre, %")
    axis.margins(y=0.01)
    axis.legend(loc="lower right")
    return figure


@rc_context(STYLE)
def draw_watched(films: pd.DataFrame) -> Figure:
    """Share of the films that at most so many training users watched.

    films: one row per film of a pair: role (preferred or other film), watched (training users).
    """
    figure, [[axis]] = new_figure(2.6)
    for role, look in ROLES.items():
        axis.ecdf(films.loc[films["role"] == role, "watched"], label=role, **look)
    axis.set_xscale("symlog", linthresh=1)
    axis.xaxis.set_major_formatter("{x:g}")
    axis.set(xlabel="training users who watched the film, at most", ylabel="share of the films", xlim=(0, None))
    axis.legend(loc="upper left")
    return figure
