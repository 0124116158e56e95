"""DPO on a GPU: pairs a second and memory, by backend and micro-batch, on the shape of Llama 3 8B.

    python tests/benchmarks/gpu.py --pairs data/contrastive_rec_train.jsonl --memory_gb 24
    python tests/benchmarks/gpu.py --model FOLDER --pairs ...        # any model folder instead

Builds a model with Llama 3 8B's shape and random weights in NF4 (for speed and memory, random weights are as good as
any), trains each case in a process of its own, one after the other, and writes docs/results/gpu.json and gpu.md.
Pairs a second are over the steps after those of warm-up. The share of the matrix rate counts what a trainer has to
compute (stock: 6 FLOP a weight and token, 2 forward and 2 back through the frozen policy and 2 forward through the
reference; shared: 4, and a pair's prompt once; recomputation is not counted) against the rate that bf16 matrix products
of 8192 x 8192 reach on the same card.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
WARM_UP, TIMED = 3, 8
GRAPHS_WARM_UP = 12  # by then most shapes of a batch have come twice, and have their graph
CASE = (  # what a record is of
    *("device", "shape", "backend", "trainer", "micro_batch", "effective_batch", "checkpointing"),
    *("kernels", "optim", "cuda_graphs", "memory_cap_gb"),
)
CASES = [  # backend, trainer, micro-batch, checkpointing ("offloaded": kept in the computer's memory, by Unsloth)
    ("unsloth", "shared", 8, False),
    ("unsloth", "shared", 8, True),
    ("unsloth", "shared", 16, False),
    ("unsloth", "shared", 16, True),
    ("unsloth", "shared", 32, True),
    ("unsloth", "stock", 8, True),
    ("unsloth", "stock", 8, "offloaded"),
    ("hf", "shared", 8, True),
    ("hf", "stock", 8, True),
    ("unsloth", "stock", 1, True),
    ("hf", "stock", 2, False),
]


def build_shape(folder: Path, tokenizer_from: str) -> None:
    """Llama 3 8B's shape with random weights, NF4, saved as a folder that both backends load."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, LlamaConfig

    shape = LlamaConfig(
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        rope_theta=500_000.0,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        dtype="bfloat16",
    )
    raw = folder.with_name(folder.name + "-bf16")
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        model = AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16)
        torch.set_default_dtype(torch.float32)
    model.save_pretrained(raw)
    del model
    torch.cuda.empty_cache()
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
    )
    AutoModelForCausalLM.from_pretrained(raw, quantization_config=nf4, device_map={"": 0}, dtype="auto").save_pretrained(folder)
    for made in (raw, folder):
        AutoTokenizer.from_pretrained(tokenizer_from).save_pretrained(made)


def synchronize() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def matrix_rate(seconds: float = 2.0) -> float:
    """FLOP a second of bf16 matrix products on this device."""
    import torch

    size, device = (8192, "cuda") if torch.cuda.is_available() else (2048, "cpu")
    a = torch.randn(size, size, dtype=torch.bfloat16, device=device)
    for _ in range(3):
        a @ a
    synchronize()
    began, products = time.monotonic(), 0
    while time.monotonic() - began < seconds:
        for _ in range(20 if device == "cuda" else 1):
            a @ a
            products += 1
        synchronize()
    return products * 2 * size**3 / (time.monotonic() - began)


KERNELS = {  # part of the work: what its kernels are named; the first that fits
    "dequantising": "dequant",
    "attention": "flex|attention|fmha|flash",
    "matrix products": "gemm|nvjet|cutlass|sm90|gemv|splitk",
    "optimiser": "adam|optim|foreach|multi_tensor",
    "norm, rotary, activation (Unsloth)": "rms|rope|swiglu|_fg_kernel|DWf_DW",
    "copies": "copy|memcpy|memset|cat",
    "elementwise and reductions": "",
}


def profile(trainer: object, path: Path) -> None:
    """Write how one micro-batch's forward and backward pass spends its time: seconds by kind of kernel, and idle."""
    import re

    import torch

    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        synchronize()
        began = time.monotonic()
        trainer.accelerator.backward(trainer.compute_loss(trainer.model, batch))
        synchronize()
        seconds = time.monotonic() - began
    trainer.model.zero_grad()
    parts = dict.fromkeys(KERNELS, 0.0)
    top = {}
    for event in found.key_averages():
        busy = event.self_device_time_total / 1e6
        part = next(part for part, pattern in KERNELS.items() if re.search(pattern, event.key, re.IGNORECASE))
        parts[part] += busy
        top[event.key[:120]] = round(busy, 5)
    record = {"seconds": round(seconds, 4), "idle": round(seconds - sum(parts.values()), 4)}
    record |= {part: round(busy, 4) for part, busy in parts.items()}
    record["top"] = dict(sorted(top.items(), key=lambda item: -item[1])[:25])
    path.write_text(json.dumps(record, indent=1) + "\n")


def run_case(case: dict) -> dict:
    """Train one case for a few steps and measure it: keys `backend`, `trainer`, `micro_batch`, `effective_batch`,
    `checkpointing`, `preset`, `model`, `shape`, `pairs`, `work`, `memory_gb` and, or the defaults, `warm_up` and
    `timed` steps, how many times each prompt is repeated, `prompt_times`, whose `kernels` hf takes, if not its own, and
    `cuda_graphs` as in the settings. The record has `cuda_graphs` where they were used.
    """
    import config

    config.import_unsloth_first(case["backend"])
    import torch
    from transformers import TrainerCallback

    import train_dpo
    from data.pairs import preference_rows
    from data.tokens import longest_in_tokens

    config.quiet_libraries()
    if case.get("kernels") == "liger":
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama(cross_entropy=False, fused_linear_cross_entropy=False)  # norm, rotary embedding, activation
    rate = matrix_rate()
    timed = case.get("timed", TIMED)
    if case["memory_gb"] and torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(case["memory_gb"] * 1e9 / total)
    settings = config.preset_settings(
        config.TrainingSettings,
        case["preset"],
        base_model=case["model"],
        trainer=case["trainer"],
        max_pairs=None,
        pairs=case["pairs"],
        backend=case["backend"],
        outputs=case["work"],
        effective_batch=case["effective_batch"],
        gradient_checkpointing="unsloth" if case["checkpointing"] == "offloaded" else case["checkpointing"],
        cuda_graphs=case.get("cuda_graphs"),
        batch_size=case["micro_batch"],
        validation_pairs=0,
        save_steps=10_000,
        max_length=512 * case.get("prompt_times", 1),
        **({"optim": case["optim"]} if case.get("optim") else {}),
    )
    train, _ = config.load_split(settings)
    rows = preference_rows(train, "balanced", settings.seed)
    prompts = 1 if case["trainer"] == "shared" else 2
    longest = longest_in_tokens(rows, config.load_tokenizer(settings), ["chosen", "rejected"], prompts)
    _, _, graphs = config.fitting_batch_size(settings, case["effective_batch"], longest, case["trainer"] == "shared")
    warm_up = max(case.get("warm_up", WARM_UP), GRAPHS_WARM_UP if graphs else 0)
    settings.cuda_graphs, settings.max_steps = graphs, warm_up + timed
    rows = rows[: settings.max_steps * case["effective_batch"]]
    rows = [row | {"prompt": row["prompt"] * case.get("prompt_times", 1)} for row in rows]
    clock = {}

    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step in (warm_up, warm_up + timed):  # else steps would wait for one another
                synchronize()
                clock[state.global_step] = time.monotonic()

    reference_seconds = [0.0]
    real = train_dpo.reference_log_probs

    def timed_reference(trainer, examples):
        real(trainer, examples[: 2 * case["micro_batch"]])  # kernels are compiled at their first use
        synchronize()
        began = time.monotonic()
        found = real(trainer, examples)
        synchronize()
        reference_seconds[0] += time.monotonic() - began
        return found

    train_dpo.reference_log_probs = timed_reference
    for known in Path(case["work"]).glob("*_reference/*.json"):
        known.unlink()  # so that the pass is measured
    trainer = train_dpo.build_trainer("dpo", settings, train_dpo.Data(rows, [], {}), None, case["micro_batch"])
    trainer.add_callback(Clock())
    if case.get("kernels") == "compiled":
        for layer in trainer.model.base_model.model.model.layers:  # one graph a length of rows, which all layers share
            layer.compile(dynamic=False)
    tokens = sum(2 * len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in trainer.train_dataset)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    seconds = clock[warm_up + timed] - clock[warm_up]
    pairs_per_second = timed * case["effective_batch"] / seconds
    peak = train_dpo.peak_memory()
    if case.get("profile"):
        profile(trainer, Path(case["profile"]))
    weights = config.parameter_count(case["model"])
    shape = trainer.model.config
    in_matrices = weights - shape.vocab_size * shape.hidden_size
    computed = sum(len(row["chosen_ids"]) + len(row["rejected_ids"]) + len(row["prompt_ids"]) for row in trainer.train_dataset)
    flop = in_matrices * (4 * computed if case["trainer"] == "shared" else 6 * tokens) / len(rows)
    return {
        "device": config.environment_facts()["device"],
        "shape": case["shape"],
        "bits": settings.bits,
        "backend": config.backend_of(settings),
        "trainer": case["trainer"],
        "micro_batch": case["micro_batch"],
        "effective_batch": case["effective_batch"],
        "checkpointing": case["checkpointing"],
        **{name: case[name] for name in ("kernels", "optim") if case.get(name)},
        **({"cuda_graphs": True, "shapes_captured": len(train_dpo.graphs_of(trainer))} if graphs else {}),
        "pairs_per_second": round(pairs_per_second, 2),
        "pairs_timed": timed * case["effective_batch"],
        "seconds": round(seconds, 3),
        "tokens_per_second": round(pairs_per_second * tokens / len(rows)),
        "share_of_matrix_rate": round(pairs_per_second * flop / rate, 4),
        "peak_memory_gb": round(peak, 2),
        "reference_seconds_per_pair": round(reference_seconds[0] / len(rows), 5),
        "share_of_floor": round(pairs_per_second * 4 * 248 * weights / rate, 4),
        "memory_cap_gb": case["memory_gb"],
        "tokens_per_pair": round(tokens / len(rows), 1),
        "computed_tokens_per_pair": round((computed if case["trainer"] == "shared" else tokens) / len(rows), 1),
        "matrix_tflops": round(rate / 1e12, 1),
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],  # the first alone: logging_first_step
        "steps": warm_up + timed,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", required=True)
    parser.add_argument("--model", help="a model folder; default: Llama 3 8B's shape with random weights")
    parser.add_argument("--shape", default="Llama-3-8B, random weights")
    parser.add_argument("--tokenizer", default=None, help="folder of any tokenizer; default: the small model's")
    parser.add_argument("--memory_gb", type=float, default=24.0, help="cap on the GPU's memory")
    parser.add_argument("--effective_batch", type=int, default=8)
    parser.add_argument("--cases", help="JSON list of [backend, trainer, micro-batch, checkpointing]")
    parser.add_argument("--work", default="/tmp/gpu-benchmark")
    parser.add_argument("--results", type=Path, default=ROOT / "docs" / "results")
    parser.add_argument("--optim", help="another optimiser than the preset's, by its name in transformers")
    parser.add_argument("--cuda_graphs", choices=["true", "false"], help="a setting of training; the default is its default")
    parser.add_argument("--kernels", choices=["liger", "compiled"], help="backend hf with Liger's (pip install liger-kernel), or torch.compile's")
    parser.add_argument("--warm_up", type=int, default=WARM_UP, help="steps that are not timed")
    parser.add_argument("--timed", type=int, default=TIMED, help="steps after those")
    parser.add_argument("--profile", help="also write, here, how the first case's micro-batch spends its time")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        case = json.loads(options.one)
        Path(case["out"]).write_text(json.dumps(run_case(case)))
        return

    work = Path(options.work)
    work.mkdir(parents=True, exist_ok=True)
    model = Path(options.model or work / "llama-3-8b-shape")
    if not options.model and not model.is_dir():
        import config

        build_shape(model, options.tokenizer or str(config.small_model_folder()))
    path = options.results / "gpu.json"
    records = []
    for backend, trainer, micro_batch, checkpointing in json.loads(options.cases) if options.cases else CASES:
        case = {
            "backend": backend, "trainer": trainer, "micro_batch": micro_batch, "checkpointing": checkpointing,
            "preset": "thesis", "model": str(model),
            "pairs": options.pairs, "memory_gb": options.memory_gb, "effective_batch": max(options.effective_batch, micro_batch),
            "shape": options.shape, "work": str(work), "out": str(work / "record.json"),
            "profile": options.profile if not records else None,
            **{name: getattr(options, name) for name in ("kernels", "optim") if getattr(options, name)},
            "warm_up": options.warm_up, "timed": options.timed, "cuda_graphs": {"true": True, "false": False}.get(options.cuda_graphs),
        }
        records.append(in_own_process(case))
        print(json.dumps(records[-1]), flush=True)
        device = next((record["device"] for record in records if "device" in record), None)  # a case that failed does not know
        for record in records:
            record.setdefault("device", device)
        (options.results / "gpu.md").write_text(as_table(save(path, records, CASE)))


def save(path: Path, records: list[dict], key: tuple[str, ...]) -> list[dict]:
    """Write records, after those that the file holds of other cases; a case is what the fields of the key say. All of them."""
    path.parent.mkdir(parents=True, exist_ok=True)

    def case(record: dict) -> tuple:
        return tuple(record.get(name) for name in key)

    measured = {case(record) for record in records}
    earlier = json.loads(path.read_text()) if path.exists() else []
    found = [record for record in earlier if case(record) not in measured] + records
    path.write_text(json.dumps(found, indent=1) + "\n")
    return found


def in_own_process(case: dict) -> dict:
    """The record of one case, or what it was and why it failed."""
    Path(case["out"]).unlink(missing_ok=True)
    done = subprocess.run([sys.executable, __file__, "--pairs", "-", "--one", json.dumps(case)], capture_output=True, text=True)
    if Path(case["out"]).exists():
        return json.loads(Path(case["out"]).read_text())
    print(done.stderr[-3000:], file=sys.stderr)
    reason = "out of memory" if "OutOfMemoryError" in done.stderr else (done.stderr.strip().splitlines() or ["?"])[-1]
    kept = ("shape", "backend", "trainer", "micro_batch", "effective_batch", "checkpointing", "kernels", "optim", "cuda_graphs")
    return {key: case[key] for key in kept if key in case} | {"memory_cap_gb": case["memory_gb"], "failed": reason[:200]}


def as_table(records: list[dict]) -> str:
    columns = ["device", "shape", "backend", "trainer", "micro_batch", "checkpointing", "memory_cap_gb", "pairs_per_second", "tokens_per_second", "share_of_matrix_rate", "peak_memory_gb", "first_loss"]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for record in records:
        cells = [str(record.get(name, record.get("failed", "-") if name == "pairs_per_second" else "-")) for name in columns]
        cells[columns.index("backend")] += "".join(f", {record[name]}" for name in ("kernels", "optim") if name in record)
        cells[columns.index("first_loss")] = f"{record['losses'][0]:.4f}" if "losses" in record else "-"
        cells[columns.index("memory_cap_gb")] = str(record.get("memory_cap_gb") or "none")
        cells[columns.index("trainer")] += ", CUDA graphs" if record.get("cuda_graphs") else ""
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
