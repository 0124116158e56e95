"""Training on a GPU: pairs a second, memory and idle time, by stage, backend and micro-batch, on Llama 3's shapes.

    python tests/benchmarks/gpu.py --pairs data/contrastive_rec_train.jsonl --memory_gb 24
    python tests/benchmarks/gpu.py --shape Llama-3.2-1B --stage sft --pairs ...
    python tests/benchmarks/gpu.py --model FOLDER --pairs ...        # any model folder instead
    python tests/benchmarks/gpu.py --whole outputs                   # after a default run: what it took

Builds a model with random weights in NF4 (for speed and memory, random weights are as good as any) and Llama 3's own
tokenizer, trains each case in a process of its own, one after the other, and writes docs/results/gpu.json and gpu.md.
Pairs a second are over the steps after those of warm-up, `idle` is the share of such a step in which no kernel runs. The
share of the matrix rate counts what a trainer has to compute (4 FLOP a weight and token, forward and back through the
frozen weights, and 2 more where stock DPO runs its reference; shared: a pair's prompt once; recomputation is not
counted) against the rate that bf16 matrix products of 8192 x 8192 reach on the same card.
"""

import argparse
import base64
import json
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
WARM_UP, TIMED, PROFILED = 3, 8, 2  # steps
CASE = (  # what a record is of
    *("device", "shape", "stage", "backend", "trainer", "micro_batch", "effective_batch", "checkpointing"),
    *("kernels", "optim", "cuda_graphs", "memory_cap_gb"),
)
WHOLE = (
    *("device", "git_commit", "rows", "steps", "batch_size", "gradient_checkpointing", "cuda_graphs"),
    *("first_loss", "last_loss", "rows_per_second", "train_seconds", "wall_seconds", "peak_memory_gb"),
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


LLAMA = {"vocab_size": 128_256, "num_attention_heads": 32, "num_key_value_heads": 8, "rope_theta": 500_000.0}
SHAPES = {
    "Llama-3-8B": LLAMA | {"hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32},
    "Llama-3.2-1B": LLAMA
    | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64, "tie_word_embeddings": True},
}
TOKENIZER_WHEEL = ("llama-models==0.3.0", "7f77f78ff13fca09f70d76a376aff6414cd901623fb9d57e69c2f8367a73032f")
TOKENIZER_MEMBER = "llama_models/llama3/tokenizer.model"


def llama3_tokenizer() -> Path:
    """Llama 3's tokenizer as a folder in the user's cache, made from Meta's wheel at the first call."""
    import config
    from data.files import fetch_wheel, whole_folder

    folder = config.CACHE / "llama-3-tokenizer"
    if not folder.is_dir():
        with tempfile.TemporaryDirectory() as work, zipfile.ZipFile(fetch_wheel(*TOKENIZER_WHEEL, Path(work))) as wheel:
            ranks = Path(wheel.extract(TOKENIZER_MEMBER, work))
            with whole_folder(folder) as made:
                convert_tokenizer(ranks, made)
    return folder


def convert_tokenizer(ranks: Path, folder: Path) -> None:
    """Write Llama 3's file of tokens and ranks as a tokenizer that transformers loads."""
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    class Converter(TikTokenConverter):
        @staticmethod
        def load_tiktoken_bpe(path):  # without tiktoken
            return {base64.b64decode(token): int(rank) for token, rank in map(str.split, Path(path).read_text().splitlines())}

    begin, end = "<|begin_of_text|>", "<|end_of_text|>"
    special = [begin, end, *(f"<|reserved_special_token_{number}|>" for number in range(254))]
    tokenizer = Converter(str(ranks), extra_special_tokens=special).converted()
    tokenizer.post_processor = TemplateProcessing(single=f"{begin} $A", special_tokens=[(begin, tokenizer.token_to_id(begin))])
    names = {"bos_token": begin, "eos_token": end, "pad_token": special[-1]}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names, clean_up_tokenization_spaces=False).save_pretrained(folder)


def build_shape(folder: Path, tokenizer_from: Path, shape: dict) -> None:
    """A Llama of this shape with random weights, NF4, saved as a folder that both backends load."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, LlamaConfig

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_from)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    raw = folder.with_name(folder.name + "-bf16")
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        made = LlamaConfig(**shape, **ids, max_position_embeddings=8192, dtype="bfloat16")
        model = AutoModelForCausalLM.from_config(made, dtype=torch.bfloat16)
        torch.set_default_dtype(torch.float32)
    model.save_pretrained(raw)
    del model
    torch.cuda.empty_cache()
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
    )
    AutoModelForCausalLM.from_pretrained(raw, quantization_config=nf4, device_map={"": 0}, dtype="auto").save_pretrained(folder)
    for made in (raw, folder):
        tokenizer.save_pretrained(made)


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


def kernel_times(profiler: object, steps: int) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds a step by part of the work, `busy` being those in which any kernel runs; and the 25 longest kernels."""
    import re

    import torch

    kernels = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    parts, top, busy, until = dict.fromkeys(KERNELS, 0.0), {}, 0.0, 0.0
    for event in sorted(kernels, key=lambda event: event.time_range.start):
        start, end = event.time_range.start, event.time_range.end
        busy, until = busy + max(0.0, end - max(start, until)), max(until, end)
        part = next(part for part, pattern in KERNELS.items() if re.search(pattern, event.name, re.IGNORECASE))
        parts[part] += end - start
        top[event.name[:120]] = top.get(event.name[:120], 0.0) + end - start

    def seconds(found: dict[str, float]) -> dict[str, float]:
        return {name: round(value / steps / 1e6, 5) for name, value in found.items()}

    return seconds({"busy": busy} | parts), seconds(dict(sorted(top.items(), key=lambda item: -item[1])[:25]))


def run_case(case: dict) -> dict:
    """Train one case for a few steps and measure it: keys `stage`, `backend`, `trainer`, `micro_batch`, `effective_batch`,
    `checkpointing`, `preset`, `model`, `shape`, `pairs`, `work`, `memory_gb` and, or the defaults, `warm_up` and
    `timed` steps, how many times each prompt is repeated, `prompt_times`, whose `kernels` hf takes, if not its own,
    `logging_steps`, and `cuda_graphs` as in the settings. The record has `cuda_graphs` where they were used.
    """
    import config

    config.import_unsloth_first(case["backend"])
    import torch
    from transformers import TrainerCallback

    import train_dpo
    from data.machine import peak_process_memory
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
        logging_steps=case.get("logging_steps", 5),
        max_length=512 * case.get("prompt_times", 1),
        **({"optim": case["optim"]} if case.get("optim") else {}),
    )
    train, _ = config.load_split(settings)
    rows = preference_rows(train, "balanced", settings.seed)
    stage, shared, cuda = case.get("stage", "dpo"), case["trainer"] == "shared", torch.cuda.is_available()
    responses, prompts = (["chosen"], 1) if stage == "sft" else (["chosen", "rejected"], 1 if shared else 2)
    longest = longest_in_tokens(rows, config.load_tokenizer(settings), responses, prompts)
    _, _, settings.cuda_graphs = config.fitting_batch_size(settings, case["effective_batch"], longest, shared)
    warm_up = case.get("warm_up", WARM_UP)
    settings.max_steps = warm_up + timed + (PROFILED if cuda else 0)
    rows = rows[: settings.max_steps * case["effective_batch"]]
    rows = [row | {"prompt": row["prompt"] * case.get("prompt_times", 1)} for row in rows]
    clock, profiler = {}, torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])

    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step in (warm_up, warm_up + timed, settings.max_steps):  # else steps would wait for one another
                synchronize()
                clock[state.global_step] = time.monotonic()
            if state.global_step == warm_up + timed and cuda:
                profiler.start()
            if state.global_step == settings.max_steps and cuda:
                profiler.stop()

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
    trainer = train_dpo.build_trainer(stage, settings, train_dpo.Data(rows, [], {}), None, case["micro_batch"])
    trainer.add_callback(Clock())
    if case.get("kernels") == "compiled":
        for layer in trainer.model.base_model.model.model.layers:  # one graph a length of rows, which all layers share
            layer.compile(dynamic=False)
    tokens = computed = sum(len(row["input_ids"]) for row in trainer.train_dataset) if stage == "sft" else 0
    for row in trainer.train_dataset if stage == "dpo" else ():
        both = len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"])
        tokens, computed = tokens + both + len(row["prompt_ids"]), computed + both + (0 if shared else len(row["prompt_ids"]))
    trainer.train()
    seconds = clock[warm_up + timed] - clock[warm_up]
    pairs_per_second = timed * case["effective_batch"] / seconds
    peak = torch.cuda.max_memory_allocated() / 1e9 if cuda else peak_process_memory()
    times, top = kernel_times(profiler, PROFILED) if cuda else ({}, {})
    if case.get("profile"):
        step = {"seconds": round(seconds / timed, 4)} | times | {"top": top}
        Path(case["profile"]).write_text(json.dumps(step, indent=1) + "\n")
    weights = config.empty_model(case["model"]).num_parameters()
    shape = trainer.model.config
    in_matrices = weights - shape.vocab_size * shape.hidden_size
    flop = in_matrices * (6 if stage == "dpo" and not shared else 4) * computed / len(rows)
    graphs = len(getattr(getattr(trainer, "hidden_states", None), "captured", ()))
    return {
        "device": config.environment_facts()["device"],
        "shape": case["shape"],
        "stage": stage,
        "bits": settings.bits,
        "backend": config.backend_of(settings),
        "trainer": case["trainer"],
        "micro_batch": case["micro_batch"],
        "effective_batch": case["effective_batch"],
        "checkpointing": case["checkpointing"],
        **{name: case[name] for name in ("kernels", "optim") if case.get(name)},
        **({"cuda_graphs": True, "shapes_captured": graphs} if graphs else {}),
        "pairs_per_second": round(pairs_per_second, 2),
        "pairs_timed": timed * case["effective_batch"],
        "seconds": round(seconds, 3),
        "tokens_per_second": round(pairs_per_second * tokens / len(rows)),
        "share_of_matrix_rate": round(pairs_per_second * flop / rate, 4),
        "idle": round(1 - times["busy"] * timed / seconds, 3) if times else None,
        "peak_memory_gb": round(peak, 2),
        "reference_seconds_per_pair": round(reference_seconds[0] / len(rows), 5),
        "share_of_floor": round(pairs_per_second * 4 * 248 * weights / rate, 4),
        "memory_cap_gb": case["memory_gb"],
        "tokens_per_pair": round(tokens / len(rows), 1),
        "computed_tokens_per_pair": round(computed / len(rows), 1),
        "matrix_tflops": round(rate / 1e12, 1),
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],  # the first alone: logging_first_step
        "steps": warm_up + timed,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", help="file of pairs")
    parser.add_argument("--model", help="a model folder; default: one of the shape, with random weights")
    parser.add_argument("--shape", default="Llama-3-8B", help=f"one of {', '.join(SHAPES)}; or a name for --model")
    parser.add_argument("--stage", choices=["sft", "dpo"], default="dpo")
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
    parser.add_argument("--profile", help="also write, here, how a step of the first case spends its time")
    parser.add_argument("--whole", type=Path, help="only keep what a default run took: the folder of its outputs")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.whole:
        runs = [json.loads(path.read_text()) for path in sorted(options.whole.glob("*_final/run.json"))]
        kept = {run["stage"]: {name: run[name] for name in WHOLE} for run in runs}
        (options.results / "whole_run.json").write_text(json.dumps(kept, indent=1) + "\n")
        return
    if options.one:
        case = json.loads(options.one)
        Path(case["out"]).write_text(json.dumps(run_case(case)))
        return

    work = Path(options.work)
    work.mkdir(parents=True, exist_ok=True)
    model = Path(options.model or work / options.shape)
    if not options.model and not model.is_dir():
        build_shape(model, llama3_tokenizer(), SHAPES[options.shape])
    path = options.results / "gpu.json"
    records = []
    for backend, trainer, micro_batch, checkpointing in json.loads(options.cases) if options.cases else CASES:
        case = {
            "backend": backend, "trainer": trainer, "micro_batch": micro_batch, "checkpointing": checkpointing,
            "preset": "thesis", "model": str(model),
            "pairs": options.pairs, "memory_gb": options.memory_gb, "effective_batch": max(options.effective_batch, micro_batch),
            "shape": options.shape if options.model else f"{options.shape}, random weights", "stage": options.stage, "work": str(work), "out": str(work / "record.json"),
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
    kept = ("shape", "stage", "backend", "trainer", "micro_batch", "effective_batch", "checkpointing", "kernels", "optim", "cuda_graphs")
    return {key: case[key] for key in kept if key in case} | {"memory_cap_gb": case["memory_gb"], "failed": reason[:200]}


def as_table(records: list[dict]) -> str:
    columns = ["device", "shape", "stage", "backend", "trainer", "micro_batch", "checkpointing", "memory_cap_gb", "pairs_per_second", "tokens_per_second", "share_of_matrix_rate", "idle", "peak_memory_gb", "first_loss"]
    lines = ["Memory is in GB; `idle` is the share of a step in which no kernel runs; the matrix rate is the card's, measured.\n"]
    lines += ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
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
