"""What stands between `<!-- filled: NAME -->` and `<!-- end -->` in README.md and docs/, from docs/results.

    python tests/benchmarks/documents.py    # after a new study, or when the programs print something else

`tests/test_docs.py` finds a block that is not what this writes.
"""

import json
import re
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from data.files import write_text  # noqa: E402
from data.report import cell, summary  # noqa: E402
from data.runs import model_of, settings_of  # noqa: E402
from data.verdict import interval_text, sentence  # noqa: E402

RESULTS = ROOT / "docs" / "results"
PAGES = [ROOT / "README.md", ROOT / "docs" / "quickstart.md", ROOT / "docs" / "thesis.md"]
EPOCHS, PAIRS = 3, 4768  # of DPO and of training, in the preset `thesis` on MovieLens-1M


def read(name: str):
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def table_of(heads: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *rows))


def laptop() -> str:
    """The head of what the README's run prints: verdicts, what follows from them, and the main table."""
    said = summary(read("small/metrics.json"), model_of(read("small/run.json")))
    head = "\n\n".join(said.split("\n\n")[:3])
    return f"```text\n{head}\n```"


def speed() -> str:
    """Pairs a second of DPO, by what trains: the best of each trainer."""
    speeds, of_preset = read("speed.json"), [row for row in read("gpu.json") if row.get("effective_batch") == 8]
    rows = []
    for label, records, device, shape in (
        ("Llama 3 8B's shape, H100 held to 24 GB", speeds, "H100", "Llama-3-8B"),
        ("the same, in batches of 8 as in the preset `thesis`", of_preset, "H100", "Llama-3-8B"),
        ("SmolLM2-135M, H100", speeds, "H100", "SmolLM2-135M"),
        ("SmolLM2-135M, two CPU cores, batches of 8", speeds, "EPYC", "SmolLM2-135M"),
    ):
        best: dict[str, float] = {}
        for row in records:
            if device in row.get("device", "") and row["shape"].startswith(shape):
                kind = "shared" if row["trainer"] == "shared" else row["backend"]
                best[kind] = max(best.get(kind, 0), row["pairs_per_second"])
        rows.append([label, *(f"{best[kind]:.1f}" if kind in best else "-" for kind in ("shared", "unsloth", "hf"))])
    return table_of(["DPO, pairs a second", "this project", "Unsloth with TRL", "TRL"], rows)


def memory() -> str:
    """Memory and time of DPO on Llama 3 8B's shape, by micro-batch."""
    rows = []
    for row in read("gpu.json"):
        measured = row.get("memory_cap_gb") and row.get("pairs_per_second") and row["backend"] == "unsloth"
        if not measured or not row["shape"].startswith("Llama"):
            continue
        seconds = PAIRS * (EPOCHS / row["pairs_per_second"] + row["reference_seconds_per_pair"])
        said = "yes" if row["checkpointing"] else "no"
        numbers = [f"{row['peak_memory_gb']:.1f}", f"{row['pairs_per_second']:.1f}", f"{seconds / 60:.0f}"]
        rows.append([row["trainer"], str(row["micro_batch"]), said, *numbers])
    heads = ["trainer", "micro-batch", "checkpointing", "peak memory, GB", "pairs a second", "minutes of DPO"]
    return table_of(heads, sorted(rows, key=lambda row: float(row[3])))


def quoted(text: str) -> str:
    return "\n".join("> " + line for line in textwrap.wrap(text, 117, break_long_words=False, break_on_hyphens=False))


def study() -> tuple[dict, dict, dict]:
    """The study's metrics, and run.json of the first run of DPO and of the control."""
    metrics = read("metrics.json")
    dpo, control = (read(f"runs/{arm}.run.json") for arm in ("dpo", metrics["control"]))
    return metrics, dpo, control


def methods() -> str:
    metrics, dpo, control = study()
    sft = read("runs/sft.run.json")
    first, then, more = (settings_of(run) for run in (sft, dpo, control))
    data, runs = dpo["data"], metrics["arms"]["dpo"]["seeds"]
    continued = metrics["control"] == "sft_more"
    rate = more.get("control_learning_rate") or more["sft_learning_rate"]
    of_control = (
        f"continued SFT from that adapter for as many steps as DPO, at {rate:g}"
        if continued
        else f"was SFT of {more['sft_epochs']:g} epochs at {rate:g}"
    )
    return quoted(
        "A pair holds five films that a user of MovieLens watched, the film watched next, and a film never rated. "
        f"The adapters were trained on {data['train_pairs']:,} pairs. Another {data['validation_pairs']} pairs were "
        f"held back to watch the loss, and {data['test_pairs']:,} to test. No user is in two of these parts. "
        "Training showed half of the pairs in each order of the options. Evaluation scored every pair in both orders. "
        f"The base model was {then['base_model']} in {then['bits']} bits, with LoRA of rank {then['lora_rank']} and "
        f"alpha {then['lora_alpha']} on all linear layers. SFT took {first['sft_epochs']:g} epochs at a peak learning "
        f"rate of {first['sft_learning_rate']:g}. DPO started from this SFT adapter, which was also its frozen "
        f"reference. It took {then['epochs']:g} epochs at {then['learning_rate']:g} with β = {then['beta']:g}, in "
        f"batches of {then['effective_batch']} pairs. Its first loss was {dpo['first_loss']:.4f}, beside an expected "
        f"ln 2 = 0.6931. The control {of_control}. Each arm was trained {runs} times, with different seeds. The primary "
        "measure is ranking accuracy, with 95% intervals over users and training runs. The rule of the verdict was "
        "fixed beforehand: DPO is supported by a difference above 2 points whose interval lies above 0."
    )


def results() -> str:
    metrics, dpo, _ = study()
    arms, against_sft = metrics["arms"], metrics["comparisons"]["dpo - sft"]

    def of(arm: str, measure: str, unit: str = "%") -> str:
        return cell(arms[arm][measure], unit)

    return quoted(
        f"{sentence(metrics, model_of(dpo))} With both orders taken together, DPO differs from SFT by "
        f"{interval_text(against_sft['order_free_accuracy'])} points. Its position bias is "
        f"{of('dpo', 'position_bias', 'points')} points, beside {of('sft', 'position_bias', 'points')} of SFT. Where "
        f"the less popular film was the right one, DPO ranked {of('dpo', 'accuracy_against_popularity')}% right. With "
        f"a stranger's history it lost {of('dpo', 'personalisation_gap', 'points')} points."
    )


BLOCKS = {"laptop": laptop, "speed": speed, "memory": memory, "methods": methods, "results": results}


def filled(page: str) -> str:
    """A page with each of its blocks as the results have it."""
    blocks = re.compile(r"(<!-- filled: (\w+) -->\n).*?(<!-- end -->)", re.S)
    return blocks.sub(lambda found: f"{found[1]}{BLOCKS[found[2]]()}\n{found[3]}", page)


if __name__ == "__main__":
    for path in PAGES:
        write_text(path, filled(path.read_text(encoding="utf-8")))
