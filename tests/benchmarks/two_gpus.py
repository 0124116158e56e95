"""Two GPUs against one: DPO and evaluation by `accelerate launch`, and ten steps of a model that two GPUs share.

    python tests/benchmarks/two_gpus.py --model FOLDER --shape NAME --pairs data/contrastive_rec_train.jsonl

Trains one DPO adapter from the base by two processes and one by one, on the same rows in the same order, with the same
effective batch; lets two processes and one score the held-out users with the first of them; and trains SmolLM2 as
docs/fsdp_qlora.yaml says. Writes docs/results/two_gpus.json: pairs and users a second, how far losses and margins
are apart, and losses and gradient norms of the sharded model.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402

import config  # noqa: E402
from data.files import write_json  # noqa: E402
from data.pairs import load_pairs, write_pairs  # noqa: E402
from data.predictions import read_predictions  # noqa: E402

STEPS = 24  # CUDA graphs are made in the first few


def call(script: str, flags: str, processes: int, configuration: str = "") -> None:
    """Run a script by one process on the first GPU, or by several."""
    launcher = []
    if processes > 1:
        launcher = ["-m", "accelerate.commands.launch", *shlex.split(configuration or f"--num_processes {processes} --multi_gpu")]
        if not torch.cuda.is_available():  # where the script itself is tried
            launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    environment |= {"CUDA_VISIBLE_DEVICES": "0"} if processes == 1 else {}
    subprocess.run([sys.executable, *launcher, str(ROOT / script), *shlex.split(flags)], check=True, cwd=ROOT, env=environment)


def training(run: dict) -> dict:
    logged = [entry for entry in run["log_history"] if "loss" in entry]
    found = {"pairs_per_second": run["rows_per_second"], "micro_batch": run["batch_size"], "trainer": run["trainer"]}
    found |= {"effective_batch": run["settings"]["effective_batch"], "peak_memory_gb": run["peak_memory_gb"]}
    return found | {name: [round(entry[name], 6) for entry in logged] for name in ("loss", "grad_norm")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--model", "--shape", "--pairs"):
        parser.add_argument(name, required=True)
    parser.add_argument("--pairs_used", type=int, default=2000, help="the first so many, a fifth of them held out")
    parser.add_argument("--preset", default="thesis")
    parser.add_argument("--training", default="--effective_batch 32 --batch_size 16 --gradient_checkpointing false")
    parser.add_argument("--work", type=Path, default=Path("/tmp/two-gpus"))
    parser.add_argument("--results", type=Path, default=ROOT / "docs" / "results")
    options = parser.parse_args()
    for folder in (options.work, options.results):
        folder.mkdir(parents=True, exist_ok=True)
    pairs = options.work / "pairs.jsonl"
    write_pairs(pairs, load_pairs(options.pairs)[: options.pairs_used])
    common = f"--preset {options.preset} --pairs {pairs}"
    once = "--stage dpo --init base --validation_pairs 0 --save_steps 1000 --logging_steps 1"
    steps = f"{once} --max_steps {STEPS} --max_pairs {STEPS * 32}"

    record = {"device": config.environment_facts()["device"], "shape": options.shape, "training": {}, "evaluation": {}}
    scores, adapter = {}, None
    for processes in (2, 1):
        outputs = options.work / str(processes)
        flags = f"{common} --base_model {options.model}"
        call("train_dpo.py", f"{flags} --outputs {outputs} {steps} {options.training}", processes)
        trained = next(outputs.glob("*_dpo_4bit_final"))
        adapter = adapter or trained  # both score what two have trained
        record["training"][str(processes)] = training(json.loads((trained / "run.json").read_text()))
        scored = outputs / "scored"
        arm = f"--outputs {scored} --adapters dpo_of_two={adapter}"
        call("evaluate_dpo.py", f"{flags} {arm} --strangers false --generate_users 0 --fast true", processes)
        run = json.loads((scored / "evaluation" / "run.json").read_text())
        rows = read_predictions(scored / "evaluation" / "predictions.csv")
        scores[processes] = rows[rows["kind"] == "model"].sort_values(["arm", "pair_id", "order"]).reset_index(drop=True)
        seconds = {name.split()[1]: value for name, value in run["seconds"].items() if name.startswith("scoring")}
        users = scores[processes]["pair_id"].nunique()
        record["evaluation"][str(processes)] = {"users": users, "seconds": seconds, "processes": run["processes"]}

    one, two = scores[1], scores[2]
    assert one[["arm", "pair_id", "order"]].equals(two[["arm", "pair_id", "order"]])
    losses, rates = ([record["training"][processes][name] for processes in "12"] for name in ("loss", "pairs_per_second"))
    record["training"] |= {
        "speed_up": round(rates[1] / rates[0], 3),
        "largest_difference_of_a_loss": float(np.abs(np.subtract(*losses)).max().round(6)),
    }
    seconds = [sum(record["evaluation"][processes]["seconds"].values()) for processes in "12"]
    record["evaluation"] |= {
        "speed_up": round(seconds[0] / seconds[1], 3),
        "largest_difference_of_a_decision_margin": float((one["decision_margin"] - two["decision_margin"]).abs().max()),
        "largest_difference_of_a_response_margin": float((one["response_margin"] - two["response_margin"]).abs().max()),
        "decisions_changed": int(((one["decision_margin"] > 0) != (two["decision_margin"] > 0)).sum()),
    }
    write_json(options.results / "two_gpus.json", record)
    print(json.dumps(record), flush=True)

    outputs = options.work / "sharded"
    flags = f"{common} --base_model {config.SMALL_MODEL} --backend hf --outputs {outputs} {once} --max_steps 10 --effective_batch 32 --batch_size 16"
    call("train_dpo.py", flags, 2, f"--config_file {ROOT / 'docs' / 'fsdp_qlora.yaml'}")
    run = json.loads((next(outputs.glob("*_dpo_4bit_final")) / "run.json").read_text())
    record["sharded"] = {"model": config.SMALL_MODEL} | training(run)
    write_json(options.results / "two_gpus.json", record)
    print(json.dumps(record["sharded"]), flush=True)


if __name__ == "__main__":
    main()
