"""Compare base model, SFT, DPO and baselines that are no language models, on users that no arm was trained on.

    python evaluate_dpo.py                                     # the adapters that train_dpo.py wrote
    python evaluate_dpo.py --adapters strong=outputs/b05/llama3_dpo_4bit_final
    python evaluate_dpo.py --from_predictions outputs/evaluation/predictions.csv    # no model needed

Every held-out pair is scored in both orders. `predictions.csv` holds one row an arm, user and order, and all
measures are computed from it; `metrics.json`, `report.md` and `figures/` follow. Margins are in nats, preferred
minus other film; the unit of every interval is the user.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

import config
from config import EvaluationSettings, UserError
from data.pairs import ORDERS, STEM, Movie, Pair, ids_digest, preference_row

SCHEMA_VERSION = 1
MEASURES = {  # name: (label, unit)
    "ranking_accuracy": ("ranking accuracy", "%"),
    "response_accuracy": ("response accuracy", "%"),
    "order_free_accuracy": ("order-free accuracy", "%"),
    "position_bias": ("position bias (A - B)", "points"),
    "swap_consistency": ("swap consistency", "%"),
    "decision_margin": ("decision margin", "nats"),
    "response_margin": ("response margin", "nats"),
}


def main(arguments: Sequence[str] | None = None) -> None:
    settings = config.parse_settings(EvaluationSettings, arguments)
    config.quiet_libraries()
    folder = config.evaluation_folder(settings)
    if settings.from_predictions:
        source = Path(settings.from_predictions)
    else:
        source = folder / "predictions.csv"
        predictions = predict(settings)
        if not config.is_main_process():
            return
        folder.mkdir(parents=True, exist_ok=True)
        write_text(source, predictions.to_csv(index=False, lineterminator="\n"))
    metrics = compute_metrics(read_predictions(source), settings.resamples, settings.seed)
    folder.mkdir(parents=True, exist_ok=True)
    config.write_json(folder / "metrics.json", metrics)
    write_text(folder / "report.md", report(metrics))
    plot_accuracy(metrics, folder / "figures")
    print(table(metrics) + "\n\n" + summary(metrics) + f"\n\nwritten to {folder}")


def write_text(path: Path, text: str) -> None:
    """Write a file, whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


# --------------------------------------------------------------------------------------------------- scoring


def predict(settings: EvaluationSettings) -> pd.DataFrame:
    """Score every held-out pair in both orders under all arms: one row an arm, user and order.

    Raises:
        UserError: an adapter is missing or was trained on another base model or split.
    """
    import torch

    if config.process_count() > 1:
        from accelerate import PartialState

        PartialState(cpu=not config.cuda_present())  # joins the processes
    train, test = config.load_split(settings)
    adapters = find_adapters(settings, ids_digest(test))
    popularity = film_counts(train)
    parts = [
        frame(arm, "baseline", test, popularity, decision, np.full_like(decision, np.nan))
        for arm, decision in baseline_margins(train, test).items()
    ]
    model, tokenizer = config.load_model(settings, torch.float32)
    trees = [pair_tree(pair, tokenizer) for pair in test]
    parts.append(frame("base", "model", test, popularity, *score(model, trees, settings.batch_users, "base")))
    for arm, adapter in adapters.items():
        model = load_adapter(model, arm, adapter)
        parts.append(frame(arm, "model", test, popularity, *score(model, trees, settings.batch_users, arm)))
    return pd.concat(parts, ignore_index=True)


def find_adapters(settings: EvaluationSettings, test_digest: str) -> dict[str, Path]:
    """The adapters to compare, by arm; each is there, and fits the base model and the split."""
    adapters = {}
    for stage in ("sft", "dpo"):
        given = getattr(settings, f"{stage}_adapter")
        adapters[stage] = Path(given or config.adapter_folder(settings, stage))
        if not adapters[stage].is_dir():
            command = f"python train_dpo.py --preset {settings.preset} --stage {stage}"
            raise UserError(f"no {stage.upper()} adapter at {adapters[stage]}", f"Make it with: {command}")
    for text in settings.adapters:
        name, _, path = text.partition("=")
        if not name or not path or name in (*adapters, "base", *BASELINES):
            raise UserError(f"--adapters {text}", "Give each as name=folder, with a name of its own.")
        adapters[name] = Path(path)
    for folder in adapters.values():
        problem = config.adapter_problem(folder, settings, test_digest)
        if problem:
            raise UserError(problem, "Train one for these settings with train_dpo.py, or give the settings it was trained with.")
    return adapters


def load_adapter(model: Any, name: str, folder: Path) -> Any:
    """The model with the named adapter switched on; the base model is shared by all adapters."""
    from peft import PeftModel

    if isinstance(model, PeftModel):
        model.load_adapter(str(folder), adapter_name=name)
    else:
        model = PeftModel.from_pretrained(model, str(folder), adapter_name=name)
    model.set_adapter(name)
    config.keep_weights_unpacked(model)
    return model.eval()


@dataclasses.dataclass(frozen=True)
class Tree:
    """The four texts of a pair (two orders, two responses) as one tree of tokens, so that each beginning that
    texts share is computed once.

    tokens, parents: (n,) of each node; the root's parent is -1 and a parent stands before its children.
    paths: for [order][chosen, rejected], the nodes of the response's tokens from the option's letter, where the
        two part, to the end of text.
    """

    tokens: np.ndarray
    parents: np.ndarray
    paths: list[list[np.ndarray]]


def pair_tree(pair: Pair, tokenizer: Any) -> Tree:
    """Tokenize a pair in both orders, as training does, into one tree.

    Raises:
        UserError: the tokenizer does not make the option's letter the first token that the responses differ in.
    """
    tokens: list[int] = []
    parents: list[int] = []
    children: dict[tuple[int, int], int] = {}
    paths = []
    for order in ORDERS:
        row = preference_row(pair, order)
        both = []
        for response in ("chosen", "rejected"):
            node, path = -1, []
            for token in [*tokenizer(row["prompt"] + row[response])["input_ids"], tokenizer.eos_token_id]:
                if (node, token) not in children:
                    children[node, token] = len(tokens)
                    tokens.append(token)
                    parents.append(node)
                node = children[node, token]
                path.append(node)
            both.append(path)
        parting = next(i for i, (chosen, rejected) in enumerate(zip(*both, strict=False)) if chosen != rejected)
        stem = tokenizer(row["prompt"] + STEM)["input_ids"]
        letters = [tokenizer.decode([tokens[path[parting]]]).strip() for path in both]
        if parting != len(stem) or letters != [order, ORDERS[1 - ORDERS.index(order)]]:
            raise UserError(
                f"the tokenizer cuts 'Option A' into {letters} and not into a letter of its own",
                "Use a base model whose tokenizer has ' A' and ' B' as tokens.",
            )
        paths.append([np.array(path[parting:]) for path in both])
    return Tree(np.array(tokens), np.array(parents), paths)


def score(model: Any, trees: Sequence[Tree], batch_users: int, description: str) -> tuple[np.ndarray, np.ndarray]:
    """(decision margins, response margins) in nats, each of shape (users, orders A and B).

    The decision margin is log p(preferred's letter) - log p(other's letter) after the stem; the response margin
    is the same for the whole responses. The stem, which both begin with, cancels out of it.
    """
    import torch
    from tqdm import tqdm

    began = time.monotonic()
    margins = np.zeros((2, len(trees), 2))
    by_length = sorted(range(len(trees)), key=lambda user: len(trees[user].tokens))
    batches = [by_length[start : start + batch_users] for start in range(0, len(trees), batch_users)]
    mine = batches[config.process_index() :: config.process_count()]  # under `accelerate launch` the GPUs share them
    for users in tqdm(mine, desc=f"scoring {description}", unit="batch", leave=False, disable=not config.is_main_process()):
        with torch.inference_mode():
            for user, log_probs in zip(users, tree_log_probs(model, [trees[user] for user in users]), strict=True):
                for order, (chosen, rejected) in enumerate(trees[user].paths):
                    margins[0, user, order] = log_probs[chosen[0]] - log_probs[rejected[0]]
                    margins[1, user, order] = log_probs[chosen].sum() - log_probs[rejected].sum()
    if config.process_count() > 1:
        from accelerate.utils import gather_object

        margins = np.sum(gather_object([margins]), axis=0)  # 0 where another process scored
    print(f"scored {description}: {len(trees):,} users in {time.monotonic() - began:.1f} s", flush=True)
    return margins[0], margins[1]


def tree_log_probs(model: Any, trees: Sequence[Tree]) -> Iterator[np.ndarray]:
    """For each tree, log p of every response token given the path that leads to it, (n,); 0 elsewhere.

    Each node attends to its ancestors alone, at the position of its depth, so that what comes out is what the
    four texts would give one by one. Logits are made only where a response token is predicted.
    """
    import torch

    base = model.get_base_model() if hasattr(model, "peft_config") else model
    device = base.get_input_embeddings().weight.device
    length = max(len(tree.tokens) for tree in trees)
    tokens = np.zeros((len(trees), length), dtype=np.int64)
    positions = np.zeros_like(tokens)
    attends = np.tile(np.eye(length, dtype=bool), (len(trees), 1, 1))
    for index, tree in enumerate(trees):
        tokens[index, : len(tree.tokens)] = tree.tokens
        for node, parent in enumerate(tree.parents):
            if parent >= 0:
                attends[index, node, : node] = attends[index, parent, : node]
                positions[index, node] = positions[index, parent] + 1
    hidden = base.base_model(
        input_ids=torch.from_numpy(tokens).to(device),
        position_ids=torch.from_numpy(positions).to(device),
        attention_mask=torch.from_numpy(attends[:, None]).to(device),
        use_cache=False,
    ).last_hidden_state
    head = base.get_output_embeddings()
    for index, tree in enumerate(trees):
        nodes = np.unique(np.concatenate([path for order in tree.paths for path in order]))
        logits = head(hidden[index, tree.parents[nodes]]).float()
        targets = torch.from_numpy(tree.tokens[nodes]).to(device)
        picked = logits.gather(-1, targets[:, None])[:, 0] - logits.logsumexp(-1)
        log_probs = np.zeros(len(tree.tokens))
        log_probs[nodes] = picked.double().cpu().numpy()
        yield log_probs


def frame(
    arm: str, kind: str, pairs: Sequence[Pair], popularity: Counter[str], decision: np.ndarray, response: np.ndarray
) -> pd.DataFrame:
    """Rows of predictions.csv for one arm, from margins of shape (users, orders)."""
    counts = [(popularity[pair.preferred.title], popularity[pair.other.title]) for pair in pairs]
    return pd.DataFrame(
        {
            "arm": arm,
            "kind": kind,
            "seed": "",
            "pair_id": np.repeat([pair.pair_id for pair in pairs], 2),
            "order": list(ORDERS) * len(pairs),
            "history": "own",
            "decision_margin": decision.ravel().round(6),
            "response_margin": response.ravel().round(6),
            "preferred_more_popular": np.repeat(["tie" if a == b else str(a > b).lower() for a, b in counts], 2),
        }
    )


# ------------------------------------------------------------------------------------------------- baselines

BASELINES = ("always A", "genre overlap", "co-occurrence", "popularity")


def film_counts(train: Sequence[Pair]) -> Counter[str]:
    """How many training users watched each title (in the history, or next)."""
    return Counter(title for pair in train for title in (*pair.history, pair.preferred.title))


def baseline_margins(train: Sequence[Pair], test: Sequence[Pair]) -> dict[str, np.ndarray]:
    """Decision margins (users, orders) of the arms that are no language model, fitted on the training part only.

    Popularity takes the film that more training users watched; co-occurrence the one more often watched together
    with the history's films; genre overlap the one that shares more genres with them, film by film.
    """
    watched = film_counts(train)
    genres = {film.title: set(film.genres) for pair in train for film in (pair.preferred, pair.other)}
    together: dict[str, Counter[str]] = defaultdict(Counter)
    for pair in train:
        titles = {*pair.history, pair.preferred.title}
        for title in titles:
            together[title].update(titles - {title})

    def overlap(pair: Pair, film: Movie) -> int:
        return sum(len(genres.get(title, set()) & set(film.genres)) for title in pair.history)

    scores = {
        "genre overlap": overlap,
        "co-occurrence": lambda pair, film: sum(together[title][film.title] for title in pair.history),
        "popularity": lambda pair, film: watched[film.title],
    }
    margins = {"always A": np.tile([1.0, -1.0], (len(test), 1))}
    for arm, value in scores.items():
        difference = [value(pair, pair.preferred) - value(pair, pair.other) for pair in test]
        margins[arm] = np.repeat(np.array(difference, dtype=float)[:, None], 2, axis=1)
    return margins


# -------------------------------------------------------------------------------------------------- measures


def user_measures(decision: np.ndarray, response: np.ndarray) -> dict[str, np.ndarray]:
    """Each measure user by user, so that its value is the mean over users.

    Args:
        decision, response: margins in nats, (users, orders A and B).

    Returns:
        Arrays of shape (users,); accuracies, consistency and bias as shares of 1. A tie counts one half; a tie in
        either order is no consistent choice.
    """
    right, right_response = wins(decision), wins(response)
    return {
        "ranking_accuracy": right.mean(axis=1),
        "response_accuracy": right_response.mean(axis=1),
        "order_free_accuracy": wins(decision.sum(axis=1)),
        "position_bias": right[:, 0] - right[:, 1],
        "swap_consistency": (right[:, 0] == right[:, 1]) & (right[:, 0] != 0.5),
        "decision_margin": decision.mean(axis=1),
        "response_margin": response.mean(axis=1),
    }


def wins(margin: np.ndarray) -> np.ndarray:
    """1 where the margin is above 0, one half where it is 0, nan where there is none."""
    return np.where(np.isnan(margin), np.nan, (margin > 0) + 0.5 * (margin == 0))


def bootstrap_means(values: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Means over resampled users, (resamples, columns), from values of shape (users, columns).

    The same users are drawn for every column, so that differences between columns are paired (Efron & Tibshirani
    1993, ch. 8).
    """
    random = np.random.default_rng(seed)
    users = len(values)
    means = np.empty((resamples, values.shape[1]))
    for start in range(0, resamples, 500):
        rows = slice(start, min(start + 500, resamples))
        draws = random.multinomial(users, np.full(users, 1 / users), size=rows.stop - rows.start)
        means[rows] = draws @ values / users
    return means


def percentile_interval(samples: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    low, high = np.quantile(samples, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def mcnemar(right_one: np.ndarray, right_other: np.ndarray) -> float:
    """p of McNemar's exact test on two arms' right (1) or wrong (0) answers to the same users; a tie is left out."""
    from scipy.stats import binomtest

    wins_one = int(np.sum((right_one == 1) & (right_other == 0)))
    wins_other = int(np.sum((right_one == 0) & (right_other == 1)))
    return binomtest(wins_one, wins_one + wins_other).pvalue if wins_one + wins_other else 1.0


def detectable_difference(differences: np.ndarray) -> float:
    """The smallest mean difference that these users could show with 80% power at the two-sided 5% level.

    (z_0.975 + z_0.8) standard errors of the paired difference (users,), in the same unit.
    """
    from scipy.stats import norm

    if len(differences) < 2:
        return math.nan
    return float((norm.ppf(0.975) + norm.ppf(0.8)) * differences.std(ddof=1) / math.sqrt(len(differences)))


def verdict(difference: float, low: float, high: float) -> str:
    """The verdict on DPO - SFT, all in percentage points of ranking accuracy; the first rule that holds."""
    if difference > 2 and low > 0:
        return "SUPPORTED"
    if difference < 0 and high < 0:
        return "NOT SUPPORTED"
    if low >= -1 and high <= 1:
        return "PARTIAL: comparable"
    if difference > 0 and low > 0:
        return "PARTIAL: small gain"
    return "INCONCLUSIVE"


def read_predictions(path: Path) -> pd.DataFrame:
    columns = {name: str for name in ("arm", "kind", "seed", "pair_id", "order", "history", "preferred_more_popular")}
    try:
        predictions = pd.read_csv(path, dtype=columns, keep_default_na=False, na_values={name: [""] for name in MARGINS})
        missing = {*columns, *MARGINS} - {*predictions.columns}
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {str(error).splitlines()[0]}", "Give a predictions.csv of evaluate_dpo.py.") from None
    if missing:
        raise UserError(f"{path} has no column {', '.join(sorted(missing))}", "Give a predictions.csv of evaluate_dpo.py.")
    return predictions


MARGINS = ("decision_margin", "response_margin")


def compute_metrics(predictions: pd.DataFrame, resamples: int, seed: int) -> dict[str, Any]:
    """All measures with 95% intervals, DPO against SFT, and the verdict, from the rows of predictions.csv."""
    arms: dict[str, dict[str, np.ndarray]] = {}
    kinds = {}
    for arm, rows in predictions[predictions["history"] == "own"].groupby("arm", sort=False):
        wide = rows.pivot(index="pair_id", columns="order", values=list(MARGINS)).sort_index()
        arms[arm] = user_measures(*(wide[margin][list(ORDERS)].to_numpy(dtype=float) for margin in MARGINS))
        kinds[arm] = rows["kind"].iloc[0]
    columns = [(arm, measure) for arm in arms for measure in MEASURES]
    values = np.column_stack([arms[arm][measure] for arm, measure in columns]).astype(float)
    scale = np.array([1.0 if MEASURES[measure][1] == "nats" else 100.0 for _, measure in columns])
    values *= scale
    samples = dict(zip(columns, bootstrap_means(values, resamples, seed).T, strict=True))
    point = dict(zip(columns, values.mean(axis=0), strict=True))

    metrics: dict[str, Any] = {"schema_version": SCHEMA_VERSION, "users": len(values), "resamples": resamples, "seed": seed}
    metrics["arms"] = {
        arm: {"kind": kinds[arm]} | {name: estimate(point[arm, name], samples[arm, name]) for name in MEASURES} for arm in arms
    }
    if {"sft", "dpo"} <= set(arms):
        key = "ranking_accuracy"
        paired = 100 * (arms["dpo"][key] - arms["sft"][key])
        difference = estimate(paired.mean(), samples["dpo", key] - samples["sft", key])
        smallest = detectable_difference(paired)
        metrics["dpo_minus_sft"] = difference | {
            "p": mcnemar(arms["dpo"]["order_free_accuracy"], arms["sft"]["order_free_accuracy"]),
            "detectable_points": number(smallest),
            "users_needed_for_2_points": math.ceil(len(values) * (smallest / 2) ** 2),
            "verdict": verdict(difference["value"], difference["low"], difference["high"]),
            "caveats": caveats(metrics),
        }
    return metrics


def estimate(value: float, samples: np.ndarray) -> dict[str, float | None]:
    low, high = percentile_interval(samples)
    return {"value": number(value), "low": number(low), "high": number(high)}


def number(value: float) -> float | None:
    """A number for JSON: six decimals, null where there is none."""
    return None if math.isnan(value) else round(float(value), 6) + 0.0


# --------------------------------------------------------------------------------------------------- reports


def cell(value: dict[str, float | None], unit: str) -> str:
    if value["value"] is None:
        return "-"
    digits = 2 if unit == "nats" else 1
    return f"{value['value']:.{digits}f} [{value['low']:.{digits}f}, {value['high']:.{digits}f}]"


ON_TERMINAL = {  # measure: heading
    "ranking_accuracy": "ranking %",
    "response_accuracy": "response %",
    "order_free_accuracy": "order-free %",
    "swap_consistency": "swap consistency %",
    "position_bias": "position bias A - B",
}


def table(metrics: dict[str, Any]) -> str:
    """All arms and the main measures with 95% intervals, as aligned text."""
    rows = [["arm", *ON_TERMINAL.values()]]
    for arm, measures in metrics["arms"].items():
        rows.append([arm, *(cell(measures[name], MEASURES[name][1]) for name in ON_TERMINAL)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def summary(metrics: dict[str, Any]) -> str:
    """The comparison of DPO with SFT in words, verdict last."""
    if "dpo_minus_sft" not in metrics:
        return "no verdict: there is no arm named sft, or none named dpo"
    found = metrics["dpo_minus_sft"]
    lines = [
        f"DPO - SFT: {found['value']:+.1f} points of ranking accuracy, 95% interval [{found['low']:+.1f}, {found['high']:+.1f}], "
        f"{metrics['users']:,} users, McNemar p = {found['p']:.3g}",
        f"smallest difference that these users could show with 80% power: {found['detectable_points']:.1f} points",
    ]
    if found["verdict"] == "INCONCLUSIVE":
        lines.append(f"to show a difference of 2 points, about {found['users_needed_for_2_points']:,} test users are needed")
    lines += [f"caveat: {caveat}" for caveat in found["caveats"]]
    return "\n".join([*lines, f"verdict: {found['verdict']}"])


def caveats(metrics: dict[str, Any]) -> list[str]:
    """What a reader of the verdict must know, each raised by rule."""
    found = []
    arms = metrics["arms"]
    for arm in ("sft", "dpo"):
        bias = arms[arm]["position_bias"]["value"]
        if abs(bias) >= 90:
            letter = "A" if bias > 0 else "B"
            found.append(f"{arm} answers {letter} almost whatever the options are: its ranking accuracy is 50% for that reason")
    popularity, dpo = arms.get("popularity"), arms["dpo"]["ranking_accuracy"]
    if popularity and dpo["value"] < popularity["ranking_accuracy"]["value"]:
        found.append(f"dpo ({dpo['value']:.1f}%) loses to taking the more popular film ({popularity['ranking_accuracy']['value']:.1f}%)")
    return found


def report(metrics: dict[str, Any]) -> str:
    """The same as Markdown."""
    header = ["arm", *(f"{label} ({unit})" for label, unit in MEASURES.values())]
    lines = ["# DPO against SFT: ranking adherence", "", f"{metrics['users']:,} test users, both orders; 95% intervals.", ""]
    lines += ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for arm, measures in metrics["arms"].items():
        cells = [arm, *(cell(measures[name], unit) for name, (_, unit) in MEASURES.items())]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *(line + "  " for line in summary(metrics).splitlines()), "", "![accuracy](figures/accuracy.png)", ""])


def plot_accuracy(metrics: dict[str, Any], folder: Path) -> None:
    """Ranking and response accuracy of all arms with 95% intervals, as PNG and PDF."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    arms = list(metrics["arms"])
    figure, axis = plt.subplots(figsize=(5.2, 0.45 * len(arms) + 1.1), layout="constrained")
    styles = {"ranking_accuracy": ("o", "black", "ranking", -0.12), "response_accuracy": ("s", "0.6", "response", 0.12)}
    for measure, (marker, colour, label, shift) in styles.items():
        found = [(row, metrics["arms"][arm][measure]) for row, arm in enumerate(arms)]
        found = [(row, value) for row, value in found if value["value"] is not None]
        centre = np.array([value["value"] for _, value in found])
        spread = np.abs(np.array([[value["low"], value["high"]] for _, value in found]).T - centre)
        rows = np.array([row for row, _ in found]) + shift
        axis.errorbar(centre, rows, xerr=spread, fmt=marker, color=colour, label=label, capsize=2, markersize=4)
    axis.axvline(50, color="0.8", linewidth=0.8, zorder=0)
    axis.set(yticks=range(len(arms)), yticklabels=arms, xlabel="accuracy on held-out users, % (95% interval)")
    axis.invert_yaxis()
    axis.legend(frameon=False, loc="lower right")
    folder.mkdir(parents=True, exist_ok=True)
    for ending in ("png", "pdf"):
        figure.savefig(folder / f"accuracy.{ending}", dpi=200)
    plt.close(figure)


if __name__ == "__main__":
    config.run_script(main)
