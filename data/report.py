"""Metrics -> the table on the terminal, report.md, table.tex and an adapter's model card."""

import html
import os
import re
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import TemplateError

from data import verdict
from data.errors import printable
from data.files import file_sha256, read_json, write_text
from data.measures import COMPARED, MEASURES, OF_ANSWERS
from data.pairs import STEM, Movie, Pair, preference_row
from data.runs import WEIGHTS, model_of, plain, read_run, settings_of, trained_settings

Facts = dict[str, Any]
DOCS = Path(__file__).resolve().parent.parent / "docs"
MAIN_MEASURES = {  # measure: heading
    "ranking_accuracy": "ranking %",
    "response_accuracy": "response %",
    "order_free_accuracy": "order-free %",
    "swap_consistency": "swap consistency %",
    "position_bias": "position bias A - B",
}
NO_VERDICT = "no verdict: it takes an arm named sft and an arm named dpo"


def cell(value: Facts, unit: str) -> str:
    return "-" if value["value"] is None else verdict.with_interval(value, {"nats": 2, "": 3}.get(unit, 1))


def difference_cell(difference: Facts) -> str:
    return "-" if difference["value"] is None else verdict.interval_text(difference)


def heading(measure: str) -> str:
    label, unit = MEASURES[measure]
    return f"{label} ({unit})" if unit else label


def table_cells(metrics: Facts, measures: dict[str, str] = MAIN_MEASURES) -> pd.DataFrame:
    """All arms (rows) and measures, {name: heading}, with 95% intervals (columns), as text."""
    arms = metrics["arms"]
    columns = {head: [cell(arms[arm][name], MEASURES[name][1]) for arm in arms] for name, head in measures.items()}
    return pd.DataFrame(columns, index=list(arms))


def latex(metrics: Facts) -> str:
    """The main table for a paper (booktabs)."""
    cells = table_cells(metrics, {name: heading(name) for name in MAIN_MEASURES}).rename_axis(columns="arm")
    style = cells.style.format(lambda text: "--" if text == "-" else text.replace("-", "$-$"))
    style = style.format_index(escape="latex").format_index(escape="latex", axis=1)
    return style.to_latex(hrules=True, column_format="l" + "r" * cells.shape[1])


def verdicts(metrics: Facts) -> list[tuple[str, str]]:
    """The verdicts against SFT and against the control in words, each with the difference that it is on."""
    control = metrics["control"]
    seen = "" if control else verdict.pairs_seen("sft", metrics["arms"])
    names = {"sft": f"an SFT that saw {seen}" if seen else "SFT"}
    named = verdict.longer(metrics).replace("continued SFT", verdict.KINDS["sft_more"]) if control else ""
    names |= {control: f"{named} ({control})"} if control else {}
    found = []
    for arm, name in names.items():
        difference = metrics["comparisons"][f"dpo - {arm}"]
        value, _, interval = verdict.interval_text(difference).partition(" ")
        lead = f"{value} points of ranking accuracy, 95% interval {interval}"
        found.append((f"{difference['verdict']} against {name}", lead))
    return found if control else [*found, (metrics["control_verdict"], "")]


def verdict_text(metrics: Facts) -> str:
    """The verdicts and what follows from them, as Markdown."""
    if "verdict" not in metrics:
        return f"{NO_VERDICT.capitalize()}."
    told = [f"- **Verdict: {says}**{lead and f'. {lead}'}" for says, lead in verdicts(metrics)]
    return "\n".join([*told, "", metrics["conclusion"]])


# ---------------------------------------------------------------------------------- on a terminal of 80 columns

def summary(metrics: Facts, model: str = "", notes: Sequence[str] = ()) -> str:
    """The headline, the differences, the caveats and the sentence to quote: blocks with an empty line between them.

    model: what the adapters belong to. notes: what an evaluation noted; they stand before the caveats.
    """
    judged, told = "verdict" in metrics, [*notes, *metrics.get("caveats", [])]
    blocks = [headline(metrics), *([differences(metrics)] if judged else [])]
    blocks += ["\n".join(["caveats", *(wrapped(f"- {text}", "  ") for text in told)])] if told else []
    if judged:
        said = verdict.sentence(metrics, model)
        blocks.append(wrapped(said if metrics["users"] < verdict.USERS_TO_QUOTE else f"to quote: {said}"))
    return "\n\n".join(blocks)


def headline(metrics: Facts) -> str:
    """The first blocks of the summary: the verdicts, what follows from them, and the table of the main measures."""
    if "verdict" not in metrics:
        return f"{NO_VERDICT}\n\n{table(metrics)}"
    told = [(textwrap.wrap(says, 71, subsequent_indent="  "), f"  {lead}") for says, lead in verdicts(metrics)]
    lines = [line for says, lead in told for line in (*says, lead) if line.strip()]
    shown = "\n         ".join(lines)
    return f"verdict: {shown}\n\n{wrapped(metrics['conclusion'])}\n\n{table(metrics)}"


def table(metrics: Facts) -> str:
    """All arms and the main measures, ± half of their 95% intervals; a name above 14 letters has a line of its own."""
    arms = metrics["arms"]
    columns = [["", "arm", *(arm if len(arm) <= 14 else "" for arm in arms)]]
    for name, head in MAIN_MEASURES.items():
        values = [of_arm[name] for of_arm in arms.values()]
        halves = [half_interval(found) for found in values]
        size = max(map(len, halves))
        both = zip(values, halves, strict=True)
        cells = [f"{verdict.rounded(found['value'])} ±{half:<{size}}" if half else "-" for found, half in both]
        heads = textwrap.wrap(head.removesuffix(" %"), 11)
        columns.append([*[""] * (2 - len(heads)), *heads, *cells])
    first, second, *rows = aligned([*zip(*columns, strict=True)])
    rows = [row if len(arm) <= 14 else f"{arm}\n{row}" for arm, row in zip(arms, rows, strict=True)]
    about = f"In %: {metrics['users']:,} test users, each pair in both orders, ± half of the 95% interval"
    return "\n".join([first, second, "-" * len(second), *rows, wrapped(about)])


def half_interval(found: Facts) -> str:
    """Half of an interval as text, the longer half where it ends at the measure's limit; "" where there is none."""
    value, low, high = (found[name] for name in ("value", "low", "high"))
    return "" if value is None else verdict.rounded(max(high - value, value - low))


def differences(metrics: Facts) -> str:
    """DPO minus SFT and minus the control, and what these users can tell."""
    control, found = metrics["control"], metrics["comparisons"]["dpo - sft"]
    compared = {name: metrics["comparisons"][name] for name in ("dpo - sft", f"dpo - {control}")[: 1 + bool(control)]}
    rows = [["difference in points", *compared], ["ranking accuracy", *map(verdict.interval_text, compared.values())]]
    for name in ("order_free_accuracy", "response_accuracy"):
        rows.append([MEASURES[name][0], *(difference_cell(one[name]) for one in compared.values())])
    for name, key in (("p of McNemar's test (order-free)", "p"), ("p after Holm's correction", "p_holm")):
        if found["p"] is not None:
            rows.append([name, *("-" if one[key] is None else f"{one[key]:.3g}" for one in compared.values())])
    of_what = "users and runs" if metrics["scope"] == "method" else "users"
    names = zip(("SFT", "the control"), compared.values(), strict=False)
    told = " and ".join(f"{one['detectable_points']:.1f} points against {name}" for name, one in names)
    said = f"These {of_what} can tell {told} from 0 (80% power)."
    if "sft" in verdict.arms_of_one_letter(metrics["arms"]):
        said = f"{verdict.all_one_letter(metrics)}: more test users would not decide between them."
    elif metrics["verdict"].startswith("INCONCLUSIVE") and found["scope"] == "method":
        said += " More runs and more users would narrow the interval."
    elif metrics["verdict"].startswith("INCONCLUSIVE"):
        said += f" About {found['users_needed_for_2_points']:,} test users can tell 2 points from 0."
        said += f" About {found['users_needed_to_decide']:,} always decide: their interval is 1 point wide."
    return "\n".join([*aligned(rows), wrapped(said)])


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as lines, the first column to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join([first.ljust(widths[0]), *map(str.rjust, cells, widths[1:])]).rstrip() for first, *cells in rows]


def wrapped(text: str, indent: str = "") -> str:
    """Text in lines of 80 columns, broken at words but not within an interval; indent: before all but the first."""
    text = re.sub(r"(\[\S+,) (\S+\])", "\\1\xa0\\2", text)
    lines = textwrap.fill(text, 80, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    return lines.replace("\xa0", " ")


def emphasised(text: str) -> str:
    """A summary with its verdicts in bold, where a terminal shows it and NO_COLOR (no-color.org) is not set."""
    if not sys.stdout.isatty() or os.environ.get("NO_COLOR"):
        return text
    return re.sub(r"(?m)^(verdict: | {9})(\S.* against .*)", "\\1\033[1m\\2\033[0m", text)


# ------------------------------------------------------------------------------------------------------ report.md

def report(
    metrics: Facts, generation: Facts, notes: Sequence[str] = (), run: Facts | None = None, figures: Sequence[str] = ()
) -> str:
    """Verdicts, main table and figures, then all other measures, then the settings and definitions, as Markdown.

    run: run.json of the evaluation. figures: names of files in figures/.
    """
    arms, run = metrics["arms"], run or {}
    model = model_of(run)
    lines = ["# DPO against SFT: ranking adherence", "", verdict_text(metrics)]
    about = f"{metrics['users']:,} test users, {metrics['pairs']:,} pairs, each in both orders of the options"
    lines += ["", f"{about}; 95% intervals in brackets.{f' Adapters of {model}.' if model else ''}"]
    lines += markdown_cells("arm", table_cells(metrics))
    for name in figures:
        lines += ["", f"![{Path(name).stem.replace('_', ' ')}](figures/{name})"]

    told = [f"- {html.escape(text, quote=False)}" for text in (*notes, *metrics.get("caveats", ()))]
    lines += ["", "## Caveats", ""] if told else []
    lines += [re.sub("^- (note|mismatch): ", lambda kind: f"- **{kind[1].capitalize()}:** ", text) for text in told]
    lines += ["", "## To quote", "", verdict.sentence(metrics, model)] if "verdict" in metrics else []
    lines += ["", "## Comparisons"]
    rows = []
    for name, found in metrics["comparisons"].items():
        cells = [difference_cell(one) for one in (found, *(found[measure] for measure in COMPARED[1:]))]
        numbers = ("-" if found[key] is None else f"{found[key]:.3g}" for key in ("p", "p_holm", "detectable_points"))
        rows.append([name, *cells, *numbers, found.get("verdict", "-")])
    heads = ["comparison, in points", *(MEASURES[name][0] for name in COMPARED)]
    lines += markdown_table([*heads, "p (McNemar)", "p (Holm)", "detectable points", "verdict"], rows)
    lines += ["", "## All measures"]
    cells = table_cells(metrics, {name: heading(name) for name in MEASURES}).T
    ties = ["-" if found["near_ties"] is None else str(found["near_ties"]) for found in arms.values()]
    cells = cells[(cells != "-").any(axis=1)]  # those that were measured
    cells.loc["decisions by less than 0.01 nats"] = ties
    lines += markdown_cells("measure", cells)
    runs = {arm: of["ranking_accuracy"]["runs"] for arm, of in arms.items() if "runs" in of["ranking_accuracy"]}
    if runs:
        seeds = list(dict.fromkeys(seed for of in runs.values() for seed in of))
        rows = [[arm, *(f"{of[seed]:.1f}" if seed in of else "-" for seed in seeds)] for arm, of in runs.items()]
        lines += markdown_table(["ranking accuracy (%) of each run", *(f"seed {seed}" for seed in seeds)], rows)
    if generation:
        of_arms = [(arm, *(found[name] for name in OF_ANSWERS)) for arm, found in generation.items()]
        rows = [[arm, f"{answers:,.0f}", *(f"{share:.3f}" for share in shares)] for arm, answers, *shares in of_arms]
        lines += markdown_table(["generated answers", *(name.replace("_", " ") for name in OF_ANSWERS)], rows)

    if settings := settings_of(run):
        about = settings | {name: run[name] for name in ("device", "git_commit", "packages") if name in run}
        rows = [[as_code(name), as_code(value)] for name, value in about.items()]
        lines += ["", "## Settings of this evaluation", *markdown_table(["setting", "value"], rows)]
    known = (DOCS / "metrics.md").read_text(encoding="utf-8")
    return "\n".join([*lines, "", "## Definitions", known.partition("\n## Measures\n")[2].partition("\n## ")[0]])


def as_code(value: Any) -> str:
    """What somebody's file says as code in a table of Markdown."""
    return "`" + re.sub(r"[^\w .,:;%()+=/@-]", "", str(value)) + "`"


def markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """An empty line, and a table."""
    return ["", *(f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *rows))]


def markdown_cells(corner: str, cells: pd.DataFrame) -> list[str]:
    return markdown_table([corner, *cells], [[name, *row] for name, *row in cells.itertuples()])


# ----------------------------------------------------------------------------------------------- model cards

MARK = "Written by this project's scripts"
CARD_MARK = f"<!-- {MARK}, which overwrite it. Delete this line to keep your own text. -->"
NF4 = 'BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)'
PRECISIONS = {  # bits: (their name, how transformers loads them)
    4: ("4-bit (NF4)", f"quantization_config={NF4}"),
    8: ("8-bit (LLM.int8)", "quantization_config=BitsAndBytesConfig(load_in_8bit=True)"),
    16: ("16-bit", 'dtype="bfloat16"'),
}


def write_card(
    folder: Path, base: Facts, arm: str = "", metrics: Facts | None = None, mismatches: Sequence[str] = (),
    generation: Facts | None = None,
) -> str:
    """Write an adapter's `model_card`, and say in a line what was done. A card ends no run: a fault is a warning."""
    path = folder / "README.md"
    try:
        if path.exists() and MARK not in path.read_text(encoding="utf-8", errors="replace"):
            return f"{path} has your own text and is kept"
        write_text(path, model_card(folder, base, arm, metrics, mismatches, generation))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, TemplateError) as error:
        return printable(f"warning: no model card in {folder}: {error!r}")
    return f"model card: {path}"


def model_card(
    folder: Path, base: Facts, arm: str = "", metrics: Facts | None = None, mismatches: Sequence[str] = (),
    generation: Facts | None = None,
) -> str:
    """The model card of the adapter in a folder: the template docs/model_card.md, filled.

    Args:
        base: the base model, as `config.base_facts` describes it.
        metrics: has the measures of its arm; without it the card says that the adapter was not evaluated.
        generation: measures of generated answers by arm.
    """
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    lora, run = read_json(folder / "adapter_config.json"), read_run(folder)
    trained, stage = settings_of(run), run["stage"] if run.get("stage") in tuple(verdict.KINDS) else ""
    precision, weights = PRECISIONS[trained.get("bits", base["bits"])]
    decided = trained_settings(stage, trained) if stage else {}
    from_base = stage == "sft_more" and trained.get("init") == "base"  # and continues no SFT
    measured: Facts = {}
    index: Facts = {}
    limits = []
    if metrics is not None:
        arms, found = metrics["arms"], metrics["arms"][arm]
        cells = {name: cell(found[name], MEASURES[name][1]) for name in MEASURES if found[name]["value"] is not None}
        beside = [name for name in ("popularity", "base", "sft", "dpo") if name in arms and name != arm]
        others = ", ".join(f"{name} {cell(arms[name]['ranking_accuracy'], '%')}" for name in beside)
        measured = {
            "users": f"{metrics['users']:,}", "seeds": found["seeds"], "others": others, "fast": base["fast"],
            "precision": PRECISIONS[base["bits"]][0], "sha256": file_sha256(folder / WEIGHTS),
            "cells": {heading(name): value for name, value in cells.items()},
            "sentence": metrics["sentence"] if arm in compared(metrics) else None,
        }
        about = {"task_type": "text-generation", "dataset_type": "movielens"}
        about["dataset_name"] = "film pairs of held-out users, both orders"
        results = [
            EvalResult(
                **about, metric_type=name, metric_name=heading(name), metric_value=found[name]["value"],
                metric_args={"interval_95": [found[name]["low"], found[name]["high"]]},
            )
            for name in MAIN_MEASURES if name in cells
        ]
        if found["seeds"] == 1:  # else they are means, of other adapters, too
            index = {"model_name": plain(folder.absolute().name), "eval_results": results}
        limits = [plain(text.removeprefix(f"{folder} ")) for text in mismatches if text.startswith(f"{folder} ")]
        limits += card_limits(arm, metrics, (generation or {}).get(arm))
    tags = ["recommendation", "movielens", "lora", *([stage] if stage else [])]
    of_hub = {"language": "en", "library_name": "peft", "pipeline_tag": "text-generation", "tags": tags}
    card_data = ModelCardData(**of_hub, base_model=base["hub_name"], license=base["license"], **index)
    film = Movie("title (year)", ("genre", "genre"))
    prompt = preference_row(Pair(("title (year)",) * 5, film, film), "A")["prompt"]
    card = ModelCard.from_template(
        card_data, str(DOCS / "model_card.md"), mark=CARD_MARK, base=base, lora=lora, run=run, trained=trained,
        stage=stage, kind="SFT" if from_base else verdict.KINDS.get(stage, ""), decided=decided, precision=precision,
        weights=weights, stem=STEM, prompt=prompt, known=bool(decided) and isinstance(run.get("data"), dict),
        limits=limits, measured=measured, plain=lambda value: plain(value) or "not known",
    )
    return str(card) + "\n"


def compared(metrics: dict[str, Any]) -> tuple[str, ...]:
    """The arms that the verdicts are on."""
    return ("sft", "dpo", metrics["control"]) if "verdict" in metrics else ()


def card_limits(arm: str, metrics: dict[str, Any], answers: Facts | None) -> list[str]:
    """The caveats that concern an arm, answers that are no recommendation, and what another precision changes."""
    found = verdict.caveats_of(arm, metrics) + verdict.caveats_of_baselines(arm, metrics)
    found += verdict.caveats_of_verdict(metrics) if arm in compared(metrics) else []
    if answers and answers["parsed"] < 0.95:
        parsed = f"{100 * answers['parsed']:.1f}%"
        found.append(f"Of {answers['answers']:,} generated answers, {parsed} recommend exactly one option.")
    for name, measures in metrics["arms"].items():
        if name.startswith(f"{arm}@"):
            kept, bits = cell(measures["precision_consistency"], "%"), name.partition("@")[2].replace("bit", "-bit")
            found.append(f"On {bits} weights {kept}% of its decisions stay the same.")
    return found
