"""Tiny random Llama models, their tokenizer, and made-up pairs; nothing is fetched."""

import os
import sys
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the tests are the same on every machine
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # enough for a tiny model, and not slowed down by what else the machine does
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pytest

import config
from data.pairs import Movie, Pair, preference_row, write_pairs

REAL_PAIRS = config.ROOT.parent / "shared" / "data" / "contrastive_rec_train.jsonl"
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
    return [*flags, *"--max_steps 3 --batch_size 2 --effective_batch 4 --validation_pairs 4 --eval_steps 1".split()]
