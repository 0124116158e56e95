"""How long scoring held-out users takes on a GPU, and what faster arithmetic does to the scores.

    python tests/benchmarks/evaluation.py --model FOLDER --shape NAME --pairs data/contrastive_rec_train.jsonl

Scores every test pair in both orders and both responses with one freshly made adapter, in float32, in float32 with
TensorFloat-32 matrix products, and in bfloat16. Writes docs/results/evaluation_speed.json: seconds, pairs a second,
peak memory, and the largest and the mean difference from float32 in nats.
"""

import argparse
import json
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--model", "--shape", "--pairs"):
        parser.add_argument(name, required=True)
    parser.add_argument("--preset", default="thesis")
    parser.add_argument("--batch_users", type=int, default=16)
    parser.add_argument("--users", type=int, default=None, help="of the test users; default: all")
    parser.add_argument("--modes", nargs="+", default=["bfloat16", "tf32", "float32"])
    parser.add_argument("--results", type=Path, default=ROOT / "docs" / "results")
    options = parser.parse_args()

    import gpu
    import numpy as np
    import torch
    from peft import get_peft_model

    import config
    import evaluate_dpo
    from data.tokens import pair_tree

    config.quiet_libraries()
    settings = config.preset_settings(config.EvaluationSettings, options.preset, base_model=options.model, pairs=options.pairs)
    _, test = config.load_split(settings)
    records, scores = [], {}
    for mode in options.modes:
        torch.backends.cuda.matmul.allow_tf32 = mode == "tf32"
        torch.cuda.reset_peak_memory_stats()
        model, tokenizer = config.load_model(settings, torch.bfloat16 if mode == "bfloat16" else torch.float32)
        torch.manual_seed(0)
        model = get_peft_model(model, config.lora_config(config.TrainingSettings())).eval()
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.data.normal_(std=0.02)
        trees = [pair_tree(pair, tokenizer) for pair in test[: options.users]]
        evaluate_dpo.score(model, trees[:32], options.batch_users, "warm-up")
        began = time.monotonic()
        scores[mode] = np.array(evaluate_dpo.score(model, trees, options.batch_users, mode))
        seconds = time.monotonic() - began
        records.append(
            {
                "device": config.environment_facts()["device"], "shape": options.shape, "bits": settings.bits, "compute": mode,
                "users": len(trees), "batch_users": options.batch_users, "seconds": round(seconds, 1),
                "pairs_per_second": round(len(trees) / seconds, 1),
                "peak_memory_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2),
            }
        )
        model = None
        torch.cuda.empty_cache()
        if "float32" in scores:
            for record in records:
                for name, margins, exact in zip(("decision", "response"), scores[record["compute"]], scores["float32"], strict=True):
                    off = np.abs(margins - exact)
                    record[f"{name}_off_by_nats"] = {"largest": round(float(off.max()), 5), "mean": round(float(off.mean()), 6)}
                record["decisions_changed"] = int(((scores[record["compute"]][0] > 0) != (scores["float32"][0] > 0)).sum())
        print(json.dumps(records[-1]), flush=True)
        gpu.save(options.results / "evaluation_speed.json", records, ("device", "shape", "compute", "users"))


if __name__ == "__main__":
    main()
