"""What is written of metrics: the summary, an adapter's model card, and with it a folder that is fit for the Hub."""

import html
import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import adapter_of, predictions_of
from huggingface_hub import ModelCard, ModelCardData

import config
import evaluate_dpo
from config import EvaluationSettings, preset_settings
from data.files import file_sha256, read_json
from data.measures import MEASURES, OF_ANSWERS, compute_metrics
from data.report import (
    CARD_MARK,
    MAIN_MEASURES,
    cell,
    emphasised,
    half_interval,
    headline,
    latex,
    model_card,
    report,
    summary,
    table,
    verdict_text,
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


def test_means_over_runs_are_not_passed_off_as_one_adapters():
    folder, settings = config.PUBLISHED / "sft", preset_settings(EvaluationSettings, "small")
    metrics = read_json(config.ROOT / "docs" / "results" / "metrics.json")
    card = model_card(folder, config.base_facts(settings), "sft", metrics)
    assert "The values are means over 10 training runs, and this adapter is one of them." in card
    assert "belong to" not in card and ModelCard(card).data.eval_results is None


def test_every_arm_is_in_each_table_and_text_of_others_is_escaped():
    rows = predictions_of(sft=np.tile([-1.0, 1.0], (100, 1)), sft_long=np.ones((100, 2)), dpo=np.ones((100, 2)))
    rows["response_margin"] = np.nan
    metrics = judge(compute_metrics(rows))
    lines = table(metrics).splitlines()
    assert [line.split()[0] for line in (lines[1], *lines[3:-1])] == ["arm", *metrics["arms"]]
    tex = latex(metrics)
    assert r"sft\_long & 100.0 [100.0, 100.0] & -- & " in tex and "$-$100.0 [$-$100.0, $-$100.0]" in tex
    assert r"\toprule" in tex and r"ranking accuracy (\%)" in tex
    answers = {"dpo": dict.fromkeys(OF_ANSWERS, 0.9996) | {"answers": 1500}}
    run = {"settings": {"base_model": "a/model", "bits": 4, "`<b>|": "<i>"}, "packages": {"torch": "2"}}
    text = report(metrics, answers, ["note: of <b>"], run, ["accuracy.png", "position_bias.png"])
    assert "| measure | sft | sft_long | dpo |" in text and "- **Note:** of &lt;b&gt;" in text
    assert "| ranking accuracy (%) of each run | seed 1 |" in text and "| sft_long | 100.0 |" in text
    assert "| dpo - sft_long |" in text and "| INCONCLUSIVE (these adapters) |" in text
    assert "| dpo | 1,500 | 1.000 |" in text and "| dpo - sft | +50.0 [" in text
    assert "Adapters of model in 4 bits." in text
    assert "| decisions by less than 0.01 nats | 0 | 0 | 0 |" in text and "| loss of ranking" not in text
    assert "| `b` | `i` |" in text and "| `packages` | `torch: 2` |" in text
    assert "We tested model in 4 bits on 100" in text and "model" not in metrics["sentence"]
    order = ["**Verdict: SUPPORTED (these adapters) against SFT**", metrics["conclusion"], "| arm | ranking % |"]
    order += ["![accuracy](figures/accuracy.png)", "![position bias](figures/position_bias.png)", *metrics["caveats"]]
    order += ["## To quote", "## Comparisons", "## All measures", "## Settings", "## Definitions"]
    places = [text.index(html.escape(part)) for part in order]
    assert places == sorted(places), "what a reader wants first comes first"
    assert all(f"`{name}`" in text[places[-1] :] for name in MEASURES), "docs/metrics.md defines them"
    alone = judge(compute_metrics(rows[rows["arm"] == "dpo"]))
    assert verdict_text(alone) == "No verdict: it takes an arm named sft and an arm named dpo."


@pytest.mark.parametrize("results", ["", "small"])
def test_a_terminal_of_80_columns_shows_the_verdicts_first(results):
    metrics = judge(read_json(config.ROOT / "docs" / "results" / results / "metrics.json"))
    text = summary(metrics, "a model in 4 bits", ["mismatch: " + 20 * "word "])
    assert max(map(len, text.splitlines())) <= 80
    verdicts, meaning, arms, differences, caveats, quote = text.split("\n\n")
    assert headline(metrics) == "\n\n".join([verdicts, meaning, arms]), "what the README shows"
    assert verdicts.startswith(f"verdict: {metrics['verdict']} against SFT\n")
    assert f"\n         {metrics['control_verdict']} against " in verdicts and f"({metrics['control']})" in verdicts
    assert meaning.replace("\n", " ") == metrics["conclusion"]
    for name, found in metrics["arms"].items():
        [line] = [line for line in arms.splitlines() if line.startswith(f"{name} ") and "±" in line]
        assert f" {found['ranking_accuracy']['value']:.1f} ±" in line
    assert f"dpo - {metrics['control']}" in differences and "response accuracy " in differences
    assert caveats.startswith("caveats\n- mismatch: word ") and "\n  word" in caveats
    assert caveats.count("\n- ") == len(metrics["caveats"]) + 1
    assert "to quote: We tested a model in 4 bits on " in quote
    assert not re.search(r"[-+]0\.0\b|\[[^\]]*$", text, re.M), "a zero with a sign, or an interval on two lines"


def test_a_long_name_has_a_line_of_its_own_and_an_interval_at_a_limit_its_longer_half():
    name = "sft_of_another_learning_rate"
    lines = table(compute_metrics(predictions_of(**{name: np.ones((40, 2))}))).splitlines()
    place = lines.index(name)
    assert re.match(r" +100\.0 ±0\.0 ", lines[place + 1]) and max(map(len, lines)) <= 80
    assert half_interval({"value": 99.0, "low": 95.0, "high": 100.0}) == "4.0"


def test_only_a_terminal_without_no_color_shows_verdicts_in_bold(monkeypatch):
    text = "verdict: SUPPORTED against SFT\n           +9.4 points\n         NOT SUPPORTED against SFT, continued"
    monkeypatch.delenv("NO_COLOR", raising=False)
    for terminal, no_color, bold in ((True, "", 2), (True, "1", 0), (False, "", 0)):
        monkeypatch.setenv("NO_COLOR", no_color)
        monkeypatch.setattr("sys.stdout", SimpleNamespace(isatty=lambda shown=terminal: shown))
        shown = emphasised(text)
        assert shown.count("\033[1m") == shown.count("\033[0m") == bold
        assert re.sub(r"\033\[\dm", "", shown) == text


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
        assert f"weights with sha256 `{file_sha256(adapter_of(flags, arm) / WEIGHTS)}`" in text
        assert "personalisation" not in text and "a stranger's" not in text, "not measured"
        for part in ("GroupLens", "10.1145/2827872", "forbids redistribution"):
            assert part in text
        for part in ("18 held-out users", "both orders", "4-bit (NF4)", "seed 3407"):
            assert part in text
        assert "- Fewer than 3 training runs" in text and not re.search(r"\.\.$", text, re.M)
        assert not re.search(rf"^- {other.upper()}: it is", text, re.M), "a caveat of the other arm"
        kept = cell(metrics["arms"][f"{arm}@16bit"]["precision_consistency"], "%")
        assert f"On 16-bit weights {kept}% of its decisions stay the same" in text
    assert "beta 0.1" in text and "from the SFT adapter, which is also its reference" in text
    assert metrics["sentence"] in text, "the card is that of the first arm that has this folder"


@pytest.mark.parametrize("base", ["folder", "small"])
def test_the_three_lines_of_a_card_load_the_adapter_that_was_measured(study, base, monkeypatch, tiny_model):
    flags, _ = study
    adapter = adapter_of(flags)
    card = (adapter / "README.md").read_text()
    if base == "small":  # known by a name that transformers cannot find: through config.py
        monkeypatch.setattr(config, "model_path", lambda name: str(tiny_model))
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
    assert "means over 3 training runs" in model_card(adapter, base, "dpo", metrics)
    mismatch = [f"{adapter} was trained on another split <b>"]
    assert "- was trained on another split _b_." in model_card(adapter, base, "dpo", metrics, mismatch)


def test_a_card_tells_of_answers_that_are_no_recommendation(study, monkeypatch):
    flags, metrics = study
    adapter, base = adapter_of(flags), base_of(flags)
    told = "\n- Of 500 generated answers, 65.6% recommend exactly one option.\n"
    for parsed, there in ((0.656, True), (0.95, False)):
        generation = {"dpo": {"answers": 500, "parsed": parsed}, "sft": {"answers": 500, "parsed": 0.656}}
        assert (told in model_card(adapter, base, "dpo", metrics, (), generation)) is there
        written: list = []
        monkeypatch.setattr(evaluate_dpo, "write_card", lambda *given, to=written: to.append(model_card(*given)))
        settings = config.parse_settings(EvaluationSettings, flags)
        evaluate_dpo.write_cards(settings, {"dpo": {"": adapter}}, metrics, [], generation)
        assert (told in written[0]) is there


def test_a_card_names_the_weights_that_a_copy_is_of(mine, study):
    adapter = adapter_of(mine[1])
    run = read_json(adapter / "run.json") | {"copy_of_sha256": "<b>1f"}
    (adapter / "run.json").write_text(json.dumps(run))
    card = model_card(adapter, base_of(mine[1]), "dpo", study[1])
    assert "belong to the float32 weights that these are a bfloat16 copy of, with sha256 `_b_1f`." in card
    assert file_sha256(adapter / WEIGHTS) not in card


def test_a_control_that_began_with_the_base_model_is_called_so(mine, study):
    adapter = adapter_of(mine[1], "sft")
    run = read_json(adapter / "run.json")
    for init, says in (("base", "by SFT from the base model"), ("sft", "by SFT, continued from the SFT adapter")):
        changed = {"stage": "sft_more", "settings": run["settings"] | {"init": init}}
        (adapter / "run.json").write_text(json.dumps(run | changed))
        assert says in model_card(adapter, base_of(mine[1]))


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
        assert said.startswith("model card: ") is ours and ("your own text" in said) is not ours
    (adapter / "README.md").unlink()
    (adapter / "README.md").mkdir()  # it cannot be written
    sft = adapter_of(flags, "sft") / "README.md"
    sft.write_text("# My adapter")
    evaluate_dpo.main([*flags])
    out = capsys.readouterr().out
    assert f"{sft} has your own text and is kept\n" in out
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
    assert "this folder has no run.json that names it" in model_card(adapter, base)
    about = {"stage": "<b>", "settings": {"seed": "[x](http://y)", "pairs": "`\n# Title"}}
    (adapter / "run.json").write_text(json.dumps(about))
    card = model_card(adapter, base)
    assert "# LoRA adapter" in card and not re.search(r"<b>|\[x\]|^# Title", card, re.M)
    for nonsense in ("[]", "{"):
        (adapter / "run.json").write_text(nonsense)
        assert write_card(adapter, base).startswith("model card: ")
        assert "The training data is not known" in (adapter / "README.md").read_text()
    for nonsense in ('{"settings": 1}', '{"settings": {"bits": []}}', '{"settings": {"bits": 3}}', '{"stage": []}'):
        (adapter / "run.json").write_text(nonsense)
        said = write_card(adapter, base)
        assert said.startswith(("model card: ", "warning: no model card in ")), "it never fails"
        card = (adapter / "README.md").read_text() if said.startswith("model card: ") else "not known"
        assert "not known" in card and " pairs of " not in card
