"""Compare base model, SFT, DPO and baselines that are no language models, on users that no arm was trained on.

    python evaluate_dpo.py                                     # the adapters that train_dpo.py wrote
    python evaluate_dpo.py --adapters strong=outputs/b05/llama3_dpo_4bit_final
    python evaluate_dpo.py --from_predictions outputs/evaluation/predictions.csv    # no model needed

Every held-out pair is scored in both orders. `predictions.csv` holds one row per arm, run, pair and order; all measures
are computed from it. `metrics.json`, `report.md` and `figures/` follow. Margins are in nats, preferred minus other
film; the unit of every interval is the user.
"""

import contextlib
import dataclasses
import json
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

import config
from config import EvaluationSettings
from data import runs
from data.adapters import adapter_mismatch, adapter_problem
from data.baselines import BASELINES, film_counts
from data.bases import ANOTHER, original_name
from data.display import BEING_WRITTEN, choices
from data.errors import UserError
from data.figures import plot_all
from data.files import file_sha256, only_run_in, read_json, write_json, write_text
from data.measures import OF_ANSWERS, check_same_pairs, compute_metrics, generation_measures, interaction
from data.pairs import ORDERS, Pair, ids_digest, preference_row, preference_rows, warnings_on, with_strangers
from data.predictions import (
    ARM_NAME,
    as_csv,
    baseline_rows,
    generation_rows,
    genre_pattern,
    left_out,
    prediction_rows,
    read_predictions,
)
from data.report import emphasised, latex, report, summary, write_card
from data.runs import RUN, STAGES, WEIGHTS, Adapters, Lineage, lineage, model_of, notes_of, read_run, settings_of
from data.tokens import check_tokens, pair_tree
from data.trees import Tree, ancestor_mask, pad_trees
from data.verdict import change_text, judge

MADE_OF_THEM = ("metrics.json", "interaction.json", "report.md", "table.tex")  # of predictions


def main(arguments: Sequence[str] | None = None) -> None:
    settings = config.parse_settings(EvaluationSettings, arguments)
    folder = Path(settings.outputs) / "evaluation"
    others = read_predictions(Path(settings.compare_with)) if settings.compare_with else None
    if others is not None and Path(settings.compare_with).resolve() == (folder / "predictions.csv").resolve():
        raise UserError(f"--compare_with {settings.compare_with} is written anew", "Give --outputs another folder.")
    with only_run_in(folder) if config.RANK == 0 else contextlib.nullcontext():
        if settings.from_predictions:
            predictions, generation, run = load_earlier(Path(settings.from_predictions), folder)
        else:
            # adapters, scores, predictions
            train, test = config.load_split(settings)
            if others is not None:
                tested = pd.DataFrame([(pair.pair_id, pair.user_id) for pair in test], columns=["pair_id", "user_id"])
                check_same_pairs(tested, others)
            adapters, mismatches = find_adapters(settings, test)
            weights = weights_of(adapters)  # training may write others meanwhile
            rows, answers, seconds = predict(settings, train, test, adapters)
            if config.RANK != 0:
                return
            remove(folder, "predictions.csv", "generations.csv", "generation.json", *MADE_OF_THEM)
            run = run_record(settings, train, test, adapters, mismatches, seconds) | {"adapters_sha256": weights}
            write_json(folder / RUN, run)  # its mismatches are kept, whatever fails below
            generation = save(folder, rows, answers)
            predictions = read_predictions(folder / "predictions.csv")  # as anybody would, rounded

        # measures and verdict
        began = time.monotonic()
        metrics = judge(compute_metrics(predictions))
        changes = interaction(predictions, others) if others is not None else {}

        # report
        remove(folder, *MADE_OF_THEM)
        notes = [*notes_of(run), *left_out(predictions)]
        notes += [change_text(name, found, settings.compare_with) for name, found in changes.items()]
        write_json(folder / "metrics.json", metrics)
        if changes:
            write_json(folder / "interaction.json", changes)
        write_text(folder / "table.tex", latex(metrics))
        plot_all(predictions, metrics, folder / "figures")
        figures = [path.name for path in sorted((folder / "figures").glob("*.png"))]
        write_text(folder / "report.md", report(metrics, generation, notes, run, figures))
        if not settings.from_predictions:
            run["seconds"]["measures, intervals and figures"] = round(time.monotonic() - began, 1)
            write_json(folder / RUN, run)
            if weights == weights_of(adapters):
                write_cards(settings, adapters, metrics, mismatches, generation)
        print("", emphasised(summary(metrics, model_of(run), notes)), "", "read next", sep="\n")
        print(f"- {folder}/report.md: all measures, settings and definitions")
        print(f"- {folder}/figures: PNG for the screen, PDF for a paper")
        print("- dpo_comparison.ipynb, in JupyterLab: what each arm recommends to one user")


def write_cards(
    settings: EvaluationSettings, adapters: Adapters, metrics: dict[str, Any], mismatches: list[str],
    generation: dict[str, Any],
) -> None:
    """Each adapter's model card with its arm's measures; of two in one folder the first's. Published cards stay."""
    for arm, folders in reversed(adapters.items()):
        for folder in (folder for folder in folders.values() if config.PUBLISHED not in folder.parents):
            print(write_card(folder, config.base_facts(settings), arm, metrics, mismatches, generation))


def load_earlier(source: Path, folder: Path) -> tuple[pd.DataFrame, dict[str, Any], dict[str, Any]]:
    """(predictions, measures of generated answers, run.json) of an earlier evaluation, copied into the folder.

    If the folder holds these predictions, what lies there is of them. What lies beside a file of another name than
    predictions.csv, or predictions.csv.gz, is of other predictions.
    """

    def is_known(arm: str, found: Any) -> bool:  # what lies beside a predictions.csv may be somebody else's
        numbers = isinstance(found, dict) and all(isinstance(found.get(name), int | float) for name in OF_ANSWERS)
        return numbers and bool(ARM_NAME.fullmatch(arm))

    predictions, there = read_predictions(source), folder / "predictions.csv"
    text, known = as_csv(predictions), there.is_file()
    if known and source.resolve() != there.resolve() and there.read_text(encoding="utf-8") != text:
        raise UserError(f"{there} holds other predictions than {source}", "Give --outputs another folder.")
    places = [folder] * known + [source.parent] * (source.name.removesuffix(".gz") == "predictions.csv")
    run = next(filter(None, map(read_run, places)), {})
    generation = next(filter(None, (read_json(place / "generation.json") for place in places)), {})
    kept = {arm: found for arm, found in generation.items() if is_known(arm, found)}
    if not known:
        remove(folder, RUN, "generations.csv", "generation.json")  # of predictions that are gone
        write_text(there, text)
    for name, content in ((RUN, run), ("generation.json", kept)):  # or the next report would lack its mismatches
        if content and not (folder / name).is_file():  # it may hold NaN, or half a surrogate
            write_text(folder / name, json.dumps(content, indent=1) + "\n")
    return predictions, kept, run


def remove(folder: Path, *names: str) -> None:
    """Remove what an earlier evaluation left in the folder, where it did."""
    for name in names:
        (folder / name).unlink(missing_ok=True)


def save(folder: Path, predictions: pd.DataFrame, answers: pd.DataFrame | None = None) -> dict[str, Any]:
    """Write predictions.csv and, where there are answers, generations.csv and generation.json; returns the latter."""
    write_text(folder / "predictions.csv", as_csv(predictions))
    if answers is None:
        remove(folder, "generations.csv", "generation.json")
        return {}
    write_text(folder / "generations.csv", answers.to_csv(index=False, lineterminator="\n"))
    generation = {arm: generation_measures(rows) for arm, rows in answers.groupby("arm", sort=False)}
    write_json(folder / "generation.json", generation)
    return generation


def run_record(
    settings: EvaluationSettings, train: list[Pair], test: list[Pair], adapters: Adapters, mismatches: list[str],
    seconds: dict[str, float],
) -> dict[str, Any]:
    """What run.json says of an evaluation."""
    return {
        "settings": dataclasses.asdict(settings),
        "data": {"pairs_sha256": file_sha256(settings.pairs), "test_pairs": len(test), "test_digest": ids_digest(test)},
        "adapters": {arm: {seed: str(path) for seed, path in folders.items()} for arm, folders in adapters.items()},
        "mismatches": mismatches,
        "notes": warnings_on(train, test) + runs.notes_on(adapters, settings.bits, file_sha256(settings.pairs)),
        "processes": config.PROCESSES,
        "seconds": seconds,
        **config.environment_facts(),
        "compute_dtype": str(scoring_dtype(settings.fast)).removeprefix("torch."),
        "tensorfloat_32": settings.fast and torch.cuda.is_available(),
    }


# --------------------------------------------------------------------------------------------------- adapters

def find_adapters(settings: EvaluationSettings, test: Sequence[Pair]) -> tuple[Adapters, list[str]]:
    """(adapters by arm and seed, mismatches that were allowed); each adapter is there.

    The arms sft, sft_more and dpo are where training writes them, all their runs, unless they are given. The control
    may lack, and beside other arms alone all may. UserError where an adapter is missing, or does not fit the base model
    or, unless that is allowed, the split.
    """
    texts, given = settings.adapters, {}
    if texts == ["published"]:
        texts = [f"{arm}={config.PUBLISHED / arm}" for arm in STAGES]
    for text in texts:
        name, _, paths = text.partition("=")
        if not ARM_NAME.fullmatch(name) or not paths.strip(",") or "@" in name or name in (*given, "base", *BASELINES):
            remedy = "Give each as name=folder, with a name of its own of up to 30 letters, digits and . _ + -."
            raise UserError(f"--adapters {text}", remedy)
        parts = [paths] if Path(paths).is_dir() else paths.split(",")
        given[name] = [Path(path).expanduser() for path in parts if path]
    found = {stage: config.adapters_there(settings, stage) for stage in STAGES}
    needed = () if given and not found.keys() & given.keys() else ("sft", "dpo")
    usual = {stage: there or [config.adapter_folder(settings, stage)] for stage, there in found.items()}
    arms = {stage: folders for stage, folders in usual.items() if found[stage] or stage in needed} | given
    places = [(arm, number, folder) for arm, folders in arms.items() for number, folder in enumerate(folders)]
    for arm, _, folder in places:
        if not folder.is_dir():
            start = ("--sft_adapter", str(given["sft"][0])) if "sft" in given and arm != "sft" else ()
            command = config.command_with("train_dpo.py", settings, "--stage", arm, *start)
            made = "Give" if arm in given else f"Make it with: {command}; or give"
            raise UserError(f"no adapter of the arm {arm} at {folder}", f"{made} --adapters {arm}=FOLDER")
    base, digest = config.read_base(settings), ids_digest(test)
    adapters: Adapters = {}
    mismatches = []
    for arm, number, folder in places:
        run, seeds = read_run(folder), adapters.setdefault(arm, {})
        if problem := adapter_problem(folder, base):
            raise UserError(problem, f"Give --adapters {arm}=FOLDER with a LoRA adapter of {settings.base_model}.")
        problem = adapter_mismatch(folder, base, digest) or runs.of_another_stage(folder, arm)
        if problem and not settings.allow_mismatch:
            remedy = "Give the settings that it was trained with, or --allow_mismatch true to go on and report it."
            raise UserError(problem, remedy)
        if not problem and not (folder / RUN).is_file():
            problem = f"{folder} came without run.json: whether it was trained on test pairs is not known"
        if not problem and run.get("initial_adapter_known") is False:
            began = "began with an adapter without run.json"
            problem = f"{folder} {began}: whether that was trained on test pairs is not known"
        mismatches += [problem] if problem else []
        weights = file_sha256(folder / WEIGHTS)
        if same := [known for known in seeds.values() if file_sha256(known / WEIGHTS) == weights]:
            remedy = "Give each training run once, or delete the folder of one that is of no use."
            raise UserError(f"{arm}: {folder} holds the same weights as {same[0]}", remedy)
        seed = str(settings_of(run).get("seed", ""))
        seed = seed if ARM_NAME.fullmatch(seed) else ""  # somebody's run.json may say anything
        seeds[seed if seed not in seeds else f"{seed}-{number}"] = folder
    return adapters, mismatches


def weights_of(adapters: Adapters) -> dict[str, str]:
    """sha256 of the weights of each adapter, by its folder."""
    return {str(path): file_sha256(path / WEIGHTS) for seeds in adapters.values() for path in seeds.values()}


def load_adapter(model: Any, name: str, folder: Path) -> Any:
    """The model with the named adapter switched on; the base model is shared by all adapters."""
    from peft import PeftModel

    if isinstance(model, PeftModel):
        model.load_adapter(str(folder), adapter_name=name)
    else:
        model = PeftModel.from_pretrained(model, str(folder), adapter_name=name)
    config.check_loaded(model, name, folder)
    model.set_adapter(name)
    return model.eval()


# ----------------------------------------------------------------------------------------------------- scores

def predict(
    settings: EvaluationSettings, train: Sequence[Pair], test: Sequence[Pair], adapters: Adapters
) -> tuple[pd.DataFrame, pd.DataFrame | None, dict[str, float]]:
    """Score every held-out pair in both orders under all arms.

    Returns rows of predictions.csv (one per arm, seed, user, order and history), rows of generations.csv (one per
    answer; None where none were asked for), and seconds by part.
    """
    if config.PROCESSES > 1:
        config.join_processes()
    for precision in precisions(settings):  # what cannot be had is said before hours of scoring
        config.read_base(precision)
    popularity, genres = film_counts(train), genre_pattern([*train, *test])
    parts, generated = baseline_rows(train, test), []
    by_id = sorted(test, key=lambda pair: pair.pair_id)
    firsts = {pair.user_id: pair for pair in reversed(by_id)}
    asked = [pair for pair in by_id if firsts[pair.user_id] is pair][: settings.generate_users]  # one a user
    scored: list[tuple[str, str, Path | None]] = [("base", "", None)]
    scored += [(arm, seed, folder) for arm, seeds in adapters.items() for seed, folder in seeds.items()]
    seconds: dict[str, float] = {}
    for precision in precisions(settings):
        first = precision.bits == settings.bits
        suffix = "" if first else f"@{precision.bits}bit"
        with timed(seconds, f"loading{suffix}"):
            model, tokenizer = config.load_model(precision, scoring_dtype(settings.fast))
            check_scores(model, tokenizer, test[0], exact=precision.bits != 8 and not settings.fast)
        strangers = with_strangers(test) if settings.strangers and first else []
        check_tokens(preference_rows([*test, *strangers], "both"), tokenizer, settings.max_length)
        trees = [pair_tree(pair, tokenizer) for pair in test]
        strange = [pair_tree(pair, tokenizer, decision_only=True) for pair in strangers]
        for number, (arm, seed, path) in enumerate(scored):
            if path is not None:
                model = load_adapter(model, f"run_{number}", path)
            arm, run = arm + suffix, f"{arm}{suffix} {seed}".strip()
            with timed(seconds, f"scoring {run}"):
                scores = score(model, trees, settings.batch_users, run)
            about = lineage(path) if path else Lineage(pairs_seen=0)
            parts.append(prediction_rows(arm, "model", seed, "own", test, popularity, *scores, about=about))
            if strange:
                with timed(seconds, f"scoring {run} with strangers' histories"):
                    decision, *_ = score(model, strange, settings.batch_users, f"{run} with strangers")
                parts.append(prediction_rows(arm, "model", seed, "stranger", test, popularity, decision, about=about))
            if asked and first and config.RANK == 0:
                orders = [ORDERS[index % 2] for index in range(len(asked))]
                prompts = [preference_row(pair, order)["prompt"] for pair, order in zip(asked, orders, strict=True)]
                with timed(seconds, f"generating {run}"):
                    answers = generate_answers(model, tokenizer, prompts, settings.generate_samples, settings.seed, run)
                generated.append(generation_rows(arm, seed, asked, orders, answers, genres))
        model = None  # before the next precision is loaded
    return pd.concat(parts, ignore_index=True), pd.concat(generated) if generated else None, seconds


def precisions(settings: EvaluationSettings) -> list[EvaluationSettings]:
    """The settings of each precision to score in; a base model stored in 4 bits gives way to its 16-bit original."""
    if not settings.second_bits:
        return [settings]
    name = settings.base_model if settings.second_bits == 4 else original_name(settings.base_model)
    return [settings, dataclasses.replace(settings, bits=settings.second_bits, base_model=name, second_bits=None)]


def scoring_dtype(fast: bool) -> torch.dtype:
    """float32; fast on a GPU lets it use TensorFloat-32 in matrix products, on a CPU it is bfloat16 where native."""
    if fast and torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")
    return config.training_dtype() if fast and not torch.cuda.is_available() else torch.float32


@contextlib.contextmanager
def timed(seconds: dict[str, float], what: str) -> Iterator[None]:
    began = time.monotonic()
    yield
    seconds[what] = round(time.monotonic() - began, 1)


def score(model: Any, trees: Sequence[Tree], batch_users: int, description: str) -> np.ndarray:
    """Decision margins, log p(chosen) and log p(rejected) in nats, (3, pairs, orders A and B).

    The decision margin is log p(preferred's letter) - log p(other's letter) after the stem; a response's log p is
    of all that follows the stem, which both responses begin with, from the letter on.
    """
    began = time.monotonic()
    scores = np.zeros((3, len(trees), 2))
    by_length = sorted(range(len(trees)), key=lambda user: len(trees[user].tokens))
    batches = [by_length[start : start + batch_users] for start in range(0, len(trees), batch_users)]
    mine = batches[config.RANK :: config.PROCESSES]  # under `accelerate launch` the GPUs share them
    for users in tqdm(mine, f"scoring {description}", unit="batch", leave=False, disable=config.RANK != 0):
        with torch.inference_mode():
            for user, log_probs in zip(users, tree_log_probs(model, [trees[user] for user in users]), strict=True):
                scores[:, user] = tree_scores(trees[user], log_probs)
    if config.PROCESSES > 1:
        from accelerate.utils import gather_object

        scores = np.sum(gather_object([scores]), axis=0)  # 0 where another process scored
    print(f"scored {description}: {len(trees):,} pairs in {time.monotonic() - began:.1f} s", flush=True)
    return scores


def check_scores(model: Any, tokenizer: Any, pair: Pair, exact: bool) -> None:
    """Raise UserError unless the tree of a pair gives the log-probabilities that its texts give, each by itself.

    They differ where a model does not mix tokens by attention alone, or cuts or scales what it attends to.
    """
    tree = pair_tree(pair, tokenizer)
    with torch.inference_mode():
        [found] = tree_log_probs(model, [tree])
        for order, paths in zip(ORDERS, tree.paths, strict=True):
            row = preference_row(pair, order)
            for response, path in zip((row["chosen"], row["rejected"]), paths, strict=True):
                text = [*tokenizer(row["prompt"] + response)["input_ids"], tokenizer.eos_token_id]
                tokens = torch.tensor([text], device=model.device)
                log_probs = model(input_ids=tokens, use_cache=False).logits[0].float().log_softmax(-1)
                alone = log_probs[:-1].gather(-1, tokens[0, 1:, None])[-len(path) :, 0].cpu().numpy()
                if not (difference := np.abs(alone - found[path]).max()) < (0.005 if exact else 1):
                    problem = f"a token's log-probability differs by {difference:.3f} nats with the texts beside it"
                    raise UserError(f"this model cannot be scored: {problem}", ANOTHER)


def tree_scores(tree: Tree, log_probs: np.ndarray) -> np.ndarray:
    """(decision margin, log p of the chosen and of the rejected response; orders A and B), from log p of the nodes."""
    decision = [log_probs[chosen[0]] - log_probs[rejected[0]] for chosen, rejected in tree.paths]
    return np.array([decision, *([log_probs[path].sum() for path in paths] for paths in zip(*tree.paths, strict=True))])


def tree_log_probs(model: Any, trees: Sequence[Tree]) -> Iterator[np.ndarray]:
    """For each tree, log p of every response token given the path that leads to it, (n,); 0 elsewhere."""
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    device = base.get_input_embeddings().weight.device
    batch = {name: torch.from_numpy(values).to(device) for name, values in pad_trees(trees).items()}
    nodes = {"input_ids": batch["tokens"], "position_ids": batch["positions"]}
    mask = ancestor_mask(batch["ends"])
    hidden = base.base_model(**nodes, attention_mask=mask, use_cache=False).last_hidden_state
    head = base.get_output_embeddings()
    for index, tree in enumerate(trees):
        nodes = np.unique(np.concatenate([path for order in tree.paths for path in order]))
        logits = head(hidden[index, tree.parents[nodes]]).float()
        targets = torch.from_numpy(tree.tokens[nodes]).to(device)
        picked = logits.gather(-1, targets[:, None])[:, 0] - logits.logsumexp(-1)
        log_probs = np.zeros(len(tree.tokens))
        log_probs[nodes] = picked.double().cpu().numpy()
        yield log_probs


def generate_answers(
    model: Any, tokenizer: Any, prompts: Sequence[str], samples: int | None, seed: int, description: str
) -> list[list[str]]:
    """Answers to each prompt, [prompt][sample], at temperature 0.7 and top-p 0.95; samples None: one greedy answer."""
    torch.manual_seed(seed)
    answers: list[list[str]] = []
    sampling = {"do_sample": True, "temperature": 0.7, "top_p": 0.95, "top_k": 0, "min_p": None}
    sampling = {"do_sample": False} if samples is None else sampling
    sampling |= {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "num_beams": 1}  # whatever the base's defaults
    samples = samples or 1
    step = max(1, (256 if torch.cuda.is_available() else 64) // samples)
    starts = range(0, len(prompts), step)
    for start in tqdm(starts, f"generating {description}", unit="batch", leave=False, disable=len(starts) == 1):
        part = prompts[start : start + step]
        text = tokenizer(part, return_tensors="pt", padding=True, padding_side="left").to(model.device)
        ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
        with torch.inference_mode():
            tokens = model.generate(**text, **sampling, **ends, max_new_tokens=96, num_return_sequences=samples)
        new = tokenizer.batch_decode(tokens[:, text["input_ids"].shape[1] :], skip_special_tokens=True)
        answers += [new[first : first + samples] for first in range(0, len(new), samples)]
    return answers


# ------------------------------------------------------------------------------- for the notebook: arms at hand

@dataclasses.dataclass(frozen=True)
class Arms:
    """One base model that holds the adapters of several arms; the arm `base` is all of them switched off."""

    model: Any
    tokenizer: Any
    names: tuple[str, ...]
    lock: Any = dataclasses.field(default_factory=threading.RLock)  # Jupyter runs widgets in several threads

    @contextlib.contextmanager
    def switched_to(self, arm: str) -> Iterator[Any]:
        """The model as this arm, held until the block ends."""
        bare = arm == "base" and len(self.names) > 1  # it alone has no adapter to switch off
        with self.lock, self.model.disable_adapter() if bare else contextlib.nullcontext():
            if arm != "base":
                self.model.set_adapter(arm)
            yield self.model


def load_arms(settings: EvaluationSettings, test: Sequence[Pair]) -> Arms:
    """The base model, once, with the first adapter of each of the arms sft, sft_more and dpo."""
    adapters, mismatches = find_adapters(settings, test)
    print("".join(f"mismatch: {mismatch}\n" for mismatch in mismatches), end="")
    model, tokenizer = config.load_model(settings, scoring_dtype(settings.fast))
    check_tokens(preference_rows(test, "both"), tokenizer, settings.max_length)
    names = [arm for arm in STAGES if arm in adapters]
    for arm in names:
        model = load_adapter(model, arm, next(iter(adapters[arm].values())))
    return Arms(model, tokenizer, ("base", *names))


def predict_with(arms: Arms, train: Sequence[Pair], test: Sequence[Pair], batch_users: int) -> pd.DataFrame:
    """Rows of predictions.csv for these test pairs under the baselines and the arms that are loaded."""
    parts = baseline_rows(train, test)
    trees = [pair_tree(pair, arms.tokenizer) for pair in test]
    for arm in arms.names:
        with arms.switched_to(arm) as model:
            scores = score(model, trees, batch_users, arm)
        parts.append(prediction_rows(arm, "model", "", "own", test, film_counts(train), *scores))
    return pd.concat(parts, ignore_index=True)


def side_by_side(arms: Arms, pair: Pair) -> Iterator[pd.DataFrame]:
    """What every arm makes of one pair: rows of `choices`, first without answers, then again after each arm's."""
    tree = pair_tree(pair, arms.tokenizer)
    prompts = [preference_row(pair, order)["prompt"] for order in ORDERS]
    parts = []
    for arm in arms.names:
        with arms.switched_to(arm) as model, torch.inference_mode():
            [log_probs] = tree_log_probs(model, [tree])
        parts.append(choices(arm, pair, tree_scores(tree, log_probs)[0]))
    rows = pd.concat(parts, ignore_index=True).assign(answer=BEING_WRITTEN)
    yield rows
    for arm in arms.names:
        with arms.switched_to(arm) as model:
            answers = generate_answers(model, arms.tokenizer, prompts, None, 0, arm)
        rows.loc[rows["arm"] == arm, "answer"] = [text for [text] in answers]
        yield rows


def settings_of_results(folder: Path, training: dict[str, dict[str, Any]], outputs: str) -> EvaluationSettings:
    """The settings that results were made with, from run.json or a training run; else the preset of this machine.

    outputs: where adapters lie on this machine. A pairs file that lay elsewhere is looked for in data/.
    """
    here = {"preset": "thesis" if torch.cuda.is_available() else "small"}
    saved = next(filter(None, map(settings_of, (read_run(folder), *training.values()))), here)
    names = {field.name for field in dataclasses.fields(EvaluationSettings)} - {"preset", "outputs"}
    known = {name: saved[name] for name in names & saved.keys()}
    preset = saved["preset"] if saved.get("preset") in config.PRESETS else here["preset"]
    settings = config.preset_settings(EvaluationSettings, preset, outputs=outputs, **known)
    moved = Path("data") / Path(settings.pairs).name
    found = settings.pairs if Path(settings.pairs).is_file() or not moved.is_file() else str(moved)
    return dataclasses.replace(settings, pairs=found)


if __name__ == "__main__":
    config.run_script(main)
