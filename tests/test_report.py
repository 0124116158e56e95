"""What is written of metrics: the summary, an adapter's model card, and with it a folder that is fit for the Hub."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import adapter_of, predictions_of
from huggingface_hub import ModelCard, ModelCardData

import config
import evaluate_dpo
from config import EvaluationSettings, preset_settings
from data.files import file_sha256
from data.measures import MEASURES, OF_ANSWERS, compute_metrics
from data.report import (
    CARD_MARK,
    MAIN_MEASURES,
    cell,
    latex,
    model_card,
    report,
    summary,
    table,
    write_card,
)
from data.runs import WEIGHTS
from data.tokens import pair_tree
from data.verdict import judge

ADAPTER_FILES = {"adapter_config.json", "adapter_model.safetensors", "run.json", "loss.png", "README.md"}
ADAPTER_FILES |= {"tokenizer.json", "tokenizer_config.json"}


@pytest.fixture(scope="module")
def study(trained, tmp_path_factory):
    """(flags of evaluation, metrics) of adapters that were evaluated; nothing may change in their outputs."""
    folder = tmp_path_factory.mktemp("study")
    shutil.copytree(trained[2], folder / "outputs")
    flags = [*trained[1], "--outputs", str(folder / "outputs")]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(evaluate_dpo, "plot_all", lambda *_: None)
        again = f"again={adapter_of(flags)}"
        evaluate_dpo.main([*flags, "--second_bits", "16", "--adapters", again])
    return flags, json.loads((folder / "outputs" / "evaluation" / "metrics.json").read_text())


def test_every_arm_is_in_each_table_and_text_of_others_is_escaped():
    rows = predictions_of(sft=np.tile([-1.0, 1.0], (40, 1)), sft_long=np.ones((40, 2)), dpo=np.ones((40, 2)))
    rows["response_margin"] = np.nan
    metrics = judge(compute_metrics(rows))
    lines = table(metrics).splitlines()
    assert [line.split()[0] for line in (lines[0], *lines[2:])] == ["arm", *metrics["arms"]]
    tex = latex(metrics)
    assert r"sft\_long & 100.0 [100.0, 100.0] & -- & " in tex and "$-$100.0 [$-$100.0, $-$100.0]" in tex
    assert r"\toprule" in tex and r"ranking accuracy (\%)" in tex
    answers = {"dpo": dict.fromkeys(OF_ANSWERS, 0.25)}
    text = report(metrics, answers, ["note: of <b>"], "a model in 4 bits")
    assert "| measure | sft | sft_long | dpo |" in text and "**Note:** of &lt;b&gt;" in text
    assert "| ranking accuracy (%) of each run | seed 1 |" in text and "| sft_long | 100.0 |" in text
    assert "| dpo - sft_long |" in text and "| PARTIAL: comparable (these adapters) |" not in text, "too few users"
    assert "| dpo | 0.25 | 0.25 |" in text and "Adapters of a model in 4 bits." in text
    assert all(line in text for line in summary(metrics, "a model in 4 bits").splitlines())
    assert "DPO and SFT of a model in 4 bits reached" in text and "a model" not in metrics["sentence"]


def base_of(flags: list[str]) -> dict:
    return config.base_facts(config.parse_settings(EvaluationSettings, flags))


def code_of(card: str) -> str:
    [code] = re.findall(r"```python\n(.*?)```", card, re.S)
    return code


def test_a_trained_adapters_folder_is_complete_for_the_hub(trained):
    """As `hf upload NAME FOLDER` publishes it."""
    _, flags, outputs = trained
    for stage in ("sft", "dpo"):
        adapter = adapter_of(flags, stage)
        assert {str(path.relative_to(adapter)) for path in adapter.rglob("*")} == ADAPTER_FILES
        card = (adapter / "README.md").read_text()
        assert CARD_MARK in card and "Not evaluated" in card and f"# {stage.upper()} adapter" in card
        assert "PEFT 0." not in card and str(outputs) not in card, "PEFT's, with a path of this machine"
        assert stage in ModelCard(card).data.tags


def test_evaluation_writes_a_card_with_the_measures_of_its_arm(study):
    flags, metrics = study
    for arm, other in (("sft", "dpo"), ("dpo", "sft")):
        text = (adapter_of(flags, arm) / "README.md").read_text()
        card = ModelCard(text)
        known = (card.data.library_name, card.data.base_model)
        assert known == ("peft", None), "the Hub refuses a folder as base model"
        assert {"movielens", arm} <= set(card.data.tags) and other not in card.data.tags
        results = {result.metric_type: result for result in card.data.eval_results}
        for name in MAIN_MEASURES:
            (label, unit), found = MEASURES[name], metrics["arms"][arm][name]
            assert results[name].metric_value == found["value"], "a number, as the Hub expects"
            assert results[name].metric_args == {"interval_95": [found["low"], found["high"]]}
            assert f"| {label} ({unit}) | {cell(found, unit)} |" in text
        assert f"weights of sha256 `{file_sha256(adapter_of(flags, arm) / WEIGHTS)}`" in text
        assert "personalisation" not in text and "a stranger's" not in text, "not measured"
        for part in ("GroupLens", "10.1145/2827872", "forbids redistribution"):
            assert part in text
        for part in ("18 users", "both orders", "4-bit (NF4)", "seed 3407"):
            assert part in text
        assert "- fewer than 3 training runs" in text
        assert not re.search(rf"^- {other} ", text, re.M), "a caveat of the other arm"
        kept = cell(metrics["arms"][f"{arm}@16bit"]["precision_consistency"], "%")
        assert f"on 16bit weights {kept}% of its decisions stay the same" in text
    assert "beta 0.1" in text and "from the SFT adapter, which is its reference" in text
    assert metrics["sentence"] in text, "the card is that of the first arm that has this folder"


@pytest.mark.parametrize("base", ["folder", "small"])
def test_the_three_lines_of_a_card_load_the_adapter_that_was_measured(study, base, monkeypatch, tiny_model):
    flags, _ = study
    adapter = adapter_of(flags)
    card = (adapter / "README.md").read_text()
    if base == "small":  # known by a name that transformers cannot find: through config.py
        monkeypatch.setattr(config, "small_model_folder", lambda: tiny_model)
        card = model_card(adapter, config.base_facts(preset_settings(EvaluationSettings, "small")))
        assert ModelCard(card).data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
        assert ModelCard(card).data.license == "apache-2.0"
    assert len(code_of(card).splitlines()) == 3
    monkeypatch.chdir(adapter)
    names: dict = {}
    exec(code_of(card), names)  # as it stands
    assert names["base"].is_loaded_in_4bit, "as the adapter was trained"
    settings = config.parse_settings(EvaluationSettings, flags)
    _, test = config.load_split(settings)
    model, tokenizer = config.load_model(settings, torch.float32)
    trees = [pair_tree(pair, tokenizer) for pair in test[:4]]

    def scores(model) -> np.ndarray:
        return np.array(evaluate_dpo.score(model.eval(), trees, 4, ""))

    without = scores(model)
    measured = scores(evaluate_dpo.load_adapter(model, "x", adapter))
    loaded = scores(names["model"])
    assert np.abs(loaded - measured).max() < 0.1 * np.abs(without - measured).max()


def test_an_adapter_that_was_not_evaluated_says_so_and_several_seeds_are_told(study):
    flags, metrics = study
    adapter, base, metrics = adapter_of(flags), base_of(flags), json.loads(json.dumps(metrics))
    card = model_card(adapter, base)
    assert "Not evaluated" in card and "| measure |" not in card and ModelCard(card).data.eval_results is None
    assert "training runs" not in model_card(adapter, base, "again", metrics)
    metrics["arms"]["dpo"]["seeds"] = 3
    assert "Means over the arm's 3 training runs" in model_card(adapter, base, "dpo", metrics)
    mismatch = [f"{adapter} was trained on another split <b>"]
    assert "- was trained on another split _b_." in model_card(adapter, base, "dpo", metrics, mismatch)


def test_llama_3_is_named_with_its_licence(study):
    card = model_card(adapter_of(study[0]), config.base_facts(preset_settings(EvaluationSettings, "thesis")))
    assert (ModelCard(card).data.base_model, ModelCard(card).data.license) == ("unsloth/llama-3-8b-bnb-4bit", "llama3")
    assert "Built with Meta Llama 3." in card


def test_only_a_generated_readme_is_overwritten_and_evaluation_goes_on(mine, no_figures, tmp_path, capsys):
    _, flags = mine
    adapter, base = adapter_of(flags), base_of(flags)
    peft = f"{ModelCard.from_template(ModelCardData(library_name='peft'))}\n### Framework versions\n\n- PEFT 0.21.2"
    for text, ours in (
        ("# My adapter", False),
        (peft, False),
        ("It has been trained using [TRL](https://github.com/huggingface/trl).", False),
        (f"{CARD_MARK}\nold", True),
    ):
        (adapter / "README.md").write_text(text)
        said = write_card(adapter, base)
        assert ((adapter / "README.md").read_text() != text) is ours
        assert said.startswith("model card: ") is ours and ("somebody's own" in said) is not ours
    (adapter / "README.md").unlink()
    (adapter / "README.md").mkdir()  # it cannot be written
    sft = adapter_of(flags, "sft") / "README.md"
    sft.write_text("# My adapter")
    evaluate_dpo.main([*flags])
    out = capsys.readouterr().out
    assert f"{sft} is somebody's own text and stays as it is\n" in out
    assert f"warning: no model card in {adapter}: " in out
    assert sft.read_text() == "# My adapter" and "verdict: " in out
    shutil.rmtree(adapter / "README.md")
    predictions = tmp_path / "outputs" / "evaluation" / "predictions.csv"
    evaluate_dpo.main([*flags, "--from_predictions", str(predictions)])
    assert not (adapter / "README.md").exists()


def test_a_card_of_an_adapter_that_says_nothing_or_nonsense_of_itself(mine):
    _, flags = mine
    adapter, base = adapter_of(flags), base_of(flags)
    (adapter / "run.json").unlink()
    assert "it has no run.json that says so" in model_card(adapter, base)
    about = {"stage": "<b>", "settings": {"seed": "[x](http://y)", "pairs": "`\n# Title"}}
    (adapter / "run.json").write_text(json.dumps(about))
    card = model_card(adapter, base)
    assert "# LoRA adapter" in card and not re.search(r"<b>|\[x\]|^# Title", card, re.M)
    for nonsense in ("[]", "{"):
        (adapter / "run.json").write_text(nonsense)
        assert write_card(adapter, base).startswith("model card: ")
        assert "What it was trained on is not known" in (adapter / "README.md").read_text()
    for nonsense in ('{"settings": 1}', '{"settings": {"bits": []}}', '{"settings": {"bits": 3}}', '{"stage": []}'):
        (adapter / "run.json").write_text(nonsense)
        said = write_card(adapter, base)
        assert said.startswith(("model card: ", "warning: no model card in ")), "it never fails"
        card = (adapter / "README.md").read_text() if said.startswith("model card: ") else "not known"
        assert "not known" in card and " pairs of " not in card
