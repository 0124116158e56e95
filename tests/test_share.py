"""Model cards, publishing on the Hub, and merging; without a network."""

import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import config
import evaluate_dpo
import train_dpo
from config import EvaluationSettings, UserError, preset_settings
from conftest import make_pairs
from data.pairs import write_pairs

pytestmark = pytest.mark.usefixtures("no_figures")


@pytest.fixture(scope="module")
def no_figures():
    """They take longer than all else here."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(evaluate_dpo, "plot_all", lambda *_: None)
        patched.setattr(train_dpo, "plot_losses", lambda history, stage, path: path.write_bytes(b""))
        yield


@pytest.fixture(scope="module")
def study(tmp_path_factory, tiny_model, no_figures):
    """(flags of both scripts, flags of training, evaluated outputs); nothing may change in these outputs."""
    folder = tmp_path_factory.mktemp("study")
    write_pairs(folder / "pairs.jsonl", make_pairs(60))
    flags = [
        *("--preset", "small", "--base_model", str(tiny_model), "--pairs", str(folder / "pairs.jsonl"), "--test_share", "0.3"),
        *("--outputs", str(folder / "outputs")),
    ]
    training = [*flags, *"--max_steps 3 --batch_size 2 --effective_batch 4 --validation_pairs 0 --learning_rate 0.05".split()]
    train_dpo.main(training)
    adapter = adapter_of(flags, "dpo")
    assert not (adapter / "README.md").exists(), "PEFT's, with a path of this machine"
    evaluate_dpo.main([*flags, "--resamples", "50", "--second_bits", "16", "--adapters", f"again={adapter}"])
    return flags, training, folder / "outputs"


@pytest.fixture
def mine(study, tmp_path):
    """(flags of training, flags of evaluation) for a copy of the outputs, to be changed."""
    flags, training, outputs = study
    shutil.copytree(outputs, tmp_path / "outputs")
    place = ["--outputs", str(tmp_path / "outputs")]
    return [*training, *place], [*flags, *place]


def adapter_of(flags: list[str], stage: str = "dpo") -> Path:
    return config.adapter_folder(config.parse_settings(EvaluationSettings, [*flags[:8], "--outputs", flags[-1]]), stage)


def code_of(card: str) -> str:
    [code] = re.findall(r"```python\n(.*?)```", card, re.S)
    return code


# ------------------------------------------------------------------------------------------------------ cards


def test_evaluation_writes_a_card_with_the_measures_of_its_arm(study):
    flags, _, outputs = study
    metrics = json.loads((outputs / "evaluation" / "metrics.json").read_text())
    for arm, other in (("sft", "dpo"), ("dpo", "sft")):
        text = (adapter_of(flags, arm) / "README.md").read_text()
        card = ModelCard(text)
        assert (card.data.library_name, card.data.base_model) == ("peft", None), "the Hub refuses a folder as base model"
        assert {"movielens", arm} <= set(card.data.tags) and other not in card.data.tags
        results = {result.metric_type: result.metric_value for result in card.data.eval_results}
        for name in evaluate_dpo.ON_TERMINAL:
            label, unit = evaluate_dpo.MEASURES[name]
            assert results[name] == evaluate_dpo.cell(metrics["arms"][arm][name], unit)
            assert f"| {label} ({unit}) | {results[name]} |" in text
        assert "personalisation" not in text and "a stranger's" not in text, "not measured"
        for part in ("GroupLens", "10.1145/2827872", "forbids redistribution", "18 users", "both orders", "4-bit (NF4)", "seed 3407"):
            assert part in text
        assert "- one training run an arm" in text
        assert not re.search(rf"^- {other} ", text, re.M), "a caveat of the other arm"
        kept = evaluate_dpo.cell(metrics["arms"][f"{arm}@16bit"]["precision_consistency"], "%")
        assert f"on 16bit weights {kept}% of its decisions stay the same" in text
    assert "beta 0.1" in text and "from the SFT adapter, which is its reference" in text
    assert metrics["sentence"] in text, "the card is that of the first arm that has this folder"


@pytest.mark.parametrize("base", ["folder", "small"])
def test_the_three_lines_of_a_card_load_the_adapter_that_was_measured(study, base, monkeypatch, tmp_path, tiny_model):
    flags, _, _ = study
    adapter = adapter_of(flags)
    card = (adapter / "README.md").read_text()
    if base == "small":  # known by a name that transformers cannot find: through config.py
        monkeypatch.setattr(config, "small_model_folder", lambda: tiny_model)
        card = evaluate_dpo.model_card(adapter, preset_settings(EvaluationSettings, "small"))
        assert ModelCard(card).data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
        assert ModelCard(card).data.license == "apache-2.0"
    assert len(code_of(card).splitlines()) == 3
    monkeypatch.chdir(adapter)
    names: dict = {}
    exec(code_of(card), names)  # as it stands
    settings = config.parse_settings(EvaluationSettings, flags)
    _, test = config.load_split(settings)
    model, tokenizer = config.load_model(settings, torch.float32)
    trees = [evaluate_dpo.pair_tree(pair, tokenizer) for pair in test[:4]]
    without = train_dpo.response_log_probs(model.eval(), trees)
    measured = train_dpo.response_log_probs(evaluate_dpo.load_adapter(model, "x", adapter), trees)
    loaded = train_dpo.response_log_probs(names["model"].eval(), trees)
    assert np.abs(loaded - measured).max() < 0.1 * np.abs(without - measured).max()


def test_an_adapter_that_was_not_evaluated_says_so_and_several_seeds_are_told(study):
    flags, _, outputs = study
    settings = config.parse_settings(EvaluationSettings, flags)
    card = evaluate_dpo.model_card(adapter_of(flags), settings)
    assert "Not evaluated" in card and "| measure |" not in card and ModelCard(card).data.eval_results is None
    metrics = json.loads((outputs / "evaluation" / "metrics.json").read_text())
    assert "training runs" not in evaluate_dpo.model_card(adapter_of(flags), settings, "again", metrics)
    metrics["arms"]["dpo"]["seeds"] = 3
    assert "Means over the arm's 3 training runs" in evaluate_dpo.model_card(adapter_of(flags), settings, "dpo", metrics)
    mismatch = [f"{adapter_of(flags)} was trained on another split <b>"]
    assert "- was trained on another split _b_." in evaluate_dpo.model_card(adapter_of(flags), settings, "dpo", metrics, mismatch)


def test_llama_3_is_named_with_its_licence(study):
    card = evaluate_dpo.model_card(adapter_of(study[0]), preset_settings(EvaluationSettings, "thesis"))
    assert (ModelCard(card).data.base_model, ModelCard(card).data.license) == ("unsloth/llama-3-8b-bnb-4bit", "llama3")
    assert "Built with Meta Llama 3." in card


def test_only_a_generated_readme_is_overwritten_and_evaluation_goes_on(mine, tmp_path, capsys):
    _, flags = mine
    settings = config.parse_settings(EvaluationSettings, flags)
    adapter = adapter_of(flags)
    peft = str(ModelCard.from_template(ModelCardData(library_name="peft"))) + "\n### Framework versions\n\n- PEFT 0.21.2"
    for text, ours in (
        ("# My adapter", False),
        (peft.replace("[More Information Needed]", "I wrote this", 1), False),
        (peft, True),
        ("It has been trained using [TRL](https://github.com/huggingface/trl).", True),
        (f"{evaluate_dpo.CARD_MARK}\nold", True),
    ):
        (adapter / "README.md").write_text(text)
        said = evaluate_dpo.write_card(adapter, settings)
        assert ((adapter / "README.md").read_text() != text) is ours
        assert said.startswith("model card: ") is ours and ("somebody's own" in said) is not ours
    (adapter / "README.md").unlink()
    (adapter / "README.md").mkdir()  # it cannot be written
    sft = adapter_of(flags, "sft") / "README.md"
    sft.write_text("# My adapter")
    evaluate_dpo.main([*flags, "--resamples", "20"])
    out = capsys.readouterr().out
    assert f"{sft} is somebody's own text and stays as it is\n" in out and f"warning: no model card in {adapter}: " in out
    assert sft.read_text() == "# My adapter" and "verdict: " in out
    shutil.rmtree(adapter / "README.md")
    evaluate_dpo.main([*flags, "--resamples", "20", "--from_predictions", str(tmp_path / "outputs" / "evaluation" / "predictions.csv")])
    assert not (adapter / "README.md").exists()


def test_a_card_of_an_adapter_that_says_nothing_or_nonsense_of_itself(mine):
    _, flags = mine
    settings = config.parse_settings(EvaluationSettings, flags)
    adapter = adapter_of(flags)
    (adapter / "run.json").unlink()
    assert "it came without run.json" in evaluate_dpo.model_card(adapter, settings)
    (adapter / "run.json").write_text(json.dumps({"stage": "<b>", "settings": {"seed": "[x](http://y)", "pairs": "`\n# Title"}}))
    card = evaluate_dpo.model_card(adapter, settings)
    assert "# LoRA adapter" in card and not re.search(r"<b>|\[x\]|^# Title", card, re.M)
    for nonsense in ("[]", "{", '{"settings": 1}', '{"settings": {"bits": []}}'):
        (adapter / "run.json").write_text(nonsense)
        assert evaluate_dpo.write_card(adapter, settings).startswith("warning: no model card in ")


# -------------------------------------------------------------------------------------------------------- Hub


@pytest.fixture
def hub(monkeypatch):
    """The requests that the Hub's client would make; the token is good."""
    from huggingface_hub import RepoUrl

    asked = []
    monkeypatch.setenv("HF_TOKEN", "hf_made_up")
    monkeypatch.setattr(HfApi, "whoami", lambda self: asked.append("whoami") or {"name": "me"})

    def create_repo(self, repo_id, *, exist_ok):
        asked.append(("create", repo_id, exist_ok))
        return RepoUrl(f"https://huggingface.co/me/{repo_id}")

    def upload_folder(self, *, repo_id, folder_path, ignore_patterns):
        files = [str(path.relative_to(folder_path)) for path in Path(folder_path).rglob("*") if path.is_file()]
        asked.append(("upload", repo_id, sorted(filter_repo_objects(files, ignore_patterns=ignore_patterns))))

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    return asked


@pytest.fixture
def no_training(monkeypatch):
    monkeypatch.setattr(train_dpo, "train_stage", lambda *_: pytest.fail("it trained"))


FILES = {"README.md", "adapter_config.json", "adapter_model.safetensors", "run.json", "loss.png", "tokenizer.json", "tokenizer_config.json"}


@pytest.mark.parametrize("stage", ["all", "sft"])
def test_a_finished_adapter_is_published_with_its_card_and_nothing_is_trained(mine, hub, no_training, stage, capsys):
    flags, _ = mine
    adapter = adapter_of(flags, "sft" if stage == "sft" else "dpo")
    card = (adapter / "README.md").read_text()
    (adapter / "checkpoint-2").mkdir()
    (adapter / "checkpoint-2" / "optimizer.pt").write_text("x")
    train_dpo.main([*flags, "--stage", stage, "--push_to_hub", "films"])
    assert hub[:2] == ["whoami", ("create", "films", True)]
    assert hub[2][:2] == ("upload", "me/films") and set(hub[2][2]) == FILES and len(hub) == 3
    assert (adapter / "README.md").read_text() == card and "| ranking accuracy (%) |" in card
    assert f"{adapter} -> https://huggingface.co/me/films" in capsys.readouterr().out


def test_a_missing_adapter_is_trained_and_then_published_as_not_evaluated(mine, hub):
    flags, _ = mine
    adapter = adapter_of(flags)
    shutil.rmtree(adapter)
    train_dpo.main([*flags, "--check", "--push_to_hub", "films"])
    assert hub == ["whoami"]
    train_dpo.main([*flags, "--push_to_hub", "films"])
    assert [step[0] for step in hub[2:]] == ["create", "upload"] and set(hub[3][2]) == FILES
    assert "Not evaluated" in (adapter / "README.md").read_text()


def test_without_a_token_nothing_is_trained(mine, no_training, monkeypatch, tmp_path, capsys):
    flags, _ = mine
    shutil.rmtree(adapter_of(flags))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.setattr(sys, "argv", ["train_dpo.py", *flags, "--push_to_hub", "films"])
    with pytest.raises(SystemExit) as ended:
        config.run_script(train_dpo.main)
    assert ended.value.code == 2
    assert capsys.readouterr().err == (
        "error: there is no token to publish with\nRun: hf auth login, or set HF_TOKEN, with a token that may write.\n"
    )


def test_a_name_or_token_that_the_hub_refuses_is_told_before_training(mine, hub, no_training, monkeypatch):
    flags, _ = mine
    with pytest.raises(UserError, match="cannot publish a/b/c: Repo id must be"):
        train_dpo.main([*flags, "--push_to_hub", "a/b/c"])
    monkeypatch.undo()  # the Hub cannot be reached: the tests are offline
    monkeypatch.setenv("HF_TOKEN", "hf_made_up")
    with pytest.raises(UserError, match="cannot publish films: .*\nMend this"):
        train_dpo.main([*flags, "--push_to_hub", "films"])


@pytest.mark.parametrize("flag", ["--push_to_hub", "--merge"])
def test_an_adapter_of_other_settings_is_not_passed_off_as_this_one(mine, hub, no_training, tmp_path, flag):
    flags, _ = mine
    what = str(tmp_path / "made")
    with pytest.raises(UserError, match="was trained with beta 0.1, not 0.5\nGive the settings"):
        train_dpo.main([*flags, "--beta", "0.5", flag, "films" if flag == "--push_to_hub" else what])
    with pytest.raises(UserError, match="may have seen the test pairs"):
        train_dpo.main([*flags, "--test_share", "0.4", flag, "films" if flag == "--push_to_hub" else what])
    assert not [step for step in hub if step != "whoami"] and not Path(what).exists()


# ------------------------------------------------------------------------------------------------------ merge


def test_a_merged_model_is_base_plus_adapter_and_tells_how_far_it_is_off(mine, no_training, tmp_path, tiny_model, monkeypatch, capsys):
    flags, _ = mine
    adapter, merged = adapter_of(flags), tmp_path / "merged"
    capsys.readouterr()
    train_dpo.main([*flags, "--merge", str(merged)])
    model = AutoModelForCausalLM.from_pretrained(merged)
    assert model.dtype == torch.float16 and AutoTokenizer.from_pretrained(merged).eos_token == "</s>"
    base, lora = load_file(tiny_model / "model.safetensors"), load_file(adapter / "adapter_model.safetensors")
    for name, weight in model.state_dict().items():
        factors = [lora.get(f"base_model.model.{name.removesuffix('.weight')}.lora_{part}.weight") for part in "AB"]
        wanted = base.get(name, base["model.embed_tokens.weight"]).bfloat16().float()
        wanted = wanted if factors[0] is None else wanted + factors[1] @ factors[0]  # alpha / r is 1
        assert torch.equal(weight, wanted.half()), name  # bfloat16 would round most of a real update away
    assert any("lora_A" in name for name in lora)

    # the difference, by evaluation's own log of both precisions
    run = json.loads((merged / "run.json").read_text())
    settings = config.parse_settings(EvaluationSettings, [*flags[:8], "--bits", "4", "--outputs", flags[-1]])
    _, test = config.load_split(settings)
    scores = []
    for bits, path, name in ((4, tiny_model, adapter), (16, merged, None)):
        model, tokenizer = config.load_model(EvaluationSettings(base_model=str(path), bits=bits), torch.float32)
        model = evaluate_dpo.load_adapter(model, "x", name) if name else AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        scores.append(evaluate_dpo.score(model, [evaluate_dpo.pair_tree(pair, tokenizer) for pair in test], 4, "")[0])
    compared = run["compared"]
    assert (compared["pairs"], compared["decisions"]) == (18, 36)
    assert compared["decisions_changed"] == int(((scores[0] > 0) != (scores[1] > 0)).sum())
    assert 0 < compared["mean_difference_nats"] <= compared["largest_difference_nats"]
    text = (merged / "README.md").read_text()
    told = f"differ by up to {compared['largest_difference_nats']:.2f} nats"
    assert told in text and told in capsys.readouterr().out.replace("\n", " ")
    assert f"{compared['decisions_changed']} of 36 decisions change" in text
    with monkeypatch.context() as patched:
        patched.chdir(merged)
        names: dict = {}
        exec(code_of(text), names)  # as it stands
    assert names["model"].dtype == torch.float16

    kept = (merged / "model.safetensors").stat().st_mtime_ns
    train_dpo.main([*flags, "--merge", str(merged)])  # its own work is made anew
    assert (merged / "model.safetensors").stat().st_mtime_ns != kept
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged", "outputs"]


def test_merging_is_whole_or_absent_and_spares_what_is_not_its_own(mine, no_training, tmp_path, monkeypatch):
    flags, _ = mine
    adapter, merged = adapter_of(flags), tmp_path / "merged"
    for other in (adapter, tmp_path / "outputs", adapter / "run.json"):
        with pytest.raises(UserError, match="holds what --merge did not write\nGive --merge a new folder"):
            train_dpo.main([*flags, "--merge", str(other)])
    with monkeypatch.context() as patched, pytest.raises(RuntimeError):
        patched.setattr(evaluate_dpo, "hub_card", lambda *_, **__: (_ for _ in ()).throw(RuntimeError))
        train_dpo.main([*flags, "--merge", str(merged)])
    assert [path.name for path in tmp_path.iterdir()] == ["outputs"]
    shutil.rmtree(adapter)
    with pytest.raises(UserError, match="there is no adapter .* to merge\nTrain it first"):
        train_dpo.main([*flags, "--merge", str(merged)])


def test_merging_never_imports_unsloth(monkeypatch):
    """It would patch the transformers that the scores come from."""
    asked = []
    monkeypatch.setattr(config, "import_unsloth_first", asked.append)
    for flags in (["--merge", "x"], ["--merge=x", "--backend", "auto"], []):
        config.parse_settings(config.TrainingSettings, flags)
    assert asked == ["hf", "hf", "auto"]


def test_a_base_model_stored_in_4_bits_gives_way_to_its_original():
    assert config.original_name("unsloth/llama-3-8b-bnb-4bit") == "unsloth/llama-3-8b"
    assert config.original_name("meta-llama/Meta-Llama-3-8B") == "meta-llama/Meta-Llama-3-8B"
