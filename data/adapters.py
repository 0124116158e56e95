"""An adapter's folder, read without a model: is it plain LoRA, whole, of this base model and of this split?

Plain means: low-rank updates of single linear layers. Whatever else an adapter can hold (embeddings, biases, other
initialisations of the base) would change the base model for the arms that are scored after it.
"""

import re
from collections.abc import Collection
from pathlib import Path

from safetensors import safe_open

from data.bases import Base, base_key, damage
from data.errors import printable
from data.files import read_json, weights_digest
from data.pairs import prompt_digest
from data.runs import RUN, WEIGHTS, read_run, settings_of

CONFIG = "adapter_config.json"
ANY_VALUE = {  # settings of adapter_config.json that change neither what is adapted nor how; or are looked at below
    *("auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "eva_config", "exclude_modules"),
    *("inference_mode", "layers_pattern", "layers_to_transform", "lora_alpha", "lora_dropout", "megatron_core"),
    *("peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "alpha_pattern", "revision"),
    *("target_modules", "use_dora", "use_rslora"),
}
THESE_VALUES = {  # other settings must be unset, too: what a newer PEFT means by them is not known
    "bias": ("none",),
    "init_lora_weights": (True, "gaussian", "orthogonal", "eva"),  # which leave the base model as it is
    "task_type": ("CAUSAL_LM",),
}
_TENSOR = re.compile(r"base_model\.model\.(?P<layer>.+)\.lora_(?P<part>[AB]\.weight|magnitude_vector(\.weight)?)")


def adapter_problem(folder: Path, base: Base) -> str:
    """Why the adapter in a folder is no whole plain LoRA on this base model; "" if it is."""
    try:
        return printable(_folder_problem(folder) or _weights_problem(folder, base))
    except (TypeError, ValueError, AttributeError, re.error) as error:
        return printable(f"{folder}/{CONFIG} has another form than PEFT's ({error})")


def adapter_mismatch(folder: Path, base: Base, test_digest: str) -> str:
    """Why an adapter was made for another base model or split, as its run.json and configuration say; "" if not."""
    run = read_run(folder)
    trained_on, data = settings_of(run).get("base_model"), run.get("data")
    if not (folder / RUN).is_file():
        trained_on = read_json(folder / CONFIG).get("base_model_name_or_path")
    elif not trained_on or not isinstance(data, dict) or "test_digest" not in data:
        return f"{folder}/{RUN} cannot be read, or is of an older version"
    elif data["test_digest"] != test_digest:
        return f"{folder} was trained on another split or other data: it may have seen the test pairs"
    elif data.get("prompt_digest", prompt_digest()) != prompt_digest():
        return f"{folder} was trained with other words around the films than data/pairs.py has now"
    had, there = run.get("base_weights_digest"), weights_digest(base.name)
    same_files = had == there if had and there else None
    if trained_on and base_key(str(trained_on)) != base_key(base.name) and not same_files:  # which may have moved
        return printable(f"{folder} was trained on the base model {trained_on}, not {base.name}")
    if same_files is False:
        return printable(f"{folder} was trained on other weights or settings than {base.name} holds now")
    if (had := run.get("vocabulary")) and had != base.vocabulary:
        tokens = f"of {had} tokens; that of {base.name} has {base.vocabulary}"
        return printable(f"{folder} was trained with another tokenizer, {tokens}")
    return ""


def _folder_problem(folder: Path) -> str:
    if not folder.is_dir():
        return f"there is no adapter at {folder}"
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            return f"{folder} is no adapter: it has no {name}"
    if problem := damage(folder / WEIGHTS):
        return problem
    lora = read_json(folder / CONFIG)
    if lora.get("peft_type") != "LORA":
        return f"{folder}/{CONFIG} describes no LoRA adapter"
    for name in ("r", "lora_alpha"):
        if isinstance(lora.get(name), bool) or not isinstance(lora.get(name), int | float) or not lora[name] > 0:
            return f"{folder}/{CONFIG} has {name} {lora.get(name)!r}"
    for name, value in lora.items():
        if value and name not in ANY_VALUE and value not in THESE_VALUES.get(name, ()):
            return f"{folder} is no plain LoRA adapter: it has {name} {value!r}"
    return ""


def _weights_problem(folder: Path, base: Base) -> str:
    """Why an adapter's tensors are not the low-rank updates of the base model's layers that its configuration names."""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    lora, parts = read_json(folder / CONFIG), dict[str, set[str]]()
    for name, shape in shapes_of(folder / WEIGHTS).items():
        found = _TENSOR.fullmatch(name)
        layer = found["layer"] if found else ""
        if layer not in base.layers:
            return f"{folder} holds {name}, which updates no layer of {base.name}"
        rank, (inputs, outputs) = lora.get("r"), base.layers[layer]
        rank = shape[0] if lora.get("rank_pattern") and shape else rank
        wanted = {"A.weight": [rank, inputs], "B.weight": [outputs, rank]}.get(found["part"], [outputs])
        if found["part"] == "B.weight" and lora.get("rank_pattern"):
            wanted = [outputs, *shape[1:]]
        if shape != wanted:
            return f"{folder}: {name} has the shape {shape}, where {base.name} needs {wanted}"
        parts.setdefault(layer, set()).add(found["part"].partition(".")[0])
    if not parts:
        return f"{folder} holds no weights"
    lora_config = LoraConfig.from_pretrained(folder)
    named = {layer for layer in base.layers if check_target_module_exists(lora_config, layer)}
    whole = {"A", "B", "magnitude_vector"} if lora.get("use_dora") else {"A", "B"}
    if unlike := [layer for layer in sorted(named | parts.keys()) if parts.get(layer) != whole or layer not in named]:
        return f"{folder}: the weights of {len(unlike)} layers are not those that {CONFIG} names, such as {unlike[0]}"
    if name := first_not_finite(folder / WEIGHTS):
        return f"{folder}: {name} holds what is no finite number of 16 or 32 bits"
    return ""


def shapes_of(weights: Path) -> dict[str, list[int]]:
    """The shape of every tensor in a safetensors file, by name."""
    with safe_open(weights, "pt") as file:
        return {name: file.get_slice(name).get_shape() for name in sorted(file.keys())}


def first_not_finite(weights: Path) -> str:
    """The first tensor that holds an infinity, no number, or numbers of a type that is not looked into; "" if none."""
    with safe_open(weights, "pt") as file:
        for name in sorted(file.keys()):
            known = file.get_slice(name).get_dtype() in ("F32", "F16", "BF16")
            if not known or not file.get_tensor(name).isfinite().all():
                return name
    return ""


def starting_point(
    folder: Path, base: Base, test_digest: str, targets: Collection[str], asked: dict[str, float]
) -> tuple[str, str]:
    """An adapter to start training from, and what to do where it does not fit.

    asked: lora_rank and lora_alpha and, where SFT goes on, lora_dropout: training goes on with the adapter's own.
    """
    if problem := adapter_problem(folder, base) or adapter_mismatch(folder, base, test_digest):
        return problem, "Train it with --stage sft, or give --sft_adapter."
    if (stage := read_run(folder).get("stage")) in ("dpo", "sft_more"):
        return f"{folder} is an adapter of {stage}", "Give --sft_adapter an adapter of the stage sft."
    if kind := unlike_plain_lora(folder, targets):
        remedy = "Train SFT with --stage sft: DPO goes on with plain LoRA."
        return f"{folder}, an adapter with {', '.join(kind)}", remedy
    lora = read_json(folder / CONFIG)
    found = {name: lora.get(name.replace("lora_rank", "r")) for name in asked}
    other = " ".join(f"--{name} {value}" for name, value in found.items() if value != asked[name])
    return (f"{folder}, which has {other}", f"Give {other}, or train SFT again.") if other else (str(folder), "")


def unlike_plain_lora(folder: Path, targets: Collection[str]) -> list[str]:
    """What an adapter has beside updates of one rank and scale, of these layers: training does not go on with it."""
    lora = read_json(folder / CONFIG)
    unlike = ("use_rslora", "use_dora", "alpha_pattern", "rank_pattern", "layers_to_transform")
    return [name for name in unlike if lora.get(name)] + sorted(adapted_layers(folder) - {*targets})


def adapted_layers(folder: Path) -> set[str]:
    """Layers that a LoRA adapter changes, such as q_proj, from its weights: its configuration may hold a pattern."""
    names = [name.partition(".lora_")[0] for name in shapes_of(folder / WEIGHTS) if ".lora_" in name]
    return {name.rpartition(".")[2] for name in names}
