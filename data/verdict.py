"""Comparisons -> verdicts, caveats and the sentence to quote, each by rule."""

import math
from collections.abc import Sequence
from typing import Any

from data.measures import NEAR_TIE, RUNS_FOR_METHOD, sft_controls

KINDS = {"sft": "SFT", "sft_more": "SFT, continued", "dpo": "DPO"}  # an arm's name for readers
FEWEST = 6  # users for a verdict
NO_CONTROL = "no control was trained"
USERS_TO_QUOTE = 100  # fewer test users give no sentence to quote
SHARES = {1: "as many pairs", 2: "half as many pairs", 3: "a third as many pairs"}
SHARES |= {4: "a quarter as many pairs", 5: "a fifth as many pairs"}
SAYS = {  # a verdict: how DPO ranks beside the other arm
    "SUPPORTED": "ranks better than",
    "PARTIAL: small gain": "ranks a little better than",
    "PARTIAL: comparable": "ranks within a point of",
    "NOT SUPPORTED": "ranks worse than",
    "INCONCLUSIVE": "is not shown to rank better or worse than",
}
BETTER = ("SUPPORTED", "PARTIAL: small gain")


def judge(metrics: dict[str, Any]) -> dict[str, Any]:
    """The metrics with what follows from them: verdicts, caveats, sentence; without `sft` or `dpo` there are none.

    The second verdict is on the control `sft_more` or, where there is none, on the best other one.
    """
    arms, comparisons, controls = metrics["arms"], metrics["comparisons"], sft_controls(metrics["arms"])
    for arm in ("sft", *controls):
        if found := comparisons.get(f"dpo - {arm}"):
            undecided = arm in arms_of_one_letter(arms) or metrics["effective_users"] < FEWEST
            says = verdict(found["value"], found["low"], found["high"], undecided)
            found["verdict"] = says if found["scope"] == "method" else f"{says} (these adapters)"
    if "dpo - sft" in comparisons:
        best = max(sorted(controls), key=lambda arm: arms[arm]["ranking_accuracy"]["value"], default=None)
        control = "sft_more" if "sft_more" in controls else best
        metrics["verdict"] = comparisons["dpo - sft"]["verdict"]
        metrics["control"] = control
        metrics["control_verdict"] = comparisons[f"dpo - {control}"]["verdict"] if control else NO_CONTROL
        scopes = [comparisons[f"dpo - {arm}"]["scope"] for arm in ("sft", control) if arm]
        metrics["scope"] = "adapters" if "adapters" in scopes else "method"
        metrics["caveats"] = caveats(metrics)
        metrics["conclusion"] = conclusion(metrics)
        metrics["sentence"] = sentence(metrics)
    return metrics


def verdict(difference: float, low: float, high: float, undecided: bool = False) -> str:
    """The verdict on DPO - SFT, all in percentage points of ranking accuracy; the first rule that holds.

    undecided: INCONCLUSIVE whatever these are. Both arms answer one letter almost whatever the options are, and so have
    about 50% whichever films they prefer; or effective users are fewer than the six without which no exact test finds
    anything.
    """
    if undecided:
        return "INCONCLUSIVE"
    if low >= -1 and high <= 1:
        return "PARTIAL: comparable"
    if difference > 2 and low > 0:
        return "SUPPORTED"
    if high < 0:
        return "NOT SUPPORTED"
    return "PARTIAL: small gain" if low > 0 else "INCONCLUSIVE"


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


def arms_of_one_letter(arms: dict[str, Any]) -> list[str]:
    """Arms of SFT that answer one letter almost always, where DPO does, too: accuracy does not compare them."""
    found = [arm for arm in ("sft", *sft_controls(arms)) if arm in arms and letter_always_answered(arms[arm])]
    return found if letter_always_answered(arms["dpo"]) else []


def all_one_letter(metrics: dict[str, Any]) -> str:
    """That DPO and SFT, the control or both answer one letter almost always; "" where it is not so."""
    names = {"sft": "SFT"} | ({metrics["control"]: longer(metrics)} if metrics["control"] else {})
    alike = [names[arm] for arm in arms_of_one_letter(metrics["arms"]) if arm in names]
    biases = [metrics["arms"][arm]["position_bias"]["value"] for arm in ("dpo", *arms_of_one_letter(metrics["arms"]))]
    do = "answer one letter almost always" if min(map(abs, biases)) >= 80 else "seldom prefer a film in both orders"
    return f"{listed(['DPO', *alike], 'and')} {do}" if alike else ""


def pairs_seen(arm: str, arms: dict[str, Any]) -> str:
    """How many pairs an arm saw in training, in words, beside DPO's; "" where either is not known."""
    seen, of_dpo = arms[arm]["pairs_seen"], arms["dpo"]["pairs_seen"]
    if not seen or not of_dpo:
        return ""
    near = (words for part, words in SHARES.items() if abs(part * seen / of_dpo - 1) < 0.05)
    return next(near, f"{100 * seen / of_dpo:.0f}% as many pairs")


def conclusion(metrics: dict[str, Any]) -> str:
    """What both verdicts say, in one or two sentences."""
    arms, dpo = metrics["arms"], "DPO"
    if metrics["comparisons"]["dpo - sft"]["scope"] == "adapters":
        dpo = "this DPO adapter" if arms["dpo"]["seeds"] == 1 else "the mean of these DPO adapters"
    seen = pairs_seen("sft", arms)
    sft = f"an SFT that saw {seen}" if seen else "SFT"
    first, second = (metrics[name].partition(" (")[0] for name in ("verdict", "control_verdict"))
    gains = first in BETTER and second not in BETTER
    if second not in SAYS:
        gains &= (arms["sft"]["pairs_seen"] or 0) < (arms["dpo"]["pairs_seen"] or math.inf)  # it was trained for less
        text = f"{dpo} {SAYS[first]} {sft}. No control was trained{', so more training may gain as much' * gains}."
    elif first == second:
        word = "or" if first == "INCONCLUSIVE" else "and"
        text = f"{dpo} {SAYS[first]} SFT {word} {longer(metrics)}."
    else:
        link = "but" if (first in BETTER) != (second in BETTER) else "and"
        text = f"{dpo} {SAYS[first]} SFT, {link} {SAYS[second]} {longer(metrics)}."
        text += " So more training may explain its lead." * (gains and longer(metrics) != "another SFT")
    return text[0].upper() + text[1:]


def listed(names: list[str], last: str) -> str:
    return f" {last} ".join([", ".join(names[:-1]), names[-1]] if names[1:] else names)


def longer(metrics: dict[str, Any]) -> str:
    """The control in words; that of a DPO from the base model begins there, too, and continues no SFT."""
    arms, control = metrics["arms"], metrics["control"]
    if control == "sft_more" and arms["dpo"]["reference"] != "base":
        return "continued SFT"
    seen, of_sft = (arms[arm]["pairs_seen"] for arm in (control, "sft"))
    more = seen > of_sft if seen and of_sft else control == "sft_more"
    return "longer SFT" if more else "another SFT"


def named(arm: str, metrics: dict[str, Any]) -> str:
    """An arm's name for readers."""
    return longer(metrics) if arm == "sft_more" and longer(metrics) != "continued SFT" else KINDS.get(arm, arm)


def sentence(metrics: dict[str, Any], model: str = "") -> str:
    """The result as sentences that a thesis may quote, together with its caveats; why not, where users are too few.

    model: what the adapters belong to. The predictions don't hold it, so the sentence of metrics.json is without it.
    """
    if metrics["users"] < USERS_TO_QUOTE:
        return f"No sentence to quote: it takes {USERS_TO_QUOTE} test users, and these are {metrics['users']}."
    arms, control, comparisons = metrics["arms"], metrics["control"], metrics["comparisons"]
    accuracy = {arm: with_interval(measures["ranking_accuracy"], unit="%") for arm, measures in arms.items()}
    pairs = "" if metrics["pairs"] == metrics["users"] else f" with {metrics['pairs']:,} pairs"
    text = (
        f"We tested {f'{model} ' if model else ''}on {metrics['users']:,} held-out users{pairs} and showed each pair "
        f"of films in both orders. DPO reached a ranking accuracy of {accuracy['dpo']} and SFT {accuracy['sft']} "
        f"({runs_text(arms, 'dpo', 'sft')}). The difference is {spoken(comparisons['dpo - sft'])}."
    )
    if control:
        as_dpo = "as many pairs as DPO; " if pairs_seen(control, arms) == "as many pairs" else ""
        name = longer(metrics) + ("" if control in KINDS else f" ({control})")
        text += f" The control, {name}, reached {accuracy[control]} ({as_dpo}{runs_text(arms, control)})."
        text += f" DPO minus the control is {spoken(comparisons[f'dpo - {control}'])}."
    text += f" {metrics['conclusion']}"
    if alike := all_one_letter(metrics):
        text += f" {alike}, so their accuracies do not show how they compare."
    if metrics["scope"] == "adapters":
        which = "This result" if comparisons["dpo - sft"]["scope"] == "adapters" else "The result against the control"
        text += f" {which} is on these adapters only. A result on the method takes {RUNS_FOR_METHOD} runs per arm."
    if "popularity" in arms:
        text += f" Taking the more popular film reached {accuracy['popularity']}."
    return text


def runs_text(arms: dict[str, Any], *names: str) -> str:
    """How many training runs arms have, and of which seeds."""
    counts = dict.fromkeys(str(arms[name]["seeds"]) for name in names)
    runs = f"{' and '.join(counts)} training run{'' if [*counts] == ['1'] else 's'}"
    seeds = dict.fromkeys(tuple(arms[name]["ranking_accuracy"].get("runs", ())) for name in names)
    each = " each" if len(names) > 1 and len(counts) == 1 else ""
    word = "seed" if all(len(of) == 1 for of in seeds) else "seeds"
    return f"{runs}{each}, {word} {' and '.join(map(seeds_text, seeds))}" if all(seeds) else runs + each


def seeds_text(seeds: Sequence[str]) -> str:
    """3407 to 3416, where each is one more than the last and they are three or more; else all of them."""
    follow = len(seeds) > 2 and all(seed.isdecimal() for seed in seeds)
    follow = follow and [*map(int, seeds)] == [*range(int(seeds[0]), int(seeds[0]) + len(seeds))]
    return f"{seeds[0]} to {seeds[-1]}" if follow else ", ".join(seeds)


def spoken(found: dict[str, Any]) -> str:
    """A difference with its interval, and what the interval is over."""
    over = "users and training runs" if found["scope"] == "method" else "users"
    value, low, high = (rounded(found[name], decimals(found), "+") for name in ("value", "low", "high"))
    return f"{value} points (95% interval {low} to {high} over {over})"


def rounded(value: float, digits: int = 1, sign: str = "") -> str:
    """A number as text; sign "+" for differences. What rounds to 0 has no sign."""
    value = round(value, digits) or 0.0
    return f"{value:{sign if value else ''}.{digits}f}"


def with_interval(found: dict[str, Any], digits: int = 1, sign: str = "", unit: str = "") -> str:
    value, low, high = (rounded(found[name], digits, sign) for name in ("value", "low", "high"))
    return f"{value}{unit} [{low}, {high}]"


def interval_text(difference: dict[str, Any]) -> str:
    return with_interval(difference, decimals(difference), "+")


def decimals(difference: dict[str, Any]) -> int:
    """How many a difference in points is told with: 2 where 1 would hide on which side of 0 or ±1 a bound lies, or of 2
    the value."""
    near = [abs(difference[bound] - limit) for bound in ("low", "high") for limit in (-1, 0, 1)]
    near.append(abs(difference["value"] - 2))
    return 2 if any(0.005 <= distance < 0.05 for distance in near) else 1


def change_text(name: str, found: dict[str, Any], other: str) -> str:
    """How much a lead, such as `dpo - sft`, differs between two evaluations, of data.measures.interaction."""
    change = f"note: {name} changes by {interval_text(found)} points, here minus {other}"
    return f"{change}. A change of {found['detectable_points']:.1f} points could be told from 0."


# ------------------------------------------------------------------------------------------------------ caveats

def caveats(metrics: dict[str, Any]) -> list[str]:
    """What a reader of the verdict must know."""
    arms = metrics["arms"]
    models = [arm for arm, measures in arms.items() if measures["kind"] == "model" and arm != "base" and "@" not in arm]
    found = [caveat for arm in models for caveat in caveats_of(arm, metrics)]
    others = [arm for arm in ("sft", *sft_controls(arms)) if not letter_always_answered(arms[arm])]  # which says enough
    found += [caveat for arm in ("dpo", *others) for caveat in caveats_of_baselines(arm, metrics)]
    return found + caveats_of_verdict(metrics)


def caveats_of(arm: str, metrics: dict[str, Any]) -> list[str]:
    """What a reader of one arm's measures must know."""
    found, measures = [], metrics["arms"][arm]
    letter = letter_always_answered(measures)
    if letter:
        kept = "keeps its letter when the options are swapped," if letter == "one letter" else f"answers {letter}"
        found.append(f"it {kept} almost always. Its ranking accuracy is about 50% for that reason")
    for seed in {} if letter else measures["ranking_accuracy"].get("runs", {}):
        if of_run := letter_always_answered(measures, seed):
            counts = "Its ranking accuracy of about 50% is part of the mean"
            found.append(f"the run of seed {seed} answers {of_run} almost always. {counts}")
    against = measures["accuracy_against_popularity"]
    if not letter and against["value"] is not None and against["low"] <= 50:
        interval = with_interval(against, unit="%")
        found.append(f"it is not shown to beat chance where the less popular film is the right one: {interval}")
    gap = measures["personalisation_gap"]
    if gap["value"] is not None and gap["low"] <= 0:
        loss = f"a stranger's history costs {with_interval(gap)} points"
        found.append(f"it may not use the history: {loss}" + (", which may be 0" if gap["high"] >= 0 else ""))
    if (measures["near_ties"] or 0) > 0.05 * 2 * metrics["pairs"] * measures["seeds"]:
        close = f"{measures['near_ties']:,} of its decisions are closer than {NEAR_TIE} nats"
        found.append(f"{close}. Rounding may change them")
    change = measures["chosen_change"]
    if change["value"] is not None and change["value"] < -1:
        chosen, rejected = (with_interval(measures[f"{name}_change"], sign="+") for name in ("chosen", "rejected"))
        falls = f"the chosen response became less likely, {chosen} nats from the reference (rejected: {rejected})"
        found.append(f"{falls}. This {'is' if change['high'] < 0 else 'may be'} likelihood displacement")
    return [f"{named(arm, metrics)}: {text}." for text in found]


def caveats_of_baselines(arm: str, metrics: dict[str, Any]) -> list[str]:
    """Which baselines are better than an arm, and which are not shown to be worse."""
    arms, comparisons = metrics["arms"], metrics["comparisons"]
    names = {"popularity": "the more popular film", "learned": "a logistic regression on counts"}
    baselines = {
        names.get(name, name): comparisons[f"{arm} - {name}"]
        for name, measures in arms.items()
        if measures["kind"] == "baseline" and f"{arm} - {name}" in comparisons
    }
    worse = [name for name, one in baselines.items() if one["high"] < 0]
    open_ = [name for name, one in baselines.items() if one["low"] <= 0 <= one["high"]]
    found = [f"it ranks worse than {listed(worse, 'and')}"] if worse else []
    found += [f"it is not shown to rank better than {listed(open_, 'or')}"] if open_ else []
    return [f"{named(arm, metrics)}: {text}." for text in found]


def caveats_of_verdict(metrics: dict[str, Any]) -> list[str]:
    """What a reader must know of the comparisons that the verdicts are on."""
    arms, comparisons, controls = metrics["arms"], metrics["comparisons"], sft_controls(metrics["arms"])
    difference, found = comparisons["dpo - sft"], []
    for arm in filter(None, ("sft", metrics["control"])):
        order_free, name = comparisons[f"dpo - {arm}"]["order_free_accuracy"], named(arm, metrics)
        sides = [(one["low"] > 0) - (one["high"] < 0) for one in (comparisons[f"dpo - {arm}"], order_free)]
        if sides[0] != sides[1]:
            told = f"Order-free accuracy against {name}: the difference is {interval_text(order_free)} points"
            hidden = ". A lean to one letter hides how they differ in the films that they prefer."
            same = ", which may be 0. They may lean to a letter differently and prefer the same films."
            found.append(told + (hidden if sides[1] else same))
    for arm in ("sft", *controls):
        seen = pairs_seen(arm, arms)
        if seen not in ("", "as many pairs"):
            why = "Unequal training may explain the difference"
            found.append(f"{named(arm, metrics)}: it saw {seen} as DPO, repeats counted. {why}.")
    for arm in controls:
        also = comparisons[f"dpo - {arm}"]
        says = also["verdict"].partition(" (")[0]
        if arm != metrics["control"] and says not in BETTER and (difference["low"] > 0 or also["high"] < 0):
            found.append(f"DPO: it {SAYS[says]} {arm} ({interval_text(also)} points).")
    if metrics["effective_users"] < metrics["users"] / 2:
        told = f"they count as {metrics['effective_users']:.0f} (Kish's effective number)"
        found.append(f"Few of the {metrics['users']:,} test users have most of the pairs: {told}.")
    few = [arm for arm in ("sft", "dpo", metrics["control"]) if arm and arms[arm]["seeds"] < RUNS_FOR_METHOD]
    if few:
        runs = "; ".join(f"{named(arm, metrics)}: {arms[arm]['seeds']}" for arm in few)
        against = " against the control" if few == [metrics["control"]] else ""
        found.append(
            f"Fewer than {RUNS_FOR_METHOD} training runs ({runs}): the verdict{against} is on these adapters. "
            "Another seed may give another result, and the intervals leave this out."
        )
    return found
