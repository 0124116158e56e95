"""Does DPO by the shared trainer go the way of TRL's? The losses of 50 steps of both, on the real small model.

    python tests/benchmarks/curves.py --pairs data/pairs_ml-100k.jsonl

Trains DPO from the base model twice, in float32 so that rounding does not hide a difference, and writes
docs/results/curves.json: the losses of both, and the largest difference of any step.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", required=True)
    parser.add_argument("--flags", default="--preset small --effective_batch 4 --batch_size 4 --learning_rate 1e-4 --save_steps 1000")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--results", type=Path, default=ROOT / "docs" / "results")
    options = parser.parse_args()

    import torch

    import config
    import train_dpo
    from data.files import write_json

    config.training_dtype = lambda: torch.float32
    losses = {}
    for trainer in ("stock", "shared"):
        with tempfile.TemporaryDirectory() as outputs:
            flags = f"{options.flags} --max_steps {options.steps} --max_pairs {4 * options.steps} --logging_steps 1 --validation_pairs 0"
            where = ["--pairs", options.pairs, "--outputs", outputs]
            train_dpo.main([*flags.split(), "--stage", "dpo", "--init", "base", "--trainer", trainer, *where])
            run = json.loads(next(Path(outputs).glob("*_dpo_4bit_final/run.json")).read_text())
        losses[trainer] = [entry["loss"] for entry in run["log_history"] if "loss" in entry]
    apart = max(abs(one - other) for one, other in zip(*losses.values(), strict=True))
    record = {"device": run["device"], "model": run["settings"]["base_model"], "bits": run["settings"]["bits"], "compute": "float32"}
    record |= {"steps": options.steps, "largest_difference": apart, "loss": losses}
    write_json(options.results / "curves.json", record)
    print(json.dumps(record | {"loss": None}), flush=True)


if __name__ == "__main__":
    main()
