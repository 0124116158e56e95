"""Train the adapters that evaluate_dpo.py compares: SFT, its control (SFT continued), and DPO.

    python train_dpo.py                    # SFT, then from its adapter the control and DPO
    python train_dpo.py --seeds 3          # three runs of each
    python train_dpo.py --check            # look at everything, train nothing
    python train_dpo.py --stage dpo --init base --beta 0.2

Pairs -> preference rows -> SFT on the chosen responses -> as many steps of either more SFT or DPO on chosen against
rejected -> adapter folders with `run.json`, `loss.png` and a model card. What is there with the same settings is not
trained again.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import math
import os
import shutil
import signal
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch
from safetensors.torch import load_file
from torch.nn.functional import pad
from tqdm import tqdm

import config
from config import TrainingSettings
from data import runs
from data.adapters import starting_point
from data.bases import HUB_NAMES
from data.errors import Check, UserError, failed_kernel, print_checks, printable, refuse
from data.figures import draw_losses
from data.files import file_sha256, only_run_in, read_json, seal, weights_digest, whole_folder, write_json
from data.machine import PACKAGES, peak_process_memory, unmet_requirements
from data.pairs import STEM, Pair, hold_back, ids_digest, preference_rows, prompt_digest, warnings_on
from data.report import write_card
from data.runs import RUN, WEIGHTS
from data.tokens import check_tokenized, check_tokens, labels_of, longest_in_tokens, pair_tree, placed_trees, tree_of
from data.trees import ancestor_mask, row_lengths


class Data(NamedTuple):
    """What is trained on: rows with prompt, chosen and rejected, and what run.json says of them."""

    rows: list[dict[str, str]]
    validation_rows: list[dict[str, str]]
    split: dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> None:
    settings = config.parse_settings(TrainingSettings, arguments)

    # pairs
    train, test = config.load_split(settings)
    used, validation = hold_back(train, settings.validation_pairs, settings.max_pairs)
    if len(used) < settings.effective_batch:
        problem = f"{len(used)} pairs are left to train on, fewer than one step's {settings.effective_batch}"
        remedy = f"Lower --effective_batch or --validation_pairs ({settings.validation_pairs}), or give more pairs"
        raise UserError(problem, remedy + (" and a higher --max_pairs." if settings.max_pairs else "."))

    # rows
    split = {"pairs_sha256": file_sha256(settings.pairs), "train_pairs": len(used), "train_digest": ids_digest(used)}
    split |= {"validation_pairs": len(validation), "test_pairs": len(test), "test_digest": ids_digest(test)}
    split |= {"prompt_digest": prompt_digest()}
    data = Data(preference_rows(used, settings.option_order, settings.seed), preference_rows(validation, "both"), split)

    # checks, before a model is loaded
    checks = run_checks(settings, train, test, data)
    if settings.check:
        print_checks(checks)
        return
    refuse(checks)

    # SFT, its control and DPO: the adapters of each run
    for run in config.planned_runs(settings):
        there = run.found(split["pairs_sha256"])
        refuse([(run.stage, there.said, there.remedy)])  # its start may have been trained since the checks
        if there.done:
            print(f"{run.stage}: {there.said}", flush=True)
        else:
            drawn = preference_rows(used, settings.option_order, run.settings.seed)
            train_stage(run.stage, run.settings, data._replace(rows=drawn), run.start)
    print(f"\nnext: {config.next_command(settings)}", flush=True)


# ------------------------------------------------------------------------------------------ a stage, whole

def train_stage(stage: str, settings: TrainingSettings, data: Data, start: Path | None = None) -> None:
    """Train one stage (`sft`, `sft_more` or `dpo`) from an adapter or the base model, and write its adapter folder."""
    from accelerate.utils import release_memory

    began = time.monotonic()
    folder, checkpoints = config.adapter_folder(settings, stage), config.checkpoints_folder(settings, stage)
    kind = "shared" if shares_prompt(settings) else "stock"
    print(f"{stage}: {len(data.rows):,} rows from {f'the adapter {start}' if start else 'the base model'}")
    print(f"  {settings.bits}-bit {settings.base_model}, {kind} trainer", flush=True)
    start_sha256 = file_sha256(start / WEIGHTS) if start else None
    how = {"backend": config.backend_of(settings), "processes": config.PROCESSES}
    identity = runs.decisive(stage, vars(settings), data.split["pairs_sha256"], start_sha256) | how
    identity |= {"compute dtype": str(config.training_dtype())}
    with only_run_in(checkpoints) if config.RANK == 0 else contextlib.nullcontext():
        if config.RANK == 0:
            runs.prepare_checkpoints(checkpoints, identity, settings.restart)
        for leftover in folder.parent.glob(f".{folder.name}.*"):  # of a final save that was killed
            shutil.rmtree(leftover, ignore_errors=True)
        trainer, fitted = train_within_memory(stage, settings, data, start)
        history, steps = trainer.state.log_history, trainer.state.global_step
        losses = [entry["loss"] for entry in history if "loss" in entry]
        gaps = np.diff(trainer.step_ends)  # without the first step, which compiles
        seen = runs.rows_in(steps, len(data.rows), settings.effective_batch)
        before = runs.pairs_seen(start) if start else 0
        peak = torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else peak_process_memory()
        run = {
            "stage": stage, "settings": dataclasses.asdict(settings),
            "initial_adapter": str(start) if start else None, "initial_adapter_sha256": start_sha256,
            "initial_adapter_known": (start / RUN).is_file() if start else None,  # else it may have seen test pairs
            "data": data.split, "rows": len(data.rows), "steps": steps,
            **fitted,  # after a resumption, seconds and memory are those since then
            "rows_seen": seen, "pairs_seen": seen + before if before or not start else None,  # its start's included
            "first_loss": losses[0], "last_loss": losses[-1], "wall_seconds": round(time.monotonic() - began, 1),
            "rows_per_second": round(settings.effective_batch / statistics.median(gaps), 3) if len(gaps) else None,
            "train_seconds": round(history[-1].get("train_runtime", 0), 1), "peak_memory_gb": round(peak, 2),
            "vocabulary": len(trainer.processing_class), "base_weights_digest": weights_digest(settings.base_model),
            **how, **config.environment_facts(), "log_history": history,
        }
        save_adapter(trainer, folder, settings, run)
        if config.RANK == 0:
            shutil.rmtree(checkpoints, ignore_errors=True)
    since = f" (since step {run['resumed_from_step']})" if run["resumed_from_step"] else ""
    took = f"in {steps} steps, {run['wall_seconds']:.0f} s{since}, {run['peak_memory_gb']} GB"
    print(f"{stage}: loss {run['first_loss']:.4f} -> {run['last_loss']:.4f} {took}\n  -> {folder}", flush=True)
    if (wandb := sys.modules.get("wandb")) and getattr(wandb, "run", None):
        wandb.finish()  # or the next stage would go into the same run
    del trainer
    release_memory()


def train_within_memory(stage: str, settings: TrainingSettings, data: Data, start: Path | None) -> tuple[Any, dict]:
    """(trained trainer, what run.json says of how it fitted).

    Out of memory, the stage starts again, or goes on from its last checkpoint, with gradient checkpointing, then with
    half the micro-batch; and with the stock trainer where a kernel of the shared one fails on this card. Effective
    batch, seed and starting weights stay: what is trained does not depend on it.
    """
    from accelerate.utils import gather_object, release_memory
    from transformers import set_seed

    if torch.cuda.is_available():
        torch.cuda.set_device(config.LOCAL_RANK)  # what is capped and measured is each process's own GPU
        if settings.gpu_memory_gb:
            total = torch.cuda.get_device_properties(config.LOCAL_RANK).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, settings.gpu_memory_gb * 1e9 / total))
    share = settings.effective_batch // config.PROCESSES
    shared = shares_prompt(settings)
    responses, prompts = (["chosen"], 1) if stage != "dpo" else (["chosen", "rejected"], 1 if shared else 2)
    tokens = longest_in_tokens(data.rows, config.load_tokenizer(settings), responses, prompts)
    batch_size, checkpointing, graphs = config.fitting_batch_size(settings, share, tokens, shared)
    if config.PROCESSES > 1:  # all take what the fullest GPU can
        config.join_processes()
        fitting = gather_object([(batch_size, checkpointing)])
        batch_size, checkpointing = min(size for size, _ in fitting), any(kept for _, kept in fitting)
    while True:
        attempt = dataclasses.replace(settings, gradient_checkpointing=checkpointing, cuda_graphs=graphs)
        set_seed(settings.seed)  # before the adapter is made: TRL does not seed it
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()  # of an earlier stage, or of an attempt that failed
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # Unsloth's banners; the progress bar is on stderr
                trainer = build_trainer(stage, attempt, data, start, batch_size)
                trainer.accelerator.wait_for_everyone()  # the first process may have thrown checkpoints away
                checkpoint = runs.last_whole_checkpoint(config.checkpoints_folder(settings, stage))
                train_from(trainer, checkpoint, stage)
            return trainer, {
                "batch_size": batch_size, "gradient_checkpointing": checkpointing,
                "trainer": "shared" if shares_prompt(settings) else "stock",
                "cuda_graphs": len(getattr(getattr(trainer, "hidden_states", None), "captured", ())),
                "resumed_from_step": checkpoint and int(checkpoint.name.rpartition("-")[2]),
            }
        except Exception as error:
            problem = failed_kernel(error) if shares_prompt(settings) else ""
            if not problem and not isinstance(error, torch.OutOfMemoryError):
                raise
            trainer = None  # goes on below, where nothing holds on to the tensors
        release_memory()
        if problem:
            settings, graphs, less = dataclasses.replace(settings, trainer="stock"), False, "with the stock trainer"
        elif graphs:
            graphs, less = False, "without CUDA graphs"
        elif config.PROCESSES == 1 and not checkpointing and settings.gradient_checkpointing is None:
            checkpointing, less = True, "with gradient checkpointing"  # never with graphs, which would record it twice
        elif config.PROCESSES == 1 and batch_size > 1:
            batch_size = max(size for size in range(1, batch_size // 2 + 1) if share % size == 0)
            less = f"with micro-batches of {batch_size}, {share // batch_size} to a step"
        else:
            keep = "" if checkpointing else "Give --gradient_checkpointing true. "
            lower = "--batch_size" if batch_size > 1 else "--bits, --lora_rank (of SFT) or the length of the texts"
            raise UserError(f"{stage}: out of memory with a micro-batch of {batch_size}", f"{keep}Lower {lower}.")
        print(f"{stage}: {problem or 'out of memory'}; starting again {less}", flush=True)


def save_adapter(trainer: Any, folder: Path, settings: TrainingSettings, run: dict[str, Any]) -> None:
    """Write the adapter folder, whole or not at all; under `accelerate launch` the first process writes."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    state = trainer.accelerator.get_state_dict(trainer.model) if config.FSDP else None
    if config.RANK == 0:
        with whole_folder(folder) as made:
            name = HUB_NAMES.get(settings.base_model, settings.base_model)  # one that any client finds
            model.peft_config["default"].base_model_name_or_path = name
            model.save_pretrained(made, selected_adapters=["default"], save_embedding_layers=False, state_dict=state)
            config.load_tokenizer(settings).save_pretrained(made)
            write_json(made / RUN, run)
            draw_losses(run["log_history"], run["stage"]).savefig(made / "loss.png", dpi=150)
            (made / "README.md").unlink(missing_ok=True)  # PEFT's, all gaps and a path of this machine
        if (said := write_card(folder, config.base_facts(settings))).startswith("warning"):
            print(said, file=sys.stderr, flush=True)
    trainer.accelerator.wait_for_everyone()


def train_from(trainer: Any, checkpoint: Path | None, stage: str) -> None:
    """Train from the start or go on from a checkpoint; stopped from outside, save the step, raise KeyboardInterrupt."""
    from transformers import TrainerCallback

    class AllTrained(Exception):
        pass

    class Checkpoints(TrainerCallback):
        stopping = False

        def on_train_begin(self, args, state, control, **kwargs):
            state.compute_steps(args, state.max_steps)  # of saves and logs: these settings', not the checkpoint's
            if state.global_step >= state.max_steps:  # killed after the last step: transformers would train one more
                raise AllTrained

        def on_step_end(self, args, state, control, **kwargs):
            trainer.step_ends.append(time.monotonic())
            if self.stopping:
                control.should_save = control.should_training_stop = True
            if state.global_step >= state.max_steps:  # or run.json would not have the last losses
                control.should_log, control.should_evaluate = True, trainer.eval_dataset is not None

        def on_save(self, args, state, control, **kwargs):
            trainer.accelerator.wait_for_everyone()  # each process writes its own random state
            if config.RANK == 0:
                seal(Path(args.output_dir) / f"checkpoint-{state.global_step}")

        def stop(self, number, frame):
            if self.stopping:
                raise KeyboardInterrupt
            self.stopping = True
            print(f"\n{stage}: stopping after this step", file=sys.stderr, flush=True)

    trainer.step_ends, checkpoints = [], Checkpoints()
    trainer.add_callback(checkpoints)  # after training_health, which looks at the gradients before one is sealed
    if checkpoint and config.RANK == 0:
        print(f"{stage}: goes on from {checkpoint}", file=sys.stderr, flush=True)
    if not config.FSDP:  # beside a frozen reference transformers loads the reference alone
        trainer._load_from_checkpoint = lambda path: load_policy(trainer.model, Path(path))
    signals = (signal.SIGINT, signal.SIGTERM) if config.PROCESSES == 1 else ()  # several would not stop together
    before = {number: signal.signal(number, checkpoints.stop) for number in signals}
    try:
        with contextlib.suppress(AllTrained):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:
        for callback in trainer.callback_handler.callbacks:
            if (bar := getattr(callback, "training_bar", None)) is not None:
                bar.close()  # or an error would stand beside it
        for number, handler in before.items():
            signal.signal(number, handler)
    if checkpoints.stopping:
        at = f"{stage}: stopped at step {trainer.state.global_step} of {trainer.state.max_steps}, which is saved"
        raise KeyboardInterrupt(f"{at}\nThe same command goes on from there.")


# -------------------------------------------------------------------------------------------- the trainer

def build_trainer(stage: str, settings: TrainingSettings, data: Data, start: Path | None = None, batch_size: int = 1):
    """TRL's trainer for one stage, on a freshly loaded base model.

    The reference of DPO is the policy that it starts from: the base model with the adapter off, or a frozen copy of the
    adapter (which TRL makes of any PeftModel). At the first step both are equal, and the loss is ln 2.
    """
    from datasets import Dataset
    from peft import PeftModel
    from transformers import ProgressCallback
    from trl import DPOTrainer, SFTTrainer

    model, tokenizer = config.load_model(settings, config.training_dtype())
    tokenizer.chat_template = None  # the text is no chat; Unsloth drops the first token where a template holds it
    adapter: dict[str, Any] = {}
    if config.backend_of(settings) == "unsloth":
        model = config.add_unsloth_adapter(model, settings, start)
    elif start is None:
        adapter["peft_config"] = config.lora_config(settings)
    else:
        model = PeftModel.from_pretrained(model, start, is_trainable=True)
        model.peft_config["default"].base_model_name_or_path = config.model_path(settings.base_model)  # not on the hub
    rows, watched = data.rows, data.validation_rows
    if stage != "dpo":
        rows, watched = ([{"prompt": row["prompt"], "completion": row["chosen"]} for row in part] for part in data[:2])
    shared, kind = shares_prompt(settings), DPOTrainer if stage == "dpo" else SFTTrainer
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(Path(settings.outputs) / "logs" / stage)  # checkpoints are removed
    if shared:
        kind = tree_trainer(kind, stage, in_one_row(settings), bool(settings.cuda_graphs))
    sets = {"train_dataset": Dataset.from_list(rows), "eval_dataset": Dataset.from_list(watched) if watched else None}
    about = {"args": trainer_arguments(stage, settings, batch_size), "callbacks": [training_health(stage, settings)]}
    trainer = kind(model=model, processing_class=tokenizer, **sets, **about, **adapter)
    check_tokenized(trainer.train_dataset, rows, tokenizer)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(progress_bar(stage))
    if not config.FSDP:  # which shards what has one dtype
        keep_adapter_in_float32(trainer.model)
        if start:
            load_policy(trainer.model, start)  # its weights, which TRL has rounded to bfloat16
            config.check_loaded(trainer.model, "default", start)
    if shared:
        check_isolation(trainer, stage, settings.bits)
    if shared and stage == "dpo":
        remember_reference(trainer, settings, start)
    return trainer


def trainer_arguments(stage: str, settings: TrainingSettings, batch_size: int) -> Any:
    """TRL's configuration of one stage; what another backend would set otherwise is given in full."""
    from trl import DPOConfig, SFTConfig

    bfloat16, watched = config.training_dtype() == torch.bfloat16, bool(settings.validation_pairs)
    shared = {
        "output_dir": str(config.checkpoints_folder(settings, stage)), "report_to": settings.report_to,
        "seed": settings.seed, "data_seed": settings.seed,
        "num_train_epochs": settings.sft_epochs if stage == "sft" else settings.epochs, "max_steps": settings.max_steps,
        "learning_rate": runs.learning_rate({"stage": stage, "settings": vars(settings)}),
        "max_length": settings.max_length,  # run_checks has seen that every row fits: none is cut, none dropped
        "per_device_train_batch_size": batch_size, "per_device_eval_batch_size": batch_size,
        "gradient_accumulation_steps": settings.effective_batch // config.PROCESSES // batch_size,
        "optim": settings.optim, "lr_scheduler_type": settings.lr_scheduler, "warmup_steps": settings.warmup_steps,
        "weight_decay": settings.weight_decay, "max_grad_norm": settings.max_grad_norm,
        "bf16": bfloat16, "fp16": False, "use_cpu": not torch.cuda.is_available(),
        "tf32": torch.cuda.is_available() and bfloat16,  # for what is left in float32: a tenth of the time
        "gradient_checkpointing": bool(settings.gradient_checkpointing),
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "ddp_find_unused_parameters": False, "dataloader_pin_memory": torch.cuda.is_available(),
        "accelerator_config": {"non_blocking": torch.cuda.is_available()},  # or each batch would wait for the last step
        "eval_strategy": "steps" if watched else "no", "eval_steps": settings.eval_steps if watched else None,
        "save_steps": settings.save_steps, "save_total_limit": 2, "disable_tqdm": False,
        "logging_steps": settings.logging_steps, "logging_first_step": True,
        "logging_nan_inf_filter": False,  # it would hide them from training_health, and wait for each step's loss
    }
    if stage == "dpo":
        losses = settings.loss_type.split("+")
        shared |= {"loss_type": losses, "loss_weights": [1.0, settings.sft_weight][: len(losses)]}
        made = DPOConfig(**shared, beta=settings.beta, disable_dropout=True, precompute_ref_log_probs=False)
    else:
        made = SFTConfig(**shared, completion_only_loss=True, packing=False, padding_free=False)
    made.mixed_precision = "bf16" if made.bf16 else "no"  # whatever an accelerate configuration asks for
    made._n_gpu = min(made.n_gpu, 1)  # without a launcher a second GPU would get rows of its own: another batch
    return made


def keep_adapter_in_float32(model: Any) -> None:
    """Undo TRL's cast of a quantised model's adapter to bfloat16, which would round small updates away."""
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()


def load_policy(model: Any, folder: Path) -> None:
    """Give the policy the weights of an adapter or a checkpoint, in the precision that it has."""
    from peft import set_peft_model_state_dict

    set_peft_model_state_dict(model, load_file(folder / WEIGHTS), adapter_name="default")


def first_loss_tolerance(settings: TrainingSettings) -> float:
    """How far DPO's first loss may be from ln 2, and its first reward margin from 0.

    A remembered reference was computed among other rows. Where these change the rounding, it may be off by a nat. On a
    CPU all batches have one length, so only 8 bits are rounded by other rows.
    """
    rounds = settings.bits == 8 or (torch.cuda.is_available() and config.training_dtype() != torch.float32)
    return settings.beta if rounds and shares_prompt(settings) else 1e-3


def training_health(stage: str, settings: TrainingSettings) -> Any:
    """A callback that stops a run that cannot learn, learns against a wrong reference, or falls apart."""
    from transformers import TrainerCallback

    prefix = {"sft": "sft_", "sft_more": "control_", "dpo": ""}[stage]
    lower = f"Lower --{prefix}learning_rate or --max_grad_norm, with --restart true."

    class TrainingHealth(TrainerCallback):
        looking: tuple[int, Any, Any] = (0, True, None)  # a step, are its gradients finite, when that is known

        def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
            self.look()
            weights = [weight for group in optimizer.param_groups for weight in group["params"]]
            norms = torch._foreach_norm([weight.grad for weight in weights if weight.grad is not None])
            finite = torch.stack(norms).isfinite().all()
            found = torch.empty((), dtype=torch.bool, pin_memory=finite.is_cuda).copy_(finite, non_blocking=True)
            copied = torch.cuda.current_stream().record_event() if finite.is_cuda else None
            self.looking = state.global_step + 1, found, copied

        def look(self) -> None:
            """At the gradients of the step before: those of this one would have to be waited for."""
            step, finite, copied = self.looking
            if copied:
                copied.synchronize()
            if not finite:
                raise UserError(f"{stage}: the gradient of step {step} is not finite", lower)

        def on_save(self, args, state, control, **kwargs):
            self.look()  # before the checkpoint is called whole; the last step is always saved

        def on_log(self, args, state, control, logs, **kwargs):
            if "loss" not in logs:
                return
            losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
            step, loss, margin = state.global_step, logs["loss"], logs.get("rewards/margins", 0)
            if not math.isfinite(loss):
                raise UserError(f"{stage}: the loss of step {step} is {loss}", lower)
            if logs["grad_norm"] == 0 and step == 1:
                remedy = "Give --backend hf, or other --bits."
                raise UserError(f"{stage}: every gradient is zero, nothing is learnt", remedy)
            if len(losses) > 5 and statistics.median(losses[-5:]) > 2 * losses[0] + 1:
                problem = f"{stage}: the loss diverges: {losses[0]:.3f} at first, {losses[-1]:.3f} at step {step}"
                raise UserError(problem, lower)
            off = 0 if stage != "dpo" or args.loss_type != ["sigmoid"] else abs(loss - math.log(2))
            if step == 1 and max(off, abs(margin)) > first_loss_tolerance(settings):
                problem = (
                    f"{stage}: the first loss is {loss:.4f} (sigmoid: ln 2 = 0.6931), the first reward margin "
                    f"{margin:.4f} and not 0: the reference is not the policy that training starts from"
                )
                remedy = "Check --init and --sft_adapter; where the card rounds a row by what is beside it, give"
                raise UserError(problem, f"{remedy} --trainer stock.")

    return TrainingHealth()


def progress_bar(stage: str) -> Any:
    """transformers' progress bar, with the loss beside the time left instead of a printed line a step."""
    from transformers import ProgressCallback, TrainerCallback

    class Progress(ProgressCallback):
        on_prediction_step = TrainerCallback.on_prediction_step  # a second bar would hide the first

        def on_train_begin(self, args, state, control, **kwargs):
            super().on_train_begin(args, state, control, **kwargs)
            if self.training_bar is not None:
                self.training_bar.set_description(stage)

        def on_log(self, args, state, control, logs=None, **kwargs):
            shown = {"loss": "loss", "rewards/accuracies": "accuracy", "eval_loss": "held-out loss"}
            values = {label: f"{logs[name]:.4f}" for name, label in shown.items() if name in (logs or {})}
            if self.training_bar is not None and values:
                self.training_bar.set_postfix(values)

    return Progress()


# ---------------------------------------------------------------------------------- the shared-prompt trainer

HEAD_CHUNK = {"cuda": 32_768, "cpu": 4_096}  # words whose logits are made at once; fewer stay in a CPU's cache
BLOCKS = {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2}  # for the registers of every card
BLOCKS |= {"bwd_BLOCK_M1": 32, "bwd_BLOCK_N1": 64, "bwd_BLOCK_M2": 64, "bwd_BLOCK_N2": 32}
NODES = ("tree_tokens", "tree_positions", "tree_ends", "tree_pairs", "tree_responses")  # hidden states are made of them


def shares_prompt(settings: TrainingSettings) -> bool:
    """Is a pair's prompt computed once, and logits for its responses alone? The default, and the faster way."""
    if settings.trainer == "shared" and config.FSDP:  # which serves only whole forward passes
        raise UserError("the shared trainer cannot train a model that FSDP shards", "Give --trainer stock, or auto.")
    return settings.trainer != "stock" and not config.FSDP


def in_one_row(settings: TrainingSettings) -> bool:
    """Do Unsloth's own models take all pairs as one row? A base in 8 bits it loads as transformers' model."""
    return config.backend_of(settings) == "unsloth" and settings.bits != 8


def tree_trainer(kind: type, stage: str, in_row: bool, graphs: bool) -> type:
    """TRL's trainer of a stage, but one that computes a pair as one tree of tokens (data/trees.py).

    In DPO the prompt is computed once, not once for each response; in SFT the tree has one branch. Logits are made only
    where a response token is predicted. Data, reference, DPO's losses and metrics stay TRL's: it has a route for
    kernels that give log-probabilities without logits. The loss of SFT is its mean over the step's response tokens.
    """
    from trl.models.utils import _ForwardRedirection
    from trl.trainer.utils import _ChunkedLogProbFunction

    class TreeTrainer(kind):
        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **kwargs)
            self._forward_redirection = _ForwardRedirection()  # runs it inside the wrapper that several processes need
            self.use_liger_kernel = True  # TRL's name for that route; no Liger kernel is used
            self.model_accepts_loss_kwargs = True  # so that a step's response tokens are counted, and in DPO its rows
            if stage != "dpo":
                self.data_collator = lambda rows: {"labels": torch.from_numpy(labels_of(rows))}
                self._signature_columns = ["input_ids", "labels", "completion_mask"]
            rows, size, stock = self.train_dataset, self.args.per_device_train_batch_size, self.data_collator
            some = range(0, len(rows), -(-len(rows) // 1_000))  # to choose the lengths by
            lengths = row_lengths([tree_of(rows[index]) for index in some], size) if in_row else []
            if not in_row and not torch.cuda.is_available():  # a CPU rounds a row by its padded length: one for all
                lengths = [max(len(tree_of(row).tokens) for row in (*rows, *(self.eval_dataset or ())))]
            self.lengths, self.data_collator = lengths, lambda rows: tree_batch(rows, stock(rows), in_row, lengths)
            states = flat_hidden_states if in_row else tree_hidden_states
            self.hidden_states = Graphs(states, lengths) if graphs else states
            shorten_walks(self.model)

        def floating_point_ops(self, inputs):
            return 0  # to count them is another walk

        def compute_loss(self, model, *given, **named):
            unwrapped = getattr(model, "module", model)  # accelerate's way is another such walk
            return self._forward_redirection(model, unwrapped, self._compute_loss, unwrapped, *given, **named)

        def response_log_probs(self, model: Any, inputs: dict[str, Any]) -> tuple[Any, Any]:
            """Log-probabilities and entropies of the batch's response tokens, each (response tokens,)."""
            causal = model.base_model.model
            with self.accelerator.autocast():
                nodes = {name: inputs[name] for name in NODES if name in inputs}
                hidden = self.hidden_states(causal.base_model, nodes)
                before, targets = hidden.flatten(0, 1)[inputs["tree_before"]], inputs["tree_targets"]
                head, chunk = causal.get_output_embeddings(), HEAD_CHUNK[before.device.type]
                return _ChunkedLogProbFunction.apply(before, head.weight, head.bias, targets, 1.0, chunk)

    class TreeDPOTrainer(TreeTrainer):
        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **kwargs)
            gather, for_metrics = self.accelerator.gather, self.accelerator.gather_for_metrics  # of what TRL will log
            self.accelerator.gather = lambda values: gather(values).as_subclass(Later)
            self.accelerator.gather_for_metrics = lambda values: for_metrics(values).as_subclass(Later)

        def get_batch_samples(self, *arguments, **more):
            batches, _ = super().get_batch_samples(*arguments, **more)
            return batches, sum(len(batch["input_ids"]) for batch in batches)

        def _compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            """Of a step's micro-batches the last of a pass may be short: its rows count as much as any."""
            loss = super()._compute_loss(model, inputs, return_outputs)
            return loss if num_items_in_batch is None else loss * (len(inputs["input_ids"]) / num_items_in_batch)

        def log(self, logs, start_time=None):
            for found in self._metrics.values():
                found |= {name: [float(value) for value in values] for name, values in found.items()}
            super().log(logs, start_time)

        def _get_per_token_logps_and_entropies(self, model, model_kwargs, input_ids, completion_mask):
            """Log-probabilities and entropies (2 pairs, tokens - 1) of rows that hold all chosen, then all rejected."""
            found, mask = self.response_log_probs(model, model_kwargs), completion_mask[:, 1:].bool()
            log_probs, entropies = (values.new_zeros(mask.shape).masked_scatter(mask, values) for values in found)
            return log_probs, entropies, None

    class TreeSFTTrainer(TreeTrainer):
        def _compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            log_probs, _ = self.response_log_probs(model, inputs)
            processes = self.accelerator.num_processes  # which are averaged
            loss = -log_probs.sum() / (len(log_probs) if num_items_in_batch is None else num_items_in_batch / processes)
            return (loss, {}) if return_outputs else loss

    return TreeDPOTrainer if stage == "dpo" else TreeSFTTrainer


def shorten_walks(model: Any) -> None:
    """Keep a step from a walk over every module, 10 ms for an 8B model, to set what is set and clear what is frozen."""
    walk, trained = model.train, [weight for weight in model.parameters() if weight.requires_grad]
    walk()  # a fresh PeftModel says that it trains, while the layers in it do not

    def zero_grad(set_to_none: bool = True) -> None:
        for weight in trained:
            weight.grad = None

    model.train = lambda mode=True: model if model.training == mode else walk(mode)
    model.zero_grad = zero_grad


def tree_batch(examples: Sequence[dict], batch: dict, in_row: bool, lengths: Sequence[int] = ()) -> dict[str, Any]:
    """TRL's batch, and in it what `placed_trees` gives, as `tree_...`: all indices, so that a GPU waits for none."""
    made = placed_trees(examples, in_row, lengths)
    return batch | {f"tree_{name}": torch.from_numpy(values) for name, values in made.items()}


def tree_hidden_states(model: Any, batch: dict[str, Any]) -> Any:
    """The model's last hidden states at every node, (pairs, nodes, width), by a mask of ancestors."""
    nodes = {"input_ids": batch["tree_tokens"], "position_ids": batch["tree_positions"]}
    return model(**nodes, attention_mask=ancestor_mask(batch["tree_ends"]), use_cache=False).last_hidden_state


def flat_hidden_states(model: Any, batch: dict[str, Any]) -> Any:
    """The same in one row, (1, all nodes, width), through Unsloth's kernel for texts that share a beginning."""
    from unsloth.utils import prefix_grouper_kernel as kernel

    small = {"BLOCK_M": 32, "BLOCK_N": 32}  # Unsloth's own, for the rounding of float32
    kernel._kernel_options_for_dtype = lambda dtype: small if dtype == torch.float32 else BLOCKS
    count, responses = batch["tree_tokens"].shape[1], batch["tree_responses"]
    places = {"group_of_kv": batch["tree_pairs"], "is_prefix": responses < 0, "suffix_of_kv": responses}
    places |= {"T": count, "T_pad": count, "signature": (object(),)}  # its mask serves one pass's layers
    nodes = {"input_ids": batch["tree_tokens"], "position_ids": batch["tree_positions"]}
    with torch._dynamo.config.patch(suppress_errors=False):  # Unsloth sets it: what fails would run on, slow and large
        return model(**nodes, prefix_seg_info=kernel.PrefixSegInfo(**places), use_cache=False).last_hidden_state


class Later(torch.Tensor):
    """Numbers that are read when they are logged. Reading one within a step would wait for the GPU."""

    def item(self) -> Any:
        return self.detach()

    def __bool__(self) -> bool:
        return True  # a count of response tokens, which every row has


class OwnGradients(torch.autograd.Function):
    """Weights whose gradients are copies: a graph writes its next ones where it wrote the last."""

    @staticmethod
    def forward(context: Any, *weights: Any) -> Any:
        return weights

    @staticmethod
    def backward(context: Any, *gradients: Any) -> Any:
        return tuple(torch._foreach_mul(gradients, 1.0))


class Graphs:
    """Hidden states by CUDA graphs, one for each length of a row: the same kernels, launched by one call a pass.

    A step is else spent waiting for Python to launch them. All are captured at the first batch, the longest first, so
    that the others find room in its memory: each backward pass ends before another forward pass.
    """

    def __init__(self, states: Callable[[Any, dict[str, Any]], Any], lengths: Sequence[int]):
        self.states, self.lengths = states, sorted(lengths, reverse=True)
        self.captured: dict[int, Callable[..., Any]] = {}
        self.pool = torch.cuda.graph_pool_handle()
        self.weights, self.kept = list[Any](), list[Any]()

    def __call__(self, model: Any, batch: dict[str, Any]) -> Any:
        if not self.captured:
            with torch.enable_grad():
                self.capture(model, batch)
        length = batch["tree_tokens"].shape[1]
        if length not in self.captured or (self.dropout and not model.training):  # a row in a million is longer
            return self.states(model, batch)
        return self.captured[length](batch, *OwnGradients.apply(*self.weights))

    def capture(self, model: Any, batch: dict[str, Any]) -> None:
        """Record the passes; they take the weights, too: their gradients are what comes back."""
        self.weights = [weight for weight in model.parameters() if weight.requires_grad]
        self.dropout = any(module.p for module in model.modules() if isinstance(module, torch.nn.Dropout))
        rows = {
            length: {name: pad(values, (0, length - values.shape[-1])).clone() for name, values in batch.items()}
            for length in self.lengths
        }
        dtype, enabled = torch.get_autocast_dtype("cuda"), torch.is_autocast_enabled("cuda")
        with torch.autocast("cuda", dtype, enabled, cache_enabled=False):
            for row in rows.values():  # compiles all, in memory that is free again before the first graph takes its own
                hidden = self.states(model, row)
                torch.autograd.grad(hidden, self.weights, torch.zeros_like(hidden))
            del hidden
            for length, row in rows.items():
                self.captured[length] = torch.cuda.make_graphed_callables(
                    lambda batch, *weights: self.states(model, batch), (row, *self.weights),
                    num_warmup_iters=0, pool=self.pool,
                )
        # What graphs read where it lay at their capture, and a library may replace by a larger one: buffers, rotary
        # embeddings (Unsloth keeps a list of them, one a GPU), and what Unsloth unpacks weights to
        held = [value for module in model.modules() for value in vars(module).values() if isinstance(value, list)]
        kernels = sys.modules.get("unsloth.kernels.utils")
        held += [getattr(kernels, name, []) for name in ("WEIGHT_BUFFERS", "ABSMAX_BUFFERS")]
        tensors = [value for values in held for value in values if isinstance(value, torch.Tensor)]
        self.kept = [*model.buffers(), *tensors]


def first_inputs(trainer: Any, count: int) -> dict[str, Any]:
    """The batch that the first training rows make."""
    rows = [trainer.train_dataset[index] for index in range(min(count, len(trainer.train_dataset)))]
    return trainer._prepare_inputs(trainer.data_collator(rows))


def log_probs_of(trainer: Any, inputs: dict[str, Any]) -> list[Any]:
    """The policy's log-probabilities of a batch's responses, (tokens,) each, all chosen first; no gradients."""
    with torch.no_grad():
        found, _ = trainer.response_log_probs(trainer.model, inputs)
    return found.split(inputs["tree_texts"].bincount().tolist())


def check_isolation(trainer: Any, stage: str, bits: int) -> None:
    """Raise UserError unless a response has the same log-probabilities whatever the responses beside it say.

    Nothing else would show that they see each other: policy and reference would be wrong alike, and the first loss
    ln 2. So one response's words are changed: what others change by is 0, or rounding, or close to half of what its own
    log-probabilities change by. In 8 bits rounding is more: the kernel's columns in 16 bits depend on the whole batch.
    """
    inputs = first_inputs(trainer, 2)
    nodes = inputs["tree_before"].split(inputs["tree_texts"].bincount().tolist())
    beside = Counter(node for response in nodes for node in response.tolist())
    own = [[node for node in response.tolist() if beside[node] == 1] for response in nodes]
    earliest = min((places[0], number) for number, places in enumerate(own) if places)[1]  # what is later may see it
    tokens = inputs["tree_tokens"].clone()
    changed = torch.tensor(own[earliest], device=tokens.device)
    tokens.view(-1)[changed] = (tokens.view(-1)[changed] + 1) % trainer.model.config.get_text_config().vocab_size
    found = []
    for given in (inputs["tree_tokens"], tokens):
        with torch.random.fork_rng([tokens.device.index] if tokens.is_cuda else []):
            torch.manual_seed(0)  # the same dropout
            found.append(log_probs_of(trainer, inputs | {"tree_tokens": given}))
    changes = [(before - after).abs().max().item() for before, after in zip(*found, strict=True)]
    most = (0.2 if bits == 8 else 0.02) * changes.pop(earliest)
    if not max(changes, default=0.0) <= most:
        told = f"its log-probabilities change by up to {max(changes):.3f} nats with them"
        remedy = "Give --base_model another model: the evaluation could not score this one either."
        raise UserError(f"{stage}: in this model a response sees the responses beside it: {told}", remedy)


def remember_reference(trainer: Any, settings: TrainingSettings, start: Path | None) -> None:
    """Give the trainer's rows the reference's log-probabilities, computed once and kept in a file of the outputs.

    The file belongs to one reference and has an entry per row: other epochs, beta and seeds find theirs there.
    UserError if it is of another policy than the one that training starts from. CUDA graphs compute it, too: they read
    the policy's weights, which are the reference's until the first step.
    """
    path = config.reference_file(settings, start)
    known = read_json(path)
    padded = [] if torch.cuda.is_available() else trainer.lengths  # which rounds a row's values on a CPU
    for name in ("train_dataset", "eval_dataset"):
        dataset = getattr(trainer, name)
        if dataset is None:
            continue
        texts = dataset.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"])
        keys = [hashlib.sha256(json.dumps([*padded, *row.values()]).encode()).hexdigest()[:24] for row in texts]
        missing = {key: row for key, row in zip(keys, texts, strict=True) if key not in known}
        known |= zip(missing, reference_log_probs(trainer, [*missing.values()]), strict=True)
        for column, response in (("ref_chosen_logps", 0), ("ref_rejected_logps", 1)):
            dataset = dataset.add_column(column, [known[key][response] for key in keys])
        setattr(trainer, name, dataset)
    inputs = first_inputs(trainer, 4)
    remembered = torch.cat([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]])
    found = torch.stack([response.sum() for response in log_probs_of(trainer, inputs)])
    difference = (found - remembered).abs().mean().item()
    if difference > (1e-2 if config.training_dtype() == torch.float32 else 2.0):  # of a hundred nats; bfloat16 rounds
        problem = f"dpo: the reference in {path} is not the policy that training starts from"
        raise UserError(f"{problem}: {difference:.3f} nats a response", "Delete the file, so it is computed again.")
    trainer.precompute_ref_logps = True
    if config.RANK == 0:
        write_json(path, known)


def reference_log_probs(trainer: Any, examples: Sequence[dict[str, Any]]) -> list[list[float]]:
    """log p of [chosen, rejected] under the reference for each example; the processes share them out."""
    from accelerate.utils import gather_object

    order = list(range(len(examples)))
    if not trainer.lengths:  # of which there are few, whatever is in a row
        order.sort(key=lambda index: -sum(map(len, examples[index].values())))
    size = trainer.args.per_device_train_batch_size
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    found: dict[int, list[float]] = {}
    mine = batches[config.RANK :: config.PROCESSES]
    for batch in tqdm(mine, desc="reference", unit="batch", leave=False, disable=config.RANK != 0):
        inputs = trainer._prepare_inputs(trainer.data_collator([examples[index] for index in batch]))
        log_probs = torch.stack(trainer.compute_ref_log_probs(trainer.model, inputs), dim=1)
        found |= dict(zip(batch, log_probs.tolist(), strict=True))
    if config.PROCESSES > 1:
        found = {index: values for part in gather_object([found]) for index, values in part.items()}
    return [found[index] for index in range(len(examples))]


# ----------------------------------------------------------------------------------------------------- checks

def run_checks(settings: TrainingSettings, train: list[Pair], test: list[Pair], data: Data) -> list[Check]:
    """Look at all that a run needs, before a model is loaded; each finding is (what, found, remedy or "")."""
    backend, facts = config.backend_of(settings), config.environment_facts()
    unmet = unmet_requirements({*PACKAGES} - ({"unsloth"} if backend != "unsloth" else set()))
    versions = ", ".join(f"{wanted} is wanted, {version} installed" for wanted, version in unmet.items())
    install = f"Run {sys.executable} -m pip install -r requirements.txt" if None in unmet.values() else ""
    tokenizer, base = config.load_tokenizer(settings), config.read_base(settings)
    model = f"{settings.base_model}, {base.parameters / 1e6:,.0f} M parameters in {settings.bits} bits"
    needed = 1.5 + base.parameters * settings.bits / 8 * 1.3 / 1e9
    free = (torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else psutil.virtual_memory().available) / 1e9
    outputs = Path(settings.outputs).absolute()
    there = next(folder for folder in (outputs, *outputs.parents) if folder.exists())
    disk = shutil.disk_usage(there).free / 1e9
    place = "" if disk > 1 else "Free 1 GB, or give --outputs elsewhere."
    if not there.is_dir() or not os.access(there, os.W_OK):
        place = f"{there} is no folder that you may write to: give --outputs another."
    answers = Counter(pair.order for pair in train + test)
    alone = f"one letter alone would score {max(answers.values()) / answers.total():.0%} in this order"
    count, in_a = len(data.rows), sum(row["chosen"].startswith(f"{STEM} A") for row in data.rows)
    longest = check_tokens(data.rows + data.validation_rows, tokenizer, settings.max_length)
    shares_prompt(settings)  # this and the next refuse what cannot be had
    config.graphs_serve(settings)
    pair_tree(test[0], tokenizer)  # as the evaluation will cut it
    checks = [
        ("packages", versions or "as in requirements.txt", install),
        ("device", f"{facts['device']}, {facts['cores']} cores, computes in {facts['compute_dtype']}", ""),
        ("base model", f"{model}, trained by {backend}", ""),
        ("memory", f"{free:.1f} GB free, at least {needed:.1f} GB needed",
         "" if free >= needed else "Free memory, or lower --bits."),
        ("disk", f"{disk:.1f} GB free for {settings.outputs}", place),
        ("pairs", f"{len(train + test):,} in {settings.pairs}: {len(train):,} train, {len(test):,} test", ""),
        ("answers in the file", f"{answers['A']:,} A, {answers['B']:,} B; {alone}", ""),
        *[("note", warning, "") for warning in warnings_on(train, test)],
        ("rows", f"{count:,} for training ({settings.option_order}): {in_a:,} A, {count - in_a:,} B", ""),
        ("longest row", f"{longest} tokens of at most {settings.max_length}", ""),
    ]
    planned, steps, trained = config.planned_runs(settings), {}, set()
    for run in planned:
        epochs = settings.sft_epochs if run.stage == "sft" else settings.epochs
        whole = math.ceil(math.ceil(count / settings.effective_batch) * epochs)
        steps[run.stage] = settings.max_steps if settings.max_steps > 0 else whole
        there = run.found(data.split["pairs_sha256"])
        said = f"{steps[run.stage]:,} steps of {settings.effective_batch}; {there.said}"
        said += " unless its start becomes another" * (there.done and run.start in trained)
        trained |= set() if there.done else {run.folder}
        checks.append((run.stage, said, there.remedy))
    for start in dict.fromkeys(run.start for run in planned if run.stage != "sft"):
        found, remedy = "the base model" if start is None else f"{start}, trained first", ""
        if start and start not in trained:
            asked = {"lora_rank": settings.lora_rank, "lora_alpha": settings.lora_alpha}
            asked |= {"lora_dropout": settings.lora_dropout} if "sft_more" in steps else {}  # DPO has none
            found, remedy = starting_point(start, base, ids_digest(test), config.LORA_TARGETS, asked)
        checks.append(("starts from", found, remedy))
    return [*checks, ("trainer", *libraries_settings(settings, steps))]


def libraries_settings(settings: TrainingSettings, steps: dict[str, int]) -> tuple[str, str]:
    """Do the libraries take optimiser, tracker and the schedule of each stage's steps? Else they end in a traceback."""
    from transformers import Trainer, get_scheduler
    from transformers.integrations import get_available_reporting_integrations

    try:
        for stage, count in steps.items():
            made = trainer_arguments(stage, dataclasses.replace(settings, report_to="none"), 1)
            kind, options = Trainer.get_optimizer_cls_and_kwargs(made)
            optimizer = kind([torch.nn.Parameter(torch.zeros(1))], **options)
            schedule = get_scheduler(made.lr_scheduler_type, optimizer, settings.warmup_steps, count)
            if not hasattr(schedule, "lr_lambdas"):
                raise ValueError(f"{settings.lr_scheduler} is no schedule: it goes by the losses that are measured")
            optimizer.step()  # or the schedule complains
            for _ in range(count):
                schedule.step()
    except (ValueError, TypeError, ImportError, ArithmeticError, RuntimeError) as error:
        found = printable(str(error).strip().partition("\n")[0])
        return found, "Give another --optim, --lr_scheduler or --warmup_steps."
    known = settings.report_to in ("none", "all", *get_available_reporting_integrations())
    named = f"{settings.optim}, {settings.lr_scheduler}, reports to {settings.report_to}"
    return named, "" if known else f"Install {settings.report_to}, or give --report_to none."


if __name__ == "__main__":
    config.run_script(main)
