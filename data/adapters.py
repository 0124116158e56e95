"""An adapter's folder, read without a model: is it a whole LoRA adapter, and of this base model and this split?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from data.errors import printable
from data.files import read_json
from data.runs import RUN, WEIGHTS, read_run, settings_of


def original_name(base_model: str) -> str:
    """The 16-bit original of a base model that Unsloth stored in 4 bits; any other name is its own."""
    return base_model.removesuffix("-bnb-4bit")


def adapter_problem(folder: Path, base_model: str, vocabulary: Callable[[], int], test_digest: str) -> str:
    """Why the adapter in a folder cannot serve this base model and this split; "" if it can.

    An adapter without run.json is taken as it is: nothing is known of what it was trained on.
    vocabulary: gives the tokens of the base model's tokenizer; asked last, since it may have to be fetched.
    """
    return printable(_problem(folder, base_model, vocabulary, test_digest))


def _problem(folder: Path, base_model: str, vocabulary: Callable[[], int], test_digest: str) -> str:
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
    if read_json(folder / "adapter_config.json").get("peft_type") != "LORA":
        return f"{folder}/adapter_config.json describes no LoRA adapter"
    if not (folder / RUN).is_file():
        return ""
    run: dict[str, Any] = read_run(folder)
    trained_on, data = settings_of(run).get("base_model"), run.get("data")
    if not trained_on or not isinstance(data, dict) or "test_digest" not in data:
        return f"{folder}/{RUN} cannot be read, or is of an older version"
    if original_name(str(trained_on)) != original_name(base_model):
        return f"{folder} was trained on the base model {trained_on}, not {base_model}"
    if data["test_digest"] != test_digest:
        return f"{folder} was trained on another split of other data: it may have seen the test pairs"
    had = run.get("vocabulary")
    if had and had != (has := vocabulary()):
        return f"{folder} was trained with another tokenizer, of {had} tokens; that of {base_model} has {has}"
    return ""


def unlike_plain_lora(folder: Path, targets: Sequence[str]) -> list[str]:
    """What an adapter has beside low-rank updates, of one rank and scale, of these layers."""
    lora = read_json(folder / "adapter_config.json")
    unlike = ("use_rslora", "use_dora", "alpha_pattern", "rank_pattern", "modules_to_save")
    return [name for name in unlike if lora.get(name)] + sorted(adapted_layers(folder) - {*targets})


def adapted_layers(folder: Path) -> set[str]:
    """Names of the layers that a LoRA adapter changes, such as q_proj, from its weights.

    Its adapter_config.json may hold them as a pattern: Unsloth writes one for a base in 8 bits.
    """
    from safetensors import safe_open

    with safe_open(folder / WEIGHTS, "np") as weights:
        names = [name.partition(".lora_")[0] for name in weights.keys() if ".lora_" in name]  # noqa: SIM118
    return {name.rpartition(".")[2] for name in names}
