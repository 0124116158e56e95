"""What the study's rows say: measures, tables and figures in docs/results, from the predictions that lie there."""

import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure

from data.figures import CAPTIONS, GREY, LINES, STYLE, arm_name, arm_styles, new_figure, plot_all, sample_text, spread
from data.files import read_json, write_json, write_text
from data.measures import MEASURES, compute_metrics, interaction, wins
from data.predictions import COLUMNS, NUMBERS, completed, read_predictions
from data.report import cell, half_interval, summary
from data.verdict import interval_text, judge, rounded

MAIN = {"4bit": "predictions.csv.gz", "16bit": "predictions_16bit.csv.gz"}
ABLATIONS = "ablations.csv.gz"
SHOWN = ("accuracy", "margins", "seeds", "popularity", "reliability")  # of evaluate_dpo.py's figures
MAIN_STUDY = "unchanged"
READ = "read in"
DRAWN = '<img src="{file}.png" alt="{title}: ranking accuracy of SFT and DPO" width="49%">'
PANELS = {  # figure and rows of the table: [(value, study)]
    "beta": [("0.05", "beta_0.05"), ("0.1", MAIN_STUDY), ("0.2", "beta_0.2"), ("0.5", "beta_0.5")],
    "LoRA rank": [("8", "rank_8"), ("16", MAIN_STUDY), ("64", "rank_64")],
    "loss": [("sigmoid", MAIN_STUDY), ("IPO", "loss_ipo"), ("APO-zero", "loss_apo_zero")],
    "loss of SFT added": [("no", MAIN_STUDY), ("yes", "dpo_with_sft_loss")],
    "learning rate of DPO": [("× 1", MAIN_STUDY), ("× 3.2", "dpo_rate_3.2")],
    "start of DPO": [("SFT", MAIN_STUDY), ("base", "dpo_from_base")],
    "epochs of SFT": [("× 1", MAIN_STUDY), ("× 2", "sft_x2")],
    "pairs, as many passes": [("128", "pairs_128_passes"), ("1,024", "pairs_1024_passes"), ("all", MAIN_STUDY)],
    "pairs, as many steps": [("128", "pairs_128_steps"), ("1,024", "pairs_1024_steps"), ("all", MAIN_STUDY)],
    "option order in training": [
        *(("balanced", MAIN_STUDY), ("both", "order_both"), ("as in the file", "order_original")),
    ],
    "negatives: trained on, tested on": [
        (f"{trained}, {tested}", f"negatives_{trained}_on_{tested}")
        for trained in ("random", "matched")
        for tested in ("random", "matched")
    ],
}


def report(results: Path) -> None:
    """Write metrics.json of each precision, interaction.json, ablations.json, tables.md, the figures and README's tables."""
    main = {study: read_predictions(results / name) for study, name in MAIN.items() if (results / name).exists()}
    metrics = {study: judge(compute_metrics(rows)) for study, rows in main.items()}
    for study, found in metrics.items():
        write_json(results / f"metrics{'' if study == '4bit' else '_16bit'}.json", found)
    if len(main) == 2:
        write_json(results / "interaction.json", interaction(main["4bit"], main["16bit"]))
    with tempfile.TemporaryDirectory() as work:
        plot_all(main["4bit"], metrics["4bit"], Path(work) / "figures")
        for name in SHOWN:
            if (made := Path(work) / "figures" / f"{name}.png").exists():
                shutil.copy(made, results / made.name)
    write_json(results / "ablations.json", ablations(results, main["4bit"]))
    draw_ablations(read_json(results / "ablations.json"), results)
    made = tables(results)
    page = results / "README.md"
    write_text(page, filled(page.read_text(encoding="utf-8"), made))
    write_text(results / "tables.md", all_tables(made))


def ablations(results: Path, main: pd.DataFrame) -> dict[str, Any]:
    """Measures of each ablation. Its DPO is compared with its SFT, or the main study's, and with the unchanged DPO.

    Of the main study those runs are taken that have the seeds of the ablation, and the same users.
    """
    numbers, found = {name: [""] for name in NUMBERS}, dict[str, Any]()
    if not (results / ABLATIONS).exists():
        return found
    rows = pd.read_csv(results / ABLATIONS, dtype={"seed": str}, keep_default_na=False, na_values=numbers)
    rows = completed(rows.astype({"preferred_more_popular": str}))
    columns = [name for name in rows if name != "study"]
    for study, part in rows.groupby("study", sort=False):
        part = part[columns]
        seeds = sorted(seed for seed in part["seed"].unique() if seed)
        here = unchanged(main, seeds)
        if set(here["pair_id"]) == set(part["pair_id"]) and study != "read_in_16":
            beside = here[(here["arm"] == "dpo") | ((here["arm"] == "sft") & ~(part["arm"] == "sft").any())]
            part = pd.concat([part, beside.replace({"arm": {"dpo": MAIN_STUDY}})])
            found.setdefault(f"{MAIN_STUDY}, {len(seeds)} runs", measured(here))
        found[study] = measured(part)
    return found


def unchanged(main: pd.DataFrame, seeds: list[str]) -> pd.DataFrame:
    """The trained arms of the main study, of these seeds alone, with the columns of an ablation."""
    own = main[(main["history"] == "own") & (main["kind"] == "model") & main["seed"].isin(seeds)]
    return completed(own[list(COLUMNS[1])])


def measured(rows: pd.DataFrame) -> dict[str, Any]:
    return judge(compute_metrics(rows))


def draw_ablations(found: dict[str, Any], results: Path) -> None:
    """One figure for each of `panels`, and one for the precision that adapters are read in."""
    drawn = {}
    for title, (default, there) in panels(found).items():
        arms = {value: accuracies(one) for value, one in there.items()}
        users = " or ".join(dict.fromkeys(f"{one['users']:,}" for one in there.values()))
        runs = sample_text(next(one for value, one in there.items() if value != default)).partition(" ")[2]
        drawn[title] = draw_ablation(arms, default, title, caption=f"{users} {runs}")
    if read := found.get("read_in_16"):
        arms = {"4 bits": accuracies(read), "16 bits": accuracies(read, "@16bit")}
        drawn[READ] = draw_ablation(arms, "4 bits", f"trained in 4 bits, {READ}", caption=sample_text(read))
    for title, figure in drawn.items():
        figure.savefig(results / f"{figure_name(title)}.png", dpi=200)


@rc_context(STYLE)
def draw_ablation(
    points: dict[str, dict[str, dict[str, float]]], default: str | None, setting: str, caption: str = ""
) -> Figure:
    """Arms over the values of one setting, with their 95% intervals; the study's own value is shaded and named.

    Args:
        points: {value of the setting: {arm: {"value", "low", "high"}}}, as metrics.json holds a measure of an arm.
        caption: how many users and runs they are from.
    """
    arms = list(dict.fromkeys(arm for found in points.values() for arm in found))
    long = sum(map(len, points)) + 2 * len(points) > 44  # characters that fit beside each other
    figure, [[axis]] = new_figure(3 if long else 2.4)
    for number, (arm, style) in enumerate(arm_styles(arms).items()):
        shown = [(place, found[arm]) for place, found in enumerate(points.values()) if arm in found]
        shown = [(place, found) for place, found in shown if found["value"] is not None]
        if shown:
            at = [place + 0.14 * (number - (len(arms) - 1) / 2) for place, _ in shown]
            error = np.hstack([spread(found) for _, found in shown])
            marker = {"fmt": "so^Dv"[number % 5], "markersize": 4, "label": arm_name(arm)}
            axis.errorbar(at, [found["value"] for _, found in shown], yerr=error, **marker, **LINES, **style)
    labels = [f"{label}\n(study)" if label == default else label for label in points]
    if default:
        place = [*points].index(default)
        axis.axvspan(place - 0.4, place + 0.4, color="0.93", linewidth=0, zorder=0)
    axis.set(xticks=range(len(points)), xlim=(-0.5, len(points) - 0.5), xlabel=setting, ylabel="ranking accuracy, %")
    axis.set_xticklabels(labels, **({"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if long else {}))
    figure.legend(loc="outside upper center", ncols=3)
    figure.supxlabel(f"{caption}; 95% intervals", fontsize=7, color=GREY)
    return figure


def accuracies(metrics: dict[str, Any], kind: str = "") -> dict[str, dict[str, float]]:
    """Ranking accuracy of SFT and DPO, of the arms of one kind."""
    arms = metrics["arms"]
    return {arm: arms[arm + kind]["ranking_accuracy"] for arm in ("sft", "dpo") if arm + kind in arms}


def panels(found: dict[str, Any]) -> dict[str, tuple[str | None, dict[str, Any]]]:
    """(default, {value: what was measured}) of each panel; the unchanged study has the seeds of what was changed."""
    made = {}
    for title, points in PANELS.items():
        changed = [found[study] for _, study in points if study in found]
        if changed:
            beside = found.get(f"{MAIN_STUDY}, {changed[0]['arms']['dpo']['seeds']} runs")
            there = {value: found.get(study) or (beside if study == MAIN_STUDY else None) for value, study in points}
            default = next((value for value, study in points if study == MAIN_STUDY), None)
            made[title] = default, {value: one for value, one in there.items() if one}
    return made


def figure_name(title: str) -> str:
    return "ablation_" + re.sub(r"\W+", "_", title.lower())


# ------------------------------------------------------------------------------------------------------- tables


def tables(results: Path) -> dict[str, str]:
    """Every table in Markdown, by name."""
    read = {name: read_json(results / f"{name}.json") for name in ("metrics", "metrics_16bit", "interaction")}
    metrics, found = read["metrics"], read_json(results / "ablations.json")
    main = "\n\n".join(summary(metrics).split("\n\n")[:4])  # verdicts, what follows, the table, the differences
    made = {
        "main": f"```text\n{main}\n```",
        "runs": runs_table(metrics, read["metrics_16bit"]),
        "also": measures_table(metrics, ["popularity_balanced_accuracy", "accuracy_against_popularity", "personalisation_gap"]),
        "calibration": measures_table(metrics, ["calibration_error", "dpo_calibration_error", "dpo_temperature"]),
        "displacement": measures_table(metrics, ["chosen_change", "rejected_change"]),
        "shortcut": shortcut_table(results),
        "ablations": ablations_table(found),
        "search": search_table(read_json(results / "search.json")),
        "answers": answers_table(read_json(results / "generation.json")),
        "cost": cost_table(read_json(results / "runs.json")),
    }
    for name, figure in {"runs": "seeds", "calibration": "reliability", "displacement": "margins"}.items():
        made[name] += f"\n\n![{CAPTIONS[figure]}]({figure}.png)"
    drawn = [DRAWN.format(title=title, file=figure_name(title)) for title in (*panels(found), READ)]
    made["ablations"] += "\n\n" + "\n".join(drawn) if found else ""
    if read["interaction"]:
        made["bits"] = bits_table(metrics, read["metrics_16bit"], read["interaction"])
    for name in ("read_in_16", "transfer"):
        if name in found:
            shown = ["ranking_accuracy", "order_free_accuracy", "position_bias", "precision_consistency"]
            made[name] = measures_table(found[name], shown[: 4 if name == "read_in_16" else 2])
    return made


def markdown(columns: list[str], rows: list[list]) -> str:
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in (columns, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(columns), *lines[1:]])


def measures_table(metrics: dict[str, Any], names: list[str]) -> str:
    """Models and baselines that have one of these measures; measures that none has are left out."""
    arms = metrics["arms"].values()
    names = [name for name in names if any(values[name]["value"] is not None for values in arms)]
    heads = [f"{label} ({unit})" if unit else label for label, unit in (MEASURES[name] for name in names)]
    rows = [
        [arm, *(cell(values[name], MEASURES[name][1]) for name in names)]
        for arm, values in metrics["arms"].items()
        if any(values[name]["value"] is not None for name in names)
    ]
    return markdown(["arm", *heads], rows)


def runs_table(*precisions: dict[str, Any]) -> str:
    """Ranking accuracy of every run of the main study."""
    rows = []
    for bits, metrics in zip((4, 16), precisions, strict=False):
        runs = {arm: values["ranking_accuracy"].get("runs") for arm, values in metrics.get("arms", {}).items()}
        for arm, values in runs.items():
            rows += [[bits, arm, *(f"{value:.1f}" for value in values.values())]] if values else []
    count = max(len(row) for row in rows) - 2
    return markdown(["bits", "arm", *(f"run {number + 1}" for number in range(count))], rows)


def bits_table(first: dict[str, Any], second: dict[str, Any], change: dict[str, Any]) -> str:
    """What DPO leads by in each precision, and how much more in the first than in the second."""
    rows = []
    for key, found in change.items():
        leads = (first["comparisons"][key], second["comparisons"][key], found)
        rows.append([key, *map(interval_text, leads), f"{found['detectable_points']:.1f}"])
    return markdown(["lead (points)", "4 bits", "16 bits", "4 bits minus 16 bits", "smallest detectable"], rows)


def shortcut_table(results: Path) -> str:
    """The same adapters where the right answer is always A, as is usual for this data, and in both orders."""
    main = read_predictions(results / MAIN["4bit"])
    main = main[(main["kind"] == "model") & (main["history"] == "own")]
    parts = [("", main)]
    if (results / ABLATIONS).exists():
        other = pd.read_csv(results / ABLATIONS, dtype={"seed": str})
        other = other[(other["study"] == "order_original") & (other["kind"] == "model")]
        parts.append((", trained in the order of the file", other))
    rows = []
    for name, part in parts:
        right = pd.Series(100 * wins(part["decision_margin"].to_numpy()), index=part.index)
        for arm, orders in right.groupby([part["arm"], part["order"]], sort=False).mean().unstack().iterrows():
            rows.append([arm + name, f"{orders['A']:.1f}", f"{orders.mean():.1f}"])
    return markdown(["arm", "A is always right, %", "both orders, %"], rows)


def ablations_table(found: dict[str, Any]) -> str:
    rows, shown = [], ("ranking_accuracy", "order_free_accuracy", "response_accuracy")
    for title, (_, there) in panels(found).items():
        for value, one in there.items():
            arms, comparisons = one["arms"], one["comparisons"]
            wanted = ((arm, name) for name in shown for arm in ("sft", "dpo"))
            values = [arms[arm][name] if arm in arms else None for arm, name in wanted]
            cells = [f"{rounded(one['value'])} ±{half_interval(one)}" if one else "" for one in values]
            differences = (comparisons.get(key) for key in ("dpo - sft", f"dpo - {MAIN_STUDY}"))
            runs = arms["dpo"]["seeds"]
            rows.append([title, value, runs, *cells, *(interval_text(one) if one else "" for one in differences)])
    arms = (f"{arm} {name.partition('_acc')[0].replace('_', '-')} %" for name in shown for arm in ("SFT", "DPO"))
    return markdown(["what", "value", "runs", *arms, "DPO - SFT", "DPO - unchanged DPO"], rows)


def search_table(found: dict[str, Any]) -> str:
    shown = ("ranking_accuracy", "order_free_accuracy", "response_accuracy")
    trials = [(arm, best, trial) for arm, best in found.items() for trial in best["trials"]]
    rows = [
        [arm, f"{float(trial['rate']):g}", trial["epochs"], *(f"{trial[name]:.1f}" for name in shown), "yes" if all(trial[name] == best[name] for name in ("rate", "epochs")) else ""]
        for arm, best, trial in trials
    ]
    return markdown(["arm", "learning rate", "epochs", "ranking %", "order-free %", "response %", "chosen"], rows)


def answers_table(found: dict[str, Any]) -> str:
    shares = ("parsed", "right", "repeat_consistency", "cites_own_genre", "cites_foreign_genre")
    rows = [[arm, values["answers"], *(f"{100 * values[name]:.1f}" for name in shares)] for arm, values in found.items()]
    return markdown(["arm", "answers", *(f"{name.replace('_', ' ')}, %" for name in shares)], rows)


def cost_table(runs: dict[str, Any]) -> str:
    """Minutes by study and by what was done; jobs side by side count each."""
    seconds: dict[tuple[str, str], list[float]] = {}
    for name, run in runs.items():
        kind = "training" if "train_dpo.py" in run["line"] else "evaluation"
        seconds.setdefault((name.split("/")[0], kind), []).append(run["seconds"])
    rows = [[*key, len(spent), f"{sum(spent) / 60:.0f}"] for key, spent in sorted(seconds.items())]
    total = sum(map(sum, seconds.values()))
    return markdown(["study", "what", "runs", "minutes, summed"], [*rows, ["all", "", len(runs), f"{total / 60:.0f}"]])


SECTIONS = {  # of tables.md: name of the table, heading, what a reader must know
    "runs": ("Each run", "Ranking accuracy in % of every training run of the main study, one column per seed."),
    "also": ("More measures", "4 bits. `docs/metrics.md` defines each."),
    "calibration": ("Calibration", "Of the decision, and of DPO's own probability σ(β(m − m_ref))."),
    "displacement": ("Displacement", "Change of log p against the reference. Both falling is the known failure of DPO."),
    "read_in_16": ("Trained in 4 bits, read in 16", "`@16bit` is the same adapter on 16-bit weights; the last three runs of the main study."),
    "transfer": ("Transfer", "Adapters of the main study on users of MovieLens-100K: its last three runs."),
    "ablations": (
        "Ablations",
        "Each row changes one setting, and nothing is tuned again. Alpha is the rank. Negatives are of MovieLens-100K and "
        "its own test users. Unchanged rows have the seeds of what is compared with them. "
        "Intervals, and ± half of them, are over users and, from three runs, over runs.",
    ),
    "search": ("Search", "Trials of one run, on training users held back. The control's best is among trials as long as DPO's."),
    "answers": ("Generated answers", "The first run: 100 users, five answers each at temperature 0.7."),
    "cost": ("Cost", "Minutes of all jobs, added up; several shared a GPU. `of_dpo` scores all variants of DPO."),
}


def all_tables(made: dict[str, str]) -> str:
    """The text of tables.md, without tables that have no rows."""
    there = [name for name in SECTIONS if made.get(name, "").count("\n") > 1]
    sections = [f"## {SECTIONS[name][0]}\n\n{SECTIONS[name][1]}\n\n{made[name]}\n" for name in there]
    return "# Tables of the study\n\nWritten by `tests/benchmarks/experiment.py report`.\n\n" + "\n".join(sections)


def filled(page: str, made: dict[str, str]) -> str:
    """A page with each table between `<!-- study: NAME -->` and `<!-- end -->` as it was made."""
    return re.sub(
        r"(<!-- study: (\w+) -->\n).*?(<!-- end -->)",
        lambda found: f"{found[1]}{made.get(found[2], '')}\n{found[3]}",
        page,
        flags=re.DOTALL,
    )
