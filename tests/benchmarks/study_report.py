"""What the study's rows say: measures, tables and figures in docs/results, from the predictions that lie there."""

import re
from collections.abc import Iterable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure

from data.baselines import BASELINES
from data.figures import CAPTIONS, GREY, LINES, STYLE, arm_name, arm_styles, draw_all, new_figure, sample_text, spread
from data.files import read_json, write_json, write_text
from data.measures import compute_metrics, interaction, wins
from data.predictions import COLUMNS, completed, read_predictions
from data.report import cell, differences, half_interval, heading, headline, table_cells
from data.verdict import interval_text, judge, rounded

MAIN = {"4bit": "predictions.csv.gz", "16bit": "predictions_16bit.csv.gz"}
ABLATIONS = "ablations.csv.gz"
SHOWN = ("accuracy", "margins", "seeds", "popularity", "reliability")  # of evaluate_dpo.py's figures
FIGURES = {"runs": "seeds", "calibration": "reliability", "displacement": "margins"}  # table: the figure below it
MAIN_STUDY = "unchanged"
READ = "read in"
DRAWN = '<img src="{file}.png" alt="{title}: ranking accuracy of SFT and DPO" width="49%">'
ACCURACIES = ("ranking_accuracy", "order_free_accuracy", "response_accuracy")
PANELS = {  # figure and rows of the table: {value: study}
    "beta": {"0.05": "beta_0.05", "0.1": MAIN_STUDY, "0.2": "beta_0.2", "0.5": "beta_0.5"},
    "LoRA rank": {"8": "rank_8", "16": MAIN_STUDY, "64": "rank_64"},
    "loss": {"sigmoid": MAIN_STUDY, "IPO": "loss_ipo", "APO-zero": "loss_apo_zero"},
    "loss of SFT added": {"no": MAIN_STUDY, "yes": "dpo_with_sft_loss"},
    "learning rate of DPO": {"× 1": MAIN_STUDY, "× 3.2": "dpo_rate_3.2"},
    "start of DPO": {"SFT": MAIN_STUDY, "base": "dpo_from_base"},
    "epochs of SFT": {"× 1": MAIN_STUDY, "× 2": "sft_x2"},
    "pairs, same epochs": {"128": "pairs_128_passes", "1,024": "pairs_1024_passes", "all": MAIN_STUDY},
    "pairs, same steps": {"128": "pairs_128_steps", "1,024": "pairs_1024_steps", "all": MAIN_STUDY},
    "option order in training": {"balanced": MAIN_STUDY, "both": "order_both", "as in the file": "order_original"},
    "negatives: trained on, tested on": {
        f"{trained}, {tested}": f"negatives_{trained}_on_{tested}"
        for trained, tested in product(("random", "matched"), repeat=2)
    },
}


def report(results: Path) -> None:
    """Write metrics of each precision, interaction.json, ablations.json, tables.md, figures, and README's tables."""
    main = {study: read_predictions(results / name) for study, name in MAIN.items() if (results / name).exists()}
    metrics = {study: judge(compute_metrics(rows)) for study, rows in main.items()}
    for study, found in metrics.items():
        write_json(results / f"metrics{'' if study == '4bit' else '_16bit'}.json", found)
    if len(main) == 2:
        write_json(results / "interaction.json", interaction(main["4bit"], main["16bit"]))
    changed = ablations(results, main["4bit"])
    write_json(results / "ablations.json", changed)
    figures = draw_all(main["4bit"], metrics["4bit"])
    figures = {name: figures[name] for name in SHOWN if name in figures} | draw_ablations(changed)
    with rc_context(STYLE):
        for name, figure in figures.items():
            figure.savefig(results / f"{name}.png", dpi=200)
    made = tables(results)
    page = results / "README.md"
    write_text(page, filled(page.read_text(encoding="utf-8"), made))
    write_text(results / "tables.md", all_tables(made))


def read_ablations(results: Path) -> pd.DataFrame:
    """The rows of all ablations, `completed`; none where none was scored."""
    if not (results / ABLATIONS).exists():
        return pd.DataFrame(columns=["study", *COLUMNS[1]])
    rows = pd.read_csv(results / ABLATIONS, dtype={"seed": str, "preferred_more_popular": str})
    return completed(rows.fillna({"seed": ""}))  # of baselines


def ablations(results: Path, main: pd.DataFrame) -> dict[str, Any]:
    """Measures of each ablation. Its DPO is compared with its SFT, or the main study's, and with the unchanged DPO.

    Of the main study those runs are taken that have the seeds of the ablation, and the same users.
    """
    found: dict[str, Any] = {}
    trained = main[(main["history"] == "own") & (main["kind"] == "model")][[*COLUMNS[1]]]
    for study, rows in read_ablations(results).groupby("study", sort=False):
        part = rows.drop(columns="study")
        seeds = set(part["seed"]) - {""}
        here = completed(trained[trained["seed"].isin(seeds)])
        if set(here["pair_id"]) == set(part["pair_id"]) and study != "read_in_16":
            beside = here[(here["arm"] == "dpo") | ((here["arm"] == "sft") & ~(part["arm"] == "sft").any())]
            part = pd.concat([part, beside.replace({"arm": {"dpo": MAIN_STUDY}})])
            found.setdefault(f"{MAIN_STUDY}, {len(seeds)} runs", judge(compute_metrics(here)))
        found[study] = judge(compute_metrics(part))
    return found


def panels(found: dict[str, Any]) -> dict[str, tuple[str | None, dict[str, Any]]]:
    """(default, {value: what was measured}) of each panel; the unchanged study has the seeds of what was changed."""
    made = {}
    for title, points in PANELS.items():
        runs = [found[study]["arms"]["dpo"]["seeds"] for study in points.values() if study in found]
        if runs:
            known = found | {MAIN_STUDY: found.get(f"{MAIN_STUDY}, {runs[0]} runs")}
            default = next((value for value, study in points.items() if study == MAIN_STUDY), None)
            made[title] = default, {value: known[study] for value, study in points.items() if known.get(study)}
    return made


def figure_name(title: str) -> str:
    return "ablation_" + re.sub(r"\W+", "_", title.lower())


def draw_ablations(found: dict[str, Any]) -> dict[str, Figure]:
    """One figure for each of `panels`, and one for the precision that adapters are read in."""
    drawn = {}
    for title, (default, there) in panels(found).items():
        arms = {value: accuracies(one) for value, one in there.items()}
        users = " or ".join(dict.fromkeys(f"{one['users']:,}" for one in there.values()))
        runs = sample_text(next(one for value, one in there.items() if value != default)).partition(" ")[2]
        drawn[figure_name(title)] = draw_ablation(arms, default, title, f"{users} {runs}")
    if read := found.get("read_in_16"):
        arms = {"4 bits": accuracies(read), "16 bits": accuracies(read, "@16bit")}
        drawn[figure_name(READ)] = draw_ablation(arms, "4 bits", f"trained in 4 bits, {READ}", sample_text(read))
    return drawn


def accuracies(metrics: dict[str, Any], kind: str = "") -> dict[str, dict[str, float]]:
    """Ranking accuracy of SFT and DPO, of the arms of one kind."""
    arms = metrics["arms"]
    return {arm: arms[arm + kind]["ranking_accuracy"] for arm in ("sft", "dpo") if arm + kind in arms}


@rc_context(STYLE)
def draw_ablation(
    points: dict[str, dict[str, dict[str, float]]], default: str | None, setting: str, caption: str
) -> Figure:
    """Arms over the values of one setting, with their 95% intervals; the study's own value is shaded and named.

    Args:
        points: {value of the setting: {arm: {"value", "low", "high"}}}, as metrics.json holds a measure of an arm.
        caption: how many users and runs they are from.
    """
    long = sum(map(len, points)) + 2 * len(points) > 44  # characters that fit beside each other
    figure, [[axis]] = new_figure(3 if long else 2.4)
    if default:
        place = [*points].index(default)
        axis.axvspan(place - 0.4, place + 0.4, color="0.93", linewidth=0, zorder=0)
    if any(found["low"] < 55 for arms in points.values() for found in arms.values()):
        axis.axhline(50, color="0.8", linewidth=0.8, label="chance", zorder=0)
    apart = 0.07
    for arm, shape, side in (("sft", "s", -1), ("dpo", "o", 1)):
        shown = {place: found[arm] for place, found in enumerate(points.values()) if arm in found}
        found, look = [*shown.values()], {"label": arm_name(arm)} | LINES | arm_styles([arm])[arm]
        if len(found) == len(points) > 1 and all(one == found[0] for one in found):  # one result: a line with a band
            axis.axhline(found[0]["value"], color=look["color"], linewidth=1, label=look["label"], zorder=1)
            axis.axhspan(found[0]["low"], found[0]["high"], color=look["color"], alpha=0.15, linewidth=0, zorder=0)
            apart = 0  # nothing to stand beside
        elif found:
            error, places = np.hstack([*map(spread, found)]), [place + side * apart for place in shown]
            axis.errorbar(places, [one["value"] for one in found], yerr=error, fmt=shape, markersize=4, **look)
    labels = [f"{label}\n(study)" if label == default else label for label in points]
    axis.set(xticks=range(len(points)), xlim=(-0.5, len(points) - 0.5), xlabel=setting, ylabel="ranking accuracy, %")
    axis.set_xticklabels(labels, **({"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if long else {}))
    figure.legend(loc="outside upper center", ncols=3)
    figure.supxlabel(f"{caption}; 95% intervals", fontsize=7, color=GREY)
    return figure


# ------------------------------------------------------------------------------------------------------- tables

OF_TABLE = {  # table: measures of the main study, or of the ablation of that name
    "also": (
        "accuracy_with_popularity", "accuracy_against_popularity", "popularity_balanced_accuracy", "personalisation_gap"
    ),
    "calibration": ("calibration_error", "temperature", "dpo_calibration_error", "dpo_temperature"),
    "displacement": ("chosen_change", "rejected_change"),
    "read_in_16": ("ranking_accuracy", "order_free_accuracy", "position_bias", "precision_consistency"),
    "transfer": ("ranking_accuracy", "order_free_accuracy"),
}


def tables(results: Path) -> dict[str, str]:
    """Every table in Markdown, by name."""
    names = ("metrics", "metrics_16bit", "interaction", "ablations", "search", "generation", "runs")
    metrics, second, change, found, tried, answers, runs = (read_json(results / f"{name}.json") for name in names)
    measured = found | dict.fromkeys(("also", "calibration", "displacement"), metrics)
    made = {
        "main": f"```text\n{headline(metrics)}\n\n{differences(metrics)}\n```",
        "runs": runs_table({4: metrics, 16: second}),
        "shortcut": shortcut_table(results),
        "baselines": baselines_table(found),
        "ablations": ablations_table(found),
        "search": search_table(tried),
        "answers": answers_table(answers),
        "cost": cost_table(runs),
    }
    made |= {name: measures_table(measured[name], shown) for name, shown in OF_TABLE.items() if name in measured}
    made["displacement"] += runs_between(metrics["arms"]["dpo"])
    for name, figure in FIGURES.items():
        made[name] += f"\n\n![{CAPTIONS[figure]}]({figure}.png)"
    drawn = [DRAWN.format(title=title, file=figure_name(title)) for title in (*panels(found), READ)]
    made["ablations"] += "\n\n" + "\n".join(drawn) if found else ""
    if change:
        made["bits"] = bits_table(metrics, second, change)
    return made


def markdown(columns: Sequence[str], rows: Iterable[Iterable]) -> str:
    lines = [f"| {' | '.join(map(str, row))} |" for row in (columns, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(columns), *lines[1:]])


def measures_table(metrics: dict[str, Any], names: Iterable[str]) -> str:
    """Models and baselines that have one of these measures; measures that none has are left out."""
    cells = table_cells(metrics, {name: heading(name) for name in names})
    known = cells != "-"
    cells = cells.loc[known.any(axis=1), known.any()]
    return markdown(["arm", *cells], cells.itertuples())


def runs_between(dpo: dict[str, Any]) -> str:
    """The lowest and the highest run of DPO in each measure of displacement; "" where it has none."""
    known = {name: dpo[name]["runs"].values() for name in OF_TABLE["displacement"] if "runs" in dpo[name]}
    spans = [f"{name.partition('_')[0]} {min(runs):.2f} to {max(runs):.2f}" for name, runs in known.items()]
    return f"\n\nLowest and highest run of DPO, in nats: {', '.join(spans)}." if spans else ""


def runs_table(precisions: dict[int, dict[str, Any]]) -> str:
    """Ranking accuracy of every run of the main study."""
    rows = []
    for bits, metrics in precisions.items():
        for arm, measures in metrics.get("arms", {}).items():
            if runs := measures["ranking_accuracy"].get("runs"):
                rows.append([bits, arm, *(f"{value:.1f}" for value in runs.values())])
    return markdown(["bits", "arm", *(f"run {number}" for number in range(1, max(map(len, rows)) - 1))], rows)


def bits_table(first: dict[str, Any], second: dict[str, Any], change: dict[str, Any]) -> str:
    """What DPO leads by in each precision, and how much more in the first than in the second."""
    rows = []
    for key, found in change.items():
        leads = (first["comparisons"][key], second["comparisons"][key], found)
        rows.append([key, *map(interval_text, leads), f"{found['detectable_points']:.1f}"])
    return markdown(["lead (points)", "4 bits", "16 bits", "4 bits minus 16 bits", "smallest detectable"], rows)


def shortcut_table(results: Path) -> str:
    """The same adapters where the right answer is always A, as is usual for this data, and in both orders."""
    main, other = read_predictions(results / MAIN["4bit"]), read_ablations(results)
    other = other[other["study"] == "order_original"]
    other = other.assign(arm=other["arm"] + ", trained in the order of the file")
    rows = pd.concat([main[main["history"] == "own"], other]).query("kind == 'model'")
    rows["right"] = 100 * wins(rows["decision_margin"].to_numpy(dtype=float))
    shares = rows.pivot_table(index="arm", columns="order", values="right", sort=False)
    rows = [[arm, f"{of['A']:.1f}", f"{of.mean():.1f}"] for arm, of in shares.iterrows()]
    return markdown(["arm", "A is always right, %", "both orders, %"], rows)


def baselines_table(found: dict[str, Any]) -> str:
    """Baselines on each kind of negatives; they are the same, whatever the models beside them trained on."""
    names, rows = BASELINES[1:], []  # without "always A"
    for tested in ("random", "matched"):
        if one := found.get(f"negatives_random_on_{tested}"):
            rows.append([tested, one["users"], *(cell(one["arms"][name]["ranking_accuracy"], "%") for name in names)])
    return markdown(["negatives", "test users", *(f"{name} %" for name in names)], rows)


def ablations_table(found: dict[str, Any]) -> str:
    shown, rows = [*product(ACCURACIES, ("sft", "dpo"))], []
    for title, (_, there) in panels(found).items():
        for value, one in there.items():
            arms, comparisons = one["arms"], one["comparisons"]
            values = [arms[arm][name] if arm in arms else None for name, arm in shown]
            cells = [f"{rounded(one['value'])} ±{half_interval(one)}" if one else "" for one in values]
            leads = [comparisons.get(key) for key in ("dpo - sft", f"dpo - {MAIN_STUDY}")]
            cells += [interval_text(lead) if lead else "" for lead in leads]
            rows.append([title, value, arms["dpo"]["seeds"], *cells])
    heads = (f"{arm.upper()} {name.removesuffix('_accuracy').replace('_', '-')} %" for name, arm in shown)
    return markdown(["what", "value", "runs", *heads, "DPO - SFT", "DPO - unchanged DPO"], rows)


def search_table(found: dict[str, Any]) -> str:
    rows = []
    for arm, best in found.items():
        for trial in best["trials"]:
            values = [f"{trial[name]:.1f}" for name in ACCURACIES]
            chosen = "yes" if trial["name"] == best["name"] else ""
            rows.append([arm, f"{float(trial['rate']):g}", trial["epochs"], *values, chosen])
    return markdown(["arm", "learning rate", "epochs", "ranking %", "order-free %", "response %", "chosen"], rows)


def answers_table(found: dict[str, Any]) -> str:
    shares = ("parsed", "right", "repeat_consistency", "cites_own_genre", "cites_foreign_genre")
    rows = [[arm, of["answers"], *(f"{100 * of[name]:.1f}" for name in shares)] for arm, of in found.items()]
    return markdown(["arm", "answers", *(f"{name.replace('_', ' ')}, %" for name in shares)], rows)


def cost_table(runs: dict[str, Any]) -> str:
    """Minutes by study and by what was done; jobs side by side count each."""
    spent = pd.DataFrame({"study": name.split("/")[0], **run} for name, run in runs.items())
    what = spent["line"].str.startswith("train_dpo.py").map({True: "training", False: "evaluation"})
    parts = {**dict(iter(spent.groupby(["study", what]))), ("all", ""): spent}
    rows = [[*key, len(part), f"{part['seconds'].sum() / 60:.0f}"] for key, part in parts.items()]
    return markdown(["study", "what", "runs", "minutes, summed"], rows)


SECTIONS = {  # of tables.md: name of the table, heading, what a reader must know
    "runs": ("Each run", "Ranking accuracy in % of every training run of the main study, one column per seed."),
    "also": ("More measures", "4 bits. `docs/metrics.md` defines each."),
    "calibration": ("Calibration", "Of the decision, and of DPO's own probability σ(β(m − m_ref))."),
    "displacement": ("Displacement", "Change of log p from the reference. Both falling is a known failure of DPO."),
    "read_in_16": (
        "Trained in 4 bits, read in 16",
        "`@16bit` is the same adapter on 16-bit weights; the last three runs of the main study.",
    ),
    "transfer": ("Transfer", "Adapters of the main study on users of MovieLens-100K: its last three runs."),
    "baselines": ("Baselines on MovieLens-100K", "Ranking accuracy. Each row has its own pairs for training and test."),
    "ablations": (
        "Ablations",
        "Each row changes one setting, and nothing is tuned again. Alpha is the rank. Negatives are of MovieLens-100K "
        "and its own test users. Unchanged rows have the seeds of what is compared with them. "
        "Intervals, and ± half of them, are over users and, from three runs, over runs.",
    ),
    "search": (
        "Search",
        "Trials of one run, on training users held back. "
        "For the control, only trials of as many epochs as DPO's choice compete.",
    ),
    "answers": ("Generated answers", "The first run: 100 users, five answers each at temperature 0.7."),
    "cost": (
        "Cost",
        "Minutes of the published jobs, added up, without the search; several shared a GPU. "
        "`of_dpo` scores all variants of DPO.",
    ),
}


def all_tables(made: dict[str, str]) -> str:
    """The text of tables.md, without tables that have no rows."""
    there = [name for name in SECTIONS if made.get(name, "").count("\n") > 1]
    sections = [f"## {SECTIONS[name][0]}\n\n{SECTIONS[name][1]}\n\n{made[name]}\n" for name in there]
    return "# Tables of the study\n\nWritten by `tests/benchmarks/experiment.py report`.\n\n" + "\n".join(sections)


def filled(page: str, made: dict[str, str]) -> str:
    """A page with each table between `<!-- study: NAME -->` and `<!-- end -->` as it was made."""
    blocks = re.compile(r"(<!-- study: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
    return blocks.sub(lambda found: f"{found[1]}{made.get(found[2], '')}\n{found[3]}", page)
