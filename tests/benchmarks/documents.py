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
from data.verdict import SAYS, interval_text, listed, longer, sentence, with_interval  # noqa: E402

RESULTS = ROOT / "docs" / "results"
PAGES = [ROOT / "README.md", ROOT / "docs" / "quickstart.md", ROOT / "docs" / "thesis.md"]
EPOCHS, PAIRS, USERS = 3, 4768, 1208  # of DPO, of training and of the test, in the preset `thesis` on MovieLens-1M


def read(name: str):
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def table_of(heads: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *rows))


def laptop() -> str:
    """The head of what the README's run prints: verdicts, what follows from them, and the main table."""
    said = summary(read("small/metrics.json"), model_of(read("small/run.json")))
    head = "\n\n".join(said.split("\n\n")[:3])
    return f"```text\n{head}\n```"


def answer() -> str:
    """What the study says, in four lines."""
    metrics, change = read("metrics.json"), read("interaction.json")
    control, runs = metrics["control"], metrics["arms"]["dpo"]["seeds"]
    led, led_more = (interval_text(metrics["comparisons"][f"dpo - {arm}"]) for arm in ("sft", control))
    more = change[f"dpo - {control}"]
    depends = "depends" if more["low"] > 0 or more["high"] < 0 else "is not shown to depend"
    compared, models = metrics["comparisons"], ("sft", control, "dpo")
    behind, learned = ([arm for arm in models if compared[f"{arm} - {one}"]["high"] < 0] for one in ("popularity", "learned"))
    names = {"sft": "SFT", control: longer(metrics), "dpo": "DPO"}
    below = f"; {listed([names[arm] for arm in behind], 'and')} rank below it" if behind[1:] else ""
    counts = " A regression beats them all." if learned == [*models] else ""
    lines = (
        f"**DPO {SAYS[metrics['verdict']]} the SFT** that it starts from: {led} points.",
        f"**DPO {SAYS[metrics['control_verdict']]} more SFT**, continued for as many steps: {led_more} points.",
        f"**DPO's lead over more SFT {depends} on 4 bits**: 4 bits minus 16 bits is {interval_text(more)} points.",
        f"**No language model is shown to beat popularity**{below}.{counts}",
    )
    said = (
        "Ranking accuracy is how often a model picks the film that the person watched next; chance is 50%. Points are of "
        f"this, with 95% intervals, of SmolLM2-135M in 4 bits: {metrics['users']:,} held-out users, each arm trained "
        f"{runs} times. Llama 3 8B is not measured yet. [All results](docs/results/README.md)."
    )
    return "\n".join(f"- {line}" for line in lines) + "\n\n" + textwrap.fill(said, 120)


def preset_speed(trainer: str, stage: str, shape: str = "Llama-3-8B", batch: int = 8, checkpointing: bool = False) -> dict:
    """The record of a stage on a GPU, in batches of this size; with checkpointing if asked, or if there is no other."""
    wanted = {"stage": stage, "trainer": trainer, "micro_batch": batch, "effective_batch": batch}
    found = [
        row
        for row in read("gpu.json")
        if row["shape"].startswith(shape) and all(row.get(name) == value for name, value in wanted.items())
    ]
    return min(found, key=lambda row: bool(row["checkpointing"]) != checkpointing)


def rate_of(record: dict, epochs: int = EPOCHS) -> float:
    """Pairs a second over all epochs; this project computes the reference once, TRL in every step."""
    return 1 / (1 / record["pairs_per_second"] + record["reference_seconds_per_pair"] / epochs)


def speed() -> str:
    """Pairs a second of training, by what trains; on a GPU from one call, on a CPU each trainer at its best."""
    of_llama = "Llama 3 8B's shape, H100 held to 24 GB"
    cases = {  # the default of Unsloth for DPO is with checkpointing
        f"DPO, {of_llama}; TRL with checkpointing": ("dpo",),
        "both with checkpointing": ("dpo", "Llama-3-8B", 8, True),
        f"SFT, {of_llama}": ("sft",),
        "DPO, SmolLM2-135M, H100, batches of 64": ("dpo", "SmolLM2", 64),
    }
    names = ("shared", "stock")
    rows = [[label, *(rate_of(preset_speed(trainer, *case)) for trainer in names)] for label, case in cases.items()]
    on_cpu = {name: [rate_of(row, 1) for row in read("speed.json") if row["trainer"] == name] for name in names}
    rows.append(["DPO of one epoch, SmolLM2-135M, two CPU cores", *map(max, on_cpu.values())])
    heads = ["pairs a second, in batches of 8", "this project", "TRL (on a GPU by Unsloth)"]
    return table_of(heads, [[label, *(f"{rate:.1f}" for rate in rates)] for label, *rates in rows])


CARDS = {  # TFLOP/s of matrix products as training computes, and of float32, as evaluation does; memory in GB
    # NVIDIA's papers on the architectures: bfloat16 with sums in float32; a T4 has no bfloat16
    "RTX 4090": (165.2, 82.6, 24),
    "RTX 3090": (71.0, 35.6, 24),
    "T4": (8.1, 8.1, 16),
}
H100 = 66.9  # its TFLOP/s of float32; those of bfloat16 were measured


def cost() -> str:
    """Minutes of a whole default run by card: measured, computed from an H100's speeds, else scaled by rates."""
    sft, dpo = (preset_speed("shared", stage) for stage in ("sft", "dpo"))
    scored = next(row for row in read("evaluation_speed.json") if row["compute"] == "float32")
    one_pass = PAIRS / sft["pairs_per_second"]
    parts = [one_pass, EPOCHS * one_pass, EPOCHS * PAIRS / rate_of(dpo)]
    scoring = 1.5 * 4 * USERS / scored["pairs_per_second"]  # base and three arms; strangers' decisions are half as much
    rows = []
    for card, (rate, float32, memory_gb) in {"H100": (dpo["matrix_tflops"], H100, 80), **CARDS}.items():
        times = [*(part * dpo["matrix_tflops"] / rate for part in parts), scoring * H100 / float32]
        minutes = [f"{time / 60:.0f}" for time in (*times, sum(times))]
        rows.append([f"{card}, {memory_gb} GB", *minutes, "computed from its speed" if card == "H100" else "**estimated**"])
    whole = read("whole_run.json")
    times = [whole[stage]["wall_seconds"] / 60 for stage in ("sft", "sft_more", "dpo")]
    card = whole["dpo"]["device"].removeprefix("NVIDIA ")
    rows.insert(0, [f"{card}, held to 24 GB", *(f"{time:.0f}" for time in times), "-", f"{sum(times):.0f}", "measured, without evaluation"])
    return table_of(["card", "SFT", "control", "DPO", "evaluation", "all", "minutes are"], rows)


def memory() -> str:
    """Peak memory of DPO on Llama 3 8B's shape, by micro-batch."""
    peaks: dict[int, dict[bool, float]] = {}
    for row in read("gpu.json"):
        if row["shape"].startswith("Llama-3-8B") and (row["stage"], row["trainer"]) == ("dpo", "shared"):
            peaks.setdefault(row["micro_batch"], {})[row["checkpointing"]] = row["peak_memory_gb"]
    parts = [f"{peak[False]:.1f} GB for {size} ({peak[True]:.1f} with checkpointing)" for size, peak in sorted(peaks.items())]
    return f"Peak memory of DPO by micro-batch: {', '.join(parts)}."


def quoted(text: str) -> str:
    return "\n".join("> " + line for line in textwrap.wrap(text, 117, break_long_words=False, break_on_hyphens=False))


def study() -> tuple[dict, dict, dict]:
    """The study's metrics, and run.json of the first run of DPO and of the control."""
    metrics = read("metrics.json")
    dpo, control = (read(f"adapters/{arm}/run.json") for arm in ("dpo", metrics["control"]))
    return metrics, dpo, control


def methods() -> str:
    metrics, dpo, control = study()
    sft = read("adapters/sft/run.json")
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
        "A pair holds five films that a user of MovieLens watched, the film watched next, and another film. "
        f"The adapters were trained on {data['train_pairs']:,} pairs. Another {data['validation_pairs']} pairs were "
        f"held back to watch the loss, and {data['test_pairs']:,} to test. No user is in two of these parts. "
        "Training showed half of the pairs in each order of the options. Evaluation scored every pair in both orders. "
        f"The base model was {then['base_model']} in {then['bits']} bits, with LoRA of rank {then['lora_rank']} and "
        f"alpha {then['lora_alpha']} on all linear layers. SFT took {first['sft_epochs']:g} epochs at a peak learning "
        f"rate of {first['sft_learning_rate']:g}. DPO started from this SFT adapter, which was also its frozen "
        f"reference. It took {then['epochs']:g} epochs at {then['learning_rate']:g} with β = {then['beta']:g}, in "
        f"batches of {then['effective_batch']} pairs. Its first loss was {dpo['first_loss']:.4f}, beside an expected "
        f"ln 2 = 0.6931. The control {of_control}. The optimiser was {then['optim']} with a {then['lr_scheduler']} "
        "schedule. Learning rates and epochs were chosen by ranking accuracy, in trials of one run on training users that "
        f"were held back. β, rank and batch were not tuned. Each arm was trained {runs} times, with different seeds. The "
        "primary measure is ranking accuracy, with 95% intervals over users and training runs. DPO is supported by a "
        "difference above 2 points whose interval lies above 0. This rule was fixed before these runs, but after earlier "
        "versions of the study, with other settings, had scored the same test users."
    )


def results() -> str:
    metrics, dpo, _ = study()
    arms, against_sft = metrics["arms"], metrics["comparisons"]["dpo - sft"]

    def of(arm: str, measure: str, unit: str = "%") -> str:
        return with_interval(arms[arm][measure], unit="%") if unit == "%" else cell(arms[arm][measure], unit)

    return quoted(
        f"{sentence(metrics, model_of(dpo))} A logistic regression on counts reached {of('learned', 'ranking_accuracy')}. "
        f"With both orders taken together, DPO differs from SFT by {interval_text(against_sft['order_free_accuracy'])} "
        f"points; in response accuracy, by {interval_text(against_sft['response_accuracy'])}. Its position bias is "
        f"{of('dpo', 'position_bias', 'points')} points, beside {of('sft', 'position_bias', 'points')} of SFT. Where "
        f"the less popular film was the right one, DPO ranked {of('dpo', 'accuracy_against_popularity')} right. With "
        f"a stranger's history it lost {of('dpo', 'personalisation_gap', 'points')} points."
    )


BLOCKS = {
    "answer": answer, "laptop": laptop, "speed": speed, "cost": cost, "memory": memory,
    "methods": methods, "results": results,
}


def filled(page: str) -> str:
    """A page with each of its blocks as the results have it."""
    blocks = re.compile(r"(<!-- filled: (\w+) -->\n).*?(<!-- end -->)", re.S)
    return blocks.sub(lambda found: f"{found[1]}{BLOCKS[found[2]]()}\n{found[3]}", page)


if __name__ == "__main__":
    for path in PAGES:
        write_text(path, filled(path.read_text(encoding="utf-8")))
