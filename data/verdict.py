"""Comparisons -> verdict, caveats and the sentence to quote, each by rule."""

from __future__ import annotations

from typing import Any

from data.measures import sft_controls

BOTH_ONE_LETTER = "both answer one letter almost always"
MEANINGS = {  # of a verdict on DPO over {}
    "SUPPORTED": "which supports that DPO improves ranking adherence over {}",
    "NOT SUPPORTED": "which speaks against DPO improving ranking adherence over {}",
    "PARTIAL: comparable": "so the two are within one point of each other",
    "PARTIAL: small gain": "a gain too small for the two points asked for",
    "INCONCLUSIVE": "which is too uncertain to decide whether DPO improves ranking adherence over {}",
}


def judge(metrics: dict[str, Any]) -> dict[str, Any]:
    """The metrics with what follows from them: verdict, caveats and sentence; without `sft` or `dpo` there is none."""
    arms, comparisons = metrics["arms"], metrics["comparisons"]
    for arm in ("sft", *sft_controls(metrics["arms"])):
        if found := comparisons.get(f"dpo - {arm}"):
            one_letter = all(letter_always_answered(arms[name]) for name in (arm, "dpo"))
            found["verdict"] = verdict(found["value"], found["low"], found["high"], one_letter)
    if "dpo - sft" in comparisons:
        metrics["verdict"] = comparisons["dpo - sft"]["verdict"]
        metrics["caveats"] = caveats(metrics)
        metrics["sentence"] = sentence(metrics)
    return metrics


def verdict(difference: float, low: float, high: float, one_letter: bool = False) -> str:
    """The verdict on DPO - SFT, all in percentage points of ranking accuracy; the first rule that holds.

    one_letter: both arms answer one letter almost whatever the options are. Both then have 50% for that reason
    alone, and equal accuracies say nothing about how they compare: INCONCLUSIVE.
    """
    if difference > 2 and low > 0:
        return "SUPPORTED"
    if difference < 0 and high < 0:
        return "NOT SUPPORTED"
    if low >= -1 and high <= 1 and not one_letter:
        return "PARTIAL: comparable"
    if difference > 0 and low > 0:
        return "PARTIAL: small gain"
    return "INCONCLUSIVE"


def letter_always_answered(measures: dict[str, Any]) -> str:
    """The letter that an arm answers almost whatever the options are; "one letter" where runs differ in it; else "".

    Such an arm chooses another film when the options are swapped, for 9 of 10 users or more. Its position bias may
    still be 0: two runs of which one always answers A, the other B.
    """
    consistency = measures["swap_consistency"]["value"]
    if consistency is None or consistency > 10:
        return ""
    bias = measures["position_bias"]["value"]
    return "one letter" if abs(bias) < 80 else "A" if bias > 0 else "B"


def sentence(metrics: dict[str, Any], model: str = "") -> str:
    """The result as a sentence that a thesis may quote, together with its caveats.

    model: what the adapters belong to. The predictions don't hold it, so the sentence of metrics.json is without it.
    """
    found, arms, verdicts = metrics["comparisons"]["dpo - sft"], metrics["arms"], control_verdicts(metrics)
    says = MEANINGS[metrics["verdict"]].format("this SFT" if verdicts else "SFT")
    if all(letter_always_answered(arms[arm]) for arm in ("sft", "dpo")):
        says = f"which says nothing of how they compare, since {BOTH_ONE_LETTER}"
    runs = [arms[arm]["seeds"] for arm in ("dpo", "sft")]
    trained = "one training run each" if max(runs) == 1 else f"{runs[0]} training runs each"
    if runs[0] != runs[1]:
        trained = f"{runs[0]} and {runs[1]} training runs"
    tested = "on order-free decisions" + (" of all runs together" if max(runs) > 1 else "")
    accuracy = {arm: f"{measures['ranking_accuracy']['value']:.1f}%" for arm, measures in arms.items()}
    text = (
        f"On {metrics['users']:,} held-out users, each shown both orders of the options, DPO and SFT "
        f"{f'of {model} ' if model else ''}reached a ranking accuracy of {accuracy['dpo']} and {accuracy['sft']} "
        f"({trained}), a difference of {found['value']:+.1f} percentage points (95% interval {found['low']:+.1f} to "
        f"{found['high']:+.1f}; exact McNemar p = {found['p']:.2g} {tested}), {says}."
    )
    for arm, reached in verdicts.items():
        more = metrics["comparisons"][f"dpo - {arm}"]
        text += (
            f" From the SFT control {arm} ({accuracy[arm]}) DPO differs by {more['value']:+.1f} points "
            f"({more['low']:+.1f} to {more['high']:+.1f}), {MEANINGS[reached].format('that one')}."
        )
    if "popularity" in arms:
        text += f" Recommending the more popular film scores {accuracy['popularity']}."
    return text


def control_verdicts(metrics: dict[str, Any]) -> dict[str, str]:
    """The verdict on DPO against each control, by the control's name."""
    found = {arm: metrics["comparisons"].get(f"dpo - {arm}", {}) for arm in sft_controls(metrics["arms"])}
    return {arm: comparison["verdict"] for arm, comparison in found.items() if "verdict" in comparison}


def interval_text(difference: dict[str, float]) -> str:
    return f"{difference['value']:+.1f} [{difference['low']:+.1f}, {difference['high']:+.1f}]"


def caveats(metrics: dict[str, Any]) -> list[str]:
    """What a reader of the verdict must know."""
    arms, comparisons, controls = metrics["arms"], metrics["comparisons"], sft_controls(metrics["arms"])
    models = [arm for arm, measures in arms.items() if measures["kind"] == "model" and arm != "base" and "@" not in arm]
    found = [caveat for arm in models for caveat in caveats_of(arm, metrics)]
    for arm in ("dpo", *controls):
        found += caveats_of_baselines(arm, metrics)
    difference = comparisons["dpo - sft"]
    order_free = difference["order_free_accuracy"]
    if difference["low"] * difference["high"] > 0 and order_free["low"] <= 0 <= order_free["high"]:
        found.append(
            f"with both orders taken together the difference is {interval_text(order_free)} points, which may be 0: "
            "what differs may be how much they lean to one letter and not which film they prefer"
        )
    for arm in controls:
        also = comparisons[f"dpo - {arm}"]
        points = interval_text(also)
        if also["high"] < 0 < difference["low"]:
            gains = "what it gains, SFT alone can gain too"
            found.append(f"dpo is better than sft and worse than {arm} ({points} points): {gains}")
        elif also["low"] <= 0 < difference["low"]:
            as_well = "SFT alone may do as well"
            found.append(f"dpo is better than sft but not clearly than {arm} ({points} points): {as_well}")
    once = [arm for arm in ("sft", "dpo", *controls) if arms[arm]["seeds"] == 1]
    if {"sft", "dpo"} <= set(once):
        found.append("one training run an arm: what another seed would give is not in the interval")
    elif once:
        runs = " and of ".join(once)
        found.append(f"one training run of {runs}: what another seed would give there is not in the intervals")
    return found


def caveats_of(arm: str, metrics: dict[str, Any]) -> list[str]:
    """What a reader of one arm's measures must know, whatever it is compared with."""
    found, measures = [], metrics["arms"][arm]
    letter = letter_always_answered(measures)
    if letter:
        why = "its ranking accuracy is 50% for that reason"
        found.append(f"{arm} answers {letter} almost whatever the options are: {why}")
    against = measures["accuracy_against_popularity"]
    if not letter and against["value"] is not None and against["low"] <= 50:
        interval = f"{against['value']:.1f}% [{against['low']:.1f}, {against['high']:.1f}]"
        where = "where the less popular film is the right one"
        found.append(f"{arm} is not shown to be better than chance {where}: {interval}")
    gap = measures["personalisation_gap"]
    if gap["value"] is not None and gap["low"] <= 0:
        loss = f"with a stranger's it loses {gap['value']:.1f} points, interval includes 0"
        found.append(f"{arm} may not use the history: {loss}")
    if (measures["near_ties"] or 0) > 0.05 * 2 * metrics["users"] * measures["seeds"]:
        found.append(f"{arm} decides {measures['near_ties']:,} times by less than 0.01 nats: rounding could turn them")
    return found


def caveats_of_baselines(arm: str, metrics: dict[str, Any]) -> list[str]:
    """Which baselines are better than an arm, and which are not shown to be worse."""
    arms = metrics["arms"]
    baselines = {name: f"{arm} - {name}" for name, measures in arms.items() if measures["kind"] == "baseline"}
    compared = {name: metrics["comparisons"][key] for name, key in baselines.items() if key in metrics["comparisons"]}
    found = []
    for says, which in (
        ("loses to", [name for name, difference in compared.items() if difference["high"] < 0]),
        ("is not shown to be better than", [name for name, one in compared.items() if one["low"] <= 0 <= one["high"]]),
    ):
        names = {"popularity": "taking the more popular film"}
        values = {name: arms[name]["ranking_accuracy"]["value"] for name in (arm, *which)}
        listed = ", ".join(f"{names.get(name, name)} ({values[name]:.1f}%)" for name in which)
        found += [f"{arm} ({values[arm]:.1f}%) {says} {listed}"] if which else []
    return found
