"""A base model, read without its weights: can it be trained and scored here, and is it the same as another one?"""

import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from data.errors import UserError, printable
from data.files import read_json

SCALED_LOGITS = ("logits_scaling", "logit_scale", "final_logit_softcapping", "logits_soft_cap", "lm_head_multiplier")
ATTENTION = {"full_attention", "sliding_attention", "chunked_attention", "attention"}  # kinds of layers
STORED = {"nf4": 4, "8-bit": 8}  # quantised weights that bitsandbytes loads as they are, and the bits to ask for
HUB_NAMES = {"SmolLM2-135M-Instruct-Q4_1": "HuggingFaceTB/SmolLM2-135M-Instruct"}  # another name of the same model
MIRRORS = HUB_NAMES | {"meta-llama/Meta-Llama-3-8B": "unsloth/llama-3-8b"}
ANOTHER = "Give --base_model another model, such as a Llama, Mistral or Qwen."


class Base(NamedTuple):
    """A base model as its configuration and tokenizer describe it.

    shape: the configuration, as transformers loads it; a model of several parts has its text's inside.
    layers: (inputs, outputs) of every linear layer, by its path.
    vocabulary: tokens of its tokenizer.
    """

    name: str
    shape: Any
    layers: dict[str, tuple[int, int]]
    parameters: int
    vocabulary: int


def original_name(base_model: str) -> str:
    """The 16-bit original of a base model that Unsloth stored in 4 bits; any other name is its own."""
    return re.sub(r"(-unsloth)?-bnb-4bit$", "", base_model)


def resolved(base_model: str) -> str:
    """A folder's one path, by whichever it is given; any other name as it is."""
    return os.path.realpath(base_model) if Path(base_model).is_dir() else base_model


def base_key(base_model: str) -> str:
    """Equal for two spellings of one base model: a folder by any of its paths, a model stored in 16 or 4 bits."""
    name = original_name(resolved(base_model))
    return MIRRORS.get(name, name)


def stored_as(shape: Any) -> str:
    """How a base model's files are quantised: nf4, fp4, 8-bit or another's method; "" if they are not."""
    quantised = getattr(shape, "quantization_config", None)
    if quantised is None:
        return ""
    quantised = quantised if isinstance(quantised, dict) else quantised.to_dict()
    if quantised.get("quant_method", "bitsandbytes") != "bitsandbytes":
        return printable(str(quantised["quant_method"]))
    known = {"load_in_8bit": "8-bit", "load_in_4bit": str(quantised.get("bnb_4bit_quant_type", "fp4"))}
    return next((kind for flag, kind in known.items() if quantised.get(flag)), "an unknown format")


def check_base(base: Base, bits: int, max_length: int) -> None:
    """Raise UserError where a base model cannot be trained or scored in these bits.

    Scores are made of the output layer's own logits, and a row of up to `max_length` tokens attends to all before.
    """
    name, text = base.name, base.shape.get_text_config()
    if problem := files_problem(Path(name)):
        raise UserError(problem, "Download it again, as safetensors.")
    stored = stored_as(base.shape)
    if stored and stored not in STORED:
        problem = f"the weights of {name} are stored in {stored}, which is neither 16 bits, NF4 nor LLM.int8"
        raise UserError(problem, "Give --base_model the 16-bit original: --bits 4 makes NF4 of it.")
    if stored and STORED[stored] != bits:
        problem = f"the weights of {name} are stored in {STORED[stored]} bits and cannot be had in {bits}"
        original = original_name(name) if name != original_name(name) else "the 16-bit original"
        raise UserError(problem, f"Give --bits {STORED[stored]}, or --base_model {original}.")
    if others := sorted({*(getattr(text, "layer_types", None) or ())} - ATTENTION):
        raise UserError(f"{name} has layers of another kind than attention ({', '.join(others)})", ANOTHER)
    if scaled := [part for part in SCALED_LOGITS if getattr(text, part, None) not in (None, 1)]:
        found = f"{name} scales or caps its logits ({scaled[0]} {getattr(text, scaled[0])})"
        raise UserError(f"{found}, which neither the shared trainer nor the evaluation does", ANOTHER)
    for window in ("sliding_window", "attention_chunk_size"):
        tokens = getattr(text, window, None)
        if tokens and tokens < max_length and getattr(text, "use_sliding_window", True):
            problem = f"{name} attends to {tokens} tokens alone ({window}), fewer than max_length {max_length}"
            raise UserError(problem, ANOTHER)


def check_trainable(base: Base, targets: Collection[str]) -> None:
    """Raise UserError where LoRA on the layers named `targets` cannot be trained on a base model."""
    for name, value in base.shape.get_text_config().to_dict().items():
        if "expert" in name and type(value) is int and value > 1:
            raise UserError(f"{base.name} is a mixture of experts ({name} {value}), which is not trained here", ANOTHER)
    found = {path.rpartition(".")[2] for path in base.layers}
    if missing := [name for name in targets if name not in found]:
        lacks = f"{len(missing)} of the {len(targets)} layers that LoRA adapts, {missing[0]} first"
        raise UserError(f"{base.name} lacks {lacks}", ANOTHER)


def files_problem(folder: Path) -> str:
    """Why a local folder does not hold a model's weights, whole and as safetensors; "" if it does, or is none."""
    if not folder.is_dir():
        return ""
    shards = read_json(folder / "model.safetensors.index.json").get("weight_map")
    for name in sorted({*map(str, shards.values())}) if isinstance(shards, dict) else ["model.safetensors"]:
        if not (folder / name).is_file():
            pickled = "" if shards else next((path.name for path in folder.glob("*.bin")), "")
            return f"{folder} has no {name}" + f", and {pickled} is a pickle, which is not read" * bool(pickled)
        if problem := damage(folder / name):
            return problem
    return ""


def damage(weights: Path) -> str:
    """Why a safetensors file is not whole, by its size and what its header says of it; "" if it is."""
    try:
        with safe_open(weights, "np"):
            return ""
    except (SafetensorError, OSError) as error:
        return printable(f"{weights} is damaged or cut short ({error})")
