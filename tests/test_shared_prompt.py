"""The trainer that computes a pair's prompt once does what TRL's does, at the same gradients."""

import functools
import itertools
import json
from typing import get_args

import numpy as np
import pytest
import torch
from trl.trainer.dpo_trainer import DataCollatorForPreference

import config
import train_dpo
from conftest import make_pairs
from data.pairs import preference_rows
from data.trees import ancestor_mask, pad_trees, token_tree


def trainer_of(flags, kind, init, tmp_path, loss_type="sigmoid", bits="16"):
    extra = ["--trainer", kind, "--bits", bits, "--outputs", str(tmp_path / "outputs"), "--loss_type", loss_type]
    settings = config.parse_settings(config.TrainingSettings, [*flags, *extra])
    rows = preference_rows(make_pairs(12), "balanced", 0)
    adapter = None
    if init == "sft":
        adapter = config.adapter_folder(settings, "sft")
        if not adapter.is_dir():
            train_dpo.main([*flags, *extra, "--stage", "sft"])
    torch.manual_seed(1)
    trainer = train_dpo.build_trainer("dpo", settings, rows, rows[:2], adapter, 4)
    for name, weight in trainer.model.named_parameters():  # a policy that has left its reference
        if weight.requires_grad:
            generator = torch.Generator().manual_seed(sum(map(ord, name)))
            weight.data += 0.05 * torch.randn(weight.shape, generator=generator)
    trainer.model.train()
    return trainer


def loss_and_gradients(trainer, examples):
    inputs = trainer.data_collator(examples)
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    found = {name: values[-1] for name, values in trainer._metrics["train"].items() if name.startswith(("logps", "rewards"))}
    return loss.item(), found, {name: weight.grad.clone() for name, weight in trainer.model.named_parameters() if weight.requires_grad}


def states_of_a_row(model, batch, leaky=False):
    """What Unsloth's kernel gives, without a GPU: hidden states of pairs in one row, by a mask of what its labels let through.

    leaky: whatever the response is.
    """
    pairs, responses = batch["tree_pairs"], batch["tree_responses"]
    mask = ((pairs[:, None] == pairs) & ((responses < 0) | (responses[:, None] == responses) | leaky)).tril()
    given = {"input_ids": batch["tree_tokens"], "position_ids": batch["tree_positions"], "attention_mask": mask[None, None]}
    return model(**given, use_cache=False).last_hidden_state


@pytest.mark.parametrize("init", ["base", "sft"])
@pytest.mark.parametrize("one_row", [False, True])
def test_log_probs_and_gradients_are_those_of_the_stock_trainer(training_flags, init, one_row, tmp_path, monkeypatch):
    monkeypatch.setattr(config, "training_dtype", lambda: torch.float32)
    monkeypatch.setattr(train_dpo, "in_one_row", lambda settings: one_row)
    monkeypatch.setattr(train_dpo, "flat_hidden_states", states_of_a_row)
    stock, shared = (trainer_of(training_flags, kind, init, tmp_path) for kind in ("stock", "shared"))
    rows = [list(stock.train_dataset), list(shared.train_dataset)]
    lengths = [len(row["prompt_ids"]) for row in rows[0]]
    assert len(set(lengths)) > 1, "the batch is padded"
    for loss_type in get_args(config.LossType):
        for trainer in (stock, shared):
            trainer.loss_types = [loss_type]
        for part in (slice(0, 4), slice(4, 5)):
            (one, logs, wanted), (other, found_logs, found) = (loss_and_gradients(t, r[part]) for t, r in zip((stock, shared), rows, strict=True))
            assert other == pytest.approx(one, rel=1e-4), loss_type
            assert found_logs == pytest.approx(logs, abs=1e-4)
            assert wanted.keys() == found.keys()
            for name, gradient in wanted.items():
                assert torch.allclose(found[name], gradient, atol=1e-4 * gradient.abs().max()), (loss_type, name)


def test_both_trainers_learn_the_same(training_flags, tmp_path, monkeypatch):
    monkeypatch.setattr(config, "training_dtype", lambda: torch.float32)
    losses = []
    for kind in ("stock", "shared"):
        flags = [*training_flags, "--outputs", str(tmp_path / kind), "--trainer", kind, "--init", "base", "--stage", "dpo"]
        train_dpo.main([*flags, "--max_steps", "8", "--learning_rate", "0.01", "--bits", "16"])
        [folder] = (tmp_path / kind).glob("*_dpo_*_final")
        losses.append([entry["loss"] for entry in json.loads((folder / "run.json").read_text())["log_history"] if "loss" in entry])
    assert losses[1] == pytest.approx(losses[0], abs=1e-4) and losses[0][0] != losses[0][-1]


def test_the_reference_is_computed_once_and_for_its_own_adapter_only(training_flags, tmp_path, monkeypatch):
    asked = []
    real = train_dpo.reference_log_probs
    monkeypatch.setattr(train_dpo, "reference_log_probs", lambda trainer, examples: asked.append(len(examples)) or real(trainer, examples))
    flags = [*training_flags, "--option_order", "both"]
    train_dpo.main([*flags, "--init", "base"])
    train_dpo.main([*flags, "--init", "base", "--stage", "dpo", "--beta", "0.5", "--learning_rate", "0.1", "--seed", "2"])
    assert asked[0] > 0 and asked[1] > 0 and asked[2:] == [0, 0], "other beta, rate and seed find them there"
    train_dpo.main([*flags, "--init", "sft", "--stage", "dpo"])
    assert asked[4:] == asked[:2], "another reference"


def test_the_shared_trainer_is_never_silently_another(training_flags, monkeypatch, capsys):
    train_dpo.main([*training_flags, "--init", "base", "--stage", "dpo"])
    assert "shared trainer" in capsys.readouterr().out
    settings = config.parse_settings(config.TrainingSettings, [*training_flags, "--trainer", "shared"])
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(config.UserError, match="the shared trainer cannot train a model that FSDP shards"):
        train_dpo.shares_prompt(settings)
    assert not train_dpo.shares_prompt(config.parse_settings(config.TrainingSettings, training_flags)), "auto is stock there"


def test_a_tree_holds_each_text_and_lets_a_node_see_its_ancestors_alone():
    texts = [[1, 2, 3, 9, 4], [1, 2, 5, 6], [1, 2, 3, 7], [1, 2, 3, 7, 8]]
    tree = token_tree(texts)
    assert len(tree.tokens) == 9
    assert [tree.tokens[path].tolist() for path in tree.paths] == texts
    assert all((tree.positions[path] == range(len(path))).all() and (tree.parents[path[1:]] == path[:-1]).all() for path in tree.paths)
    batch = pad_trees([tree, token_tree([[1, 2]])])
    mask = ancestor_mask(torch.from_numpy(batch["ends"]))[:, 0].numpy()
    wanted = {node: {*path[: depth + 1].tolist()} for path in tree.paths for depth, node in enumerate(path.tolist())}
    assert all({*mask[0, node].nonzero()[0].tolist()} == seen for node, seen in wanted.items())
    assert mask[1, 5].nonzero()[0].tolist() == [5], "padding sees itself"


@pytest.mark.parametrize("one_row", [False, True])
def test_a_model_in_which_responses_see_each_other_is_not_trained(training_flags, one_row, monkeypatch):
    """As one whose attention ignores what parts a row: it would train, with a first loss of ln 2, and learn something else."""

    def causal(ends):
        return torch.ones(ends.shape[0], 1, ends.shape[1], ends.shape[1], dtype=torch.bool).tril()

    monkeypatch.setattr(train_dpo, "ancestor_mask", causal)
    monkeypatch.setattr(train_dpo, "in_one_row", lambda settings: one_row)
    monkeypatch.setattr(train_dpo, "flat_hidden_states", functools.partial(states_of_a_row, leaky=True))
    for seed in "12345":  # chosen or rejected may stand first
        with pytest.raises(config.UserError, match="sees the responses beside it"):
            train_dpo.main([*training_flags, "--stage", "dpo", "--init", "base", "--seed", seed])
    train_dpo.main([*training_flags, "--stage", "dpo", "--init", "base", "--trainer", "stock"])


def test_only_unsloths_own_models_are_given_all_pairs_in_one_row(monkeypatch):
    """In 8 bits it loads transformers' model, which would take the row for one text."""
    monkeypatch.setattr(config, "backend_of", lambda settings: "unsloth")
    assert [train_dpo.in_one_row(config.TrainingSettings(bits=bits)) for bits in (4, 8, 16)] == [True, False, True]
    monkeypatch.setattr(config, "backend_of", lambda settings: "hf")
    assert not train_dpo.in_one_row(config.TrainingSettings())


@pytest.mark.parametrize("in_one_row", [False, True])
def test_each_response_token_is_predicted_at_the_node_before_it(in_one_row):
    examples = [
        {"prompt_ids": [1, 2, 3], "chosen_ids": [4, 9, 9, 9], "rejected_ids": [4, 8, 2]},
        {"prompt_ids": [1, 7], "chosen_ids": [5, 6], "rejected_ids": [6]},
    ]
    stock = DataCollatorForPreference(pad_token_id=0)(examples)
    batch = train_dpo.tree_batch(examples, dict(stock), in_one_row)
    tokens = batch["tree_tokens"].flatten()
    assert batch["tree_targets"].tolist() == [4, 9, 9, 9, 5, 6, 4, 8, 2, 6]
    assert tokens[batch["tree_before"]].tolist() == [3, 4, 9, 9, 7, 5, 3, 4, 8, 7]


def test_attention_takes_a_pair_in_the_same_order_whatever_pairs_are_beside_it():
    """Or bfloat16 rounds otherwise, and the reference does not fit: its tiles are of 64 nodes, in whole blocks of 128."""
    generator = np.random.default_rng(0)
    sizes = [*generator.integers(180, 250, 30), 255, 256, 300, 500]
    trees = [token_tree([generator.integers(0, 99, size).tolist()]) for size in sizes]
    alone = [train_dpo.row_starts([tree])[0] for tree in trees]
    for size in (2, 8, 34):
        for _ in range(10):
            row = generator.permutation(34)[:size]
            starts = train_dpo.row_starts([trees[number] for number in row])
            for number, start in zip(row, starts, strict=True):
                assert (start - alone[number]) % (128 if sizes[number] >= 256 else 64) == 0
            spans = sorted((start, start + sizes[number]) for number, start in zip(row, starts, strict=True))
            assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans)), "none lies on another"
    assert len({start % 64 for start in alone}) > 20
    assert spans[-1][1] < 1.08 * sum(sizes), "and few nodes lie between them"


def replayed(function, sample, num_warmup_iters, pool):
    """What torch.cuda.make_graphed_callables gives, without a GPU: a pass reads what was captured, into which its inputs are
    copied, and its gradients lie where the last ones lay.
    """
    batch, *weights = sample
    gradients = [torch.zeros_like(weight) for weight in weights]

    class Replayed(torch.autograd.Function):
        @staticmethod
        def forward(context, *given):
            for static, values in zip(batch.values(), given, strict=False):
                static.copy_(values)
            with torch.enable_grad():
                Replayed.found = function(batch, *weights)
            return Replayed.found.detach()

        @staticmethod
        def backward(context, gradient):
            for static, values in zip(gradients, torch.autograd.grad(Replayed.found, weights, gradient), strict=True):
                static.copy_(values)
            return *[None] * len(batch), *(static.detach() for static in gradients)

    return lambda batch, *weights: Replayed.apply(*batch.values(), *weights)


def test_replayed_passes_train_what_single_kernels_train(training_flags, tmp_path, monkeypatch):
    """Several micro-batches a step, whose gradients are summed up, and lengths that come back."""
    captured = []
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", lambda *given, **options: captured.append(given[1][0]) or replayed(*given, **options))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    losses = []
    for replays in (False, True):
        monkeypatch.setattr(config, "fitting_batch_size", lambda *given, replays=replays: (1, False, replays))
        flags = [*training_flags, "--outputs", str(tmp_path / str(replays)), "--init", "base", "--stage", "dpo", "--learning_rate", "0.01"]
        train_dpo.main([*flags, "--effective_batch", "4", "--max_steps", "6", "--logging_steps", "1"])
        [folder] = (tmp_path / str(replays)).glob("*_dpo_*_final")
        run = json.loads((folder / "run.json").read_text())
        losses.append([entry["loss"] for entry in run["log_history"] if "loss" in entry])
    assert losses[0] == losses[1] and losses[0][0] != losses[0][-1]
    assert run["cuda_graphs"] == len(captured) == len({given["tree_tokens"].shape for given in captured}) > 0, "one a shape"


def test_where_cuda_graphs_do_not_fit_the_stage_starts_again_without(training_flags, tmp_path, monkeypatch, capsys):
    def full(*given, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", full)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(config, "fitting_batch_size", lambda *given: (2, False, True))
    train_dpo.main([*training_flags, "--init", "base", "--stage", "dpo", "--effective_batch", "4", "--max_steps", "6"])
    assert "dpo: out of memory; starting again without CUDA graphs" in capsys.readouterr().out
    [folder] = (tmp_path / "outputs").glob("*_dpo_*_final")
    run = json.loads((folder / "run.json").read_text())
    assert (run["cuda_graphs"], run["batch_size"], run["steps"]) == (0, 2, 6), "the micro-batch stays"


def test_rows_are_filled_up_to_few_lengths():
    for nodes in (1, 127, 128, 129, 3900, 5000, 16_000, 33_000):
        whole = nodes + train_dpo.row_padding(nodes)
        assert whole % 128 == 0 and whole - nodes < max(128, nodes / 16)
    assert len({nodes + train_dpo.row_padding(nodes) for nodes in range(15_000, 17_000)}) < 6
