"""Tiny random Llama models, their tokenizer, and made-up pairs; nothing is fetched."""

import os
import re
import shutil
import sys
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the tests are the same on every machine
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # enough for a tiny model, and not slowed down by what else the machine does
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import hypothesis
import numpy as np
import pandas as pd
import pytest

import config
from data import errors
from data.baselines import film_counts
from data.pairs import Movie, Pair, preference_row, write_pairs
from data.predictions import prediction_rows

REAL_PAIRS = config.ROOT.parent / "shared" / "data" / "contrastive_rec_train.jsonl"
FUZZ_TIMES = int(os.environ.get("FUZZ_TIMES", 1))  # 100 tries a hundred times more inputs
hypothesis.settings.register_profile(
    "fuzz", deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck)
)
hypothesis.settings.load_profile("fuzz")
GENRES = ["Action", "Children's", "Comedy", "Drama", "Film-Noir", "Romance", "Sci-Fi", "War"]


def make_pairs(count: int) -> list[Pair]:
    """Made-up pairs with the punctuation of real titles; every fifth one has the answer B."""
    odd = ["Postino, Il (The Postman)", "Naked Gun: From the Files!, The", "Bug's Life, A", "54", "Shall We Dance?"]
    pairs = []
    for user in range(count):
        history = tuple(f"{odd[(user + k) % 5]} {user * 7 + k} ({1950 + (user + k) % 50})" for k in range(5))
        first = Movie(f"Film {user % 11}, The (1994)", (GENRES[user % 8], GENRES[(user + 3) % 8]))
        second = Movie(f"Other: {user % 13} (Autre) (1997)", (GENRES[(user + 1) % 8],))
        pairs.append(Pair(history, first, second, "B" if user % 5 == 0 else "A"))
    return pairs


def predictions_of(**arms: np.ndarray) -> pd.DataFrame:
    """Rows of predictions.csv from decision margins (users, orders)."""
    pairs = make_pairs(len(next(iter(arms.values()))))
    counts = film_counts(pairs)
    nothing = np.zeros((len(pairs), 2))  # log p of the rejected responses
    about = ("model", "1", "own", pairs, counts)
    return pd.concat([prediction_rows(arm, *about, margin, margin, nothing) for arm, margin in arms.items()])


def error_of(run, capsys) -> str:
    """The error that a script's main function ends with: two lines, exit code 2, no traceback."""
    with pytest.raises(SystemExit) as ended:
        errors.run_script(run)
    shown = re.split(r"(?m)^error: ", capsys.readouterr().err)[-1]
    assert ended.value.code == 2
    assert len(shown.strip().splitlines()) == 2 and "Traceback" not in shown
    return shown


def adapter_of(flags: list[str], stage: str = "dpo") -> Path:
    """Where training writes an adapter of that stage under these flags of evaluation."""
    return config.adapter_folder(config.parse_settings(config.EvaluationSettings, flags), stage)


@pytest.fixture
def pairs() -> list[Pair]:
    return make_pairs(60)


@pytest.fixture
def pairs_file(tmp_path: Path, pairs: list[Pair]) -> Path:
    path = tmp_path / "pairs.jsonl"
    write_pairs(path, pairs)
    return path


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random Llama of 2 layers, and a byte-level tokenizer trained on made-up rows."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny-llama")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = [text for pair in make_pairs(40) for text in preference_row(pair, pair.order).values()]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["<pad>", "<s>", "</s>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    settings = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=fast.pad_token_id,
        bos_token_id=fast.bos_token_id,
        eos_token_id=fast.eos_token_id,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(settings).save_pretrained(folder)
    return folder


@pytest.fixture
def flags(tmp_path: Path, tiny_model: Path, pairs_file: Path) -> list[str]:
    """Command-line flags for a run of a few seconds."""
    return [
        *("--preset", "small", "--base_model", str(tiny_model), "--pairs", str(pairs_file), "--test_share", "0.3"),
        *("--outputs", str(tmp_path / "outputs")),
    ]


@pytest.fixture
def training_flags(flags: list[str]) -> list[str]:
    steps = ["--max_steps", "3", "--eval_steps", "1", "--validation_pairs", "4", "--control", "false"]
    return [*flags, *steps, "--batch_size", "2", "--effective_batch", "4"]


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> tuple[list[str], list[str], Path]:
    """(flags of training, flags of evaluation, outputs with both adapters); nothing may change in these outputs."""
    import train_dpo

    folder = tmp_path_factory.mktemp("trained")
    write_pairs(folder / "pairs.jsonl", make_pairs(60))
    flags = [
        *("--preset", "small", "--base_model", str(tiny_model), "--pairs", str(folder / "pairs.jsonl")),
        *("--test_share", "0.3", "--outputs", str(folder / "outputs")),
    ]
    steps = [
        *("--max_steps", "3", "--batch_size", "2", "--effective_batch", "4"),
        *("--validation_pairs", "0", "--learning_rate", "0.05", "--control", "false"),
    ]
    train_dpo.main([*flags, *steps])
    return [*flags, *steps], flags, folder / "outputs"


@pytest.fixture(scope="session")
def evaluated(trained, tmp_path_factory: pytest.TempPathFactory) -> config.EvaluationSettings:
    """The settings of an evaluation of the trained adapters; nothing may change in its results."""
    import evaluate_dpo

    _, flags, outputs = trained
    mine = [*flags, "--outputs", str(shutil.copytree(outputs, tmp_path_factory.mktemp("evaluated") / "outputs"))]
    evaluate_dpo.main([*mine])
    return config.parse_settings(config.EvaluationSettings, mine)


@pytest.fixture
def mine(trained: tuple[list[str], list[str], Path], tmp_path: Path) -> tuple[list[str], list[str]]:
    """(flags of training, flags of evaluation) for a copy of the trained outputs, to be changed."""
    training, flags, outputs = trained
    shutil.copytree(outputs, tmp_path / "outputs")
    place = ["--outputs", str(tmp_path / "outputs")]
    return [*training, *place], [*flags, *place]


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take longer than all else in an evaluation."""
    monkeypatch.setattr("evaluate_dpo.plot_all", lambda *_: None)
