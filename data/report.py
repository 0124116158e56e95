"""Metrics -> the table on the terminal, report.md, table.tex and an adapter's model card."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import TemplateError

from data.errors import printable
from data.files import file_sha256, read_json, write_text
from data.measures import COMPARED, MEASURES, OF_ANSWERS
from data.pairs import STEM, Movie, Pair, preference_row
from data.runs import WEIGHTS, plain, read_run, settings_of
from data.verdict import (
    BOTH_ONE_LETTER,
    caveats_of,
    caveats_of_baselines,
    interval_text,
    letter_always_answered,
    pairs_seen,
    sentence,
)

MAIN_MEASURES = {  # measure: heading
    "ranking_accuracy": "ranking %",
    "response_accuracy": "response %",
    "order_free_accuracy": "order-free %",
    "swap_consistency": "swap consistency %",
    "position_bias": "position bias A - B",
}


def cell(value: dict[str, float | None], unit: str) -> str:
    """A value with its interval."""
    if value["value"] is None:
        return "-"
    digits = {"nats": 2, "": 3}.get(unit, 1)
    return f"{value['value']:.{digits}f} [{value['low']:.{digits}f}, {value['high']:.{digits}f}]"


def heading(measure: str) -> str:
    label, unit = MEASURES[measure]
    return f"{label} ({unit})" if unit else label


def table_cells(metrics: dict[str, Any], measures: dict[str, str] = MAIN_MEASURES) -> pd.DataFrame:
    """All arms (rows) and measures, {name: heading}, with 95% intervals (columns), as text."""
    arms = metrics["arms"]
    columns = {head: [cell(arms[arm][name], MEASURES[name][1]) for arm in arms] for name, head in measures.items()}
    return pd.DataFrame(columns, index=list(arms))


def table(metrics: dict[str, Any]) -> str:
    """All arms and the main measures with 95% intervals, as aligned text."""
    cells = table_cells(metrics)
    rows = [["arm", *cells.columns], *([arm, *row] for arm, row in zip(cells.index, cells.to_numpy(), strict=True))]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def latex(metrics: dict[str, Any]) -> str:
    """The main table for a paper (booktabs)."""
    cells = table_cells(metrics, {name: heading(name) for name in MAIN_MEASURES}).rename_axis(columns="arm")
    style = cells.style.format(lambda text: "--" if text == "-" else text.replace("-", "$-$"))
    style = style.format_index(escape="latex").format_index(escape="latex", axis=1)
    return style.to_latex(hrules=True, column_format="l" + "r" * cells.shape[1])


def summary(metrics: dict[str, Any], model: str = "") -> str:
    """The comparisons of DPO in words, with their caveats, verdicts last; model: what the adapters belong to."""
    if "verdict" not in metrics:
        return "no verdict: there is no arm named sft, or none named dpo"
    arms, control = metrics["arms"], metrics["control"]
    lines = []
    for arm in ("sft", control) if control else ("sft",):
        found = metrics["comparisons"][f"dpo - {arm}"]
        interval = f"95% interval [{found['low']:+.1f}, {found['high']:+.1f}], {metrics['users']:,} users"
        lines.append(f"DPO - {arm}: {found['value']:+.1f} points of ranking accuracy, {interval}")
        for name, label in (("order_free_accuracy", "order-free"), ("response_accuracy", "whole responses")):
            if found[name]["value"] is not None:
                lines.append(f"  {label}: {interval_text(found[name])} points")
        if found["p"] is not None:
            corrected = f"{found['p_holm']:.3g} after Holm's correction"
            lines.append(f"  McNemar on order-free decisions: p = {found['p']:.3g}, {corrected}")
    found, verdict = metrics["comparisons"]["dpo - sft"], metrics["verdict"]
    if all(letter_always_answered(arms[arm]) for arm in ("sft", "dpo")):
        lines.append(f"{BOTH_ONE_LETTER}: more test users would not decide between them")
    else:
        of_what = "users and runs" if found["scope"] == "method" else "users"
        smallest = f"{found['detectable_points']:.1f} points"
        lines.append(f"smallest difference that these {of_what} tell from 0 with 80% power: {smallest}")
        if verdict.startswith("INCONCLUSIVE") and found["scope"] == "method":
            lines.append("more training runs narrow the part of the interval that more users do not")
        elif verdict.startswith("INCONCLUSIVE"):
            to_tell = f"about {found['users_needed_for_2_points']:,} to tell 2 points from 0 with 80% power"
            to_decide = f"about {found['users_needed_to_decide']:,} for an interval of ±0.5 points"
            lines.append(f"test users needed: {to_tell}, {to_decide}, which always decides")
    lines += [f"caveat: {caveat}" for caveat in metrics["caveats"]]
    lines.append(f"to quote: {sentence(metrics, model)}")
    also = f"{metrics['control_verdict']} against {control}" if control else metrics["control_verdict"]
    seen = "" if control else pairs_seen("sft", arms)
    return "\n".join([*lines, f"verdict: {verdict} against {f'an sft that saw {seen}' if seen else 'sft'}; {also}"])


def markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """An empty line, and a table."""
    return ["", *(f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *rows))]


def report(metrics: dict[str, Any], generation: dict[str, Any], notes: Sequence[str] = (), model: str = "") -> str:
    """All measures and the verdict as Markdown."""
    arms, of_model = metrics["arms"], f" Adapters of {model}." if model else ""
    lines = ["# DPO against SFT: ranking adherence", ""]
    lines.append(f"{metrics['users']:,} test users, {metrics['pairs']:,} pairs, both orders; 95% intervals.{of_model}")
    cells = table_cells(metrics, {name: heading(name) for name in MEASURES}).T
    rows = [[name, *row] for name, row in zip(cells.index, cells.to_numpy(), strict=True)]
    rows.append(["decisions by less than 0.01 nats", *(str(arms[arm]["near_ties"] or "-") for arm in arms)])
    lines += markdown_table(["measure", *arms], rows)
    seeds = list(dict.fromkeys(seed for values in arms.values() for seed in values["ranking_accuracy"].get("runs", {})))
    if seeds:
        runs = {arm: values["ranking_accuracy"].get("runs", {}) for arm, values in arms.items()}
        rows = [[arm, *(f"{of[seed]:.1f}" if seed in of else "-" for seed in seeds)] for arm, of in runs.items() if of]
        lines += markdown_table(["ranking accuracy (%) of each run", *(f"seed {seed}" for seed in seeds)], rows)
    rows = []
    for name, found in metrics["comparisons"].items():
        cells = [cell(found, "points"), *(cell(found[measure], "points") for measure in COMPARED[1:])]
        numbers = ("-" if found[key] is None else f"{found[key]:.3g}" for key in ("p", "p_holm", "detectable_points"))
        rows.append([name, *cells, *numbers, found.get("verdict", "-")])
    heads = ["comparison, in points", *(MEASURES[name][0] for name in COMPARED)]
    lines += markdown_table([*heads, "p (McNemar)", "p (Holm)", "detectable points", "verdict"], rows)
    if generation:
        rows = [[arm, *(f"{found[name]:.3g}" for name in OF_ANSWERS)] for arm, found in generation.items()]
        lines += markdown_table(["generated answers", *(name.replace("_", " ") for name in OF_ANSWERS)], rows)
    parted = [note.partition(": ") for note in notes]
    lines += ["", *(f"**{kind.capitalize()}:** {html.escape(text)}  " for kind, _, text in parted)]
    lines += [*(line + "  " for line in summary(metrics, model).splitlines()), ""]
    return "\n".join([*lines, "![accuracy](figures/accuracy.png)", ""])


# ----------------------------------------------------------------------------------------------- model cards

Facts = dict[str, Any]
TEMPLATE = Path(__file__).resolve().parent.parent / "docs" / "model_card.md"
MARK = "Written by this project's scripts, and written anew by them; delete this line to keep your own text."
CARD_MARK = f"<!-- {MARK} -->"
CARD_SETTINGS = {
    "sft": ["sft_epochs", "sft_learning_rate"],
    "sft_more": ["init", "epochs", "control_learning_rate", "sft_learning_rate"],
    "dpo": ["init", "epochs", "learning_rate", "beta", "loss_type"],
}
KINDS = {"sft": "SFT", "sft_more": "SFT, continued", "dpo": "DPO"}
COMMON_SETTINGS = ["option_order", "lora_dropout", "effective_batch", "optim", "lr_scheduler", "warmup_steps"]
COMMON_SETTINGS += ["weight_decay", "max_grad_norm", "seed"]
NF4 = 'BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)'
PRECISIONS = {  # bits: (their name, how transformers loads them)
    4: ("4-bit (NF4)", f"quantization_config={NF4}"),
    8: ("8-bit (LLM.int8)", "quantization_config=BitsAndBytesConfig(load_in_8bit=True)"),
    16: ("16-bit", 'dtype="bfloat16"'),
}


def write_card(
    folder: Path, base: Facts, arm: str = "", metrics: Facts | None = None, mismatches: Sequence[str] = ()
) -> str:
    """Write an adapter's `model_card`, and say in a line what was done. A card ends no run: a fault is a warning."""
    path = folder / "README.md"
    try:
        if path.exists() and CARD_MARK not in path.read_text(encoding="utf-8", errors="replace"):
            return f"{path} is somebody's own text and stays as it is"
        write_text(path, model_card(folder, base, arm, metrics, mismatches))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, TemplateError) as error:
        return printable(f"warning: no model card in {folder}: {error!r}")
    return f"model card: {path}"


def model_card(
    folder: Path, base: Facts, arm: str = "", metrics: Facts | None = None, mismatches: Sequence[str] = ()
) -> str:
    """The model card of the adapter in a folder: the template docs/model_card.md, filled.

    Args:
        base: the base model, as `config.base_facts` describes it.
        metrics: has the measures of its arm; without it the card says that the adapter was not evaluated.
    """
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    lora, run = read_json(folder / "adapter_config.json"), read_run(folder)
    trained, stage = settings_of(run), run["stage"] if run.get("stage") in tuple(KINDS) else ""
    precision, weights = PRECISIONS[trained.get("bits", base["bits"])]
    names = [name for name in (*CARD_SETTINGS.get(stage, ()), *COMMON_SETTINGS) if name in trained]
    measured: dict[str, Any] = {"arm": arm}
    index: dict[str, Any] = {}
    limits = []
    if metrics is not None:
        arms, found = metrics["arms"], metrics["arms"][arm]
        there = [name for name in MEASURES if found[name]["value"] is not None]
        cells = {name: cell(found[name], MEASURES[name][1]) for name in there}
        beside = [name for name in ("popularity", "base", "sft", "dpo") if name in arms and name != arm]
        others = ", ".join(f"{name} {cell(arms[name]['ranking_accuracy'], '%')}" for name in beside)
        measured |= {"users": f"{metrics['users']:,}", "seeds": found["seeds"], "others": others}
        measured |= {"cells": {heading(name): value for name, value in cells.items()}, "fast": base["fast"]}
        measured |= {"precision": PRECISIONS[base["bits"]][0], "sha256": file_sha256(folder / WEIGHTS)}
        measured |= {"sentence": metrics["sentence"] if arm in compared(metrics) else None}
        about = {"task_type": "text-generation", "dataset_type": "movielens"}
        about["dataset_name"] = "film pairs of held-out users, both orders"
        shown = [name for name in MAIN_MEASURES if name in cells]
        results = [
            EvalResult(
                **about, metric_type=name, metric_name=heading(name), metric_value=found[name]["value"],
                metric_args={"interval_95": [found[name]["low"], found[name]["high"]]},
            )
            for name in shown
        ]  # fmt: skip
        index = {"model_name": plain(folder.absolute().name), "eval_results": results}
        limits = [plain(text.removeprefix(f"{folder} ")) for text in mismatches if text.startswith(f"{folder} ")]
        limits += card_limits(arm, metrics)
    tags = ["recommendation", "movielens", "lora", *([stage] if stage else [])]
    of_hub = {"language": "en", "library_name": "peft", "pipeline_tag": "text-generation", "tags": tags}
    card_data = ModelCardData(**of_hub, base_model=base["hub_name"], license=base["license"], **index)
    film = Movie("title (year)", ("genre", "genre"))
    prompt = preference_row(Pair(("title (year)",) * 5, film, film), "A")["prompt"]
    card = ModelCard.from_template(
        card_data,
        str(TEMPLATE),
        mark=CARD_MARK, base=base, lora=lora, run=run, trained=trained, stage=stage,
        known=bool(names) and isinstance(run.get("data"), dict), names=names,
        plain=lambda value: plain(value) or "not known",
        precision=precision, weights=weights,
        stem=STEM, prompt=prompt, kind=KINDS.get(stage, ""),
        measured=measured if metrics is not None else None, limits=limits,
    )
    return str(card) + "\n"


def compared(metrics: dict[str, Any]) -> tuple[str, ...]:
    """The arms that the verdicts are on."""
    return ("sft", "dpo", metrics["control"]) if "verdict" in metrics else ()


def card_limits(arm: str, metrics: dict[str, Any]) -> list[str]:
    """The caveats that concern an arm, and how many of its decisions another precision keeps, where measured."""
    found = caveats_of(arm, metrics) + caveats_of_baselines(arm, metrics)
    if arm in compared(metrics):
        others = tuple(f"{name}{mark}" for name in metrics["arms"] if name != arm for mark in (" ", "'s "))
        found = [caveat for caveat in metrics["caveats"] if not caveat.startswith(others)]
    for name, measures in metrics["arms"].items():
        if name.startswith(f"{arm}@"):
            kept = cell(measures["precision_consistency"], "%")
            found.append(f"on {name.partition('@')[2]} weights {kept}% of its decisions stay the same")
    return found
