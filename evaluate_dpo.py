"""Compare base model, SFT, DPO and baselines that are no language models, on users that no arm was trained on.

    python evaluate_dpo.py                                     # the adapters that train_dpo.py wrote
    python evaluate_dpo.py --adapters strong=outputs/b05/llama3_dpo_4bit_final
    python evaluate_dpo.py --from_predictions outputs/evaluation/predictions.csv    # no model needed

Every held-out pair is scored in both orders. `predictions.csv` holds one row an arm, user and order, and all
measures are computed from it; `metrics.json`, `report.md` and `figures/` follow. Margins are in nats, preferred
minus other film; the unit of every interval is the user.
"""

from __future__ import annotations

import contextlib
import dataclasses
import html
import itertools
import json
import math
import re
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy.special import expit

if TYPE_CHECKING:
    import torch

import config
from config import EvaluationSettings, Settings, UserError
from data.pairs import ORDERS, STEM, Movie, Pair, PairsError, ids_digest, preference_row, preference_rows, recommended
from data.trees import Tree, ancestor_mask, pad_trees, token_tree

SCHEMA_VERSION = 1  # of metrics.json, which docs/metrics.md describes
MEASURES = {  # name: (label, unit)
    "ranking_accuracy": ("ranking accuracy", "%"),
    "response_accuracy": ("response accuracy", "%"),
    "order_free_accuracy": ("order-free accuracy", "%"),
    "position_bias": ("position bias (A - B)", "points"),
    "swap_consistency": ("swap consistency", "%"),
    "decision_margin": ("decision margin", "nats"),
    "response_margin": ("response margin", "nats"),
    "accuracy_with_popularity": ("ranking accuracy where the preferred film is the more popular", "%"),
    "accuracy_against_popularity": ("ranking accuracy where it is the less popular", "%"),
    "personalisation_gap": ("loss of ranking accuracy with a stranger's history", "points"),
    "precision_consistency": ("decisions that are the same in the first precision", "%"),
    "brier_score": ("Brier score of the decision", ""),
    "calibration_error": ("expected calibration error of the decision", ""),
}
LIMITS = {"%": (0, 100), "points": (-100, 100), "": (0, 1)}  # of a measure, by its unit
COMPARED = ("ranking_accuracy", "order_free_accuracy", "response_accuracy")  # whose differences between arms are given
PROBABILITY_MEASURES = ("decision_margin", "brier_score", "calibration_error")
MARGINS = ("decision_margin", "response_margin")
ARM_NAME = re.compile(r"\w[\w.+@ -]{0,59}")  # means nothing to a terminal, Markdown, LaTeX or matplotlib


def main(arguments: Sequence[str] | None = None) -> None:
    settings = config.parse_settings(EvaluationSettings, arguments)
    config.quiet_libraries()
    folder = config.evaluation_folder(settings)
    with config.only_run_in(folder):
        evaluate(settings, folder)


def evaluate(settings: EvaluationSettings, folder: Path) -> None:
    """Score unless predictions are given, measure, and write all that belongs into the folder."""
    source = Path(settings.from_predictions or folder / "predictions.csv")
    generation: dict[str, Any] = {}
    if settings.from_predictions:  # what lies beside them may be somebody else's
        run, answers = (read_run(source.with_name(name)) for name in ("run.json", "generation.json"))
        known = {arm: found for arm, found in answers.items() if ARM_NAME.fullmatch(arm) and isinstance(found, dict)}
        generation = {arm: found for arm, found in known.items() if all(isinstance(found.get(name), int | float) for name in OF_ANSWERS)}
    else:
        predictions, generated, run = predict(settings)
        if not config.is_main_process():
            return
        if generated is not None:
            config.write_text(folder / "generations.csv", generated.to_csv(index=False, lineterminator="\n"))
            generation = {arm: generation_measures(rows) for arm, rows in generated.groupby("arm", sort=False)}
            config.write_json(folder / "generation.json", generation)
        else:
            forget(folder, "generations.csv", "generation.json")
        config.write_text(source, predictions.to_csv(index=False, lineterminator="\n"))
    began = time.monotonic()
    predictions = read_predictions(source)
    if source.resolve() != (folder / "predictions.csv").resolve():  # what lies here is of other predictions
        forget(folder, "predictions.csv", "generations.csv", "generation.json", "run.json")
        config.write_text(folder / "predictions.csv", predictions.to_csv(index=False, lineterminator="\n"))
        for name, content in (("run.json", run), ("generation.json", generation)):  # or the next report would lack its mismatches
            if content:
                config.write_text(folder / name, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    metrics = compute_metrics(predictions, settings.resamples, settings.seed)
    config.write_json(folder / "metrics.json", metrics)
    model = model_of(run)
    kinds = {"mismatch": "mismatches", "note": "notes"}
    notes = [f"{kind}: {config.printable(str(text))}" for kind, name in kinds.items() for text in listed(run, name)]
    config.write_text(folder / "report.md", report(metrics, generation, notes, model))
    config.write_text(folder / "table.tex", latex(metrics))
    plot_all(predictions, metrics, folder / "figures")
    if not settings.from_predictions:
        run["seconds"]["measures, intervals and figures"] = round(time.monotonic() - began, 1)
        config.write_json(folder / "run.json", run)
        for arm, folders in reversed(run["adapters"].items()):  # where two arms have one folder, the first one's card stays
            for adapter in dict.fromkeys(folders.values()):
                print(write_card(Path(adapter), settings, arm, metrics, run["mismatches"]))
    print(table(metrics) + "\n" + "".join(f"\n{text}" for text in notes) + "\n" + summary(metrics, model) + f"\n\nwritten to {folder}")


def model_of(run: dict[str, Any] | Path) -> str:
    """The base model and its precision as a run.json of evaluation has them, in words; "" where it does not say."""
    if isinstance(run, Path):
        run = read_run(run)
    settings = run.get("settings")
    known = isinstance(settings, dict) and {"base_model", "bits"} <= settings.keys()
    return plain(f"{Path(str(settings['base_model'])).name} in {settings['bits']} bits") if known else ""


def read_run(path: Path) -> dict[str, Any]:
    """A run.json, which may be somebody else's; empty where there is none that can be read."""
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return run if isinstance(run, dict) else {}


def listed(run: dict[str, Any], name: str) -> list[Any]:
    """What a run.json lists under a name; nothing where it is no list."""
    found = run.get(name)
    return found if isinstance(found, list) else []


def forget(folder: Path, *names: str) -> None:
    """Remove what an earlier evaluation left in a folder and this one does not write."""
    for name in names:
        (folder / name).unlink(missing_ok=True)


# --------------------------------------------------------------------------------------------------- scoring


def predict(settings: EvaluationSettings) -> tuple[pd.DataFrame, pd.DataFrame | None, dict[str, Any]]:
    """Score every held-out pair in both orders under all arms.

    Returns:
        Rows of predictions.csv (one an arm, seed, user, order and history), rows of generations.csv (one an
        answer; None where none were asked for), and what run.json says: settings, adapters, mismatches that were
        allowed, seconds by part.

    Raises:
        UserError: an adapter is missing or was trained on another base model or split.
    """

    if config.process_count() > 1:
        from accelerate import PartialState

        PartialState(cpu=not config.cuda_present())  # joins the processes
    train, test = config.load_split(settings)
    if len(test) < 2:
        raise UserError(f"{len(test)} test users are too few for an interval", "Give more pairs, or raise --test_share.")
    adapters, mismatches = find_adapters(settings, ids_digest(test))
    for precision in precisions(settings):  # what cannot be had is said before hours of scoring
        config.load_tokenizer(precision)
        config.check_base_model(precision.base_model)
    popularity = film_counts(train)
    nothing = np.full((len(test), 2), np.nan)
    parts = baseline_frames(train, test)
    asked = sorted(test, key=lambda pair: pair.pair_id)[: settings.generate_users]
    generated: list[pd.DataFrame] = []
    seconds: dict[str, float] = {}

    for precision in precisions(settings):
        first = precision.bits == settings.bits
        suffix = "" if first else f"@{precision.bits}bit"
        with timed(seconds, f"loading{suffix}"):
            model, tokenizer = config.load_model(precision, scoring_dtype(settings.fast))
        trees = [pair_tree(pair, tokenizer) for pair in test]
        strangers = with_strangers(test) if settings.strangers and first else []
        strange = [pair_tree(pair, tokenizer, decision_only=True) for pair in strangers]
        loaded = [("base", "", None)] + [(arm, seed, path) for arm, folders in adapters.items() for seed, path in folders.items()]
        for arm, seed, path in loaded:
            if path is not None:
                model = load_adapter(model, f"{arm}_{seed}".replace(".", "_"), path)
            arm, run = arm + suffix, f"{arm}{suffix} {seed}".strip()
            with timed(seconds, f"scoring {run}"):
                scores = score(model, trees, settings.batch_users, run)
            parts.append(frame(arm, "model", seed, "own", test, popularity, *scores))
            if strange:
                with timed(seconds, f"scoring {run} with strangers' histories"):
                    decision, _ = score(model, strange, settings.batch_users, f"{run} with strangers")
                parts.append(frame(arm, "model", seed, "stranger", test, popularity, decision, nothing))
            if asked and first and config.is_main_process():
                orders = [ORDERS[index % 2] for index in range(len(asked))]
                prompts = [preference_row(pair, order)["prompt"] for pair, order in zip(asked, orders, strict=True)]
                with timed(seconds, f"generating {run}"):
                    answers = generate_answers(model, tokenizer, prompts, settings.generate_samples, settings.seed, run)
                generated.append(generation_rows(arm, seed, asked, orders, answers, genre_pattern(train + test)))
        model = None  # before the next precision is loaded
    run = {
        "settings": dataclasses.asdict(settings),
        "data": {"pairs_sha256": config.file_sha256(settings.pairs), "test_pairs": len(test), "test_digest": ids_digest(test)},
        "adapters": {arm: {seed: str(path) for seed, path in folders.items()} for arm, folders in adapters.items()},
        "mismatches": mismatches,
        "notes": notes_on(test, adapters) + notes_on_training(settings.bits, adapters),
        "processes": config.process_count(),
        "seconds": seconds,
        **config.environment_facts(),
        "compute_dtype": str(scoring_dtype(settings.fast)).removeprefix("torch."),
        "tensorfloat_32": settings.fast and config.cuda_present(),
    }
    return pd.concat(parts, ignore_index=True), pd.concat(generated) if generated else None, run


def scoring_dtype(fast: bool) -> torch.dtype:
    """float32; fast on a GPU lets it use TensorFloat-32 in matrix products, on a CPU it is bfloat16 where that is native."""
    import torch

    if fast and config.cuda_present():
        torch.set_float32_matmul_precision("high")
    return config.training_dtype() if fast and not config.cuda_present() else torch.float32


def precisions(settings: EvaluationSettings) -> list[EvaluationSettings]:
    """The settings of each precision to score in; a base model stored in 4 bits gives way to its 16-bit original."""
    found = [settings]
    if settings.second_bits:
        name = settings.base_model if settings.second_bits == 4 else config.original_name(settings.base_model)
        found.append(dataclasses.replace(settings, bits=settings.second_bits, base_model=name, second_bits=None))
    return found


@contextlib.contextmanager
def timed(seconds: dict[str, float], what: str) -> Iterator[None]:
    """Note how long the block takes, in seconds."""
    began = time.monotonic()
    yield
    seconds[what] = round(time.monotonic() - began, 1)


def generate_answers(
    model: Any, tokenizer: Any, prompts: Sequence[str], samples: int | None, seed: int, description: str
) -> list[list[str]]:
    """Answers to each prompt, [prompt][sample]: sampled at temperature 0.7 and top-p 0.95; samples None is one greedy answer."""
    import torch
    from tqdm.auto import tqdm

    torch.manual_seed(seed)
    answers: list[list[str]] = []
    sampling = {"do_sample": False} if samples is None else {"do_sample": True, "temperature": 0.7, "top_p": 0.95, "top_k": 0, "min_p": None}
    sampling |= {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "num_beams": 1}  # whatever the base model was published with
    samples = samples or 1
    step = max(1, (256 if config.cuda_present() else 64) // samples)
    starts = range(0, len(prompts), step)
    for start in tqdm(starts, desc=f"generating {description}", unit="batch", leave=False, disable=len(starts) == 1):
        text = tokenizer(prompts[start : start + step], return_tensors="pt", padding=True, padding_side="left").to(model.device)
        with torch.inference_mode():
            tokens = model.generate(
                **text,
                **sampling,
                max_new_tokens=96,
                num_return_sequences=samples,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        new = tokenizer.batch_decode(tokens[:, text["input_ids"].shape[1] :], skip_special_tokens=True)
        answers += [new[first : first + samples] for first in range(0, len(new), samples)]
    return answers


def generation_rows(
    arm: str, seed: str, pairs: Sequence[Pair], orders: Sequence[str], answers: Sequence[Sequence[str]], genres: re.Pattern[str]
) -> pd.DataFrame:
    """One row a generated answer: what it recommends, and whether it argues with that film's genres, of those that `genres` finds.

    own_genre: a genre of the recommended film is cited before the answer turns to the other option.
    foreign_genre: a genre is cited there that neither film has. Both are false where nothing is recommended.
    """
    rows = []
    for pair, order, texts in zip(pairs, orders, answers, strict=True):
        films = {order: pair.preferred, ORDERS[1 - ORDERS.index(order)]: pair.other}
        for sample, text in enumerate(texts):
            letter = recommended(text)
            argument = re.split(rf"Option {ORDERS[1 - ORDERS.index(letter)]}\b", text)[0] if letter else ""
            cited = set(genres.findall(argument))
            own = set(films[letter].genres) if letter else set()
            neither = cited - set(pair.preferred.genres) - set(pair.other.genres)
            answer = {"answer": letter or "", "own_genre": bool(cited & own), "foreign_genre": bool(neither), "text": text}
            rows.append({"arm": arm, "seed": seed, "pair_id": pair.pair_id, "order": order, "sample": sample} | answer)
    return pd.DataFrame(rows)


def genre_pattern(pairs: Sequence[Pair]) -> re.Pattern[str]:
    """Finds every genre that these pairs' films have, as a word of its own; the longer of two that begin alike."""
    known = {genre for pair in pairs for film in (pair.preferred, pair.other) for genre in film.genres}
    return re.compile("|".join(rf"(?<![\w-]){re.escape(genre)}(?![\w-])" for genre in sorted(known, key=len, reverse=True)))


def generation_measures(rows: pd.DataFrame) -> dict[str, float | None]:
    """Shares of the generated answers of one arm; what recommends no single option stays in every denominator.

    repeat_consistency: mean over users, and training runs, of the share of answers that agree with the most frequent one.
    """
    agree = [asked["answer"].value_counts().drop("", errors="ignore").max() / len(asked) for _, asked in rows.groupby(["seed", "pair_id"])]
    return {
        "answers": len(rows),
        "repeat_consistency": number(float(np.mean(np.nan_to_num(agree)))),
        "parsed": number(float((rows["answer"] != "").mean())),
        "right": number(float((rows["answer"] == rows["order"]).mean())),
        "cites_own_genre": number(float(rows["own_genre"].mean())),
        "cites_foreign_genre": number(float(rows["foreign_genre"].mean())),
    }


def with_strangers(pairs: Sequence[Pair]) -> list[Pair]:
    """The same choices, each with the history of another of these users: the next one by hash, the first after the last."""
    history = {pair.user_id: pair.history for pair in pairs}
    users = sorted(history)
    following = dict(zip(users, users[1:] + users[:1], strict=True))
    return [dataclasses.replace(pair, history=history[following[pair.user_id]]) for pair in pairs]


def find_adapters(settings: EvaluationSettings, test_digest: str) -> tuple[dict[str, dict[str, Path]], list[str]]:
    """(adapters by arm and seed, mismatches that were allowed); each adapter is there.

    The arms sft and dpo are where training writes them unless they are given; beside other arms alone they may lack.

    Raises:
        UserError: an adapter is missing or, unless mismatches are allowed, does not fit the base model or the split.
    """
    given = {}
    for text in settings.adapters:
        name, _, paths = text.partition("=")
        if not ARM_NAME.fullmatch(name) or not paths or "@" in name or name in (*given, "base", *BASELINES):
            raise UserError(f"--adapters {text}", "Give each as name=folder, with a name of its own of letters, digits and . _ + - alone.")
        given[name] = [Path(path) for path in paths.split(",")]
    usual = {stage: [config.adapter_folder(settings, stage)] for stage in ("sft", "dpo")}
    if given and not usual.keys() & given.keys():
        usual = {stage: folders for stage, folders in usual.items() if folders[0].is_dir()}
    arms = usual | given
    adapters: dict[str, dict[str, Path]] = {}
    mismatches = []
    for arm, folders in arms.items():
        for number, folder in enumerate(folders):
            if not folder.is_dir():
                stage = arm if arm in ("sft", "dpo") else "dpo"
                command = f"python train_dpo.py --preset {settings.preset} --stage {stage}"
                raise UserError(f"no adapter of the arm {arm} at {folder}", f"Make it with: {command}; or give --adapters {arm}=FOLDER")
            problem = config.adapter_problem(folder, settings, test_digest) or of_another_stage(folder, arm)
            if problem and not (settings.allow_mismatch and (folder / config.WEIGHTS).is_file()):
                raise UserError(problem, "Give the settings that it was trained with, or --allow_mismatch true to go on and report it.")
            if not problem and not (folder / "run.json").is_file():
                problem = f"{folder} came without run.json: whether it was trained on test pairs is not known"
            if not problem and read_run(folder / "run.json").get("initial_adapter_known") is False:
                problem = f"{folder} began with an adapter without run.json: whether that was trained on test pairs is not known"
            mismatches += [problem] if problem else []
            seeds = adapters.setdefault(arm, {})
            weights = config.file_sha256(folder / config.WEIGHTS)
            same = [known for known in seeds.values() if config.file_sha256(known / config.WEIGHTS) == weights]
            if same:
                raise UserError(f"{arm}: {folder} holds the same weights as {same[0]}", "Give each training run once.")
            seed = config.trained_seed(folder)
            seeds[seed if seed not in seeds else f"{seed}-{number}"] = folder
    return adapters, mismatches


def of_another_stage(folder: Path, arm: str) -> str:
    """Why an adapter cannot be what its arm's name says, as its run.json tells the stage that trained it; "" if it can."""
    named = "sft" if arm == "sft" or arm.startswith("sft_") else arm
    stage = read_run(folder / "run.json").get("stage")
    return f"{folder} is an adapter of {stage}, given as the arm {arm}" if (named, stage) in (("sft", "dpo"), ("dpo", "sft")) else ""


def notes_on(test: Sequence[Pair], adapters: dict[str, dict[str, Path]]) -> list[str]:
    """What the predictions cannot show and their reader must know: repeated histories, and unequal training."""
    notes = []
    repeated = len(test) - len({pair.history for pair in test})
    if repeated > 0.01 * len(test):
        notes.append(f"{repeated:,} of {len(test):,} test pairs share their history with another: intervals take each for a user of its own")
    seen = {arm: max(map(rows_seen, folders.values())) for arm, folders in adapters.items()}
    arms_of_sft = {arm: rows for arm, rows in seen.items() if rows and (arm == "sft" or arm.startswith("sft_"))}
    if arms_of_sft and seen.get("dpo", 0) > max(arms_of_sft.values()):
        listed = " and ".join(f"{arm} {rows:,}" for arm, rows in arms_of_sft.items())
        notes.append(
            f"dpo has seen {seen['dpo']:,} pairs in training, its SFT start included, and {listed}: an arm of longer SFT, "
            "named sft_long or the like, would tell DPO from more training"
        )
    notes += [
        f"{arm} has seen {rows:,} pairs in training, more than dpo with its SFT start ({seen['dpo']:,})"
        for arm, rows in arms_of_sft.items()
        if rows > seen.get("dpo", 0) > 0
    ]
    return notes


def notes_on_training(bits: int, adapters: dict[str, dict[str, Path]]) -> list[str]:
    """How adapters were made otherwise than a reader would think: in other bits, the runs of an arm not alike, or DPO from another
    SFT than the one beside it.
    """
    notes = []
    for arm, folders in adapters.items():
        runs = [read_run(folder / "run.json") for folder in folders.values()]
        made_with = [run["settings"] for run in runs if isinstance(run.get("settings"), dict)]
        known = [run for run in runs if run.get("settings") in made_with and run.get("stage") in ("sft", "dpo")]
        decisive = [config.trained_settings(run["stage"], run["settings"]) for run in known]
        others = sorted({name for one in decisive for name in one if one[name] != decisive[0].get(name)} - {"seed"})
        notes += [f"the training runs of {arm} differ in {', '.join(others)}, not in their seed alone"] if others else []
        trained = {settings["bits"] for settings in made_with if isinstance(settings.get("bits"), int)}
        notes += [f"{arm} was trained on weights in {other} bits and is read here on weights in {bits}" for other in sorted(trained - {bits})]
        starts = {run.get("initial_adapter_sha256") for run in runs} - {None}
        beside = {config.file_sha256(folder / config.WEIGHTS) for folder in adapters.get("sft", {}).values()} if starts else set()
        if arm == "dpo" and beside and not starts <= beside:
            notes.append("dpo began with another SFT adapter than the arm sft")
    return notes


def rows_seen(folder: Path) -> int:
    """Pairs seen by an adapter in all its training, with those of the SFT adapter that it began with; 0 if unknown."""
    run = read_run(folder / "run.json")
    runs = [run, read_run(Path(str(run["initial_adapter"])) / "run.json")] if run.get("initial_adapter") else [run]
    seen = [run.get("rows_seen") for run in runs]
    return sum(seen) if all(isinstance(rows, int) for rows in seen) else 0


def load_adapter(model: Any, name: str, folder: Path) -> Any:
    """The model with the named adapter switched on; the base model is shared by all adapters."""
    from peft import PeftModel

    if isinstance(model, PeftModel):
        model.load_adapter(str(folder), adapter_name=name)
    else:
        model = PeftModel.from_pretrained(model, str(folder), adapter_name=name)
    model.set_adapter(name)
    config.keep_from_repacking(model)
    return model.eval()


def pair_tree(pair: Pair, tokenizer: Any, decision_only: bool = False) -> Tree:
    """Tokenize a pair's four texts (two orders, two responses), as training does, into one tree.

    Its paths are, for [order][chosen, rejected], the nodes of the response's tokens from the option's letter, where
    the two part, to the end of text; decision_only leaves out what follows the letter.

    Raises:
        UserError: the tokenizer does not make the option's letter the first token that the responses differ in.
    """
    texts: list[list[int]] = []
    starts: list[int] = []
    for order in ORDERS:
        row = preference_row(pair, order)
        both = [
            [*tokenizer(row["prompt"] + row[response])["input_ids"], tokenizer.eos_token_id] for response in ("chosen", "rejected")
        ]
        parting = next(i for i, (chosen, rejected) in enumerate(zip(*both, strict=False)) if chosen != rejected)
        letters = [tokenizer.decode([text[parting]]).strip() for text in both]
        if parting != len(tokenizer(row["prompt"] + STEM)["input_ids"]) or letters != [order, ORDERS[1 - ORDERS.index(order)]]:
            raise UserError(
                f"the tokenizer cuts 'Option A' into {letters} and not into a letter of its own",
                "Use a base model whose tokenizer has ' A' and ' B' as tokens.",
            )
        texts += [text[: parting + 1] if decision_only else text for text in both]
        starts += [parting, parting]
    tree = token_tree(texts)
    paths = [path[start:] for path, start in zip(tree.paths, starts, strict=True)]
    return dataclasses.replace(tree, paths=[paths[:2], paths[2:]])


def score(model: Any, trees: Sequence[Tree], batch_users: int, description: str) -> tuple[np.ndarray, np.ndarray]:
    """(decision margins, response margins) in nats, each of shape (users, orders A and B).

    The decision margin is log p(preferred's letter) - log p(other's letter) after the stem; the response margin
    is the same for the whole responses. The stem, which both begin with, cancels out of it.
    """
    import torch
    from tqdm.auto import tqdm

    began = time.monotonic()
    margins = np.zeros((2, len(trees), 2))
    by_length = sorted(range(len(trees)), key=lambda user: len(trees[user].tokens))
    batches = [by_length[start : start + batch_users] for start in range(0, len(trees), batch_users)]
    mine = batches[config.process_index() :: config.process_count()]  # under `accelerate launch` the GPUs share them
    for users in tqdm(mine, desc=f"scoring {description}", unit="batch", leave=False, disable=not config.is_main_process()):
        with torch.inference_mode():
            for user, log_probs in zip(users, tree_log_probs(model, [trees[user] for user in users]), strict=True):
                margins[:, user] = tree_margins(trees[user], log_probs)
    if config.process_count() > 1:
        from accelerate.utils import gather_object

        margins = np.sum(gather_object([margins]), axis=0)  # 0 where another process scored
    print(f"scored {description}: {len(trees):,} users in {time.monotonic() - began:.1f} s", flush=True)
    return margins[0], margins[1]


def tree_margins(tree: Tree, log_probs: np.ndarray) -> np.ndarray:
    """(decision and response margin, orders A and B) in nats, from the log p of a pair's nodes."""
    decision = [log_probs[chosen[0]] - log_probs[rejected[0]] for chosen, rejected in tree.paths]
    response = [log_probs[chosen].sum() - log_probs[rejected].sum() for chosen, rejected in tree.paths]
    return np.array([decision, response])


def tree_log_probs(model: Any, trees: Sequence[Tree]) -> Iterator[np.ndarray]:
    """For each tree, log p of every response token given the path that leads to it, (n,); 0 elsewhere.

    Logits are made only where a response token is predicted.
    """
    import torch

    base = model.get_base_model() if hasattr(model, "peft_config") else model
    device = base.get_input_embeddings().weight.device
    batch = {name: torch.from_numpy(values).to(device) for name, values in pad_trees(trees).items()}
    hidden = base.base_model(
        input_ids=batch["tokens"], position_ids=batch["positions"], attention_mask=ancestor_mask(batch["ends"]), use_cache=False
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
    arm: str,
    kind: str,
    seed: str,
    history: str,
    pairs: Sequence[Pair],
    popularity: Counter[str],
    decision: np.ndarray,
    response: np.ndarray,
) -> pd.DataFrame:
    """Rows of predictions.csv for one arm, seed and history, from margins of shape (users, orders)."""
    counts = [(popularity[pair.preferred.title], popularity[pair.other.title]) for pair in pairs]
    return pd.DataFrame(
        {
            "arm": arm,
            "kind": kind,
            "seed": seed,
            "pair_id": np.repeat([pair.pair_id for pair in pairs], 2),
            "order": list(ORDERS) * len(pairs),
            "history": history,
            "decision_margin": decision.ravel().round(6),
            "response_margin": response.ravel().round(6),
            "preferred_more_popular": np.repeat(["tie" if a == b else str(a > b).lower() for a, b in counts], 2),
        }
    )


def baseline_frames(train: Sequence[Pair], test: Sequence[Pair]) -> list[pd.DataFrame]:
    """Rows of predictions.csv for each baseline."""
    popularity, nothing = film_counts(train), np.full((len(test), 2), np.nan)
    margins = baseline_margins(train, test)
    return [frame(arm, "baseline", "", "own", test, popularity, decision, nothing) for arm, decision in margins.items()]


# ------------------------------------------------------------------------------------------------- baselines

BASELINES = ("always A", "genre overlap", "co-occurrence", "popularity")


def films_watched(train: Sequence[Pair]) -> dict[str, set[str]]:
    """The titles that each training user watched, in the history or next, by the user's id."""
    watched: dict[str, set[str]] = defaultdict(set)
    for pair in train:
        watched[pair.user_id].update((*pair.history, pair.preferred.title))
    return watched


def film_counts(train: Sequence[Pair]) -> Counter[str]:
    """How many training users watched each title."""
    return Counter(title for titles in films_watched(train).values() for title in titles)


def baseline_margins(train: Sequence[Pair], test: Sequence[Pair]) -> dict[str, np.ndarray]:
    """Decision margins (users, orders) of the arms that are no language model, fitted on the training part only.

    Popularity takes the film that more training users watched; co-occurrence the one more often watched together
    with the history's films; genre overlap the one that shares more genres with them, film by film.
    """
    watched = film_counts(train)
    genres = {film.title: set(film.genres) for pair in train for film in (pair.preferred, pair.other)}
    together: dict[str, Counter[str]] = defaultdict(Counter)
    for titles in films_watched(train).values():
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


def user_measures(
    decision: np.ndarray, response: np.ndarray, stranger: np.ndarray, first: np.ndarray, more_popular: np.ndarray
) -> dict[str, np.ndarray]:
    """Each measure as columns over users, so that any resample of users is a mean over rows.

    Args:
        decision, response: margins in nats, (users, orders A and B).
        stranger: decision margins with another user's history, (users, orders); nan where not scored.
        first: decision margins of the same adapter in the first precision, (users, orders); nan where there is none.
        more_popular: 1 where the preferred film is the more popular one in training, 0 where it is not, nan for a tie.

    Returns:
        (users, columns): one column for a measure that is a mean over users; numerator and denominator for one that
        is a mean over some of them; for the calibration error, one column a bin. `reduce_columns` makes values of
        their means. A tie counts one half in accuracies, and is no consistent choice.
    """
    right, right_response = wins(decision), wins(response)
    probability = expit(decision)
    single = {
        "ranking_accuracy": right.mean(axis=1),
        "response_accuracy": right_response.mean(axis=1),
        "order_free_accuracy": wins(decision.sum(axis=1)),
        "position_bias": right[:, 0] - right[:, 1],
        "swap_consistency": (right[:, 0] == right[:, 1]) & (right[:, 0] != 0.5),
        "decision_margin": decision.mean(axis=1),
        "response_margin": response.mean(axis=1),
        "brier_score": ((1 - probability) ** 2).mean(axis=1),
        "personalisation_gap": (right - wins(stranger)).mean(axis=1),
        "precision_consistency": np.where(np.isnan(first), np.nan, wins(first) == right).mean(axis=1),
    }
    columns = {name: value.astype(float)[:, None] for name, value in single.items()}
    for name, wanted in (("accuracy_with_popularity", 1), ("accuracy_against_popularity", 0)):
        part = (more_popular == wanted).astype(float)
        columns[name] = np.column_stack([part * right.mean(axis=1), part])
    columns["calibration_error"] = calibration_columns(decision)
    return columns


def calibration_columns(decision: np.ndarray, bins: int = 15) -> np.ndarray:
    """(users, bins): by how much, in each bin of p(Option A), Option A was right more often than p says.

    p(Option A) is sigma(d) where the preferred film is Option A and sigma(-d) where it is Option B. The absolute
    means summed over bins are the expected calibration error (Naeini et al. 2015).
    """
    p_a = expit(decision * np.array([1, -1]))
    right = np.broadcast_to([1.0, 0.0], decision.shape)
    index = np.minimum((p_a * bins).astype(int), bins - 1)
    return np.stack([((right - p_a) * (index == number)).mean(axis=1) for number in range(bins)], axis=1)


def reduce_columns(name: str, means: np.ndarray) -> np.ndarray:
    """A measure's value from the means of its columns, (..., columns) -> (...)."""
    if name == "calibration_error":
        return np.abs(means).sum(axis=-1)
    if means.shape[-1] == 2:
        with np.errstate(invalid="ignore", divide="ignore"):
            return means[..., 0] / means[..., 1]
    return means[..., 0]


def wins(margin: np.ndarray) -> np.ndarray:
    """1 where the margin is above 0, one half where it is 0, nan where there is none."""
    return np.where(np.isnan(margin), np.nan, (margin > 0) + 0.5 * (margin == 0))


def draw_users(users: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each user is drawn in each resample, in blocks of shape (up to 500, users); always the same."""
    random = np.random.default_rng(seed)
    for start in range(0, resamples, 500):
        yield random.multinomial(users, np.full(users, 1 / users), size=min(500, resamples - start))


def bootstrap_means(values: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Means over resampled users, (resamples, columns), from values of shape (users, columns).

    The same users are drawn for every column, so that differences between columns are paired (Efron & Tibshirani
    1993, ch. 8).
    """
    return np.concatenate([draws @ values / len(values) for draws in draw_users(len(values), resamples, seed)])


def over_seeds(values: np.ndarray, seed: int) -> np.ndarray:
    """Means over resampled seeds, (resamples,) without those that are nan, from values of shape (resamples, seeds): the second
    level of the bootstrap. With one seed nothing is drawn, and what training's randomness does is not in the interval.

    Two corrections keep intervals of few seeds honest (tests/benchmarks/simulation.py). Resampling k seeds shows
    a variance too small by (k - 1) / k, and the tails of a normal distribution where few values have Student's:
    deviations are scaled by sqrt(k / (k - 1)) t_{k-1} / z (at 97.5%). And seeds differ also because each answers the
    users a little differently, which the bootstrap over users holds already: that share of their variance, which
    its samples show, is taken out (the random-effects estimate; Searle, Casella & McCulloch 1992, ch. 3).
    """
    from scipy.stats import norm, t

    if not np.isnan(values).all():
        values = values[~np.isnan(values).any(axis=1)]  # a resample without users that the measure is of
    resamples, seeds = values.shape
    mean = values.mean(axis=1)
    if seeds == 1 or resamples < 2:
        return mean
    covariance = np.cov(values.T)
    own_noise = np.diag(covariance).mean() - covariance[~np.eye(seeds, dtype=bool)].mean()
    observed = values.mean(axis=0).var(ddof=1)
    between = max(0.0, 1 - own_noise / observed) if observed > 0 else 0.0
    scale = math.sqrt(between * seeds / (seeds - 1)) * t.ppf(0.975, seeds - 1) / norm.ppf(0.975)
    drawn = np.random.default_rng([seed, seeds]).integers(seeds, size=(resamples, seeds))
    return mean + scale * (np.take_along_axis(values, drawn, axis=1).mean(axis=1) - mean)


def percentile_interval(samples: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    low, high = np.quantile(samples, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def difference_interval(samples: np.ndarray, users: int) -> tuple[float, float]:
    """95% interval of a difference of two arms' accuracies in points, from its bootstrap samples in points.

    The percentiles, moved apart by the continuity correction 1/n on each side (Fleiss, Levin & Paik 2003, ch. 13,
    for paired proportions): the difference moves in steps, and without it a true difference of 0 is called
    SUPPORTED a little more often than 2.5% of the time.
    """
    low, high = percentile_interval(samples)
    return low - 100 / users, high + 100 / users


def holm(p_values: Sequence[float]) -> list[float]:
    """p values corrected for their number (Holm 1979), in the order that they came in."""
    order = np.argsort(p_values)
    steps = np.maximum.accumulate([(len(p_values) - rank) * p_values[index] for rank, index in enumerate(order)])
    corrected = np.empty(len(p_values))
    corrected[order] = np.minimum(steps, 1.0)
    return corrected.tolist()


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


def verdict(difference: float, low: float, high: float, one_letter: bool = False) -> str:
    """The verdict on DPO - SFT, all in percentage points of ranking accuracy; the first rule that holds.

    Where both arms answer one letter almost whatever the options are, both have 50% for that reason alone, and equal
    accuracies say nothing of how they compare: that is INCONCLUSIVE.
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


def read_predictions(path: Path) -> pd.DataFrame:
    """The rows of predictions.csv.

    Raises:
        UserError: there is no such file, or it is none of evaluate_dpo.py's.
    """
    text = {name: str for name in ("arm", "kind", "seed", "pair_id", "order", "history", "preferred_more_popular")}
    try:
        predictions = pd.read_csv(
            path, dtype=text | dict.fromkeys(MARGINS, float), keep_default_na=False, na_values={name: [""] for name in MARGINS}
        )
        missing = {*text, *MARGINS} - {*predictions.columns}
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {str(error).splitlines()[0]}", "Give a predictions.csv of evaluate_dpo.py.") from None
    problem = f"has no column {', '.join(sorted(missing))}" if missing else ""
    if not problem:
        key = ["arm", "seed", "pair_id", "order", "history"]
        if predictions.empty:
            problem = "holds no rows"
        elif not (predictions["order"].isin(ORDERS) & predictions["history"].isin(("own", "stranger"))).all():
            problem = "has an order that is neither A nor B, or a history that is neither own nor stranger"
        elif predictions.duplicated(key).any():
            problem = f"has two rows for the same {', '.join(key)}"
        else:
            problem = incoherence(predictions)
    if problem:
        raise UserError(f"{path} {problem}", "Give a predictions.csv of evaluate_dpo.py.")
    return predictions


def incoherence(predictions: pd.DataFrame) -> str:
    """Why no measures can be computed from rows of the right form; "" if they can."""
    own = predictions[predictions["history"] == "own"]
    users = own["pair_id"].nunique()
    runs = own.groupby(["arm", "seed"]).size()
    if not predictions["arm"].map(lambda arm: bool(ARM_NAME.fullmatch(arm))).all():
        return "has an arm whose name holds other than letters, digits and . _ + - @"
    if not predictions["kind"].isin(("model", "baseline")).all() or (predictions.groupby("arm")["kind"].nunique() > 1).any():
        return "has an arm that is neither a model nor a baseline, or both"
    if not predictions["preferred_more_popular"].isin(("true", "false", "tie")).all():
        return "has a preferred_more_popular that is not true, false or tie"
    if predictions["decision_margin"].isna().any() or (predictions[list(MARGINS)].abs() > 1e6).any(axis=None):
        return "has a margin that is missing or above a million"
    if users < 2 or (runs != 2 * users).any():
        return f"does not have each of its {users} users (two at least) in both orders under every arm"
    return ""


def compute_metrics(predictions: pd.DataFrame, resamples: int, seed: int) -> dict[str, Any]:
    """All measures with 95% intervals, the comparisons of arms, and the verdict, from the rows of predictions.csv.

    An arm with several seeds is the mean over them; its intervals are over users and seeds. Users and, for arms of
    equally many seeds, seeds are drawn alike in every arm, so that differences are paired.
    """
    own, strange = (predictions[predictions["history"] == history] for history in ("own", "stranger"))
    users = own["pair_id"].drop_duplicates().sort_values()
    popular = own.drop_duplicates("pair_id").set_index("pair_id")["preferred_more_popular"].reindex(users)
    more_popular = popular.map({"true": 1.0, "false": 0.0}).to_numpy(dtype=float)
    samples: dict[str, dict[str, np.ndarray]] = {}  # by arm and measure, (resamples, seeds)
    accuracy: dict[str, np.ndarray] = {}
    order_free: dict[str, np.ndarray] = {}
    metrics: dict[str, Any] = {
        **{"schema_version": SCHEMA_VERSION, "users": len(users), "resamples": resamples, "seed": seed},
        "arms": {},
    }
    for arm, rows in own.groupby("arm", sort=False):
        by_seed = []
        total = np.zeros(len(users))
        near_ties = 0
        for run, run_rows in rows.groupby("seed"):  # sorted: runs of one seed are compared, whatever order they were given in
            decision, response = (margins(run_rows, name, users) for name in MARGINS)
            stranger = strange[(strange["arm"] == arm) & (strange["seed"] == run)]
            first = own[(own["arm"] == arm.partition("@")[0]) & (own["seed"] == run) & (arm != arm.partition("@")[0])]
            others = (margins(part, "decision_margin", users) for part in (stranger, first))
            by_seed.append(user_measures(decision, response, *others, more_popular))
            total += decision.sum(axis=1)
            near_ties += int((np.abs(decision) < 0.01).sum())
        kind = rows["kind"].iloc[0]
        found: dict[str, Any] = {"kind": kind, "seeds": len(by_seed), "near_ties": near_ties if kind == "model" else None}
        widths = np.cumsum([by_seed[0][name].shape[1] for name in MEASURES])[:-1]
        means = [bootstrap_means(np.column_stack([columns[name] for name in MEASURES]), resamples, seed) for columns in by_seed]
        split = [dict(zip(MEASURES, np.split(mean, widths, axis=1), strict=True)) for mean in means]
        for name, (_, unit) in MEASURES.items():
            scale = 100 if unit in ("%", "points") else 1
            if kind == "baseline" and name in PROBABILITY_MEASURES:  # a count is no log-probability
                found[name] = {"value": None, "low": None, "high": None}
                continue
            value = scale * np.mean([reduce_columns(name, columns[name].mean(axis=0)) for columns in by_seed])
            drawn = np.stack([scale * reduce_columns(name, part[name]) for part in split], axis=1)
            found[name] = estimate(name, value, over_seeds(drawn, seed))
            if name in COMPARED:
                samples.setdefault(arm, {})[name] = drawn
        accuracy[arm] = np.mean([columns["ranking_accuracy"][:, 0] for columns in by_seed], axis=0)
        order_free[arm] = wins(total)
        metrics["arms"][arm] = found

    models = [(arm, *arm.partition("@")) for arm in accuracy if metrics["arms"][arm]["kind"] == "model"]
    pairs_of_arms = [(arm, "sft" + at + bits) for arm, name, at, bits in models if name != "sft"]  # in one precision
    pairs_of_arms += [("dpo", arm) for arm in accuracy if arm not in ("dpo", "sft", "always A") and "@" not in arm]
    baselines = [arm for arm in accuracy if metrics["arms"][arm]["kind"] == "baseline" and arm != "always A"]
    pairs_of_arms += itertools.product(sft_controls(metrics), baselines)
    comparisons = {}
    for one, other in pairs_of_arms:
        if one in accuracy and other in accuracy:
            differences = {}
            for name in COMPARED:
                values = [metrics["arms"][arm][name]["value"] for arm in (one, other)]
                drawn = None if None in values else paired_samples(samples[one][name], samples[other][name], seed)
                low, high = (math.nan, math.nan) if drawn is None else difference_interval(drawn, len(users))
                value = math.nan if drawn is None else values[0] - values[1]
                differences[name] = {"value": number(value), "low": number(low), "high": number(high)}
            found = differences.pop("ranking_accuracy")
            smallest = detectable_difference(100 * (accuracy[one] - accuracy[other])) + 100 / len(users)
            comparisons[f"{one} - {other}"] = {
                **found,
                **differences,
                "p": mcnemar(order_free[one], order_free[other]),
                "detectable_points": number(smallest),
                # six users on one side are the fewest for which McNemar's exact p is below 0.05
                "users_needed_for_2_points": max(300, math.ceil(len(users) * (smallest / 2) ** 2)),
                "users_needed_to_decide": math.ceil(len(users) * max(1.0, found["high"] - found["low"]) ** 2),
            }
    for comparison, p in zip(comparisons.values(), holm([found["p"] for found in comparisons.values()]), strict=True):
        comparison["p_holm"] = p
    metrics["comparisons"] = comparisons
    for arm in ("sft", *sft_controls(metrics)):
        if found := comparisons.get(f"dpo - {arm}"):
            one_letter = all(letter_always_answered(metrics["arms"][name]) for name in (arm, "dpo"))
            found["verdict"] = verdict(found["value"], found["low"], found["high"], one_letter)
    if "dpo - sft" in comparisons:
        metrics["verdict"] = comparisons["dpo - sft"]["verdict"]
        metrics["caveats"] = caveats(metrics)
        metrics["sentence"] = sentence(metrics)
    return metrics


def sft_controls(metrics: dict[str, Any]) -> list[str]:
    """The arms of SFT beside `sft`, by name (sft_...), in the same precision: controls for what DPO's further training does."""
    return [arm for arm in metrics["arms"] if arm.startswith("sft_") and "@" not in arm]


def paired_samples(one: np.ndarray, other: np.ndarray, seed: int) -> np.ndarray:
    """Bootstrap samples of the difference of two arms, (resamples,), from each arm's samples (resamples, seeds)."""
    if one.shape == other.shape:
        return over_seeds(one - other, seed)
    return over_seeds(one, seed) - over_seeds(other, seed)


def letter_always_answered(measures: dict[str, Any]) -> str:
    """What letter an arm answers almost whatever the options are, in each of its runs its own or not; "" where it does not.

    Such an arm chooses another film when the options are swapped, for 9 of 10 users or more. Its position bias may be 0
    nevertheless: two runs of which one always answers A, the other B.
    """
    consistency = measures["swap_consistency"]["value"]
    if consistency is None or consistency > 10:
        return ""
    bias = measures["position_bias"]["value"]
    return "one letter" if abs(bias) < 80 else "A" if bias > 0 else "B"


def margins(rows: pd.DataFrame, name: str, users: pd.Series) -> np.ndarray:
    """One margin of one arm as (users, orders A and B), nan where there is no row."""
    wide = rows.pivot(index="pair_id", columns="order", values=name)
    return wide.reindex(index=users, columns=list(ORDERS)).to_numpy(dtype=float)


def estimate(name: str, value: float, samples: np.ndarray) -> dict[str, float | None]:
    """A measure's value and the percentile interval of its samples, within the measure's limits.

    The calibration error sums absolute values, which chance raises, and in a resample raises once more: percentiles would lie
    above the truth. Its interval is the basic bootstrap's, their reflection at the value (Davison & Hinkley 1997, ch. 5), as far
    as the value at least.
    """
    if math.isnan(value):
        return {"value": None, "low": None, "high": None}
    low, high = percentile_interval(samples[~np.isnan(samples)])
    if name == "calibration_error":
        low, high = 2 * value - high, max(value, 2 * value - low)
    low, high = np.clip((low, high), *LIMITS.get(MEASURES[name][1], (-math.inf, math.inf)))
    return {"value": number(value), "low": number(low), "high": number(high)}


def number(value: float) -> float | None:
    """A number for JSON: six decimals, null where there is none."""
    return None if math.isnan(value) else round(float(value), 6) + 0.0


# --------------------------------------------------------------------------------------------------- reports


def cell(value: dict[str, float | None], unit: str) -> str:
    if value["value"] is None:
        return "-"
    digits = {"nats": 2, "": 3}.get(unit, 1)
    return f"{value['value']:.{digits}f} [{value['low']:.{digits}f}, {value['high']:.{digits}f}]"


ON_TERMINAL = {  # measure: heading
    "ranking_accuracy": "ranking %",
    "response_accuracy": "response %",
    "order_free_accuracy": "order-free %",
    "swap_consistency": "swap consistency %",
    "position_bias": "position bias A - B",
}


def table_cells(metrics: dict[str, Any]) -> pd.DataFrame:
    """All arms (rows) and the main measures with 95% intervals (columns), as text."""
    arms = metrics["arms"]
    columns = {label: [cell(arms[arm][name], MEASURES[name][1]) for arm in arms] for name, label in ON_TERMINAL.items()}
    return pd.DataFrame(columns, index=list(arms))


def table(metrics: dict[str, Any]) -> str:
    """All arms and the main measures with 95% intervals, as aligned text."""
    cells = table_cells(metrics)
    rows = [["arm", *cells.columns], *([arm, *row] for arm, row in zip(cells.index, cells.to_numpy(), strict=True))]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def summary(metrics: dict[str, Any], model: str = "") -> str:
    """The comparison of DPO with SFT in words, with its caveats, verdict last; model is what the adapters belong to."""
    if "verdict" not in metrics:
        return "no verdict: there is no arm named sft, or none named dpo"
    found, arms = metrics["comparisons"]["dpo - sft"], metrics["arms"]
    several = max(arms[arm]["seeds"] for arm in ("sft", "dpo")) > 1
    lines = [
        f"DPO - SFT: {found['value']:+.1f} points of ranking accuracy, 95% interval [{found['low']:+.1f}, {found['high']:+.1f}], "
        f"{metrics['users']:,} users",
        *(
            f"  {label}: {interval_text(found[name])} points"
            for name, label in (("order_free_accuracy", "order-free"), ("response_accuracy", "whole responses"))
            if found.get(name, {}).get("value") is not None  # a metrics.json of an earlier version has none
        ),
        f"McNemar on order-free decisions{' of all training runs together' if several else ''}: p = {found['p']:.3g}, "
        f"{found['p_holm']:.3g} after Holm's correction for {len(metrics['comparisons'])} comparisons",
    ]
    if all(letter_always_answered(arms[arm]) for arm in ("sft", "dpo")):
        lines.append("both answer one letter almost always: more test users would not decide between them")
    else:
        without = ", the variation between training runs left out" if several else ""
        lines.append(
            f"smallest difference that these users tell from 0 with 80% power: {found['detectable_points']:.1f} points{without}"
        )
        if metrics["verdict"] == "INCONCLUSIVE" and several:
            lines.append("more training runs narrow the part of the interval that more users do not")
        elif metrics["verdict"] == "INCONCLUSIVE":
            lines.append(
                f"test users needed: about {found['users_needed_for_2_points']:,} to tell 2 points from 0 with 80% power, "
                f"about {found['users_needed_to_decide']:,} for an interval of ±0.5 points, which always decides"
            )
    lines += [f"caveat: {caveat}" for caveat in metrics["caveats"]]
    lines.append(f"to quote: {sentence(metrics, model)}")
    controls = {arm: metrics["comparisons"].get(f"dpo - {arm}", {}).get("verdict") for arm in sft_controls(metrics)}
    also = "".join(f"; against {arm}: {control}" for arm, control in controls.items() if control)
    return "\n".join([*lines, f"verdict: {metrics['verdict']}{also}"])


def interval_text(difference: dict[str, float]) -> str:
    return f"{difference['value']:+.1f} [{difference['low']:+.1f}, {difference['high']:+.1f}]"


def sentence(metrics: dict[str, Any], model: str = "") -> str:
    """The result as a sentence that a thesis may quote; it holds only together with its caveats.

    What model it is of is not in the predictions, so that metrics.json cannot say it; model adds it.
    """
    found, arms = metrics["comparisons"]["dpo - sft"], metrics["arms"]
    controls = [arm for arm in sft_controls(metrics) if "verdict" in metrics["comparisons"].get(f"dpo - {arm}", {})]

    def meaning(verdict: str, over: str) -> str:
        return {
            "SUPPORTED": f"which supports that DPO improves ranking adherence over {over}",
            "NOT SUPPORTED": f"which speaks against DPO improving ranking adherence over {over}",
            "PARTIAL: comparable": "so the two are within one point of each other",
            "PARTIAL: small gain": "a gain too small for the two points asked for",
            "INCONCLUSIVE": f"which is too uncertain to decide whether DPO improves ranking adherence over {over}",
        }[verdict]

    says = meaning(metrics["verdict"], "this SFT" if controls else "SFT")
    if all(letter_always_answered(arms[arm]) for arm in ("sft", "dpo")):
        says = "which says nothing of how they compare, since both answer one letter almost always"
    runs = [arms[arm]["seeds"] for arm in ("dpo", "sft")]
    trained = "one training run each" if max(runs) == 1 else f"{runs[0]} training runs each"
    if runs[0] != runs[1]:
        trained = f"{runs[0]} and {runs[1]} training runs"
    tested = "on order-free decisions" + (" of all runs together" if max(runs) > 1 else "")
    accuracies = " and ".join(f"{arms[arm]['ranking_accuracy']['value']:.1f}%" for arm in ("dpo", "sft"))
    also = ""
    for arm in controls:
        more = metrics["comparisons"][f"dpo - {arm}"]
        also += (
            f" From the SFT control {arm} ({arms[arm]['ranking_accuracy']['value']:.1f}%) DPO differs by {more['value']:+.1f} points "
            f"({more['low']:+.1f} to {more['high']:+.1f}), {meaning(more['verdict'], 'that one')}."
        )
    popularity = arms.get("popularity")
    baseline = f" Recommending the more popular film scores {popularity['ranking_accuracy']['value']:.1f}%." if popularity else ""
    return (
        f"On {metrics['users']:,} held-out users, each shown both orders of the options, DPO and SFT "
        f"{f'of {model} ' if model else ''}reached a ranking accuracy "
        f"of {accuracies} ({trained}), a difference of {found['value']:+.1f} percentage points "
        f"(95% interval {found['low']:+.1f} to {found['high']:+.1f}; exact McNemar p = {found['p']:.2g} {tested}), {says}.{also}{baseline}"
    )


def caveats(metrics: dict[str, Any]) -> list[str]:
    """What a reader of the verdict must know, each raised by rule."""
    arms, comparisons = metrics["arms"], metrics["comparisons"]
    models = [arm for arm, measures in arms.items() if measures["kind"] == "model" and arm != "base" and "@" not in arm]
    found = [caveat for arm in models for caveat in caveats_of(arm, metrics)]
    for arm in ("dpo", *sft_controls(metrics)):
        lost = {name: comparisons[f"{arm} - {name}"] for name in arms if arms[name]["kind"] == "baseline" and f"{arm} - {name}" in comparisons}
        for says, which in (
            ("loses to", [name for name, other in lost.items() if other["high"] < 0]),
            ("is not shown to be better than", [name for name, other in lost.items() if other["low"] <= 0 <= other["high"]]),
        ):
            names = {"popularity": "taking the more popular film"}
            listed = ", ".join(f"{names.get(name, name)} ({arms[name]['ranking_accuracy']['value']:.1f}%)" for name in which)
            if which:
                found.append(f"{arm} ({arms[arm]['ranking_accuracy']['value']:.1f}%) {says} {listed}")
    difference = comparisons["dpo - sft"]
    order_free = difference["order_free_accuracy"]
    if difference["low"] * difference["high"] > 0 and order_free["low"] <= 0 <= order_free["high"]:
        found.append(
            f"with both orders taken together the difference is {interval_text(order_free)} points, which may be 0: what differs may be "
            "how much they lean to one letter and not which film they prefer"
        )
    for arm in sft_controls(metrics):
        also = comparisons[f"dpo - {arm}"]
        if also["high"] < 0 < difference["low"]:
            found.append(f"dpo is better than sft and worse than {arm} ({interval_text(also)} points): what it gains, SFT alone can gain too")
        elif also["low"] <= 0 < difference["low"]:
            found.append(f"dpo is better than sft but not clearly than {arm} ({interval_text(also)} points): SFT alone may do as well")
    once = [arm for arm in ("sft", "dpo", *sft_controls(metrics)) if arms[arm]["seeds"] == 1]
    if {"sft", "dpo"} <= set(once):
        found.append("one training run an arm: what another seed would give is not in the interval")
    elif once:
        found.append(f"one training run of {' and of '.join(once)}: what another seed would give there is not in the intervals")
    return found


def caveats_of(arm: str, metrics: dict[str, Any]) -> list[str]:
    """What a reader of one arm's measures must know, whatever it is compared with."""
    found, measures = [], metrics["arms"][arm]
    letter = letter_always_answered(measures)
    if letter:
        found.append(f"{arm} answers {letter} almost whatever the options are: its ranking accuracy is 50% for that reason")
    against = measures["accuracy_against_popularity"]
    if not letter and against["value"] is not None and against["low"] <= 50:
        interval = f"{against['value']:.1f}% [{against['low']:.1f}, {against['high']:.1f}]"
        found.append(f"{arm} is not shown to be better than chance where the less popular film is the right one: {interval}")
    gap = measures["personalisation_gap"]
    if gap["value"] is not None and gap["low"] <= 0:
        found.append(f"{arm} may not use the history: with a stranger's it loses {gap['value']:.1f} points, interval includes 0")
    if (measures["near_ties"] or 0) > 0.05 * 2 * metrics["users"] * measures["seeds"]:
        found.append(f"{arm} decides {measures['near_ties']:,} times by less than 0.01 nats: rounding could turn them")
    return found


def minus_signs(text: str) -> str:
    return "--" if text == "-" else text.replace("-", "$-$")


def latex(metrics: dict[str, Any]) -> str:
    """The main table for a paper (booktabs)."""
    names = list(ON_TERMINAL)
    lines = [
        r"\begin{tabular}{l" + "r" * len(names) + "}",
        r"\toprule",
        " & ".join(["arm", *(f"{MEASURES[name][0]} ({MEASURES[name][1]})".replace("%", r"\%") for name in names)]) + r" \\",
        r"\midrule",
    ]
    for arm, measures in metrics["arms"].items():
        safe = "".join(rf"\{letter}" if letter in "&%$#_{}" else letter for letter in arm if letter not in "\\~^")
        lines.append(" & ".join([safe, *(minus_signs(cell(measures[name], MEASURES[name][1])) for name in names)]) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


OF_ANSWERS = ("answers", "repeat_consistency", "parsed", "right", "cites_own_genre", "cites_foreign_genre")  # as a report has them


def report(
    metrics: dict[str, Any], generation: dict[str, Any] | None = None, notes: Sequence[str] = (), model: str = ""
) -> str:
    """All measures and the verdict as Markdown."""
    arms = metrics["arms"]
    scored = f"{metrics['users']:,} test users, both orders; 95% intervals.{f' Adapters of {model}.' if model else ''}"
    lines = ["# DPO against SFT: ranking adherence", "", scored, ""]
    lines += ["| measure | " + " | ".join(arms) + " |", "|---|" + "---|" * len(arms)]
    for name, (label, unit) in MEASURES.items():
        heading = f"{label} ({unit})" if unit else label
        lines.append(f"| {heading} | " + " | ".join(cell(arms[arm][name], unit) for arm in arms) + " |")
    lines.append("| decisions by less than 0.01 nats | " + " | ".join(str(arms[arm]["near_ties"] or "-") for arm in arms) + " |")
    heads = ["comparison", "points of ranking accuracy", "order-free", "whole responses", "p (McNemar)", "p (Holm)", "detectable points"]
    lines += ["", "| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for name, found in metrics["comparisons"].items():
        values = [cell(part, "points") for part in (found, found["order_free_accuracy"], found["response_accuracy"])]
        values += [f"{found[key]:.3g}" for key in ("p", "p_holm", "detectable_points")]
        lines.append(f"| {name} | " + " | ".join(values) + " |")
    if generation:
        lines += ["", "| generated answers | " + " | ".join(name.replace("_", " ") for name in OF_ANSWERS) + " |", "|---|" + "---|" * len(OF_ANSWERS)]
        lines += [f"| {arm} | " + " | ".join(f"{found[name]:.3g}" for name in OF_ANSWERS) + " |" for arm, found in generation.items()]
    lines += ["", *(f"**{text.partition(': ')[0].capitalize()}:** {html.escape(text.partition(': ')[2])}  " for text in notes)]
    return "\n".join([*lines, *(line + "  " for line in summary(metrics, model).splitlines()), "", "![accuracy](figures/accuracy.png)", ""])


# ----------------------------------------------------------------------------------------------- model cards

CARD_MARK = "<!-- Written by this project's scripts, and written anew by them; delete this line to keep your own text. -->"
CARD = """# {kind} adapter: which of two films next?

LoRA (r {r}, alpha {alpha}) on the {precision} weights of `{base_model}`{history}. \
Shown five films that a person watched and two candidates, it says which one the person would watch next. For research.

## Use

In this folder; elsewhere with its path, or its name on the Hub, in place of `"."`{note}:

```python
{imports}
base = AutoModelForCausalLM.from_pretrained({base}, {weights})
model = PeftModel.from_pretrained(base, ".")
```

The tokenizer is the base model's. The prompt ends in a newline, and the answer begins with `{stem}`:

```text
{prompt}```

## Data

{data} In a pair, one film is what the person watched next, and the other one they never rated. Pairs made from MovieLens \
are GroupLens' data, whose licence allows research and forbids redistribution: none is in this folder. Cite F. Maxwell \
Harper and Joseph A. Konstan. 2015. The MovieLens Datasets: History and Context. ACM Transactions on Interactive \
Intelligent Systems 5, 4, Article 19. <https://doi.org/10.1145/2827872>

## Measures

{measures}

## Settings

{settings}

## Limits

{limits}- Read on other weights than the {precision} ones it decides differently.
- Its reasons follow the one sentence that it was trained on: they are no evidence of why.
- English titles, and the films that MovieLens' users rated."""
CARD_SETTINGS = {
    "sft": ["sft_epochs", "sft_learning_rate"],
    "dpo": ["init", "epochs", "learning_rate", "beta", "loss_type"],
    "both": [
        *("option_order", "lora_dropout", "effective_batch", "optim", "lr_scheduler", "warmup_steps", "weight_decay"),
        *("max_grad_norm", "seed"),
    ],
}
PRECISIONS = {  # bits: (their name, how transformers loads them)
    4: ("4-bit (NF4)", 'quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)'),
    8: ("8-bit (LLM.int8)", "quantization_config=BitsAndBytesConfig(load_in_8bit=True)"),
    16: ("16-bit", 'dtype="bfloat16"'),
}


def hub_card(settings: Settings, text: str, *tags: str, **data: Any) -> str:
    """A README.md for the Hub: metadata, text, licence. The Hub refuses a base model that it does not have, such as a folder."""
    from huggingface_hub import ModelCardData

    base = config.HUB_NAMES.get(settings.base_model, settings.base_model)
    data["base_model"] = base if re.fullmatch(r"[\w.-]+/[\w.-]+", base) and not Path(base).exists() else None
    data["license"] = licence = config.LICENCES.get(config.SHORT_NAMES.get(settings.base_model, ""))
    data["tags"] = ["recommendation", "movielens", *tags]
    terms = {None: "", "llama3": ", llama3. Built with Meta Llama 3"}.get(licence, f", {licence}")
    metadata = ModelCardData(language="en", pipeline_tag="text-generation", **data)
    return f"---\n{metadata.to_yaml()}\n---\n\n{CARD_MARK}\n\n{text}\n\nLicence: that of the base model{terms}.\n"


def model_card(
    folder: Path, settings: Settings, arm: str = "", metrics: dict[str, Any] | None = None, mismatches: Sequence[str] = ()
) -> str:
    """The model card of the adapter in a folder, with the measures of its arm; without metrics it was not evaluated."""
    files = (folder / "adapter_config.json", folder / "run.json")
    lora, run = (json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {} for file in files)
    trained, data = run.get("settings", {}), run.get("data", {})
    stage = run["stage"] if run.get("stage") in ("sft", "dpo") else ""
    precision, weights = PRECISIONS[trained.get("bits", settings.bits)]
    small = settings.base_model == config.SMALL_MODEL
    base = f'model_path("{settings.base_model}")' if small else json.dumps(settings.base_model)
    imports = "from peft import PeftModel; from transformers import AutoModelForCausalLM, BitsAndBytesConfig"
    film = Movie("title (year)", ("genre", "genre"))
    history, described, shown = "", "What it was trained on is not known: it came without run.json.", "Not known."
    if stage:
        start = {"sft": " from the SFT adapter, which is its reference, too", "base": " from the base model, which is its reference, too"}
        history = f", trained by {stage.upper()}" + (start.get(trained.get("init"), "") if stage == "dpo" else "")
    if run:
        names = [name for name in CARD_SETTINGS.get(stage, []) + CARD_SETTINGS["both"] if name in trained]
        shown = ", ".join(f"{name} {plain(trained[name])}" for name in names) + ". All of them, versions and log: `run.json`."
        described = (
            f"{plain(data.get('train_pairs'))} pairs of {plain(Path(str(trained.get('pairs'))).name)} for training in {plain(run.get('steps'))} "
            f"steps, {plain(data.get('validation_pairs'))} to watch it, {plain(data.get('test_pairs'))} held out."
        )
    measures, limits, index = "Not evaluated: how well it ranks is not known yet.", [], {}
    if metrics is not None:
        measures, results = card_measures(settings, arm, metrics)
        index = {"model_name": plain(folder.absolute().name), "eval_results": results}
        limits = [plain(text.removeprefix(f"{folder} ")) for text in mismatches if text.startswith(f"{folder} ")]
        limits += card_limits(arm, metrics)
    if small:
        limits.append("The base model's weights are unpacked from a file of 4 bits (GGUF Q4_1): close to the original's on the Hub, not the same")
    text = CARD.format(
        **{"kind": stage.upper() or "LoRA", "r": plain(lora.get("r")), "alpha": plain(lora.get("lora_alpha")), "precision": precision},
        **{"base_model": settings.base_model, "history": history, "data": described, "measures": measures, "settings": shown},
        **{"imports": imports + ("; from config import model_path" if small else ""), "base": base, "weights": weights},
        note="; `config` is this project's, and fetches these weights" if small else "",
        stem=STEM,
        prompt=preference_row(Pair(("title (year)",) * 5, film, film), "A")["prompt"],
        limits="".join(f"- {limit}.\n" for limit in limits),
    )
    return hub_card(settings, text, "lora", *([stage] if stage else []), library_name="peft", **index)


def plain(value: Any) -> str:
    """What somebody's file says, without what a reader of Markdown or HTML would obey."""
    return re.sub(r"[^\w .,:;%()'+=-]", "_", str(value))


def card_measures(settings: Settings, arm: str, metrics: dict[str, Any]) -> tuple[str, list[Any]]:
    """An arm's measures as Markdown, and the main ones as the Hub's metadata has them."""
    from huggingface_hub import EvalResult

    arms, found = metrics["arms"], metrics["arms"][arm]
    cells = {name: cell(found[name], unit) for name, (_, unit) in MEASURES.items() if found[name]["value"] is not None}
    labels = {name: f"{label} ({unit})" if unit else label for name, (label, unit) in MEASURES.items()}
    dataset = {"task_type": "text-generation", "dataset_type": "movielens", "dataset_name": "film pairs of held-out users, both orders"}
    results = [EvalResult(**dataset, metric_type=name, metric_name=labels[name], metric_value=cells[name]) for name in ON_TERMINAL if name in cells]
    beside = [name for name in ("popularity", "base", "sft", "dpo") if name in arms and name != arm]
    lines = [
        f"{metrics['users']:,} users held out by a hash, each pair in both orders of its options, on {PRECISIONS[settings.bits][0]} weights, "
        f"computed in {'less than float32 (--fast)' if settings.fast else 'float32'}; 95% intervals in brackets. Ranking accuracy "
        "asks which option's letter is likelier after the answer's first words, response accuracy which whole response; guessing has 50%."
        + (f" Means over the arm's {found['seeds']} training runs, of which this is one." if found["seeds"] > 1 else ""),
        *("", "| measure | value |", "|---|---|", *(f"| {labels[name]} | {value} |" for name, value in cells.items()), ""),
        "Ranking accuracy of others: " + ", ".join(f"{name} {cell(arms[name]['ranking_accuracy'], '%')}" for name in beside) + ".",
        *(["", metrics["sentence"]] if arm in ("sft", "dpo") and "sentence" in metrics else []),
    ]
    return "\n".join(lines), results


def card_limits(arm: str, metrics: dict[str, Any]) -> list[str]:
    """The caveats that concern an arm, and how many of its decisions another precision keeps, where that was measured."""
    found = caveats_of(arm, metrics)
    if arm in ("sft", "dpo"):
        found = [caveat for caveat in metrics.get("caveats", []) if not caveat.startswith("sft " if arm == "dpo" else "dpo ")]
    kept = {name: value["precision_consistency"] for name, value in metrics["arms"].items() if name.startswith(f"{arm}@")}
    return found + [f"on {name.partition('@')[2]} weights {cell(share, '%')}% of its decisions stay the same" for name, share in kept.items()]


def write_card(folder: Path, *about: Any) -> str:
    """Write an adapter's model card, about as `model_card` takes it; says in a line what was done, and never fails."""
    path = folder / "README.md"
    try:
        if path.exists() and not is_generated(path.read_text(encoding="utf-8", errors="replace")):
            return f"{path} is somebody's own text and stays as it is"
        config.write_text(path, model_card(folder, *about))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return config.printable(f"warning: no model card in {folder}: {error!r}")
    return f"model card: {path}"


def is_generated(text: str) -> bool:
    """Is this README.md ours, or as PEFT or TRL write it, so that nobody's work is lost with it?"""
    from huggingface_hub import ModelCard, ModelCardData

    gap = "[More Information Needed]"
    untouched = text.count(gap) == ModelCard.from_template(ModelCardData()).text.count(gap)
    return CARD_MARK in text or untouched or "It has been trained using [TRL]" in text


FIGURE_STYLE = {"font.size": 8, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}


def plot_all(predictions: pd.DataFrame | None, metrics: dict[str, Any], folder: Path) -> None:
    """Write every figure that these results allow, as PNG and PDF."""
    import matplotlib

    with matplotlib.rc_context(FIGURE_STYLE), config.whole_folder(folder) as made:
        for name, figure in draw_all(predictions, metrics).items():
            for ending in ("png", "pdf"):
                figure.savefig(made / f"{name}.{ending}", dpi=200)


def draw_all(predictions: pd.DataFrame | None, metrics: dict[str, Any]) -> dict[str, Any]:
    """Every figure that these results allow, by name; without predictions, those that metrics.json holds."""
    everyone = list(metrics["arms"])
    models = [arm for arm in everyone if metrics["arms"][arm]["kind"] == "model"]
    both = ["ranking_accuracy", "response_accuracy"], ["ranking", "response"]
    popular = ["accuracy_with_popularity", "accuracy_against_popularity"], ["preferred film more popular", "less popular"]
    figures = {
        "accuracy": draw_measures(metrics, everyone, *both, "accuracy, %", 50),
        "popularity": draw_measures(metrics, everyone, *popular, "ranking accuracy, %", 50),
        "position_bias": draw_measures(metrics, models, ["position_bias"], [""], "position bias, A - B, points", 0),
    }
    if predictions is not None:
        figures |= {
            "reliability": draw_reliability(predictions, models),
            "margins": draw_margins(predictions),
            "seeds": draw_seeds(predictions),
        }
    return {name: figure for name, figure in figures.items() if figure is not None}


def draw_measures(
    metrics: dict[str, Any], arms: Sequence[str], measures: Sequence[str], labels: Sequence[str], axis_label: str, middle: float
) -> Any:
    """One row an arm: measures with their 95% intervals."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.5, 0.28 * len(arms) + 0.9), layout="constrained")
    axis = figure.subplots()
    for number, (measure, label) in enumerate(zip(measures, labels, strict=True)):
        shown = [(row, metrics["arms"][arm][measure]) for row, arm in enumerate(arms)]
        shown = [(row, found) for row, found in shown if found["value"] is not None]
        if not shown:
            continue
        centre = np.array([found["value"] for _, found in shown])
        spread = np.abs(np.array([[found["low"], found["high"]] for _, found in shown]).T - centre)
        rows = np.array([row for row, _ in shown]) + 0.24 * (number - (len(measures) - 1) / 2)
        style = {"fmt": "os"[number], "color": ["black", "0.55"][number], "capsize": 2, "markersize": 3.5, "linewidth": 1}
        axis.errorbar(centre, rows, xerr=spread, label=label, **style)
    axis.axvline(middle, color="0.8", linewidth=0.8, zorder=0)
    axis.set(yticks=range(len(arms)), yticklabels=arms, xlabel=f"{axis_label} (95% interval)")
    axis.invert_yaxis()
    if len(measures) > 1:
        figure.legend(loc="outside upper center", ncols=2)
    return figure


def draw_reliability(predictions: pd.DataFrame, arms: Sequence[str]) -> Any:
    """How often Option A is right against p(Option A), in 15 bins; the diagonal is perfect calibration."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.5, 3.0), layout="constrained")
    axis = figure.subplots()
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
        style = {"marker": "os^Dv"[number % 5], "linestyle": ["-", "--", ":", "-."][number % 4], "markersize": 3.5, "linewidth": 1}
        axis.errorbar(bins["p"], bins["right"], yerr=error, label=arm, capsize=2, **style)
    axis.set(xlabel="p(Option A)", ylabel="share of times that Option A is right", xlim=(0, 1), ylim=(0, 1))
    figure.legend(loc="outside upper center", ncols=3)
    return figure


def margins_by_user(predictions: pd.DataFrame) -> pd.DataFrame:
    """Decision margins in nats, mean over orders and seeds, (users, arms)."""
    own = predictions[predictions["history"] == "own"]
    return own.pivot_table(index="pair_id", columns="arm", values="decision_margin", aggfunc="mean")


def draw_margins(predictions: pd.DataFrame) -> Any:
    """Decision margins of DPO against SFT, one point a user (mean over orders and seeds)."""
    from matplotlib.figure import Figure

    wide = margins_by_user(predictions)
    if not {"sft", "dpo"} <= set(wide):
        return None
    figure = Figure(figsize=(3.5, 3.2), layout="constrained")
    axis = figure.subplots()
    axis.scatter(wide["sft"], wide["dpo"], s=6, color="black", alpha=0.35, linewidths=0)
    axis.axhline(0, color="0.7", linewidth=0.8, zorder=0)
    axis.axvline(0, color="0.7", linewidth=0.8, zorder=0)
    for x, y, text in ((0.02, 0.98, "only DPO right"), (0.98, 0.98, "both right"), (0.02, 0.02, "both wrong"), (0.98, 0.02, "only SFT right")):
        side, height = ("left" if x < 0.5 else "right"), ("bottom" if y < 0.5 else "top")
        axis.text(x, y, text, transform=axis.transAxes, ha=side, va=height, color="0.4")
    axis.set(xlabel="SFT: decision margin, mean of both orders (nats)", ylabel="DPO: decision margin (nats)")
    return figure


def draw_seeds(predictions: pd.DataFrame) -> Any:
    """Ranking accuracy of each training run, where an arm has several."""
    from matplotlib.figure import Figure

    own = predictions[(predictions["history"] == "own") & (predictions["kind"] == "model")]
    accuracy = (100 * own.assign(right=wins(own["decision_margin"].to_numpy())).groupby(["arm", "seed"], sort=False)["right"].mean()).reset_index()
    if not accuracy.duplicated("arm").any():
        return None
    arms = list(dict.fromkeys(accuracy["arm"]))
    figure = Figure(figsize=(3.5, 0.28 * len(arms) + 0.8), layout="constrained")
    axis = figure.subplots()
    axis.scatter(accuracy["right"], accuracy["arm"].map(arms.index), s=16, facecolors="none", edgecolors="black")
    axis.axvline(50, color="0.8", linewidth=0.8, zorder=0)
    axis.set(yticks=range(len(arms)), yticklabels=arms, xlabel="ranking accuracy of each seed, %")
    axis.invert_yaxis()
    return figure


# ---------------------------------------------------------------------------------------- what the notebook shows

PUBLISHED = (Path("docs/results"), Path("docs/results/small"))


def or_say(call: Callable[..., Any], *arguments: Any) -> Any:
    """What the call returns; where the user must mend something first, None, and what and how is printed."""
    try:
        return call(*arguments)
    except (UserError, PairsError) as error:
        print(config.printable(str(error)))
        return None


def results_folder(evaluation: Path) -> Path:
    """This folder if it holds an evaluation, else that of the published experiment."""
    return next(folder for folder in (evaluation, *PUBLISHED) if (folder / "metrics.json").is_file())


def read_results(folder: Path) -> tuple[dict[str, Any], pd.DataFrame | None]:
    """(metrics.json, rows of predictions.csv or predictions.csv.gz; None where neither is there).

    Raises:
        UserError: they are of another version.
    """
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    if metrics.get("schema_version") != SCHEMA_VERSION:
        raise UserError(
            f"{folder}/metrics.json is of another version",
            f"Make it anew with: python evaluate_dpo.py --from_predictions {folder}/predictions.csv",
        )
    files = [path for name in ("predictions.csv", "predictions.csv.gz") if (path := folder / name).is_file()]
    return metrics, read_predictions(files[0]) if files else None


def training_runs(folder: Path) -> dict[str, dict[str, Any]]:
    """run.json of each training run by name, SFT first: of the adapters that were evaluated, or published beside the results."""
    files = {path.name.removesuffix(".run.json"): path for path in (*folder.glob("*.run.json"), *folder.glob("runs/main_*.run.json"))}
    if not files and (folder / "run.json").is_file():  # published results are not of the adapters that lie in outputs now
        adapters = json.loads((folder / "run.json").read_text(encoding="utf-8"))["adapters"]
        files |= {f"{arm} {seed}".strip(): Path(path) / "run.json" for arm, seeds in adapters.items() for seed, path in seeds.items()}
    runs = {name: json.loads(path.read_text(encoding="utf-8")) for name, path in sorted(files.items()) if path.is_file()}
    runs = {name: run for name, run in runs.items() if "stage" in run}  # an evaluation has none
    return dict(sorted(runs.items(), key=lambda run: run[1]["stage"] != "sft"))


def runs_table(runs: dict[str, dict[str, Any]]) -> pd.DataFrame:
    """One row a training run: what was trained, on how much, and how it went."""
    rows = {}
    for name, run in runs.items():
        settings = run["settings"]
        rows[name] = {
            "stage": run["stage"],
            "base model": settings["base_model"],
            "seed": settings["seed"],
            "rows": run["rows"],
            "steps": run["steps"],
            "learning rate": settings["sft_learning_rate" if run["stage"] == "sft" else "learning_rate"],
            "first loss": round(run["first_loss"], 4),
            "last loss": round(run["last_loss"], 4),
            "minutes": round(run["train_seconds"] / 60, 1),
            "device": run["device"],
        }
    return pd.DataFrame.from_dict(rows, orient="index")


def settings_of(folder: Path, runs: dict[str, dict[str, Any]], outputs: str) -> EvaluationSettings:
    """The settings that results were made with, from run.json or a training run; else the preset that fits this machine.

    outputs: where adapters lie on this machine. A pairs file that lay elsewhere is looked for in data/.
    """
    made = [json.loads((folder / "run.json").read_text(encoding="utf-8"))] if (folder / "run.json").is_file() else []
    saved = next((run["settings"] for run in (*made, *runs.values())), {"preset": "thesis" if config.cuda_present() else "small"})
    names = {setting.name for setting in dataclasses.fields(EvaluationSettings)} - {"preset", "outputs"}
    settings = config.preset_settings(
        EvaluationSettings, saved["preset"], outputs=outputs, **{name: saved[name] for name in names & saved.keys()}
    )
    here = Path("data") / Path(settings.pairs).name
    return settings if Path(settings.pairs).is_file() or not here.is_file() else dataclasses.replace(settings, pairs=str(here))


def describe_pairs(train: Sequence[Pair], test: Sequence[Pair], seed: int) -> pd.DataFrame:
    """Both parts of the data in figures. Letters are balanced in training by a draw from the seed, in the test by both orders."""
    watched = film_counts(train)
    shown = {"training": "balanced", "test": "both"}
    columns = {}
    for (name, order), pairs in zip(shown.items(), (train, test), strict=True):
        films = [film for pair in pairs for film in (pair.preferred, pair.other)]
        letters = [recommended(row["chosen"]) for row in preference_rows(pairs, order, seed)]
        columns[name] = {
            "pairs": f"{len(pairs):,}",
            "users": f"{len({pair.user_id for pair in pairs}):,}",
            "different films as options": f"{len({film.title for film in films}):,}",
            "genres a film, mean": f"{np.mean([len(film.genres) for film in films]):.2f}",
            "preferred film is Option A in the file, %": f"{100 * np.mean([pair.order == 'A' for pair in pairs]):.1f}",
            "preferred film is Option A as models see it, %": f"{100 * np.mean([letter == 'A' for letter in letters]):.1f}",
            "preferred film is the more popular one, %": "{:.1f}".format(
                100 * np.mean([watched[pair.preferred.title] > watched[pair.other.title] for pair in pairs])
            ),
        }
    return pd.DataFrame(columns)


def draw_genres(pairs: Sequence[Pair]) -> Any:
    """Share of the preferred and of the other films that have each genre."""
    from matplotlib.figure import Figure

    kinds = {"preferred film": [pair.preferred for pair in pairs], "other film": [pair.other for pair in pairs]}
    counts = {kind: Counter(genre for film in films for genre in film.genres) for kind, films in kinds.items()}
    genres = [genre for genre, _ in sum(counts.values(), Counter()).most_common()]
    figure = Figure(figsize=(3.5, 0.17 * len(genres) + 0.9), layout="constrained")
    axis = figure.subplots()
    for (kind, found), style in zip(counts.items(), ({"color": "black"}, {"facecolors": "none", "edgecolors": "black"}), strict=True):
        axis.scatter([100 * found[genre] / len(pairs) for genre in genres], range(len(genres)), s=12, label=kind, **style)
    axis.set(yticks=range(len(genres)), yticklabels=genres, xlabel="share of the films that have the genre, %", xlim=(0, None))
    axis.invert_yaxis()
    axis.legend(loc="lower right")
    return figure


def draw_popularity(train: Sequence[Pair]) -> Any:
    """Which share of the preferred and of the other films was watched by at most so many training users."""
    from matplotlib.figure import Figure

    watched = film_counts(train)
    figure = Figure(figsize=(3.5, 2.6), layout="constrained")
    axis = figure.subplots()
    axis.ecdf([watched[pair.preferred.title] for pair in train], color="black", label="preferred film")
    axis.ecdf([watched[pair.other.title] for pair in train], color="black", linestyle="--", label="other film")
    axis.set_xscale("symlog", linthresh=1)
    axis.xaxis.set_major_formatter("{x:g}")
    axis.set(xlabel="training users who watched the film, at most", ylabel="share of the films", ylim=(0, 1))
    axis.legend()
    return figure


@dataclasses.dataclass(frozen=True)
class Arms:
    """One base model that holds the adapters of several arms; the arm `base` is all of them switched off."""

    model: Any
    tokenizer: Any
    names: tuple[str, ...]

    @contextlib.contextmanager
    def switched_to(self, arm: str) -> Iterator[Any]:
        """The model as this arm."""
        with self.model.disable_adapter() if arm == "base" else contextlib.nullcontext():
            if arm != "base":
                self.model.set_adapter(arm)
            yield self.model


def load_arms(settings: EvaluationSettings, test: Sequence[Pair]) -> Arms:
    """The base model, once, with the first adapter each of the arms sft and dpo.

    Raises:
        UserError: as predict.
    """
    adapters, mismatches = find_adapters(settings, ids_digest(test))
    print("".join(f"mismatch: {mismatch}\n" for mismatch in mismatches), end="")
    model, tokenizer = config.load_model(settings, scoring_dtype(settings.fast))
    names = [arm for arm in ("sft", "dpo") if arm in adapters]
    for arm in names:
        model = load_adapter(model, arm, next(iter(adapters[arm].values())))
    return Arms(model, tokenizer, ("base", *names))


def predict_with(arms: Arms, train: Sequence[Pair], test: Sequence[Pair], batch_users: int) -> pd.DataFrame:
    """Rows of predictions.csv for these test pairs under the baselines and the arms that are loaded."""
    parts = baseline_frames(train, test)
    trees = [pair_tree(pair, arms.tokenizer) for pair in test]
    for arm in arms.names:
        with arms.switched_to(arm) as model:
            margins = score(model, trees, batch_users, arm)
        parts.append(frame(arm, "model", "", "own", test, film_counts(train), *margins))
    return pd.concat(parts, ignore_index=True)


def side_by_side(arms: Arms, pair: Pair) -> Iterator[pd.DataFrame]:
    """What every arm makes of one pair: rows of `choices`, first without answers, then again as each arm has answered.

    An answer is what greedy decoding writes after the prompt of its order; it takes much longer than the choice.
    """
    import torch

    tree = pair_tree(pair, arms.tokenizer)
    prompts = [preference_row(pair, order)["prompt"] for order in ORDERS]
    parts = []
    for arm in arms.names:
        with arms.switched_to(arm) as model, torch.inference_mode():
            [log_probs] = tree_log_probs(model, [tree])
        parts.append(choices(arm, pair, tree_margins(tree, log_probs)[0], ["", ""]))
    rows = pd.concat(parts, ignore_index=True)
    yield rows
    for arm in arms.names:
        with arms.switched_to(arm) as model:
            answers = generate_answers(model, arms.tokenizer, prompts, None, 0, arm)
        rows.loc[rows["arm"] == arm, "answer"] = [text for [text] in answers]
        yield rows


def recorded_choices(predictions: pd.DataFrame, pair: Pair) -> pd.DataFrame:
    """What the arms that are models made of one pair when they were evaluated (each one's first seed), without answers."""
    rows = predictions[(predictions["pair_id"] == pair.pair_id) & (predictions["history"] == "own") & (predictions["kind"] == "model")]
    rows = rows.drop_duplicates(["arm", "order"]).sort_values("order", kind="stable")
    parts = [choices(arm, pair, found["decision_margin"].to_numpy(), ["", ""]) for arm, found in rows.groupby("arm", sort=False)]
    return pd.concat(parts, ignore_index=True)


def choices(arm: str, pair: Pair, decision: np.ndarray, answers: Sequence[str]) -> pd.DataFrame:
    """One row an order: what an arm recommends, and its answer.

    decision: decision margins in nats, (orders A and B); a row holds its own as `margin`, and as `probability` that of
    the letter which it recommends, p(letter) / (p(A) + p(B)).
    """
    rows = []
    for order, margin, text in zip(ORDERS, decision, answers, strict=True):
        letter = order if margin > 0 else ORDERS[1 - ORDERS.index(order)]
        film = pair.preferred if margin > 0 else pair.other
        probability = float(expit(abs(margin)))
        row = {"arm": arm, "order": order, "letter": letter, "film": film.title, "margin": margin, "probability": probability}
        rows.append(row | {"answer": text})
    return pd.DataFrame(rows)


def choices_html(pair: Pair, rows: pd.DataFrame, genres: re.Pattern[str], known: bool = True) -> str:
    """One pair and the rows of `choices` as HTML; all text of others is escaped.

    In an answer, genres of the film that it recommends are bold, any other genre is underlined.
    known: the preferred film was watched next; if not, it is only the first of two.
    """

    def named(film: str, extra: str = "") -> str:
        right = "" if not known else ", <b>right</b>" if film == pair.preferred.title else ", <b>wrong</b>"
        return html.escape(film) + extra + right

    first, second = ("the film watched next", "the other film") if known else ("film 1", "film 2")
    left = "text-align:left; vertical-align:top"
    lines = ["<p><b>history</b>: " + "; ".join(map(html.escape, pair.history)) + "</p>"]
    lines += [f"<p><b>{role}</b>: {html.escape(str(film))}</p>" for role, film in ((first, pair.preferred), (second, pair.other))]
    lines.append('<table style="width:100%; table-layout:fixed"><tr><th style="width:3em"></th>')
    lines += [f'<th style="{left}">with {first} as Option {order}</th>' for order in ORDERS]
    lines.append(f'<th style="{left}; width:11em">both orders together</th>')
    for arm, found in rows.groupby("arm", sort=False):
        lines.append(f'</tr><tr><td style="{left}"><b>{html.escape(arm)}</b></td>')
        for row in found.itertuples():
            shown = {row.order: pair.preferred, ORDERS[1 - ORDERS.index(row.order)]: pair.other}
            says = recommended(row.answer)
            answer = marked(row.answer, set(shown[says].genres) if says else set(), genres)
            lines.append(f'<td style="{left}"><b>{row.letter}</b>: {named(row.film, f" (p = {row.probability:.2f})")}<br>{answer}</td>')
        lines.append(f'<td style="{left}">{named((pair.preferred if found["margin"].sum() > 0 else pair.other).title)}</td>')
    return '<div class="tex2jax_ignore">' + "\n".join([*lines, "</tr></table>"]) + "</div>"


def marked(text: str, own: set[str], genres: re.Pattern[str]) -> str:
    """Text as HTML, ↵ for an end of line, with its genres marked: bold where they are among `own`, underlined otherwise."""
    text = re.sub(r"\s*\n\s*", " ↵ ", text.strip())
    pieces, end = [], 0
    for found in genres.finditer(text):
        tag = "b" if found[0] in own else "u"
        pieces += [html.escape(text[end : found.start()]), f"<{tag}>{html.escape(found[0])}</{tag}>"]
        end = found.end()
    return "".join([*pieces, html.escape(text[end:])])


def disagreements(predictions: pd.DataFrame | None, right: str, wrong: str) -> list[str]:
    """The pair_ids of users whom one arm gets right and another wrong, orders and seeds taken together; the clearest first."""
    margins = pd.DataFrame() if predictions is None else margins_by_user(predictions)
    if not {right, wrong} <= set(margins):
        return []
    found = margins[(margins[right] > 0) & (margins[wrong] < 0)]
    return list((found[wrong] - found[right]).sort_values(kind="stable").index)


def user_groups(test: Sequence[Pair], predictions: pd.DataFrame | None, live: bool) -> dict[str, list[str]]:
    """pair_ids of the test users who can be shown, by what the arms made of them; live: the arms are loaded."""
    recorded = set() if predictions is None else set(predictions["pair_id"])
    shown = [pair.pair_id for pair in test if live or pair.pair_id in recorded]
    groups = {
        "SFT right, DPO wrong": disagreements(predictions, "sft", "dpo"),
        "DPO right, SFT wrong": disagreements(predictions, "dpo", "sft"),
    }
    return {"all test users": shown} | {name: [user for user in users if user in set(shown)] for name, users in groups.items()}


def user_picker(show: Callable[[str], None], groups: dict[str, list[str]]) -> Any:
    """A widget to choose a group of users and one of them; what show(pair_id) displays stands below.

    Raises:
        UserError: ipywidgets is not installed.
    """
    widgets = import_widgets()
    group = widgets.Dropdown(description="users", options=[(f"{name} ({len(users):,})", users) for name, users in groups.items() if users])
    user = widgets.Dropdown(description="user", options=group.value)
    group.observe(lambda change: setattr(user, "options", change["new"]), "value")
    return widgets.VBox([widgets.HBox([group, user]), widgets.interactive_output(lambda pair_id: show(pair_id), {"pair_id": user})])


def own_pair_box(show: Callable[..., None], history: Sequence[str], one: tuple[str, str], other: tuple[str, str]) -> Any:
    """A widget to write a history and two films, beginning with those given; show(history, one, other) stands below.

    Raises:
        UserError: ipywidgets is not installed.
    """
    widgets = import_widgets()
    wide = {"layout": widgets.Layout(width="40em"), "style": {"description_width": "8em"}}
    titles = widgets.Textarea("\n".join(history), description="five films", rows=len(history) + 1, **wide)
    films = [
        (widgets.Text(film[0], description=f"film {number}", **wide), widgets.Text(film[1], description="its genres", **wide))
        for number, film in enumerate((one, other), start=1)
    ]
    button, output = widgets.Button(description="Compare"), widgets.Output()

    def compare(_: Any) -> None:
        output.clear_output(wait=True)
        with output:
            show(titles.value.splitlines(), *((title.value, genres.value) for title, genres in films))

    button.on_click(compare)
    return widgets.VBox([titles, *(field for film in films for field in film), button, output])


def import_widgets() -> Any:
    try:
        import ipywidgets
    except ImportError:
        raise UserError("ipywidgets is not installed", "Install it with pip, or call the functions with arguments of your own.") from None
    return ipywidgets


if __name__ == "__main__":
    config.run_script(main)
