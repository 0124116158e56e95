"""DPO's trainers side by side: TRL's, Unsloth's, and the one that computes a pair's prompt once.

    python tests/benchmarks/training.py --pairs data/pairs_ml-100k.jsonl                      # small preset's model
    python tests/benchmarks/training.py --pairs FILE --preset thesis --model FOLDER --shape NAME --memory_gb 24
    python tests/benchmarks/training.py --pairs FILE --scaling     # cost against pairs, length and batch: scaling.json

Every case runs in a process of its own, the cases in turn and the turns repeated, so that a machine whose speed
drifts treats all alike; the median of a case's turns is kept. Writes docs/results/speed.json (records of this device
and shape take the place of earlier ones), a table and a figure. `ratio_to_stock` leaves out the reference pass, which
later epochs and runs find done; `ratio_to_stock_with_reference_pass` counts it for a single epoch. The floor is
4 x 248 x parameters FLOP a pair at the device's measured rate of bf16 matrix products.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import gpu  # noqa: E402

sys.path.insert(0, str(gpu.ROOT))

import torch  # noqa: E402
from matplotlib import rc_context  # noqa: E402

import config  # noqa: E402
from data.figures import COLOURS, GREY, OTHERS, STYLE, new_figure  # noqa: E402

CPU_CASES = [("stock", 1), ("stock", 2), ("stock", 8), ("shared", 2), ("shared", 4), ("shared", 8)]
CUDA_CASES = [("stock", 8), ("unsloth", 8), ("shared", 8), ("shared", 16), ("shared", 32)]

NAMES = {"stock": "TRL", "unsloth": "TRL by Unsloth", "shared": "this project"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", required=True)
    parser.add_argument("--preset", default="small")
    parser.add_argument("--model", default=config.SMALL_MODEL)
    parser.add_argument("--shape", default="SmolLM2-135M")
    parser.add_argument("--memory_gb", type=float, default=None, help="cap on a GPU's memory")
    parser.add_argument("--effective_batch", type=int, default=8)
    parser.add_argument("--cases", help="JSON list of [trainer, micro-batch] or [trainer, micro-batch, checkpointing]; trainers: stock, unsloth, shared")
    parser.add_argument("--scaling", action="store_true")
    parser.add_argument("--no_checkpointing", action="store_true")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--warm_up", type=int, default=1)
    parser.add_argument("--timed", type=int, default=3)
    parser.add_argument("--work", default="/tmp/training-benchmark")
    parser.add_argument("--results", type=Path, default=gpu.ROOT / "docs" / "results")
    options = parser.parse_args()
    cuda = torch.cuda.is_available()
    cases = json.loads(options.cases) if options.cases else CUDA_CASES if cuda else CPU_CASES
    Path(options.work).mkdir(parents=True, exist_ok=True)
    if options.scaling:
        scaling(options, cuda)
        return
    found: dict[tuple, list[dict]] = {}
    for turn in range(options.turns):
        for trainer, micro_batch, *checkpointing in cases:
            case = case_of(options, cuda, trainer, micro_batch)
            case |= {"checkpointing": checkpointing[0]} if checkpointing else {}
            record = gpu.in_own_process(case)
            print(json.dumps({"turn": turn, "name": trainer} | record), flush=True)
            found.setdefault((trainer, micro_batch, case["checkpointing"]), []).append(record)
    write(found, options.results)


def case_of(options: argparse.Namespace, cuda: bool, trainer: str, micro_batch: int) -> dict:
    return {
        "backend": "unsloth" if trainer != "stock" and cuda else "hf", "trainer": "stock" if trainer == "unsloth" else trainer,
        "micro_batch": micro_batch, "effective_batch": max(options.effective_batch, micro_batch),
        "checkpointing": cuda and not options.no_checkpointing, "preset": options.preset, "model": options.model,
        "shape": options.shape, "pairs": options.pairs, "work": options.work, "memory_gb": options.memory_gb,
        "warm_up": options.warm_up, "timed": options.timed, "out": f"{options.work}/record.json",
    }


def scaling(options: argparse.Namespace, cuda: bool) -> None:
    """The shared trainer's cost against the number of pairs, the prompt's length and the micro-batch."""
    batch = 16 if cuda else 4
    cases = {
        "pairs": [{"micro_batch": batch, "effective_batch": batch, "timed": timed} for timed in (2, 4, 8)],
        "prompt": [{"micro_batch": batch, "effective_batch": batch, "prompt_times": times} for times in (1, 2, 4)],
        "batch": [{"micro_batch": size, "effective_batch": size} for size in ((1, 4, 16, 64) if cuda else (1, 2, 4, 8, 16))],
    }
    found = {}
    for name, changes in cases.items():
        found[name] = [gpu.in_own_process(case_of(options, cuda, "shared", batch) | change) for change in changes]
        print(name, json.dumps(found[name]), flush=True)
    path = options.results / "scaling.json"
    earlier = json.loads(path.read_text()) if path.exists() else {}
    earlier[f"{options.shape}, {config.environment_facts()['device']}"] = found
    path.write_text(json.dumps(earlier, indent=1) + "\n")
    draw_scaling(earlier, options.results / "scaling.png")


@rc_context(STYLE)
def draw_scaling(devices: dict[str, dict], path: Path) -> None:
    """Seconds against pairs (linear), tokens a second against a row's tokens (flat), pairs a second against the batch."""
    panels = {
        "pairs": ("pairs", "seconds", lambda record: (record["pairs_timed"], record["seconds"])),
        "prompt": (
            "tokens computed for a pair",
            "tokens a second",
            lambda record: (record["computed_tokens_per_pair"], record["computed_tokens_per_pair"] * record["pairs_per_second"]),
        ),
        "batch": ("pairs in a micro-batch", "pairs a second", lambda record: (record["micro_batch"], record["pairs_per_second"])),
    }
    figure, axes = new_figure(1.7 * 3, 3, len(devices))
    for column, (device, found) in zip(axes.T, devices.items(), strict=True):
        for axis, (name, (x, y, point)) in zip(column, panels.items(), strict=True):
            across, up = zip(*(point(record) for record in found[name] if "failed" not in record), strict=True)
            axis.plot(across, up, marker="o", markersize=4, linewidth=1, color="black")
            axis.set(xlabel=x, ylabel=y, xlim=(0, 1.1 * max(across)), ylim=(0, 1.15 * max(up)))
        column[0].set_title(device, fontsize=8)
    figure.supxlabel("this project's trainer, DPO; one measurement a point", fontsize=7, color=GREY)
    figure.savefig(path, dpi=200)


def write(found: dict[tuple, list[dict]], results: Path) -> None:
    """speed.json, speed.md and speed.png from the turns of every case."""
    done = {case: [turn for turn in turns if "failed" not in turn] for case, turns in found.items()}
    speed = {case: statistics.median(turn["pairs_per_second"] for turn in turns) for case, turns in done.items() if turns}
    stock = max(value for (trainer, *_), value in speed.items() if trainer == "stock")  # at its best micro-batch
    records = []
    for case, all_turns in found.items():
        record = {"trainer": case[0], "micro_batch": case[1], "failed": all_turns[0].get("failed")}
        if case in speed:
            rate, turns = speed[case], done[case]
            reference = statistics.median(turn["reference_seconds_per_pair"] for turn in turns)
            names = ("device", "shape", "bits", "backend", "effective_batch", "checkpointing", "peak_memory_gb", "share_of_floor")
            record = {"trainer": case[0], "micro_batch": case[1]} | {name: turns[0][name] for name in names}
            record |= {"cuda_graphs": True} if turns[0].get("cuda_graphs") else {}
            record |= {
                "pairs_per_second": round(rate, 3),
                "ratio_to_stock": round(rate / stock, 2),
                "ratio_to_stock_with_reference_pass": round(1 / (1 / rate + reference) / stock, 2),
                "reference_seconds_per_pair": reference,
                "turns": [turn["pairs_per_second"] for turn in turns],
            }
        records.append(record)
    save(records, results)


def save(records: list[dict], results: Path) -> None:
    """speed.json, its table and its figure; records of this device and shape take the place of earlier ones."""
    records = gpu.save(results / "speed.json", records, ("device", "shape"))
    columns = ["device", "shape", "trainer", "micro_batch", "pairs_per_second", "ratio_to_stock", "ratio_to_stock_with_reference_pass"]
    columns += ["peak_memory_gb", "share_of_floor"]
    lines = ["DPO; `stock` is TRL's trainer, `shared` this project's. Memory is in GB.\n"]
    lines += ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(str(record.get(name, "-")) for name in columns) + " |" for record in records]
    (results / "speed.md").write_text("\n".join(lines) + "\n")
    draw(records, results / "speed.png")


@rc_context(STYLE)
def draw(records: list[dict], path: Path) -> None:
    """Pairs a second against the micro-batch, one panel a device and shape, one line a trainer, one point a turn."""
    panels = list(dict.fromkeys((record["device"], record["shape"]) for record in records if "device" in record))
    figure, axes = new_figure(2.4 * len(panels), len(panels))
    for axis, panel in zip(axes[:, 0], panels, strict=True):
        for (trainer, label), marker, colour in zip(NAMES.items(), "os^", (COLOURS["sft"], OTHERS[0], COLOURS["dpo"]), strict=True):
            of_trainer = [record for record in records if (record.get("device"), record.get("shape"), record["trainer"]) == (*panel, trainer)]
            points = sorted((record["micro_batch"], record["pairs_per_second"]) for record in of_trainer)
            turns = [(record["micro_batch"], turn) for record in of_trainer for turn in record["turns"]]
            if points:
                axis.plot(*zip(*points, strict=True), color=colour, linewidth=1, label=label)
                axis.plot(*zip(*turns, strict=True), marker, color=colour, markersize=4)
        axis.set(xlabel="pairs in a micro-batch", ylabel="pairs a second", title=f"{panel[1]}, {panel[0]}")
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.margins(0.1)
        axis.set_ylim(bottom=0)
        axis.title.set_fontsize(8)
    labels = {label: line for axis in axes[:, 0] for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(labels.values(), labels.keys(), loc="outside upper center", ncols=3)
    figure.supxlabel("DPO without the reference's pass; lines are medians of turns", fontsize=7, color=GREY)
    figure.savefig(path, dpi=200)


if __name__ == "__main__":
    main()
