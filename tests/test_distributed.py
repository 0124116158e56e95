"""Two processes, as `accelerate launch` starts them on two GPUs, do what one does."""

import json
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

import config
import evaluate_dpo
import train_dpo


def launch(script: str, *flags: str, processes: int) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(config.ROOT)}
    done = subprocess.run([*command, config.ROOT / script, *flags], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def test_two_processes_train_and_evaluate_as_one(flags, tmp_path):
    found = {}
    for processes in (1, 2):
        outputs = tmp_path / f"by{processes}"
        mine = [*flags, "--outputs", str(outputs)]
        extra = "--max_steps 2 --effective_batch 4 --batch_size 2 --validation_pairs 4 --eval_steps 1 --init base".split()
        if processes == 1:
            train_dpo.main([*mine, *extra])
            evaluate_dpo.main([*mine, "--resamples", "50"])
        else:
            done = launch("train_dpo.py", *mine, *extra, processes=processes)
            assert done.stdout.count("dpo: loss 0.693") == 1, "one process speaks"
            launch("evaluate_dpo.py", *mine, "--resamples", "50", processes=processes)
        folder = next(outputs.glob("*_dpo_4bit_final"))
        found[processes] = json.loads((folder / "run.json").read_text()), pd.read_csv(outputs / "evaluation" / "predictions.csv")
    assert [run["processes"] for run, _ in found.values()] == [1, 2]
    assert found[1][0]["rows_seen"] == found[2][0]["rows_seen"] == 8
    one, two = (predictions for _, predictions in found.values())
    assert one.drop(columns=["decision_margin", "response_margin"]).equals(two.drop(columns=["decision_margin", "response_margin"]))
    untrained = one["arm"] == "base"
    assert np.allclose(one.loc[untrained, "response_margin"], two.loc[untrained, "response_margin"], atol=1e-4)
    assert one["response_margin"].notna().sum() == two["response_margin"].notna().sum()
    assert two.loc[two["arm"] == "dpo", "response_margin"].to_numpy() == pytest.approx(
        one.loc[one["arm"] == "dpo", "response_margin"].to_numpy(), abs=0.05
    )
