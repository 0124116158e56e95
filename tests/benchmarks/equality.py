"""Do an adapter's scores depend on the backend that reads it, or on computing a pair's prompt once?

    python tests/benchmarks/equality.py --adapter outputs/smollm2_dpo_4bit_final --preset small --pairs FILE

Scores the same rows with Unsloth's model and with transformers + PEFT, by plain forward passes, in 4 and in 16 bits,
computing in bfloat16 and in float32, and once more with a pair's prompt shared, as DPO's trainer does. Writes
docs/results/equality.json, one record a precision of the weights: the largest difference in summed response
log-probability, in nats, between the backends, between a shared prompt and plain passes on each backend, and for scale
the largest between bfloat16 and float32 on one backend.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--adapter", "--pairs", "--preset"):
        parser.add_argument(name, required=True)
    parser.add_argument("--users", type=int, default=64)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--results", type=Path, default=ROOT / "docs" / "results")
    parser.add_argument("--one", nargs=2, metavar=("BACKEND", "OUT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        score(options, *options.one)
        return
    found = {}
    with tempfile.TemporaryDirectory() as work:
        for backend in ("hf", "unsloth"):  # each in a process of its own: Unsloth changes the libraries for both
            out = f"{work}/{backend}.json"
            subprocess.run([sys.executable, __file__, *sys.argv[1:], "--one", backend, out], check=True)
            found |= {(backend, *case.split()): values for case, values in json.loads(Path(out).read_text()).items()}

    def largest(one: tuple[str, ...], other: tuple[str, ...]) -> float | None:
        if one not in found or other not in found:
            return None
        return round(max(abs(x - y) for x, y in zip(found[one], found[other], strict=True)), 6)

    import config

    records = []
    for bits in map(str, options.bits):
        record = {"device": config.environment_facts()["device"], "bits": int(bits), "rows": 2 * options.users}
        for dtype in ("bfloat16", "float32"):
            record[f"backends_differ_by_nats_{dtype}"] = largest(("hf", bits, dtype), ("unsloth", bits, dtype))
            for backend in ("hf", "unsloth"):
                record[f"{backend}_shared_prompt_differs_by_nats_{dtype}"] = largest((backend, bits, dtype), (backend, bits, dtype, "shared"))
        record["hf_bfloat16_float32_differ_by_nats"] = largest(("hf", bits, "bfloat16"), ("hf", bits, "float32"))
        print(json.dumps(record), flush=True)
        records.append(record)
    (options.results / "equality.json").write_text(json.dumps(records, indent=1) + "\n")


def score(options: argparse.Namespace, backend: str, out: str) -> None:
    """Write {"bits dtype": summed response log-probabilities} of one backend; a case that fails is left out."""
    import config

    config.import_unsloth_first(backend)
    import torch
    from peft import PeftModel
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    import train_dpo
    from data.pairs import preference_row

    config.quiet_libraries()
    adapter = Path(options.adapter)
    found = {}
    for bits in options.bits:
        for dtype in (torch.bfloat16, torch.float32):
            settings = config.preset_settings(
                config.TrainingSettings, options.preset, pairs=options.pairs, backend=backend, bits=bits, gradient_checkpointing=False
            )
            _, test = config.load_split(settings)
            try:
                model, tokenizer = config.load_model(settings, dtype)
                if backend == "unsloth":
                    model = config.add_unsloth_adapter(model, settings, adapter)
                else:
                    model = PeftModel.from_pretrained(model, adapter)
                model.eval()
                rows = [preference_row(pair, "A") for pair in test[: options.users]]
                examples = []
                for row in rows:
                    start = len(tokenizer(row["prompt"])["input_ids"])
                    ids = {name: [*tokenizer(row["prompt"] + row[name])["input_ids"], tokenizer.eos_token_id] for name in ("chosen", "rejected")}
                    examples.append({"prompt_ids": ids["chosen"][:start]} | {f"{name}_ids": values[start:] for name, values in ids.items()})
                name = f"{bits} {str(dtype).removeprefix('torch.')}"
                with torch.no_grad(), torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32):
                    sums = []
                    for response in ("chosen_ids", "rejected_ids"):
                        for example in examples:
                            ids = torch.tensor(example["prompt_ids"] + example[response], device=model.device)
                            logits = model(input_ids=ids[None], attention_mask=torch.ones_like(ids[None])).logits[0].float()
                            start = len(example["prompt_ids"])
                            sums.append(logits.log_softmax(-1)[start - 1 : -1].gather(-1, ids[start:, None]).sum().item())
                    found[name] = sums
                    causal = model.base_model.model
                    shared: dict[int, float] = {}
                    for first in range(0, len(examples), 8):
                        part = examples[first : first + 8]
                        batch = DataCollatorForPreference(pad_token_id=tokenizer.pad_token_id)(part)
                        batch = train_dpo.tree_batch(part, batch, in_row=backend == "unsloth")
                        batch = {key: value.to(model.device) if hasattr(value, "to") else value for key, value in batch.items()}
                        states = train_dpo.flat_hidden_states if backend == "unsloth" else train_dpo.tree_hidden_states
                        before = states(causal.base_model, batch).flatten(0, 1)[batch["tree_before"]]
                        logits = causal.get_output_embeddings()(before).float()
                        picked = logits.log_softmax(-1).gather(-1, batch["tree_targets"][:, None])[:, 0]
                        lengths = batch["completion_mask"].sum(dim=1).tolist()  # of all chosen, then of all rejected
                        for number, values in enumerate(picked.split(lengths)):
                            response, example = divmod(number, len(part))
                            shared[response * len(examples) + first + example] = values.sum().item()
                    found[f"{name} shared"] = [shared[index] for index in range(len(sums))]
            except (RuntimeError, ValueError, TypeError) as error:
                print(json.dumps({"bits": bits, "backend": backend, "dtype": str(dtype), "failed": str(error)[:200]}), flush=True)
            model = None
            torch.cuda.empty_cache()
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
