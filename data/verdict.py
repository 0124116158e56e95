"""Comparisons -> verdicts, caveats and the sentence to quote, each by rule."""

from __future__ import annotations

from typing import Any

from data.measures import RUNS_FOR_METHOD, sft_controls

BOTH_ONE_LETTER = "both answer one letter almost always"
OF_SCOPE = {"method": "", "adapters": " (these adapters)"}  # what a verdict is on, behind it
NO_CONTROL = "no control was trained"
FRACTIONS = {2: "half", 3: "a third", 4: "a quarter", 5: "a fifth"}
SAYS = {  # a verdict: does DPO rank better?
    "SUPPORTED": "yes",
    "PARTIAL: small gain": "yes",
    "NOT SUPPORTED": "no",
    "PARTIAL: comparable": "no",
    "INCONCLUSIVE": "open",
}
CASES = {  # (better than SFT, better than SFT trained longer): what follows
    ("yes", "yes"): "{dpo} ranks better than SFT, and better than SFT trained longer",
    ("yes", "no"): "{dpo} ranks better than SFT but not than SFT trained longer: "
    "what DPO gains, more training gains too",
    ("yes", "open"): "{dpo} ranks better than SFT; whether SFT trained longer gains as much is undecided",
    ("no", "yes"): "{dpo} does not rank better than SFT, though better than SFT trained longer",
    ("no", "no"): "{dpo} ranks better neither than SFT nor than SFT trained longer",
    ("no", "open"): "{dpo} does not rank better than SFT; against SFT trained longer it is undecided",
    ("open", "yes"): "whether {dpo} ranks better than SFT is undecided; it ranks better than SFT trained longer",
    ("open", "no"): "whether {dpo} ranks better than SFT is undecided; it does not rank better than SFT trained longer",
    ("open", "open"): "whether {dpo} ranks better than SFT, or than SFT trained longer, is undecided",
    ("yes", ""): "{dpo} ranks better than {sft}; no control was trained, so more training may gain as much",
    ("no", ""): "{dpo} does not rank better than {sft}; no control was trained",
    ("open", ""): "whether {dpo} ranks better than {sft} is undecided; no control was trained",
}


def judge(metrics: dict[str, Any]) -> dict[str, Any]:
    """The metrics with what follows from them: verdicts, caveats, sentence; without `sft` or `dpo` there are none."""
    arms, comparisons = metrics["arms"], metrics["comparisons"]
    for arm in ("sft", *sft_controls(arms)):
        if found := comparisons.get(f"dpo - {arm}"):
            one_letter = all(letter_always_answered(arms[name]) for name in (arm, "dpo"))
            says = verdict(found["value"], found["low"], found["high"], one_letter)
            found["verdict"] = says + OF_SCOPE[found["scope"]]
    if "dpo - sft" in comparisons:
        control = control_of(arms)
        metrics["verdict"] = comparisons["dpo - sft"]["verdict"]
        metrics["control"] = control or None
        metrics["control_verdict"] = comparisons[f"dpo - {control}"]["verdict"] if control else NO_CONTROL
        scopes = [comparisons[f"dpo - {arm}"]["scope"] for arm in ("sft", control) if arm]
        metrics["scope"] = "adapters" if "adapters" in scopes else "method"
        metrics["caveats"] = caveats(metrics)
        metrics["conclusion"] = conclusion(metrics)
        metrics["sentence"] = sentence(metrics)
    return metrics


def verdict(difference: float, low: float, high: float, one_letter: bool = False) -> str:
    """The verdict on DPO - SFT, all in percentage points of ranking accuracy; the first rule that holds.

    one_letter: both arms answer one letter almost whatever the options are. Both then have 50% for that reason
    alone, and equal accuracies say nothing about how they compare: INCONCLUSIVE.
    """
    if one_letter:
        return "INCONCLUSIVE"
    if low >= -1 and high <= 1:
        return "PARTIAL: comparable"
    if difference > 2 and low > 0:
        return "SUPPORTED"
    if high < 0:
        return "NOT SUPPORTED"
    return "PARTIAL: small gain" if low > 0 else "INCONCLUSIVE"


def control_of(arms: dict[str, Any]) -> str:
    """The control that the second verdict is on: `sft_more` or, where there is none, the best other one; "" if none."""
    controls = sft_controls(arms)
    best = max(controls, key=lambda arm: arms[arm]["ranking_accuracy"]["value"], default="")
    return "sft_more" if "sft_more" in controls else best


def letter_always_answered(measures: dict[str, Any], seed: str = "") -> str:
    """The letter that an arm answers almost whatever the options are; "one letter" where runs differ in it; else "".

    Such an arm chooses another film when the options are swapped, for 9 of 10 pairs or more. Its position bias may
    still be 0: two runs of which one always answers A, the other B. seed: of one run alone.
    """
    found = [measures[name] for name in ("swap_consistency", "position_bias")]
    consistency, bias = (measure["runs"][seed] if seed else measure["value"] for measure in found)
    if consistency is None or consistency > 10:
        return ""
    return "one letter" if abs(bias) < 80 else "A" if bias > 0 else "B"


def pairs_seen(arm: str, arms: dict[str, Any]) -> str:
    """How many pairs an arm saw in training, in words, beside DPO's; "" where either is not known."""
    seen, of_dpo = arms[arm]["pairs_seen"], arms["dpo"]["pairs_seen"]
    if not seen or not of_dpo:
        return ""
    near = [word for part, word in FRACTIONS.items() if abs(part * seen / of_dpo - 1) < 0.05]
    if near or abs(seen / of_dpo - 1) < 0.05:
        return f"{near[0]} of the pairs" if near else "as many pairs"
    return f"{100 * seen / of_dpo:.0f}% of the pairs"


def conclusion(metrics: dict[str, Any]) -> str:
    """What follows from both verdicts, by CASES."""
    arms, dpo = metrics["arms"], "DPO"
    if metrics["scope"] == "adapters":
        dpo = "this adapter of DPO" if arms["dpo"]["seeds"] == 1 else "the mean of these adapters of DPO"
    over_sft, over_control = (SAYS.get(metrics[name].partition(" (")[0], "") for name in ("verdict", "control_verdict"))
    seen = pairs_seen("sft", arms) or "an unknown number of pairs"
    return CASES[over_sft, over_control].format(dpo=dpo, sft=f"an SFT that saw {seen}")


def sentence(metrics: dict[str, Any], model: str = "") -> str:
    """The result as a sentence that a thesis may quote, together with its caveats.

    model: what the adapters belong to. The predictions don't hold it, so the sentence of metrics.json is without it.
    """
    arms, control, comparisons = metrics["arms"], metrics["control"], metrics["comparisons"]
    accuracy = {arm: f"{measures['ranking_accuracy']['value']:.1f}%" for arm, measures in arms.items()}
    pairs = "each" if metrics["pairs"] == metrics["users"] else f"with {metrics['pairs']:,} pairs"
    text = (
        f"On {metrics['users']:,} held-out users, {pairs} shown both orders of the options, DPO and SFT "
        f"{f'of {model} ' if model else ''}reached a ranking accuracy of {accuracy['dpo']} and {accuracy['sft']} "
        f"({runs_text(arms, 'dpo', 'sft')}), a difference of {spoken(comparisons['dpo - sft'])}."
    )
    if control:
        seen = pairs_seen(control, arms)
        as_dpo = f"{seen} as DPO; " if seen == "as many pairs" else ""
        about = f"{accuracy[control]}; {as_dpo}{runs_text(arms, control)}"
        also = spoken(comparisons[f"dpo - {control}"])
        text += f" From the control {control}, SFT trained longer ({about}), DPO differs by {also}."
    text += f" So {metrics['conclusion']}."
    if all(letter_always_answered(arms[arm]) for arm in ("sft", "dpo")):
        text += f" The two {BOTH_ONE_LETTER}: equal accuracies say nothing of how they compare."
    if metrics["scope"] == "adapters":
        text += f" This is a result on these adapters and not on the method, which takes {RUNS_FOR_METHOD} runs an arm."
    if "popularity" in arms:
        text += f" Recommending the more popular film scores {accuracy['popularity']}."
    return text


def runs_text(arms: dict[str, Any], *names: str) -> str:
    """How many training runs arms have, and of which seeds."""
    counts = dict.fromkeys(str(arms[name]["seeds"]) for name in names)
    runs = f"{' and '.join(counts)} training run{'' if [*counts] == ['1'] else 's'}"
    seeds = dict.fromkeys(", ".join(arms[name]["ranking_accuracy"].get("runs", {})) for name in names)
    each = " each" if len(names) > 1 and len(counts) == 1 else ""
    word = "seed" if all("," not in named for named in seeds) else "seeds"
    return f"{runs}{each}, {word} {' and '.join(seeds)}" if all(seeds) else runs + each


def spoken(found: dict[str, Any]) -> str:
    """A difference with its interval, and what the interval is over."""
    over = "users and training runs" if found["scope"] == "method" else "users"
    return f"{found['value']:+.1f} points (95% interval {found['low']:+.1f} to {found['high']:+.1f} over {over})"


def interval_text(difference: dict[str, float]) -> str:
    return f"{difference['value']:+.1f} [{difference['low']:+.1f}, {difference['high']:+.1f}]"


def change_text(name: str, found: dict[str, Any], other: str) -> str:
    """How much a lead, such as `dpo - sft`, differs between two evaluations, of data.measures.interaction."""
    lead = f"note: {name} is {interval_text(found)} points larger here than in {other}"
    return f"{lead}; a change of {found['detectable_points']:.1f} points could be told from 0"


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
    for arm in ("sft", *controls):
        seen = pairs_seen(arm, arms)
        if seen not in ("", "as many pairs"):
            found.append(f"{arm} saw {seen} that dpo saw in all its training: unequal training may be what differs")
    for arm in controls:
        also = comparisons[f"dpo - {arm}"]
        if arm != metrics["control"] and SAYS[also["verdict"].partition(" (")[0]] != "yes" and difference["low"] > 0:
            found.append(f"dpo is not shown to be better than {arm}, either ({interval_text(also)} points)")
    few = [arm for arm in ("sft", "dpo", *controls) if arms[arm]["seeds"] < RUNS_FOR_METHOD]
    if few:
        listed = ", ".join(f"{arms[arm]['seeds']} of {arm}" for arm in few)
        runs = f"fewer than {RUNS_FOR_METHOD} training runs ({listed})"
        found.append(f"{runs}: the interval leaves out what another seed would give; the verdict is on these adapters")
    return found


def caveats_of(arm: str, metrics: dict[str, Any]) -> list[str]:
    """What a reader of one arm's measures must know, whatever it is compared with."""
    found, measures = [], metrics["arms"][arm]
    letter = letter_always_answered(measures)
    if letter:
        why = "its ranking accuracy is 50% for that reason"
        found.append(f"{arm} answers {letter} almost whatever the options are: {why}")
    for seed in {} if letter else measures["ranking_accuracy"].get("runs", {}):
        if of_run := letter_always_answered(measures, seed):
            why = "its ranking accuracy of 50% is in the mean"
            found.append(f"{arm}'s run of seed {seed} answers {of_run} almost whatever the options are: {why}")
    against = measures["accuracy_against_popularity"]
    if not letter and against["value"] is not None and against["low"] <= 50:
        interval = f"{against['value']:.1f}% [{against['low']:.1f}, {against['high']:.1f}]"
        where = "where the less popular film is the right one"
        found.append(f"{arm} is not shown to be better than chance {where}: {interval}")
    gap = measures["personalisation_gap"]
    if gap["value"] is not None and gap["low"] <= 0:
        loss = f"with a stranger's it loses {gap['value']:.1f} points, interval includes 0"
        found.append(f"{arm} may not use the history: {loss}")
    if (measures["near_ties"] or 0) > 0.05 * 2 * metrics["pairs"] * measures["seeds"]:
        found.append(f"{arm} decides {measures['near_ties']:,} times by less than 0.01 nats: rounding could turn them")
    chosen, rejected = (measures[f"{name}_change"]["value"] for name in ("chosen", "rejected"))
    if chosen is not None and chosen < -1:
        falls = f"by {-chosen:.1f} nats against its reference (the rejected one: {rejected:+.1f})"
        found.append(f"{arm} makes the chosen response less likely, {falls}: likelihood displacement")
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
        names = {"popularity": "taking the more popular film", "learned": "a logistic regression on counts"}
        values = {name: arms[name]["ranking_accuracy"]["value"] for name in (arm, *which)}
        listed = ", ".join(f"{names.get(name, name)} ({values[name]:.1f}%)" for name in which)
        found += [f"{arm} ({values[arm]:.1f}%) {says} {listed}"] if which else []
    return found
