"""Train the two adapters that evaluate_dpo.py compares: SFT, and DPO.

    python train_dpo.py                    # SFT where its adapter is missing, then DPO
    python train_dpo.py --check            # look at everything, train nothing
    python train_dpo.py --stage dpo --init base --beta 0.2
    python train_dpo.py --push_to_hub NAME # publish the finished adapter with its model card
    python train_dpo.py --merge DIR        # write it and its base as one 16-bit model
    python train_dpo.py --help             # all settings

Pairs -> preference rows -> SFT on the chosen responses -> DPO on chosen against rejected -> an adapter folder with
`run.json` (settings, data, versions, log) and `loss.png`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import hashlib
import io
import json
import math
import resource
import shutil
import signal
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import config
from config import TrainingSettings, UserError
from data.pairs import STEM, Pair, ids_digest, preference_rows
from data.trees import Tree, ancestor_mask, pad_trees, token_tree

GIGABYTE = 1e9


def main(arguments: Sequence[str] | None = None) -> None:
    settings = config.parse_settings(TrainingSettings, arguments)
    config.quiet_libraries()
    train, test = config.load_split(settings)
    final = config.adapter_folder(settings, "sft" if settings.stage == "sft" else "dpo")
    check_sharing(final, settings, ids_digest(test))
    if final.is_dir() and not settings.check and (settings.push_to_hub or settings.merge):
        if settings.push_to_hub:
            push(final, settings)
        if settings.merge:
            merge(final, settings, test)
        return
    used, validation = hold_back(train, settings)
    rows = preference_rows(used, settings.option_order, settings.seed)
    validation_rows = preference_rows(validation, "both")
    checks = run_checks(settings, train, test, rows, validation_rows)
    if settings.check:
        print_checks(checks)
        return
    for what, found, remedy in checks:
        if remedy:
            raise UserError(f"{what}: {found}", remedy)

    split = {
        "pairs_sha256": config.file_sha256(settings.pairs),
        "train_pairs": len(used),
        "train_digest": ids_digest(used),
        "validation_pairs": len(validation),
        "test_pairs": len(test),
        "test_digest": ids_digest(test),
    }
    sft_adapter = Path(settings.sft_adapter or config.adapter_folder(settings, "sft"))
    if settings.stage == "sft" or (settings.stage == "all" and not sft_adapter.is_dir()):
        train_stage("sft", settings, rows, validation_rows, split)
    elif settings.stage == "all":
        print(f"sft: {sft_adapter} is there and is not trained again (--stage sft does){made_otherwise(sft_adapter, settings)}")
    if settings.stage != "sft":
        train_stage("dpo", settings, rows, validation_rows, split, sft_adapter if settings.init == "sft" else None)
    if settings.push_to_hub:
        push(final, settings)


def made_otherwise(sft_adapter: Path, settings: TrainingSettings) -> str:
    """What an SFT adapter that is there was trained with and the settings have otherwise, in words."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        had = json.loads((sft_adapter / RUN).read_text(encoding="utf-8"))["settings"]
        asked = config.trained_settings("sft", vars(settings))
        if others := differing(asked | had, asked):
            return f"; it was trained with {others}"
    return ""


def hold_back(train: list[Pair], settings: TrainingSettings) -> tuple[list[Pair], list[Pair]]:
    """(used, validation): validation comes out of the training users, so that no test user is looked at."""
    by_hash = sorted(train, key=lambda pair: (pair.user_id, pair.pair_id))
    held_back = {pair.user_id for pair in by_hash[: settings.validation_pairs]}
    validation = [pair for pair in by_hash if pair.user_id in held_back]
    used = [pair for pair in by_hash if pair.user_id not in held_back][: settings.max_pairs]
    if len(used) < settings.effective_batch:
        raise UserError(
            f"{len(used)} pairs are left to train on, fewer than one step's {settings.effective_batch}",
            f"Lower --validation_pairs ({settings.validation_pairs}), or give more pairs.",
        )
    return used, validation


# -------------------------------------------------------------------------------------------------- training


def train_stage(
    stage: str,
    settings: TrainingSettings,
    rows: list[dict[str, str]],
    validation_rows: list[dict[str, str]],
    split: dict[str, Any],
    initial_adapter: Path | None = None,
) -> Path:
    """Train one stage (`sft` or `dpo`) and write its adapter folder, whole or not at all; returns the folder."""
    began = time.monotonic()
    folder, checkpoints = config.adapter_folder(settings, stage), config.checkpoints_folder(settings, stage)
    start = f"the adapter {initial_adapter}" if initial_adapter else "the base model"
    trainer_kind = "shared" if stage == "dpo" and shares_prompt(settings) else "stock"
    print(f"{stage}: {len(rows):,} rows from {start}, {settings.bits}-bit {settings.base_model}, {trainer_kind} trainer", flush=True)
    with config.only_run_in(checkpoints):
        prepare_checkpoints(checkpoints, run_identity(stage, settings, split, initial_adapter), settings.restart)
        for leftover in folder.parent.glob(f".{folder.name}.*"):  # of a final save that was killed
            shutil.rmtree(leftover, ignore_errors=True)
        trainer, fitted = train_within_memory(stage, settings, rows, validation_rows, initial_adapter)
        history, steps = trainer.state.log_history, trainer.state.global_step
        if trainer.eval_dataset is not None and not any("eval_loss" in entry and entry["step"] == steps for entry in history):
            trainer.evaluate()
        losses = [entry["loss"] for entry in history if "loss" in entry]
        seconds = next((entry["train_runtime"] for entry in reversed(history) if "train_runtime" in entry), 0)
        step_seconds = statistics.median(np.diff(trainer.step_ends)) if len(trainer.step_ends) > 1 else None  # the first step compiles
        run = {
            "stage": stage,
            "settings": dataclasses.asdict(settings),
            "initial_adapter": str(initial_adapter) if initial_adapter else None,
            "initial_adapter_sha256": config.file_sha256(initial_adapter / config.WEIGHTS) if initial_adapter else None,
            "initial_adapter_known": (initial_adapter / RUN).is_file() if initial_adapter else None,  # else it may have seen test pairs
            "data": split,
            "rows": len(rows),
            "steps": steps,
            "trainer": trainer_kind,
            **fitted,  # after a resumption, seconds and memory are those since then
            "rows_seen": steps * settings.effective_batch,
            "first_loss": losses[0],
            "last_loss": losses[-1],
            "train_seconds": round(seconds, 1),
            "rows_per_second": round(settings.effective_batch / step_seconds, 3) if step_seconds else None,
            "wall_seconds": round(time.monotonic() - began, 1),
            "processes": config.process_count(),
            "peak_memory_gb": round(peak_memory(), 2),
            "backend": config.backend_of(settings),
            "vocabulary": len(trainer.processing_class),
            **config.environment_facts(),
            "log_history": history,
        }
        save_adapter(trainer, folder, settings, run)
        if config.is_main_process():
            shutil.rmtree(checkpoints, ignore_errors=True)
    print(
        f"{stage}: loss {run['first_loss']:.4f} -> {run['last_loss']:.4f} in {run['steps']} steps, "
        f"{run['wall_seconds']:.0f} s, {run['peak_memory_gb']} GB -> {folder}",
        flush=True,
    )
    del trainer
    free_memory()
    return folder


def train_within_memory(
    stage: str,
    settings: TrainingSettings,
    rows: list[dict[str, str]],
    validation_rows: list[dict[str, str]],
    initial_adapter: Path | None,
) -> tuple[Any, dict[str, Any]]:
    """(trained trainer, what run.json says of how it fitted): out of memory, the stage starts again with gradient
    checkpointing, then with half the micro-batch, or goes on from its last checkpoint.

    The effective batch stays as it is, and so do the seed and the starting weights, so that what is trained does
    not depend on how often memory ran out.
    """
    import torch
    from transformers import set_seed

    if config.cuda_present():
        torch.cuda.set_device(config.local_process_index())  # what is capped and measured below is each process's own GPU
    if settings.gpu_memory_gb and config.cuda_present():
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, settings.gpu_memory_gb * GIGABYTE / total))
    share = settings.effective_batch // config.process_count()
    shared_prompt = stage == "dpo" and shares_prompt(settings)
    batch_size, checkpointing, graphs = config.fitting_batch_size(settings, share, row_tokens(stage, settings, rows), shared_prompt)
    if config.process_count() > 1:  # all take what the fullest GPU can
        from accelerate import PartialState
        from accelerate.utils import gather_object

        PartialState(cpu=not config.cuda_present())  # joins the processes
        fitting = gather_object([(batch_size, checkpointing)])
        batch_size, checkpointing = min(size for size, _ in fitting), any(kept for _, kept in fitting)
    may_checkpoint = settings.gradient_checkpointing is None
    trainer = None
    while True:
        settings = dataclasses.replace(settings, gradient_checkpointing=checkpointing, cuda_graphs=graphs)
        set_seed(settings.seed)  # before the adapter is made: TRL does not seed it
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # Unsloth's banners; the progress bar is on stderr
                trainer = build_trainer(stage, settings, rows, validation_rows, initial_adapter, batch_size)
                trainer.accelerator.wait_for_everyone()  # the first process may have thrown checkpoints away
                checkpoint = last_whole_checkpoint(config.checkpoints_folder(settings, stage))
                train_from(trainer, checkpoint, stage)
            found = {"batch_size": batch_size, "gradient_checkpointing": checkpointing, "cuda_graphs": len(graphs_of(trainer))}
            return trainer, found | {"resumed_from_step": checkpoint and checkpoint_step(checkpoint)}
        except torch.OutOfMemoryError:
            captured, trainer = bool(graphs_of(trainer)), None  # goes on below, where the error no longer holds on to the tensors
        if captured:
            graphs = False
            free_memory()
            print(f"{stage}: out of memory; starting again without CUDA graphs", flush=True)
            continue
        if config.process_count() > 1 or (batch_size == 1 and (checkpointing or not may_checkpoint)):
            keep = "" if checkpointing else "Give --gradient_checkpointing true. "
            lower = "Lower --batch_size." if batch_size > 1 else "Lower --bits, --lora_rank (of SFT) or the length of the texts."
            raise UserError(f"{stage}: out of memory with a micro-batch of {batch_size}", keep + lower)
        free_memory()
        if may_checkpoint and not checkpointing:
            checkpointing, graphs = True, False  # recomputed activations would be recorded twice
            print(f"{stage}: out of memory; starting again with gradient checkpointing", flush=True)
            continue
        batch_size = max(size for size in range(1, batch_size // 2 + 1) if share % size == 0)
        accumulation = share // batch_size
        print(f"{stage}: out of memory; starting again with micro-batches of {batch_size}, {accumulation} to a step", flush=True)


def row_tokens(stage: str, settings: TrainingSettings, rows: list[dict[str, str]]) -> int:
    """How many tokens are computed for the longest row: prompt and response, both responses in DPO, whose stock
    trainer computes the prompt with each.
    """
    tokenizer = config.load_tokenizer(settings)
    prompts, chosen, rejected = (tokenizer([row[part] for row in rows])["input_ids"] for part in ("prompt", "chosen", "rejected"))
    times = 1 if stage == "sft" or shares_prompt(settings) else 2
    responses = zip(prompts, chosen, rejected if stage == "dpo" else [[]] * len(rows), strict=True)
    return max(times * len(prompt) + len(one) + len(other) for prompt, one, other in responses)


# ---------------------------------------------------------------------------------- unfinished runs, and going on

WHOLE = "whole.json"  # written last into a checkpoint: the sha256 of each of its files
RUN = "run.json"  # beside the checkpoints: what they are checkpoints of


def run_identity(stage: str, settings: TrainingSettings, split: dict[str, Any], initial_adapter: Path | None) -> dict[str, Any]:
    """All that decides what a stage trains: a run goes on from the checkpoints of one for which it is equal."""
    adapter_sha256 = config.file_sha256(initial_adapter / config.WEIGHTS)[:12] if initial_adapter else None
    return config.trained_settings(stage, vars(settings)) | {
        "sha256 of the pairs": split["pairs_sha256"][:12],
        "sha256 of the SFT adapter": adapter_sha256,
        "backend": config.backend_of(settings),
        "compute dtype": str(config.training_dtype()),
        "processes": config.process_count(),
    }


def differing(before: dict[str, Any], now: dict[str, Any]) -> str:
    return "; ".join(f"{name} {before.get(name)!r}, not {value!r}" for name, value in now.items() if before.get(name) != value)


def prepare_checkpoints(folder: Path, identity: dict[str, Any], restart: bool) -> None:
    """Make a stage's checkpoints folder ready to begin in, or to go on in.

    Raises:
        UserError: it holds an unfinished run of other settings, data or base model.
    """
    if not config.is_main_process():
        return
    if restart:
        for checkpoint in folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
    before: dict[str, Any] = {}
    with contextlib.suppress(FileNotFoundError, ValueError):
        before = json.loads((folder / RUN).read_text(encoding="utf-8"))
    others = differing(before, identity)
    if others and last_whole_checkpoint(folder):
        raise UserError(
            f"{folder} holds an unfinished run with {others}",
            "Run it with what it had, so that it goes on, or give --restart true to throw it away and start afresh.",
        )
    config.write_json(folder / RUN, identity)


def checkpoint_step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def last_whole_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint whose files are all there as they were written; broken ones that are newer are removed."""
    for checkpoint in sorted(folder.glob("checkpoint-*"), key=checkpoint_step, reverse=True):
        with contextlib.suppress(OSError, ValueError):
            written = json.loads((checkpoint / WHOLE).read_text(encoding="utf-8"))
            if all(config.file_sha256(checkpoint / name) == sha256 for name, sha256 in written.items()):
                return checkpoint
        if config.is_main_process():
            print(f"{checkpoint} is not whole and is removed", file=sys.stderr, flush=True)
            shutil.rmtree(checkpoint)
    return None


def train_from(trainer: Any, checkpoint: Path | None, stage: str) -> None:
    """Train from the start, or go on from a checkpoint: weights, optimiser, schedule, random state, order of the rows.

    Raises:
        KeyboardInterrupt: stopped from outside, after the step was finished and saved.
    """
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file
    from transformers import TrainerCallback

    class AllTrained(Exception):
        pass

    class Checkpoints(TrainerCallback):
        stopping = False

        def on_train_begin(self, args, state, control, **kwargs):  # noqa: ANN001
            if state.global_step >= state.max_steps:  # killed after the last step: transformers would train one more
                raise AllTrained

        def on_step_end(self, args, state, control, **kwargs):  # noqa: ANN001
            if self.stopping:
                control.should_save = control.should_training_stop = True

        def on_save(self, args, state, control, **kwargs):  # noqa: ANN001
            trainer.accelerator.wait_for_everyone()  # each process writes its own random state
            if config.is_main_process():
                made = Path(args.output_dir) / f"checkpoint-{state.global_step}"
                files = [path for path in made.rglob("*") if path.is_file() and path.name != WHOLE]
                config.write_json(made / WHOLE, {str(path.relative_to(made)): config.file_sha256(path) for path in files})

        def stop(self, number, frame):  # noqa: ANN001
            if self.stopping:
                raise KeyboardInterrupt
            self.stopping = True
            print(f"\n{stage}: stopping after this step", file=sys.stderr, flush=True)

    def load_policy(path: str, model: Any = None) -> None:
        """Beside a frozen reference transformers loads the reference alone; and this keeps the adapter in float32."""
        set_peft_model_state_dict(trainer.model, load_file(Path(path) / config.WEIGHTS), adapter_name="default")

    checkpoints = Checkpoints()
    trainer.add_callback(checkpoints)
    if checkpoint:
        if config.is_main_process():
            print(f"{stage}: goes on from {checkpoint}", file=sys.stderr, flush=True)
        if not config.under_fsdp():
            trainer._load_from_checkpoint = load_policy
    signals = (signal.SIGINT, signal.SIGTERM) if config.process_count() == 1 else ()  # several would not stop at one step
    before = {number: signal.signal(number, checkpoints.stop) for number in signals}
    try:
        with contextlib.suppress(AllTrained):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if checkpoints.stopping:
        step, last = trainer.state.global_step, trainer.state.max_steps
        raise KeyboardInterrupt(f"{stage}: stopped at step {step} of {last}, which is saved\nThe same command goes on from there.")


def free_memory() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def save_adapter(trainer: Any, folder: Path, settings: TrainingSettings, run: dict[str, Any]) -> None:
    """Write the adapter folder, whole or not at all; under `accelerate launch` the first process writes."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    state = trainer.accelerator.get_state_dict(trainer.model) if config.under_fsdp() else None
    if config.is_main_process():
        with config.whole_folder(folder) as made:
            model.peft_config["default"].base_model_name_or_path = config.model_path(settings.base_model)
            model.save_pretrained(made, selected_adapters=["default"], save_embedding_layers=False, state_dict=state)
            described = json.loads((made / "adapter_config.json").read_text(encoding="utf-8"))
            config.write_json(made / "adapter_config.json", described | {"base_model_name_or_path": settings.base_model})
            config.load_tokenizer(settings).save_pretrained(made)
            (made / "README.md").unlink(missing_ok=True)  # PEFT's, all gaps and a path of this machine
            config.write_json(made / "run.json", run)
            plot_losses(run["log_history"], run["stage"], made / "loss.png")
    trainer.accelerator.wait_for_everyone()


def build_trainer(
    stage: str,
    settings: TrainingSettings,
    rows: list[dict[str, str]],
    validation_rows: list[dict[str, str]],
    initial_adapter: Path | None = None,
    batch_size: int = 1,
) -> Any:
    """TRL's trainer for one stage, on a freshly loaded base model.

    The reference of DPO is the policy that it starts from: the base model with the adapter off, or, from an
    initial adapter, a frozen copy of it (which TRL makes of any PeftModel). At the first step policy and
    reference are equal and the loss is ln 2.
    """
    from datasets import Dataset
    from peft import PeftModel
    from transformers import ProgressCallback
    from trl import DPOTrainer, SFTTrainer

    shared = stage == "dpo" and shares_prompt(settings)
    model, tokenizer = config.load_model(settings, config.training_dtype())
    tokenizer.chat_template = None  # the text is no chat; Unsloth drops the first token where a template holds it
    adapter: dict[str, Any] = {}
    if config.backend_of(settings) == "unsloth":
        model = config.add_unsloth_adapter(model, settings, initial_adapter)
    elif initial_adapter is None:
        adapter["peft_config"] = config.lora_config(settings)
    else:
        model = PeftModel.from_pretrained(model, initial_adapter, is_trainable=True)
        model.peft_config["default"].base_model_name_or_path = config.model_path(settings.base_model)  # else looked for on the hub
    if stage == "sft":
        rows, validation_rows = (
            [{"prompt": row["prompt"], "completion": row["chosen"]} for row in part] for part in (rows, validation_rows)
        )
    # in 8 bits what is rounded depends on all rows of a batch: the remembered reference may be off by a nat
    health = training_health(stage, settings.beta if shared and settings.bits == 8 else 1e-3)
    kind = {"sft": SFTTrainer, "dpo": DPOTrainer}[stage]
    trainer = (shared_prompt_trainer(in_one_row(settings), bool(settings.cuda_graphs)) if shared else kind)(
        model=model,
        args=trainer_arguments(stage, settings, batch_size),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(validation_rows) if validation_rows else None,
        processing_class=tokenizer,
        callbacks=[health],
        **adapter,
    )
    trainer.step_ends = health.step_ends
    check_tokenized(trainer.train_dataset, rows, tokenizer)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(progress_bar(stage))
    if not config.under_fsdp():  # which shards what has one dtype
        keep_adapter_in_float32(trainer.model)
    if shared:
        check_isolation(trainer, settings.bits)
        remember_reference(trainer, settings, initial_adapter)
    return trainer


def shares_prompt(settings: TrainingSettings) -> bool:
    """Shared is the default: it was measured to be the faster one, on a CPU and on an H100 with both backends.

    Raises:
        UserError: it was asked for under FSDP.
    """
    if settings.trainer == "shared" and config.under_fsdp():
        raise UserError("the shared trainer cannot train a model that FSDP shards", "Give --trainer stock, or auto.")
    return settings.trainer != "stock" and not config.under_fsdp()  # whose sharded model serves only whole forward passes


def in_one_row(settings: TrainingSettings) -> bool:
    """Does attention take all pairs as one row, told which of its parts see which? Unsloth's own models do.

    A base in 8 bits it loads as transformers' model, which needs a mask.
    """
    return config.backend_of(settings) == "unsloth" and settings.bits != 8


def shared_prompt_trainer(one_row: bool, graphs: bool = False) -> type:
    """TRL's DPO trainer with the prompt of a pair computed once, not once for each response.

    Prompt, chosen and rejected response are one tree of tokens (data/trees.py), and logits are made only where a
    response token is predicted. Data, reference, losses and metrics stay TRL's: it has a route for kernels that give
    log-probabilities without logits, and only what gives them is ours.
    """
    from trl import DPOTrainer
    from trl.models.utils import _ForwardRedirection
    from trl.trainer.utils import _ChunkedLogProbFunction

    class SharedPromptTrainer(DPOTrainer):
        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **kwargs)
            self.use_liger_kernel = True  # TRL's name for that route; no Liger kernel is used
            self._forward_redirection = _ForwardRedirection()  # runs it inside the wrapper that several processes need
            stock = self.data_collator
            self.data_collator = lambda examples: tree_batch(examples, stock(examples), one_row)
            states = flat_hidden_states if one_row else tree_hidden_states
            self.hidden_states = Graphs(states) if graphs else states

        def _get_per_token_logps_and_entropies(self, model, model_kwargs, input_ids, completion_mask):  # noqa: ANN001
            """Log-probabilities and entropies (2 pairs, tokens - 1) of rows that hold all chosen, then all rejected."""
            if not hasattr(model, "peft_config"):  # unwrapping looks at every module: 16 ms for an 8B model
                model = self.accelerator.unwrap_model(model)
            causal = model.base_model.model if hasattr(model, "peft_config") else model
            with self.accelerator.autocast():
                hidden = self.hidden_states(causal.base_model, {name: model_kwargs[name] for name in NODES if name in model_kwargs})
                before = hidden.flatten(0, 1)[model_kwargs["tree_before"]]
                head = causal.get_output_embeddings()
                targets = model_kwargs["tree_targets"]
                found = _ChunkedLogProbFunction.apply(before, head.weight, head.bias, targets, 1.0, HEAD_CHUNK[before.device.type])
            mask = completion_mask[:, 1:].bool()
            log_probs, entropies = (values.new_zeros(mask.shape).masked_scatter(mask, values) for values in found)
            return log_probs, entropies, None

    return SharedPromptTrainer


HEAD_CHUNK = {"cuda": 16_384, "cpu": 4_096}  # words of the vocabulary whose logits are made at once; fewer stay in a CPU's cache
NODES = ("tree_tokens", "tree_positions", "tree_ends", "tree_pairs", "tree_responses")  # what hidden states are made of
NODES_MULTIPLE = 64  # in bfloat16 log-probabilities depend on the padded length: few lengths, and the reference's fit
ATTENTION_BLOCK, ATTENTION_TILE = 128, 64  # nodes, of Unsloth's kernel


def row_padding(nodes: int) -> int:
    """How many nodes fill a row up: to a multiple of 128 and of a 32nd of the row or less, so that rows have few lengths."""
    return -nodes % max(ATTENTION_BLOCK, 2 ** (nodes.bit_length() - 5))


def row_starts(trees: Sequence[Tree]) -> np.ndarray:
    """Where in a row each tree begins, (trees,): so that attention takes its nodes in the same order in every row.

    In bfloat16 another order is another rounding, by a nat or so a response, and the reference, which was computed with
    other pairs beside it, would not fit the policy that it is of. Attention goes through tiles, those of whole blocks last; so a
    tree that can hold two whole blocks has its own place within a block, and a shorter one within a tile. Which place is as good
    as random: trees come in the order that leaves the fewest nodes between them.
    """
    sizes = np.array([len(tree.tokens) for tree in trees])
    periods = np.where(sizes < 2 * ATTENTION_BLOCK, ATTENTION_TILE, ATTENTION_BLOCK)
    places = np.array([tree.tokens.sum() for tree in trees]) % periods
    starts = np.full(len(trees), -1)
    end = 0
    for _ in trees:
        gaps = np.where(starts < 0, (places - end) % periods, ATTENTION_BLOCK)
        nearest = gaps.argmin()
        starts[nearest] = end + gaps[nearest]
        end = starts[nearest] + sizes[nearest]
    return starts


def one_row_of(trees: Sequence[Tree], starts: np.ndarray) -> dict[str, np.ndarray]:
    """What `tree_batch` says of pairs in one row, of which each begins where `starts` says."""
    ends = starts + [len(tree.tokens) for tree in trees]
    length = int(ends.max())
    length += row_padding(length)
    row = {f"tree_{name}": np.zeros((1, length), dtype=np.int64) for name in ("tokens", "positions")}
    row["tree_pairs"] = len(trees) + np.searchsorted(np.sort(starts), np.arange(length))
    row["tree_responses"] = np.full(length, -1)
    for number, (tree, start, end) in enumerate(zip(trees, starts, ends, strict=True)):
        row["tree_tokens"][0, start:end], row["tree_positions"][0, start:end] = tree.tokens, tree.positions
        row["tree_pairs"][start:end] = number
        node, first = np.arange(end - start), np.argmin(tree.ends == end - start)  # the first node that not all descend from
        row["tree_responses"][start:end] = np.where(node < first, -1, 2 * number + (node >= tree.ends[first]))
    return row


def tree_batch(examples: Sequence[dict[str, Any]], batch: dict[str, Any], one_row: bool) -> dict[str, Any]:
    """TRL's batch, and in it each pair as a tree of tokens. All indices are made here, so that a GPU waits for none.

    Adds `tree_tokens` and `tree_positions`, either (pairs, nodes) with `tree_ends` (pairs, nodes), or in one row,
    (1, all nodes), with `tree_pairs` and `tree_responses` (all nodes,), which pair a node is of and which response, -1 where
    of both (what lies between two pairs or after the last is as the prompt of one more); `tree_before` and `tree_targets`
    (response tokens,), the node before each response token, counted over the whole batch, and the token itself, in the order of
    TRL's mask.
    """
    import torch
    from torch.nn.utils.rnn import pad_sequence

    trees = [tree_of(example) for example in examples]
    if one_row:
        starts = row_starts(trees)
        rows = one_row_of(trees, starts)
    else:
        rows = {f"tree_{name}": values for name, values in pad_trees(trees, NODES_MULTIPLE).items()}
        starts = np.arange(len(trees)) * rows["tree_tokens"].shape[1]
    nodes = [torch.from_numpy(tree.paths[response] + start) for response in (0, 1) for tree, start in zip(trees, starts, strict=True)]
    mask = batch["completion_mask"][:, 1:].bool()
    batch |= {name: torch.from_numpy(values) for name, values in rows.items()}
    batch["tree_before"] = pad_sequence(nodes, batch_first=True)[:, :-1][mask]
    batch["tree_targets"] = batch["input_ids"][:, 1:][mask]
    return batch


def tree_of(example: dict[str, Any]) -> Tree:
    """A tokenized pair: its prompt with the chosen response, and with the rejected one."""
    return token_tree([example["prompt_ids"] + example[response] for response in ("chosen_ids", "rejected_ids")])


def tree_hidden_states(model: Any, batch: dict[str, Any]) -> Any:
    """The model's last hidden states at every node, (pairs, nodes, width), by a mask of ancestors."""
    return model(
        input_ids=batch["tree_tokens"],
        position_ids=batch["tree_positions"],
        attention_mask=ancestor_mask(batch["tree_ends"]),
        use_cache=False,
    ).last_hidden_state


def flat_hidden_states(model: Any, batch: dict[str, Any]) -> Any:
    """The same in one row, (1, all nodes, width), through Unsloth's kernel for texts that share a beginning."""
    from unsloth.utils.prefix_grouper_kernel import PrefixSegInfo

    nodes = batch["tree_tokens"].shape[1]
    segments = PrefixSegInfo(
        group_of_kv=batch["tree_pairs"],
        is_prefix=batch["tree_responses"] < 0,
        suffix_of_kv=batch["tree_responses"],
        signature=(object(),),  # by which masks are remembered: this one serves the layers of one pass
        T=nodes,
        T_pad=nodes,
    )
    return model(
        input_ids=batch["tree_tokens"],
        position_ids=batch["tree_positions"],
        prefix_seg_info=segments,
        use_cache=False,
    ).last_hidden_state


MOST_GRAPHS = 8  # each keeps gradients of its own


class Graphs:
    """Hidden states by CUDA graphs, one for each shape of a batch: the same kernels, launched by one call a pass.

    A small model's step is else spent waiting for Python to launch them. A shape is captured when it comes the second time: what
    has to be compiled was compiled the first time.
    """

    def __init__(self, states: Callable[[Any, dict[str, Any]], Any]):
        import torch

        self.states = states
        self.met: Counter[tuple[int, ...]] = Counter()
        self.captured: dict[tuple[int, ...], Callable[..., Any] | None] = {}
        self.pool = torch.cuda.graph_pool_handle()  # one for all: each backward pass ends before another forward pass
        self.weights: list[Any] = []
        self.kept: list[Any] = []

        class OwnGradients(torch.autograd.Function):
            """Weights, with gradients that are copies: a graph writes its next ones where it wrote the last, which are summed up."""

            @staticmethod
            def forward(context: Any, *weights: Any) -> Any:
                return weights

            @staticmethod
            def backward(context: Any, *gradients: Any) -> Any:
                return tuple(torch._foreach_mul(gradients, 1.0))

        self.own_gradients = OwnGradients.apply

    def __call__(self, model: Any, batch: dict[str, Any]) -> Any:
        import torch

        shape = tuple(batch["tree_tokens"].shape)
        if not torch.is_grad_enabled():
            return self.states(model, batch)
        self.met[shape] += 1
        if shape not in self.captured and (self.met[shape] < 2 or len(self.captured) == MOST_GRAPHS):
            return self.states(model, batch)
        if shape not in self.captured:
            self.weights = self.weights or [weight for weight in model.parameters() if weight.requires_grad]
            self.captured[shape] = None
            self.captured[shape] = self.capture(model, batch)
        return self.captured[shape](batch, *self.own_gradients(*self.weights))

    def capture(self, model: Any, batch: dict[str, Any]) -> Callable[..., Any]:
        """The passes for batches of this shape; it takes the weights, too, since their gradients are what comes back."""
        import torch

        # A graph reads where things were: what a library keeps, such as a table of rotary embeddings, must never be freed.
        gradients = {id(weight.grad) for weight in self.weights}
        self.kept += [value for value in gc.get_objects() if type(value) is torch.Tensor and value.is_cuda and id(value) not in gradients]
        static = {name: values.clone() for name, values in batch.items()}
        with torch.autocast("cuda", torch.get_autocast_dtype("cuda"), torch.is_autocast_enabled("cuda"), cache_enabled=False):
            return torch.cuda.make_graphed_callables(
                lambda batch, *weights: self.states(model, batch), (static, *self.weights), num_warmup_iters=1, pool=self.pool
            )


def graphs_of(trainer: Any) -> dict[tuple[int, ...], Callable[..., Any] | None]:
    """A trainer's CUDA graphs by the shape of their batches; None for one that is not finished."""
    return getattr(getattr(trainer, "hidden_states", None), "captured", {})


def check_isolation(trainer: Any, bits: int) -> None:
    """Raise UserError unless a response has the same log-probabilities whatever the responses beside it say.

    Nothing else would show a model whose attention lets them see each other: policy and reference would be wrong alike,
    and the first loss ln 2. So the words of one response are changed: what others change by is 0, or rounding, or close to
    half of what that response's own log-probabilities change by. In 8 bits rounding is more, since the kernel chooses the
    columns that it keeps in 16 bits by all rows of a batch.
    """
    import torch

    rows = [trainer.train_dataset[index] for index in range(min(2, len(trainer.train_dataset)))]
    inputs = trainer._prepare_inputs(trainer.data_collator(rows))
    tree = tree_of(rows[0])
    start = inputs["tree_before"][0].item() - tree.paths[0][len(rows[0]["prompt_ids"]) - 1]  # where it begins in the row
    chosen, rejected = (set((path + start).tolist()) for path in tree.paths)
    branches = [sorted(chosen - rejected), sorted(rejected - chosen)]
    earlier = int(branches[1] < branches[0])  # what stands later may see it
    tokens = inputs["tree_tokens"].clone()
    nodes = torch.tensor(branches[earlier], device=tokens.device)
    tokens.view(-1)[nodes] = (tokens.view(-1)[nodes] + 1) % trainer.model.config.vocab_size
    found = []
    for given in (inputs["tree_tokens"], tokens):
        with torch.no_grad(), torch.random.fork_rng([tokens.device.index] if tokens.is_cuda else []):
            torch.manual_seed(0)  # the same dropout
            log_probs, _, _ = trainer._get_per_token_logps_and_entropies(
                trainer.model, inputs | {"tree_tokens": given}, inputs["input_ids"], inputs["completion_mask"]
            )
        found.append(log_probs)
    changes = (found[0] - found[1]).abs().amax(dim=1).tolist()
    own = changes.pop(earlier * len(rows))
    if not max(changes) <= (0.2 if bits == 8 else 0.02) * own:
        raise UserError(
            f"dpo: in this model a response sees the responses beside it: its log-probabilities change by up to {max(changes):.3f} nats with them",
            "Give --trainer stock.",
        )


def remember_reference(trainer: Any, settings: TrainingSettings, initial_adapter: Path | None) -> None:
    """Give the trainer's rows the reference's log-probabilities, computed once and kept in a file of the outputs.

    The file belongs to one reference (base model, its precision, initial adapter, backend) and holds a line a row, so
    that other epochs, beta, learning rates and seeds find theirs there.
    """
    path = config.reference_file(settings, initial_adapter)
    known: dict[str, list[float]] = {}
    with contextlib.suppress(FileNotFoundError, ValueError):
        known = json.loads(path.read_text(encoding="utf-8"))
    for name in ("train_dataset", "eval_dataset"):
        dataset = getattr(trainer, name)
        if dataset is None:
            continue
        texts = dataset.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"])
        keys = [hashlib.sha256(json.dumps(list(row.values())).encode()).hexdigest()[:24] for row in texts]
        missing = [index for index, key in enumerate(keys) if key not in known]
        found = reference_log_probs(trainer, [texts[index] for index in missing])
        known |= {keys[index]: values for index, values in zip(missing, found, strict=True)}
        for column, response in (("ref_chosen_logps", 0), ("ref_rejected_logps", 1)):
            dataset = dataset.add_column(column, [known[key][response] for key in keys])
        setattr(trainer, name, dataset)
    check_reference(trainer, path)
    trainer.precompute_ref_logps = True
    if config.is_main_process():
        path.parent.mkdir(parents=True, exist_ok=True)
        config.write_json(path, known)


def check_reference(trainer: Any, path: Path) -> None:
    """Raise UserError unless the policy that training starts from gives the log-probabilities remembered in a file."""
    import torch

    rows = [trainer.train_dataset[index] for index in range(min(4, len(trainer.train_dataset)))]
    inputs = trainer._prepare_inputs(trainer.data_collator(rows))
    with torch.no_grad():
        log_probs, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, inputs, inputs["input_ids"], inputs["completion_mask"])
    remembered = torch.cat([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]])
    difference = (log_probs.sum(dim=1) - remembered).abs().mean().item()
    if difference > (1e-2 if config.training_dtype() == torch.float32 else 2.0):  # nats of a hundred; rounding in bfloat16
        raise UserError(
            f"dpo: the reference remembered in {path} is not the policy that training starts from: they differ by "
            f"{difference:.3f} nats a response",
            "Delete the file, so that it is computed anew.",
        )


def reference_log_probs(trainer: Any, examples: Sequence[dict[str, Any]]) -> list[list[float]]:
    """log p of [chosen, rejected] under the reference for each example; the processes share them out."""
    import torch
    from tqdm import tqdm

    by_length = sorted(range(len(examples)), key=lambda index: -sum(map(len, examples[index].values())))
    size = trainer.args.per_device_train_batch_size
    batches = [by_length[start : start + size] for start in range(0, len(by_length), size)]
    found: dict[int, list[float]] = {}
    mine = batches[config.process_index() :: config.process_count()]
    for batch in tqdm(mine, desc="reference", unit="batch", leave=False, disable=not config.is_main_process()):
        inputs = trainer._prepare_inputs(trainer.data_collator([examples[index] for index in batch]))
        log_probs = torch.stack(trainer.compute_ref_log_probs(trainer.model, inputs), dim=1)
        found |= dict(zip(batch, log_probs.tolist(), strict=True))
    if config.process_count() > 1:
        from accelerate.utils import gather_object

        found = {index: values for part in gather_object([found]) for index, values in part.items()}
    return [found[index] for index in range(len(examples))]


def trainer_arguments(stage: str, settings: TrainingSettings, batch_size: int) -> Any:
    """TRL's configuration of one stage; what another backend would set otherwise is given in full."""
    import torch
    from trl import DPOConfig, SFTConfig

    shared = dict(
        output_dir=str(config.checkpoints_folder(settings, stage)),
        seed=settings.seed,
        data_seed=settings.seed,
        max_length=settings.max_length,  # run_checks has seen that every row fits: none is cut, none dropped
        max_steps=settings.max_steps,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=batch_size,
        gradient_accumulation_steps=settings.effective_batch // config.process_count() // batch_size,
        optim=settings.optim,
        lr_scheduler_type=settings.lr_scheduler,
        warmup_steps=settings.warmup_steps,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        bf16=config.training_dtype() == torch.bfloat16,
        fp16=False,
        tf32=config.cuda_present() and config.training_dtype() == torch.bfloat16,  # for what is left in float32: a tenth of the time
        use_cpu=not config.cuda_present(),
        gradient_checkpointing=bool(settings.gradient_checkpointing),
        gradient_checkpointing_kwargs={"use_reentrant": False},
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=config.cuda_present(),
        eval_strategy="steps" if settings.validation_pairs else "no",
        eval_steps=settings.eval_steps if settings.validation_pairs else None,
        save_steps=settings.save_steps,
        save_total_limit=2,
        logging_steps=settings.logging_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # it would hide them from training_health, and wait for each step's loss
        report_to=settings.report_to,
        disable_tqdm=False,
    )
    if stage == "sft":
        made = SFTConfig(
            num_train_epochs=settings.sft_epochs,
            learning_rate=settings.sft_learning_rate,
            completion_only_loss=True,
            packing=False,
            padding_free=False,
            **shared,
        )
    else:
        made = DPOConfig(
            num_train_epochs=settings.epochs,
            learning_rate=settings.learning_rate,
            beta=settings.beta,
            loss_type=[settings.loss_type],
            disable_dropout=True,
            precompute_ref_log_probs=False,
            **shared,
        )
    made.mixed_precision = "bf16" if made.bf16 else "no"  # whatever an accelerate configuration asks for
    made._n_gpu = min(made.n_gpu, 1)  # without a launcher a second GPU would get rows of its own: another effective batch
    return made


def keep_adapter_in_float32(model: Any) -> None:
    """Undo TRL's cast of a quantised model's adapter to bfloat16, which would round small updates away.

    Where the policy has a frozen copy of itself as reference, its weights come from that copy, which the cast
    left alone, so that both are equal again.
    """
    weights = dict(model.named_parameters())
    for name, weight in weights.items():
        if weight.requires_grad:
            source = weights.get(name.replace(".default.", ".ref."), weight)
            weight.data = source.detach().float().clone()


def training_health(stage: str, tolerance: float = 1e-3) -> Any:
    """A callback that stops a run that cannot learn, learns against a wrong reference, or falls apart.

    Gradients are looked at before a checkpoint is whole, so that none ever holds what a bad one made.
    tolerance: how far from 0 the first reward margin may be, and from ln 2 the first loss.
    """
    import torch
    from transformers import TrainerCallback

    lower = f"Lower --{'sft_' if stage == 'sft' else ''}learning_rate or --max_grad_norm, with --restart true"

    class TrainingHealth(TrainerCallback):
        def __init__(self) -> None:
            self.step_ends: list[float] = []
            self.looking: tuple[int, Any, Any] = (0, True, None)  # a step, are its gradients finite, and when that is known
            self.weights: list[Any] = []

        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):  # noqa: ANN001
            self.look()
            if not self.weights or config.under_fsdp():  # to find them means to walk over every module
                self.weights = [weight for weight in model.parameters() if weight.requires_grad]
            norms = torch._foreach_norm([weight.grad for weight in self.weights if weight.grad is not None])
            if norms:
                finite = torch.stack(norms).isfinite().all()
                found = torch.empty((), dtype=torch.bool, pin_memory=finite.is_cuda).copy_(finite, non_blocking=True)
                self.looking = state.global_step + 1, found, torch.cuda.current_stream().record_event() if finite.is_cuda else None

        def look(self) -> None:
            """At the gradients of the step before: those of this one would have to be waited for."""
            step, finite, copied = self.looking
            if copied:
                copied.synchronize()
            if not finite:
                raise UserError(f"{stage}: the gradient of step {step} is not finite", f"{lower}.")

        def on_save(self, args, state, control, **kwargs):  # noqa: ANN001
            self.look()  # before the checkpoint is called whole; the last step is always saved

        def on_step_end(self, args, state, control, **kwargs):  # noqa: ANN001
            self.step_ends.append(time.monotonic())

        def on_log(self, args, state, control, logs, **kwargs):  # noqa: ANN001
            if "loss" not in logs:
                return
            losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
            if not math.isfinite(logs["loss"]):
                raise UserError(f"{stage}: the loss of step {state.global_step} is {logs['loss']}", f"{lower}.")
            if logs["grad_norm"] == 0 and state.global_step == 1:
                raise UserError(f"{stage}: every gradient is zero, nothing is learnt", "Give --backend hf, or other --bits.")
            if len(losses) > 5 and statistics.median(losses[-5:]) > 2 * losses[0] + 1:
                found = f"{stage}: the loss diverges: {losses[0]:.3f} at first, {losses[-1]:.3f} at step {state.global_step}"
                raise UserError(found, f"{lower}.")
            if state.global_step == 1 and stage == "dpo":
                margin, loss = logs.get("rewards/margins", 0), logs["loss"]
                if abs(margin) > tolerance or (args.loss_type == ["sigmoid"] and abs(loss - math.log(2)) > tolerance):
                    raise UserError(
                        f"{stage}: the first loss is {loss:.4f} (sigmoid: ln 2 = 0.6931), the first reward margin {margin:.4f} and not "
                        "0: the reference is not the policy that training starts from",
                        "Check --init and --sft_adapter; where the card rounds a row by what is beside it, give --trainer stock.",
                    )

    return TrainingHealth()


def check_tokenized(dataset: Any, rows: list[dict[str, str]], tokenizer: Any) -> None:
    """Raise RuntimeError unless the trainer's rows are ours, token for token: all there, none cut, no token dropped."""
    if len(dataset) != len(rows):
        raise RuntimeError(f"the trainer kept {len(dataset)} of {len(rows)} rows")
    for row, text in zip(dataset.select(range(min(8, len(rows)))), rows, strict=False):
        responses = ["completion"] if "completion" in text else ["chosen", "rejected"]
        for response in responses:
            found = row["input_ids"] if response == "completion" else row["prompt_ids"] + row[f"{response}_ids"]
            wanted = [*tokenizer(text["prompt"] + text[response])["input_ids"], tokenizer.eos_token_id]
            if list(found) != wanted:
                raise RuntimeError(f"the trainer's tokens of a {response} response are not those of its text")


def progress_bar(stage: str) -> Any:
    """transformers' progress bar, with the loss beside the time left instead of a printed line a step."""
    from transformers import ProgressCallback

    class Progress(ProgressCallback):
        def on_train_begin(self, args, state, control, **kwargs):  # noqa: ANN001
            super().on_train_begin(args, state, control, **kwargs)
            if self.training_bar is not None:
                self.training_bar.set_description(stage)

        def on_log(self, args, state, control, logs=None, **kwargs):  # noqa: ANN001
            if self.training_bar is None or logs is None:
                return
            shown = {"loss": "loss", "rewards/accuracies": "accuracy", "eval_loss": "held-out loss"}
            values = {label: f"{logs[name]:.4f}" for name, label in shown.items() if name in logs}
            if values:
                self.training_bar.set_postfix(values)

        def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):  # noqa: ANN001
            pass  # a second bar would hide the first

    return Progress()


def peak_memory() -> float:
    """Peak memory in GB: the GPU's where there is one, else the process's."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / GIGABYTE
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIGABYTE


def plot_losses(history: list[dict[str, float]], stage: str, path: Path) -> None:
    draw_losses(history, stage).savefig(path, dpi=150)


def draw_losses(history: list[dict[str, float]], stage: str) -> Any:
    """The log as a figure: loss on training and held-out pairs and, for DPO, reward margin and reward accuracy."""
    from matplotlib.figure import Figure

    panels = {"loss": "loss"}
    if stage == "dpo":
        panels |= {"rewards/margins": "reward margin (nats)", "rewards/accuracies": "reward accuracy"}
    figure = Figure(figsize=(3.5 * len(panels), 2.8), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)
    for axis, (name, label) in zip(axes[0], panels.items(), strict=True):
        for prefix, style, who in (("", "-", "training"), ("eval_", "o--", "held out")):
            points = [(entry["step"], entry[prefix + name]) for entry in history if prefix + name in entry]
            if points:
                axis.plot(*zip(*points, strict=True), style, color="black" if prefix else "tab:blue", label=who, markersize=4)
        axis.set(xlabel="step", ylabel=label)
    losses = [entry["loss"] for entry in history if "loss" in entry]
    if losses and min(losses) > 0 and max(losses) > 20 * min(losses):  # SFT's first steps would flatten all that follows
        axes[0][0].set_yscale("log")
    axes[0][0].legend(frameon=False)
    return figure


# --------------------------------------------------------------------------------------------------- sharing

PAIRS_COMPARED = 32  # held-out pairs on which a merged model is compared with its adapter
MERGED_CARD = """# {adapter}, merged into {base_model} in 16 bits

What was trained and evaluated is the adapter on {bits}-bit weights. This is another model: {found}
Evaluate it before you rely on it.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = AutoModelForCausalLM.from_pretrained("."), AutoTokenizer.from_pretrained(".")
```"""


def check_sharing(final: Path, settings: TrainingSettings, test_digest: str) -> None:
    """Raise UserError for what would keep --push_to_hub or --merge from its end, before anything is trained."""
    stage = "sft" if settings.stage == "sft" else "dpo"
    if settings.merge and config.process_count() > 1:
        raise UserError("--merge runs in one process", "Give it to python alone, after training.")
    if settings.merge and not final.is_dir():
        raise UserError(f"there is no adapter {final} to merge", "Train it first, with the same command without --merge.")
    if settings.merge and holds_something_else(Path(settings.merge)):
        raise UserError(f"{settings.merge} holds what --merge did not write", "Give --merge a new folder.")
    if settings.push_to_hub:
        from huggingface_hub import HfApi, get_token
        from huggingface_hub.utils import validate_repo_id

        with hub_errors(settings.push_to_hub):
            validate_repo_id(settings.push_to_hub)
            if get_token() is None:
                raise UserError("there is no token to publish with", "Run: hf auth login, or set HF_TOKEN, with a token that may write.")
            HfApi().whoami()
    if final.is_dir() and (settings.push_to_hub or settings.merge):
        problem = config.adapter_problem(final, settings, test_digest)
        if not problem and (final / RUN).is_file():
            trained = json.loads((final / RUN).read_text(encoding="utf-8"))["settings"]
            asked = config.trained_settings(stage, vars(settings))
            others = differing(asked | trained, asked)  # a setting that is newer than the run is no difference
            problem = f"{final} was trained with {others}" if others else ""
        if problem:
            raise UserError(problem, "Give the settings that it was trained with, or train it anew without --push_to_hub and --merge.")


def holds_something_else(folder: Path) -> bool:
    """Is there a file, or a folder with anything in it, that --merge did not write?"""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        if json.loads((folder / RUN).read_text(encoding="utf-8")).get("stage") == "merge":
            return False
    return folder.is_file() or (folder.is_dir() and any(folder.iterdir()))


@contextlib.contextmanager
def hub_errors(name: str) -> Iterator[None]:
    """Turn what the Hub or its client says into an error with a remedy."""
    import httpx
    from huggingface_hub.errors import HFValidationError

    try:
        yield
    except (OSError, httpx.HTTPError, HFValidationError) as error:
        said = str(error).strip().partition("\n")[0]
        remedy = "Mend this, and give the same command again: what is finished is not trained again."
        raise UserError(f"cannot publish {name}: {said}", remedy) from error


def push(adapter: Path, settings: TrainingSettings) -> None:
    """Publish an adapter's folder; a card that evaluation has not written says that there was none."""
    from huggingface_hub import HfApi

    import evaluate_dpo

    if not config.is_main_process():
        return
    card = adapter / "README.md"
    if not card.is_file() or evaluate_dpo.CARD_MARK not in card.read_text(encoding="utf-8", errors="replace"):
        print(evaluate_dpo.write_card(adapter, settings))
    with hub_errors(settings.push_to_hub):
        repository = HfApi().create_repo(settings.push_to_hub, exist_ok=True)
        HfApi().upload_folder(repo_id=repository.repo_id, folder_path=adapter, ignore_patterns=["*checkpoint-*"])
    print(f"{adapter} -> {repository}")


def merge(adapter: Path, settings: TrainingSettings, test: list[Pair]) -> None:
    """Write base and adapter as one 16-bit model, whole or not at all, and say how far its scores are from the adapter's.

    The sum is made in float32 and rounded to float16: bfloat16, with 3 bits less, would lose half of a LoRA update. Its
    scores are those of what was written.
    """
    import psutil
    import torch
    from transformers import AutoModelForCausalLM

    import evaluate_dpo

    settings = dataclasses.replace(settings, backend="hf")
    full = dataclasses.replace(settings, bits=16, base_model=config.original_name(settings.base_model))
    free = torch.cuda.mem_get_info()[0] if config.cuda_present() else psutil.virtual_memory().available
    dtype = torch.float32 if free > 5 * config.parameter_count(full.base_model) else torch.float16
    model, tokenizer = config.load_model(settings, dtype)
    trees = [evaluate_dpo.pair_tree(pair, tokenizer) for pair in sorted(test, key=lambda pair: pair.pair_id)[:PAIRS_COMPARED]]
    scores = [response_log_probs(evaluate_dpo.load_adapter(model, "default", adapter), trees)]
    del model
    free_memory()
    with config.whole_folder(Path(settings.merge)) as made:
        model, _ = config.load_model(full, torch.float16)
        evaluate_dpo.load_adapter(model, "default", adapter).merge_and_unload().save_pretrained(made)  # adds in float32
        tokenizer.save_pretrained(made)
        del model
        free_memory()
        device = "cuda" if config.cuda_present() else "cpu"
        scores.append(response_log_probs(AutoModelForCausalLM.from_pretrained(made, dtype=dtype).to(device).eval(), trees))
        difference = np.abs(scores[1] - scores[0])[..., 1]
        one, other = (letters[..., 0, 0] > letters[..., 1, 0] for letters in scores)
        compared = {
            **{"pairs": len(trees), "decisions": one.size, "decisions_changed": int((one != other).sum())},
            **{"largest_difference_nats": round(float(difference.max()), 4), "mean_difference_nats": round(float(difference.mean()), 4)},
            "compute_dtype": str(dtype).removeprefix("torch."),
        }
        found = (
            f"on {len(trees)} held-out pairs in both orders the log-probabilities of responses differ by up to "
            f"{difference.max():.2f} nats (mean {difference.mean():.2f}) from those of the adapter on {settings.bits}-bit weights, and "
            f"{compared['decisions_changed']} of {one.size} decisions change."
        )
        names = {"adapter": adapter.name, "base_model": full.base_model, "bits": settings.bits}
        text = MERGED_CARD.format(**names, found=found)
        config.write_json(made / RUN, {"stage": "merge", **names, "compared": compared, **config.environment_facts()})
        config.write_text(made / "README.md", evaluate_dpo.hub_card(full, text, library_name="transformers"))
    print(f"{adapter} and {full.base_model} in 16 bits -> {settings.merge}\n{found}")


def response_log_probs(model: Any, trees: Sequence[Tree]) -> np.ndarray:
    """log p in nats, (pairs, orders, [chosen, rejected], [the option's letter, the response from there to its end])."""
    import torch
    from tqdm import tqdm

    import evaluate_dpo

    with torch.inference_mode():
        bar = tqdm(trees, desc="scoring", unit="pair", leave=False)
        found = [(tree, next(evaluate_dpo.tree_log_probs(model, [tree]))) for tree in bar]
    return np.array([[[(log_probs[path[0]], log_probs[path].sum()) for path in order] for order in tree.paths] for tree, log_probs in found])


# ---------------------------------------------------------------------------------------------------- checks

Check = tuple[str, str, str]  # what, what was found, how to mend it ("" where all is well)


def run_checks(
    settings: TrainingSettings,
    train: list[Pair],
    test: list[Pair],
    rows: list[dict[str, str]],
    validation_rows: list[dict[str, str]],
) -> list[Check]:
    """Look at all that a run needs, before a model is loaded; each finding is (what, found, remedy or "")."""
    import psutil
    import torch

    packages = ["torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate", "datasets"]
    unmet = config.unmet_requirements([*packages, *(["unsloth"] if config.backend_of(settings) == "unsloth" else [])])
    remedy = f"Run {sys.executable} -m pip install -r requirements.txt" if None in unmet.values() else ""
    differing = ", ".join(f"{wanted} is wanted, {version} installed" for wanted, version in unmet.items())
    checks = [("packages", differing or "as in requirements.txt", remedy)]
    facts = config.environment_facts()
    checks.append(("device", f"{facts['device']}, {facts['cores']} cores, computes in {facts['compute_dtype']}", ""))

    tokenizer = config.load_tokenizer(settings)
    config.check_base_model(settings.base_model)
    parameters = config.parameter_count(settings.base_model)
    needed = 1.5 + parameters * settings.bits / 8 * 1.3 / GIGABYTE
    free = torch.cuda.mem_get_info()[0] if config.cuda_present() else psutil.virtual_memory().available
    model = f"{settings.base_model}, {parameters / 1e6:,.0f} M parameters in {settings.bits} bits"
    remedy = "" if free / GIGABYTE >= needed else "Free memory, or lower --bits."
    checks.append(("base model", f"{model}, trained by {config.backend_of(settings)}", ""))
    checks.append(("memory", f"{free / GIGABYTE:.1f} GB free, at least {needed:.1f} GB needed", remedy))
    outputs = Path(settings.outputs).absolute()
    disk = shutil.disk_usage(next(folder for folder in (outputs, *outputs.parents) if folder.exists())).free / GIGABYTE
    remedy = "" if disk > 1 else "Free 1 GB, or give --outputs elsewhere."
    checks.append(("disk", f"{disk:.1f} GB free for {settings.outputs}", remedy))

    answers = Counter(pair.order for pair in train + test)
    checks.append(("pairs", f"{len(train + test):,} in {settings.pairs}: {len(train):,} train, {len(test):,} test", ""))
    leak = "; one letter alone would score " + f"{max(answers.values()) / answers.total():.0%} in this order"
    checks.append(("answers in the file", f"{answers['A']:,} A, {answers['B']:,} B" + leak, ""))
    in_a = sum(row["chosen"].startswith(f"{STEM} A") for row in rows)
    checks.append(("rows", f"{len(rows):,} for training ({settings.option_order}): {in_a:,} A, {len(rows) - in_a:,} B", ""))
    longest = check_tokens(rows + validation_rows, tokenizer, settings.max_length)
    checks.append(("longest row", f"{longest} tokens of at most {settings.max_length}", ""))

    for stage, epochs in (("sft", settings.sft_epochs), ("dpo", settings.epochs)):
        steps = math.ceil(math.ceil(len(rows) / settings.effective_batch) * epochs)
        steps = min(steps, settings.max_steps) if settings.max_steps > 0 else steps
        folder = config.adapter_folder(settings, stage)
        plan = f"{steps:,} steps of {settings.effective_batch}; {folder} {'is there' if folder.is_dir() else 'is not there yet'}"
        checks.append((stage, plan, ""))
    checks += [starting_point(settings, ids_digest(test)), libraries_settings(settings)]
    return checks


def libraries_settings(settings: TrainingSettings) -> Check:
    """Whether the libraries know the optimiser, the schedule and the tracker that are named, which they else say in a traceback."""
    import torch
    from transformers import get_scheduler
    from transformers.integrations import get_available_reporting_integrations
    from transformers.training_args import OptimizerNames

    try:
        OptimizerNames(settings.optim)
        dummy = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        get_scheduler(settings.lr_scheduler, dummy, num_warmup_steps=settings.warmup_steps, num_training_steps=2 + settings.warmup_steps)
    except (ValueError, TypeError) as error:
        return ("trainer", config.printable(str(error).strip().partition("\n")[0]), "Give another --optim or --lr_scheduler.")
    known = settings.report_to in ("none", "all", *get_available_reporting_integrations())
    named = f"{settings.optim}, {settings.lr_scheduler}, reports to {settings.report_to}"
    return ("trainer", named, "" if known else f"Install {settings.report_to}, or give --report_to none.")


def starting_point(settings: TrainingSettings, test_digest: str) -> Check:
    """What DPO starts from, and whether an adapter that is there already fits this base model and split."""
    folder = Path(settings.sft_adapter or config.adapter_folder(settings, "sft"))
    if settings.stage == "sft" or settings.init == "base":
        return ("DPO starts from", "the base model" if settings.init == "base" else "nothing: only SFT is trained", "")
    if settings.stage == "all" and settings.sft_adapter is None and not folder.is_dir():
        return ("DPO starts from", "the SFT adapter that is trained first", "")
    problem = config.adapter_problem(folder, settings, test_digest)
    if problem:
        return ("DPO starts from", problem, "Train it with --stage sft, or give --sft_adapter.")
    lora = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    kind = [name for name in ("use_rslora", "use_dora", "alpha_pattern", "rank_pattern", "modules_to_save") if lora.get(name)]
    kind += sorted(config.adapted_layers(folder) - {*config.LORA_TARGETS})
    if kind:
        return ("DPO starts from", f"{folder}, an adapter with {', '.join(kind)}", "Train SFT with --stage sft: DPO goes on with plain LoRA.")
    found = {"lora_rank": lora.get("r"), "lora_alpha": lora.get("lora_alpha")}  # DPO goes on with them
    other = " ".join(f"--{name} {value}" for name, value in found.items() if value != getattr(settings, name))
    return ("DPO starts from", f"{folder}{f', which has {other}' if other else ''}", f"Give {other}, or train SFT anew." if other else "")


def check_tokens(rows: list[dict[str, str]], tokenizer: Any, max_length: int) -> int:
    """The longest row in tokens, end-of-text included.

    Raises:
        UserError: a row is longer than max_length, or its prompt's tokens change when a response follows.
    """
    longest = 0
    prompts = tokenizer([row["prompt"] for row in rows])["input_ids"]
    for response in ("chosen", "rejected"):
        texts = tokenizer([row["prompt"] + row[response] for row in rows])["input_ids"]
        for number, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
            if text[: len(prompt)] != prompt:
                raise UserError(
                    f"row {number}: this tokenizer merges the prompt's end with the response's beginning",
                    "Use a base model whose tokenizer keeps a newline apart from what follows.",
                )
            longest = max(longest, len(text) + 1)
    if longest > max_length:
        raise UserError(f"the longest row has {longest} tokens, more than max_length {max_length}", f"Give --max_length {longest}.")
    return longest


def print_checks(checks: list[Check]) -> None:
    width = max(len(what) for what, _, _ in checks)
    for what, found, remedy in checks:
        print(f"{'!!' if remedy else 'ok'}  {what:<{width}}  {found}" + (f"\n    {'':<{width}}  {remedy}" if remedy else ""))
    problems = sum(bool(remedy) for _, _, remedy in checks)
    print("ready to train" if not problems else f"{problems} thing(s) to mend before training")
    if problems:
        raise SystemExit(2)


if __name__ == "__main__":
    config.run_script(main)
