"""Do the Triton kernels of the default path fit an RTX 3090 (sm_86) and an RTX 4090 (sm_89)?

    python tests/benchmarks/kernels.py --pairs data/contrastive_rec_train.jsonl

Takes one step of DPO through the shared trainer on a layer of Llama 3's shapes, head dimensions 128 and 64, as on a card
of that capability: torch chooses its blocks for it. Each kernel that the step compiles, forward and backward, is
compiled for that card, too. Writes docs/results/kernels.json and a table: the shared memory that a block of each kernel
takes there, in bytes, of the 101,376 that there are. Any CUDA card from sm_80 on serves.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import gpu  # noqa: E402

SHARED_MEMORY = 101_376  # bytes of a block, on sm_86 and on sm_89
CARDS = {"sm_86": (8, 6), "sm_89": (8, 9)}


def compiled(model: str, card: str, pairs: str) -> list[dict]:
    """The kernels of one step as on this card, each with its shared memory in bytes, or why it cannot be compiled."""
    with tempfile.TemporaryDirectory() as cache:  # where Triton leaves all that it compiles, in whatever process
        os.environ |= {"TORCHINDUCTOR_CACHE_DIR": cache, "TRITON_CACHE_DIR": cache}
        train_a_step(model, CARDS[card], pairs)
        of = {"head_dimension": json.loads(Path(model, "config.json").read_text())["head_dim"], "card": card}
        return [of | record for record in for_card(Path(cache), card)]


def train_a_step(model: str, capability: tuple[int, int], pairs: str) -> None:
    import torch
    import triton
    from torch._dynamo.device_interface import CudaInterface

    triton.runtime.driver.active.get_current_target()  # what runs here is compiled for this card all the same
    here = CudaInterface.get_compute_capability()
    CudaInterface.get_compute_capability = staticmethod(lambda device=None: here)
    torch.cuda.get_device_capability = lambda device=None: capability
    import config

    config.import_unsloth_first("unsloth")
    import train_dpo
    from data.pairs import preference_rows

    with tempfile.TemporaryDirectory() as work:
        settings = config.preset_settings(
            config.TrainingSettings, "thesis", base_model=model, pairs=pairs, outputs=work, max_steps=1,
            validation_pairs=0, gradient_checkpointing=False, cuda_graphs=False,
        )
        rows = preference_rows(config.load_split(settings)[0][:16], "balanced")
        train_dpo.build_trainer("dpo", settings, train_dpo.Data(rows, [], {}), None, 8).train()


def for_card(cache: Path, card: str) -> list[dict]:
    """Triton's compiled kernels, by name, once more for this card: of several of one name the one that takes most."""
    import triton
    from triton.backends.compiler import GPUTarget

    found: dict[str, dict] = {}
    for code in sorted(cache.glob("*/*.ttir")):
        here = json.loads(code.with_suffix(".json").read_text())
        options = {"num_warps": here["num_warps"], "num_stages": here["num_stages"]}
        try:
            there = triton.compile(str(code), target=GPUTarget("cuda", int(card[3:]), 32), options=options)
            record = options | {"shared_memory": there.metadata.shared}
        except Exception as error:  # noqa: BLE001  whatever the compiler raises is what is asked for
            record = options | {"shared_memory": None, "failed": str(error).strip()[:200]}
        most = found.get(code.stem, {"shared_memory": -1})["shared_memory"]
        if record["shared_memory"] is None or (most is not None and record["shared_memory"] > most):
            found[code.stem] = {"kernel": code.stem} | record
    return [found[name] for name in sorted(found)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", required=True)
    parser.add_argument("--results", type=Path, default=gpu.ROOT / "docs" / "results")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        model, card, out = options.one
        Path(out).write_text(json.dumps(compiled(model, card, options.pairs)))
        return
    records = []
    with tempfile.TemporaryDirectory() as work:
        for name, shape in gpu.SHAPES.items():
            gpu.build_shape(Path(work) / name, gpu.llama3_tokenizer(), shape | {"num_hidden_layers": 1})
            for card in CARDS:
                command = [sys.executable, __file__, "--pairs", options.pairs, "--one", f"{work}/{name}", card, f"{work}/found.json"]
                subprocess.run(command, check=True)
                records += json.loads(Path(f"{work}/found.json").read_text())
    (options.results / "kernels.json").write_text(json.dumps(records, indent=1) + "\n")
    columns = ["kernel", "head_dimension", "card", "shared_memory", "fits"]
    lines = [f"Bytes of shared memory that a block of each kernel takes; an RTX 3090 (sm_86) and a 4090 (sm_89) have {SHARED_MEMORY:,}.\n"]
    lines += ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for record in records:
        fits = record["shared_memory"] is not None and record["shared_memory"] <= SHARED_MEMORY
        cells = [*(str(record[name]) for name in columns[:-1]), "yes" if fits else record.get("failed", "no")]
        lines.append("| " + " | ".join(cells) + " |")
    (options.results / "kernels.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
