"""Do an adapter's scores depend on the backend that reads it?

    python tests/benchmarks/equality.py --adapter outputs/smollm2_dpo_4bit_final --preset small --pairs FILE

Scores the same rows with Unsloth's model and with transformers + PEFT, by plain forward passes, in 4 and in 16 bits,
computing in bfloat16 and in float32. Prints one JSON record a case: the largest difference in summed response
log-probability, in nats, between the backends, and for scale the largest between bfloat16 and float32 on one backend.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--adapter", "--pairs", "--preset"):
        parser.add_argument(name, required=True)
    parser.add_argument("--users", type=int, default=64)
    options = parser.parse_args()

    import config

    config._import_unsloth_first("unsloth")
    import torch
    from peft import PeftModel

    from data.pairs import preference_row

    config.quiet_libraries()
    adapter = Path(options.adapter)

    def log_probs(backend: str, bits: int, dtype: torch.dtype) -> torch.Tensor:
        settings = config.preset_settings(
            config.TrainingSettings, options.preset, pairs=options.pairs, backend=backend, bits=bits, gradient_checkpointing=False
        )
        _, test = config.load_split(settings)
        model, tokenizer = config.load_model(settings, dtype)
        if backend == "unsloth":
            model = config.add_unsloth_adapter(model, settings, adapter)
        else:
            model = PeftModel.from_pretrained(model, adapter)
        model.eval()
        sums = []
        for pair in test[: options.users]:
            row = preference_row(pair, "A")
            for response in ("chosen", "rejected"):
                start = len(tokenizer(row["prompt"])["input_ids"])
                ids = torch.tensor([*tokenizer(row["prompt"] + row[response])["input_ids"], tokenizer.eos_token_id]).cuda()
                with torch.no_grad(), torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
                    logits = model(input_ids=ids[None], attention_mask=torch.ones_like(ids[None])).logits[0].float()
                sums.append(logits.log_softmax(-1)[start - 1 : -1].gather(-1, ids[start:, None]).sum().item())
        del model
        torch.cuda.empty_cache()
        return torch.tensor(sums)

    for bits in (4, 16):
        found = {}
        for backend in ("hf", "unsloth"):
            for dtype in (torch.bfloat16, torch.float32):
                try:
                    found[backend, dtype] = log_probs(backend, bits, dtype)
                except Exception as error:  # noqa: BLE001  a case that a backend lacks is a finding, too
                    print(json.dumps({"bits": bits, "backend": backend, "dtype": str(dtype), "failed": str(error)[:200]}))

        def largest(one, other):  # noqa: ANN001
            return round((found[one] - found[other]).abs().max().item(), 5) if one in found and other in found else None

        record = {"bits": bits, "rows": 2 * options.users}
        for dtype in (torch.bfloat16, torch.float32):
            record[f"backends_differ_by_nats_{str(dtype)[6:]}"] = largest(("hf", dtype), ("unsloth", dtype))
        record["hf_bfloat16_float32_differ_by_nats"] = largest(("hf", torch.bfloat16), ("hf", torch.float32))
        print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
