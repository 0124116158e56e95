"""Scores, adapters, generated answers, and an evaluation from end to end."""

import copy
import dataclasses
import json
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import adapter_of, make_pairs
from safetensors.torch import load_file, save_file

import config
import evaluate_dpo
import train_dpo
from config import EvaluationSettings, TrainingSettings
from data.baselines import BASELINES
from data.bases import original_name
from data.errors import UserError
from data.figures import draw_all
from data.files import file_sha256, write_json
from data.measures import OF_ANSWERS, compute_metrics, wins
from data.pairs import ORDERS, STEM, preference_row, preference_rows
from data.predictions import COLUMNS, LOG_PROBS, read_predictions
from data.runs import WEIGHTS, changed_since
from data.tokens import pair_tree

# ----------------------------------------------------------------------------------------------------- scores


@pytest.fixture(scope="module")
def scorer(tiny_model):
    return config.load_model(EvaluationSettings(base_model=str(tiny_model)), torch.float32)


def plain_log_prob(model, tokenizer, prompt: str, response: str) -> float:
    """log p(response, end of text | prompt) by one ordinary forward pass."""
    start = len(tokenizer(prompt)["input_ids"])
    tokens = torch.tensor([*tokenizer(prompt + response)["input_ids"], tokenizer.eos_token_id])
    with torch.no_grad():
        log_probs = model(input_ids=tokens[None]).logits[0].log_softmax(-1)
    return sum(log_probs[position - 1, tokens[position]].item() for position in range(start, len(tokens)))


def test_scores_equal_those_of_plain_forward_passes(scorer):
    model, tokenizer = scorer
    pairs = make_pairs(7)
    trees = [pair_tree(pair, tokenizer) for pair in pairs]
    scores = evaluate_dpo.score(model.eval(), trees, batch_users=3, description="test")
    assert scores.shape == (3, 7, 2)
    decision, chosen, rejected = scores
    for user, pair in enumerate(pairs):
        for index, order in enumerate(ORDERS):
            row = preference_row(pair, order)
            for name, found in (("chosen", chosen), ("rejected", rejected)):  # of what follows the stem
                whole = plain_log_prob(model, tokenizer, row["prompt"] + STEM, row[name].removeprefix(STEM))
                assert found[user, index] == pytest.approx(whole, abs=2e-4)
            ids = tokenizer(row["prompt"] + STEM, return_tensors="pt")["input_ids"]
            letters = {letter: tokenizer(f" {letter}")["input_ids"][0] for letter in ORDERS}
            with torch.no_grad():
                logits = model(input_ids=ids).logits[0, -1]
            wanted = (logits[letters[order]] - logits[letters[ORDERS[1 - index]]]).item()
            assert decision[user, index] == pytest.approx(wanted, abs=1e-4)


def test_scores_do_not_depend_on_the_batch(scorer):
    model, tokenizer = scorer
    trees = [pair_tree(pair, tokenizer) for pair in make_pairs(9)]
    alone, together = (evaluate_dpo.score(model.eval(), trees, size, "test") for size in (1, 9))
    assert np.allclose(alone, together, atol=1e-4)


def test_a_tree_computes_each_shared_beginning_once(scorer):
    _, tokenizer = scorer
    pair = make_pairs(1)[0]
    tree = pair_tree(pair, tokenizer)
    rows = [preference_row(pair, order) for order in ORDERS]
    texts = [[*tokenizer(row["prompt"] + row[name])["input_ids"]] for row in rows for name in ("chosen", "rejected")]
    assert len(tree.tokens) < 0.6 * sum(map(len, texts))
    paths = [path for order in tree.paths for path in order]
    for text, leaf in zip(texts, [path[-1] for path in paths], strict=True):
        node, tokens = leaf, []
        while node >= 0:
            tokens.append(tree.tokens[node])
            node = tree.parents[node]
        assert tokens[::-1] == [*text, tokenizer.eos_token_id]


def test_decisions_with_a_strangers_history_are_scored_without_the_responses(scorer):
    model, tokenizer = scorer
    pairs = make_pairs(4)
    whole = [pair_tree(pair, tokenizer) for pair in pairs]
    short = [pair_tree(pair, tokenizer, decision_only=True) for pair in pairs]
    assert all(len(few.tokens) < 0.8 * len(all_.tokens) for few, all_ in zip(short, whole, strict=True))
    one, other = (evaluate_dpo.score(model.eval(), trees, 4, "test")[0] for trees in (whole, short))
    assert np.allclose(one, other, atol=1e-4)


def test_a_model_that_always_says_a_scores_exactly_half(scorer):
    model, tokenizer = scorer
    trees = [pair_tree(pair, tokenizer) for pair in make_pairs(8)]
    letter = tokenizer(" A")["input_ids"][0]

    def prefer_a(module, inputs, logits):
        return logits.index_fill(-1, torch.tensor([letter]), 100.0)

    hook = model.get_output_embeddings().register_forward_hook(prefer_a)
    decision, *_ = evaluate_dpo.score(model.eval(), trees, 4, "always A")
    hook.remove()
    assert wins(decision).mean() == 0.5
    assert (decision[:, 0] > 0).all() and (decision[:, 1] < 0).all()


def test_answers_do_not_depend_on_how_a_base_model_was_published_to_generate(scorer):
    model, tokenizer = scorer
    prompts = [row["prompt"] for row in preference_rows(make_pairs(2), "balanced", 0)]

    def answers() -> list:
        return [evaluate_dpo.generate_answers(model, tokenizer, prompts, samples, 1, "") for samples in (None, 2)]

    before, published = answers(), copy.deepcopy(model.generation_config)
    try:
        model.generation_config.update(repetition_penalty=5.0, min_p=0.9, no_repeat_ngram_size=2, num_beams=2)
        assert answers() == before
    finally:
        model.generation_config = published


def test_evaluation_never_imports_unsloth(monkeypatch):
    """It would patch the transformers that the scores come from."""
    asked = []
    monkeypatch.setattr(config, "import_unsloth_first", asked.append)
    for flags in (["--backend", "hf"], ["--backend=auto"], []):
        config.parse_settings(TrainingSettings, flags)
    config.parse_settings(EvaluationSettings, [])
    assert asked == ["hf", "auto", "auto"]


# --------------------------------------------------------------------------------------------------- adapters


def predicted(flags: list[str]) -> tuple:
    """(predictions, generated answers, seconds by part, mismatches)."""
    settings = config.parse_settings(EvaluationSettings, flags)
    train, test = config.load_split(settings)
    adapters, mismatches = evaluate_dpo.find_adapters(settings, test)
    return *evaluate_dpo.predict(settings, train, test, adapters), mismatches


def test_two_adapters_on_one_base_score_as_each_alone(trained):
    _, flags, _ = trained
    settings = config.parse_settings(EvaluationSettings, flags)
    _, test = config.load_split(settings)
    alone = {}
    for stage in ("sft", "dpo"):
        model, tokenizer = config.load_model(settings, torch.float32)
        trees = [pair_tree(pair, tokenizer) for pair in test]
        model = evaluate_dpo.load_adapter(model, stage, adapter_of(flags, stage))
        _, *alone[stage] = evaluate_dpo.score(model, trees, 4, stage)
    predictions, generated, seconds, mismatches = predicted(flags)
    assert mismatches == [] and generated is None
    assert {"loading", "scoring base", "scoring sft 3407", "scoring dpo 3407"} == set(seconds)
    predictions = predictions[predictions["history"] == "own"]
    for stage in ("sft", "dpo"):
        together = predictions.loc[predictions["arm"] == stage, list(LOG_PROBS)].to_numpy()
        assert np.allclose(together, np.reshape(alone[stage], (2, -1)).T, atol=1e-5)
    assert not np.allclose(alone["sft"], alone["dpo"], atol=1e-5)


def test_other_arms_can_be_evaluated_without_the_usual_two(trained, tmp_path):
    _, flags, _ = trained
    sft, dpo = (adapter_of(flags, stage) for stage in ("sft", "dpo"))
    elsewhere = [*flags, "--outputs", str(tmp_path / "elsewhere")]

    def arms(*adapters):
        settings = config.parse_settings(EvaluationSettings, [*elsewhere, "--adapters", *adapters])
        return [*evaluate_dpo.find_adapters(settings, config.load_split(settings)[1])[0]]

    assert arms(f"other={dpo}") == ["other"]
    assert arms(f"sft={sft}", f"dpo={dpo}", f"other={dpo}") == ["sft", "dpo", "other"]
    with pytest.raises(UserError, match="no adapter of the arm dpo"):
        arms(f"sft={sft}", f"other={dpo}")
    for wrong in (f"dpo={sft}", f"sft_long={dpo}"):
        problem = "is an adapter of (sft, given as the arm dpo|dpo, given as the arm sft_long)"
        with pytest.raises(UserError, match=problem):
            arms(f"sft={sft}", *[f"dpo={dpo}"][: not wrong.startswith("dpo")], wrong)
    with pytest.raises(UserError, match="holds the same weights as"):
        arms(f"sft={sft}", f"dpo={dpo},{dpo}")
    comma = shutil.copytree(dpo, tmp_path / "mine, again")
    assert arms(f"other={comma}") == arms(f"other={dpo},") == ["other"]
    with pytest.raises(UserError, match="--adapters is given twice"):
        arms(f"sft={sft}", "--adapters", f"dpo={dpo}")


def test_the_published_adapters_are_scored_when_asked_for(trained, tmp_path, monkeypatch):
    _, flags, _ = trained
    asked = [*flags, "--outputs", str(tmp_path / "elsewhere"), "--adapters", "published"]
    monkeypatch.setattr(config, "PUBLISHED", tmp_path / "adapters")

    def found() -> dict[str, list[Path]]:
        settings = config.parse_settings(EvaluationSettings, asked)
        adapters, _ = evaluate_dpo.find_adapters(settings, config.load_split(settings)[1])
        return {arm: [*seeds.values()] for arm, seeds in adapters.items()}

    with pytest.raises(UserError, match=f"no adapter of the arm sft at {tmp_path / 'adapters' / 'sft'}"):
        found()
    for arm, stage in (("sft", "sft"), ("sft_more", "sft"), ("dpo", "dpo")):
        shutil.copytree(adapter_of(flags, stage), tmp_path / "adapters" / arm)
    run = tmp_path / "adapters" / "sft_more" / "run.json"
    run.write_text(run.read_text().replace('"stage": "sft"', '"stage": "sft_more"', 1))
    assert found() == {arm: [tmp_path / "adapters" / arm] for arm in ("sft", "sft_more", "dpo")}
    written, own = [], adapter_of(flags, "sft")
    monkeypatch.setattr(evaluate_dpo, "write_card", lambda folder, *_: written.append(folder))
    adapters = {"sft": {"1": own}, "dpo": {"1": tmp_path / "adapters" / "dpo"}}
    evaluate_dpo.write_cards(config.parse_settings(EvaluationSettings, asked), adapters, {}, [], {})
    assert written == [own], "published cards have the measures of the study"


def test_whether_a_lead_depends_on_what_another_evaluation_has_is_told(
    evaluated, no_figures, tmp_path, monkeypatch, capsys
):
    predictions = Path(evaluated.outputs) / "evaluation" / "predictions.csv"
    rows = pd.read_csv(predictions, dtype={"seed": str}, keep_default_na=False)
    rows.loc[rows["arm"] == "dpo", "decision_margin"] = 9.0  # always right
    rows.to_csv(tmp_path / "other.csv", index=False)
    flags = ["--preset", "small", "--outputs", str(tmp_path), "--from_predictions", str(predictions)]
    evaluate_dpo.main([*flags, "--compare_with", str(tmp_path / "other.csv")])
    here = json.loads((tmp_path / "evaluation" / "metrics.json").read_text())["arms"]["dpo"]["ranking_accuracy"]
    change = json.loads((tmp_path / "evaluation" / "interaction.json").read_text())["dpo - sft"]
    assert change["value"] == pytest.approx(here["value"] - 100, abs=1e-5)
    assert f"\n- note: dpo - sft changes by {change['value']:+.1f} [" in capsys.readouterr().out
    assert "points, here minus " in (tmp_path / "evaluation" / "report.md").read_text()
    with pytest.raises(UserError, match="cannot read"):
        evaluate_dpo.main([*flags, "--compare_with", str(tmp_path / "none.csv")])
    with pytest.raises(UserError, match="is written anew"):
        evaluate_dpo.main([*flags, "--compare_with", str(tmp_path / "evaluation" / "predictions.csv")])
    evaluate_dpo.main(flags)
    assert not (tmp_path / "evaluation" / "interaction.json").exists(), "it was of an earlier comparison"
    made = sorted((tmp_path / "evaluation").iterdir())
    rows[rows["arm"] != "sft"].to_csv(tmp_path / "no_sft.csv", index=False)
    with pytest.raises(UserError, match="no arms dpo and sft in common"):
        evaluate_dpo.main([*flags, "--compare_with", str(tmp_path / "no_sft.csv")])
    assert sorted((tmp_path / "evaluation").iterdir()) == made, "what was made of the same predictions stays"
    monkeypatch.setattr(config, "load_model", lambda *_: pytest.fail("after minutes of scoring"))
    rows[rows["pair_id"] != rows["pair_id"].iloc[0]].to_csv(tmp_path / "other.csv", index=False)
    scoring = ["--preset", "small", "--pairs", evaluated.pairs, "--test_share", "0.3", "--outputs", evaluated.outputs]
    with pytest.raises(UserError, match="not of the same test pairs and users"):
        evaluate_dpo.main([*scoring, "--compare_with", str(tmp_path / "other.csv")])


def test_what_lies_beside_predictions_of_another_name_is_not_theirs(evaluated, no_figures, tmp_path):
    made = Path(evaluated.outputs) / "evaluation"
    answers = dict.fromkeys(OF_ANSWERS, 1.0)
    for name, known in (("predictions.csv", True), ("predictions_16bit.csv", False)):
        here = tmp_path / name
        here.mkdir()
        (here / name).write_bytes((made / "predictions.csv").read_bytes())
        (here / "run.json").write_bytes((made / "run.json").read_bytes())
        (here / "generation.json").write_text(json.dumps({"sft": answers}))
        place = ["--preset", "small", "--outputs", str(here / "again")]
        evaluate_dpo.main([*place, "--from_predictions", str(here / name)])
        for file in ("run.json", "generation.json"):
            assert (here / "again" / "evaluation" / file).exists() == known, (name, file)


def test_what_is_known_of_predictions_stays_where_they_are_made_anew_from_a_copy(mine, no_figures, tmp_path):
    _, flags = mine
    evaluate_dpo.main([*flags, "--generate_users", "1", "--generate_samples", "1"])
    made, known = tmp_path / "outputs" / "evaluation", ("run.json", "generation.json", "generations.csv")
    write_json(made / "run.json", {"mismatches": ["told"]})
    write_json(made / "generation.json", {"sft": dict.fromkeys(OF_ANSWERS, 1.0), "somebody": 1})
    before = [(made / name).read_bytes() for name in known]
    for source in (tmp_path / "backup 2026.csv", tmp_path / "elsewhere" / "predictions.csv"):
        source.parent.mkdir(exist_ok=True)
        source.write_bytes((made / "predictions.csv").read_bytes())
        evaluate_dpo.main([*flags, "--from_predictions", str(source)])
        assert [(made / name).read_bytes() for name in known] == before
        assert "**Mismatch:** told" in (made / "report.md").read_text()


def test_a_row_that_is_longer_than_the_model_is_said_to_attend_to_is_not_scored(mine, evaluated):
    with pytest.raises(UserError, match="the longest row has .* tokens, more than max_length 20"):
        evaluate_dpo.main([*mine[1], "--max_length", "20"])
    _, test = config.load_split(evaluated)
    with pytest.raises(UserError, match="more than max_length 20"):
        evaluate_dpo.load_arms(dataclasses.replace(evaluated, max_length=20), test)


def test_arms_of_similar_names_have_each_its_own_adapter(mine, monkeypatch, tmp_path):
    """PEFT takes no dot in a name: b0.1 and b0_1 would be one, with the first one's alpha."""
    _, flags = mine
    dpo = adapter_of(flags)
    other = shutil.copytree(dpo, tmp_path / "other")
    about = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps(about | {"lora_alpha": 64 * about["lora_alpha"]}))
    settings = config.parse_settings(EvaluationSettings, flags)
    train, test = config.load_split(settings)
    rows, _, _ = evaluate_dpo.predict(settings, train, test, {"b0.1": {"1": dpo}, "b0_1": {"1": other}})
    margins = {arm: part["decision_margin"].to_numpy() for arm, part in rows.groupby("arm")}
    assert not np.allclose(margins["b0.1"], margins["b0_1"], atol=1e-3)


def test_an_adapter_of_another_split_is_refused_or_reported(mine, no_figures, tmp_path, capsys):
    _, flags = mine
    quick = [*flags]
    with pytest.raises(UserError, match="it may have seen the test pairs"):
        evaluate_dpo.main([*flags, "--test_share", "0.4"])
    evaluate_dpo.main([*quick, "--test_share", "0.4", "--allow_mismatch", "true", "--fast", "true"])
    evaluation = tmp_path / "outputs" / "evaluation"
    assert capsys.readouterr().out.count("\n- mismatch:") == 2
    assert (evaluation / "report.md").read_text().count("**Mismatch:**") == 2
    answers = {"dpo": dict.fromkeys(OF_ANSWERS, 0.5), "sft": [], "base": {"answers": 1}}
    write_json(evaluation / "generation.json", answers)
    evaluate_dpo.main([*quick, "--from_predictions", str(evaluation / "predictions.csv")])
    assert capsys.readouterr().out.count("\n- mismatch:") == 2, "made anew from its predictions"
    report = (evaluation / "report.md").read_text()
    assert report.count("**Mismatch:**") == 2 and "| dpo | 0 | 0.500 |" in report
    for name, source in (("one", evaluation), ("two", tmp_path / "one" / "evaluation")):
        place = ["--outputs", str(tmp_path / name)]
        evaluate_dpo.main([*quick, *place, "--from_predictions", str(source / "predictions.csv")])
        assert capsys.readouterr().out.count("\n- mismatch:") == 2, "what is known of them goes with them"
        assert "| dpo | 0 | 0.500 |" in (tmp_path / name / "evaluation" / "report.md").read_text()
    write_json(evaluation / "run.json", {"mismatches": "none", "notes": None})
    evaluate_dpo.main([*quick, "--from_predictions", str(evaluation / "predictions.csv")])
    assert "mismatch:" not in capsys.readouterr().out, "somebody's run.json may say anything"
    (evaluation / "run.json").write_text('{"notes": ["kept"], "odd": NaN, "half": "\\ud800"}')
    from_it = ["--from_predictions", str(evaluation / "predictions.csv")]
    evaluate_dpo.main([*quick, "--outputs", str(tmp_path / "three"), *from_it])
    assert "\n- note: kept" in capsys.readouterr().out
    (adapter_of(flags, "sft") / "run.json").unlink()
    evaluate_dpo.main([*quick, "--fast", "true"])
    said = " ".join(capsys.readouterr().out.split())
    assert "whether it was trained on test pairs is not known" in said


def test_a_broken_adapter_is_refused_whatever_is_allowed(mine, monkeypatch):
    """It would be scored as the base model, or as half of itself."""
    _, flags = mine
    weights = adapter_of(flags) / WEIGHTS
    whole = load_file(weights)
    save_file({name: tensor for name, tensor in whole.items() if ".layers.0." in name}, weights)
    monkeypatch.setattr(config, "load_model", lambda *_: pytest.fail("before a model is loaded"))
    for allow in ("true", "false"):
        with pytest.raises(UserError, match="the weights of 7 layers are not those that adapter_config.json names"):
            evaluate_dpo.main([*flags, "--allow_mismatch", allow])


def test_an_adapter_that_peft_loads_otherwise_than_its_file_says_is_an_error(trained, monkeypatch):
    settings = config.parse_settings(EvaluationSettings, trained[1])
    model, _ = config.load_model(settings, torch.float32)
    nothing = SimpleNamespace(missing_keys=[], unexpected_keys=[])
    monkeypatch.setattr("peft.PeftModel.load_adapter", lambda *_, **__: nothing)  # which leaves the first values
    with pytest.raises(RuntimeError, match="has other weights than its file"):
        evaluate_dpo.load_adapter(model, "x", adapter_of(trained[1]))


def test_a_model_that_is_scored_otherwise_beside_other_texts_is_refused(scorer, monkeypatch):
    (model, tokenizer), [pair] = scorer, make_pairs(1)
    evaluate_dpo.check_scores(model, tokenizer, pair, exact=True)
    seen = evaluate_dpo.ancestor_mask
    monkeypatch.setattr(evaluate_dpo, "ancestor_mask", lambda ends: seen(ends) | True)
    with pytest.raises(UserError, match="cannot be scored: a token's log-probability differs by"):
        evaluate_dpo.check_scores(model, tokenizer, pair, exact=True)


def test_every_run_and_the_control_are_found(trained, tmp_path):
    training, flags, outputs = trained
    shutil.copytree(outputs, tmp_path / "outputs")
    place = ["--outputs", str(tmp_path / "outputs")]
    train_dpo.main([*training, *place, "--control", "true", "--seeds", "2"])
    settings = config.parse_settings(EvaluationSettings, [*flags, *place])
    adapters, mismatches = evaluate_dpo.find_adapters(settings, config.load_split(settings)[1])
    assert {arm: [*seeds] for arm, seeds in adapters.items()} == {
        arm: ["3407", "3408"] for arm in ("sft", "sft_more", "dpo")
    }
    assert mismatches == []
    folders = [folder for seeds in adapters.values() for folder in seeds.values()]
    assert evaluate_dpo.weights_of(adapters) == {str(folder): file_sha256(folder / WEIGHTS) for folder in folders}


def test_an_adapter_that_is_trained_again_meanwhile_is_not_passed_off_as_the_one_scored(mine, no_figures, monkeypatch):
    _, flags = mine
    adapter, predict = adapter_of(flags), evaluate_dpo.predict
    card = (adapter / "README.md").read_bytes()

    def meanwhile(*given):
        found = predict(*given)
        (adapter / WEIGHTS).write_bytes(b"trained again")
        return found

    monkeypatch.setattr(evaluate_dpo, "predict", meanwhile)
    evaluate_dpo.main(flags)
    others = f"{adapter} holds other weights than those that were evaluated"
    assert changed_since(adapter.parent / "evaluation") == [others]
    assert (adapter / "README.md").read_bytes() == card, "which would give them these measures"


def test_one_arm_of_several_seeds(trained, tmp_path, monkeypatch):
    training, flags, _ = trained
    again = [*flags, "--outputs", str(tmp_path / "2"), "--seed", "2"]
    train_dpo.main([*training, *again[-4:]])
    folders = [adapter_of(flags), adapter_of(again)]
    adapters = ["--adapters", f"sft={adapter_of(flags, 'sft')}", "dpo=" + ",".join(map(str, folders))]
    extra = [*adapters, "--strangers", "true", "--generate_users", "3", "--generate_samples", "2"]
    train, test = config.load_split(config.parse_settings(EvaluationSettings, flags))
    of_one = sorted(test, key=lambda pair: pair.pair_id)[:2]  # which would both be asked for
    test = [dataclasses.replace(pair, user="one") if pair in of_one else pair for pair in test]
    monkeypatch.setattr(config, "load_split", lambda settings: (train, test))
    predictions, generated, _, _ = predicted([*flags, *extra])
    of_user = {pair.pair_id: pair.user_id for pair in test}
    assert generated["pair_id"].map(of_user).nunique() == 3
    assert list(generated.groupby(["arm", "seed"], sort=False).size()) == [6] * 4
    dpo = predictions[predictions["arm"] == "dpo"]
    assert list(dpo.groupby(["seed", "history"]).size()) == [36] * 4
    assert dpo[dpo["history"] == "stranger"]["response_margin"].isna().all()
    metrics = compute_metrics(predictions)
    assert metrics["arms"]["dpo"]["personalisation_gap"]["value"] is not None
    draw_all(predictions, metrics)["seeds"].savefig(tmp_path / "seeds.pdf")


# ------------------------------------------------------------------------------------------------- end to end


def test_evaluation_without_adapters_says_how_to_make_them(flags, tmp_path):
    settings = config.parse_settings(EvaluationSettings, [*flags, "--outputs", str(tmp_path / "my own")])
    with pytest.raises(UserError, match="no adapter of the arm sft") as error:
        evaluate_dpo.find_adapters(settings, make_pairs(5))
    _, _, command = str(error.value).partition("Make it with: ")
    _, script, *found = shlex.split(command.partition("; or give")[0])
    training = config.parse_settings(TrainingSettings, found)
    assert Path(script).name == "train_dpo.py" and training.stage == "sft"
    assert config.adapter_folder(training, "sft") == config.adapter_folder(settings, "sft")
    assert (training.pairs, training.test_share) == (settings.pairs, settings.test_share)
    given = dataclasses.replace(settings, adapters=[f"sft={tmp_path}"])
    with pytest.raises(UserError, match=f"no adapter of the arm dpo .*\nMake it with: .* --sft_adapter {tmp_path};"):
        evaluate_dpo.find_adapters(given, make_pairs(5))
    with pytest.raises(UserError, match="no adapter of the arm dpo at typo\nGive --adapters dpo=FOLDER$"):
        evaluate_dpo.find_adapters(dataclasses.replace(given, adapters=[f"sft={tmp_path}", "dpo=typo"]), make_pairs(5))


def test_what_was_scored_and_what_it_is_of_is_on_disk_before_anything_is_made_of_it(mine, tmp_path, monkeypatch):
    _, flags = mine
    monkeypatch.setattr(evaluate_dpo, "compute_metrics", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluate_dpo.main([*flags])
    evaluation = tmp_path / "outputs" / "evaluation"
    assert len(pd.read_csv(evaluation / "predictions.csv")) == 8 * 18 * 2
    assert json.loads((evaluation / "run.json").read_text())["mismatches"] == []


def test_a_disk_that_fills_up_leaves_no_results_of_two_evaluations(mine, no_figures, tmp_path, monkeypatch):
    _, flags = mine
    evaluate_dpo.main([*flags])
    (tmp_path / "outputs" / "evaluation" / "generation.json").write_text("{}")
    monkeypatch.setattr(evaluate_dpo, "as_csv", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluate_dpo.main([*flags, "--seed", "7"])
    left = {path.name for path in (tmp_path / "outputs" / "evaluation").iterdir() if path.is_file()}
    assert left <= {"run.json", ".lock"}
    assert json.loads((tmp_path / "outputs" / "evaluation" / "run.json").read_text())["settings"]["seed"] == 7


def test_evaluation_end_to_end(mine, tmp_path, monkeypatch, capsys):
    _, flags = mine
    folder = tmp_path / "outputs" / "evaluation"
    evaluate_dpo.main([*flags, "--adapters", f"again={adapter_of(flags)}"])
    out = capsys.readouterr().out
    arms = [*BASELINES, "base", "sft", "dpo", "again"]
    assert [line[:13].strip() for line in out.splitlines() if line[:13].strip() in arms] == arms
    assert f"\n- {folder}/report.md: " in out[out.index("verdict: ") :], "what it means, then where to look"

    predictions = pd.read_csv(folder / "predictions.csv")
    assert list(predictions) == [
        *("arm", "kind", "seed", "user_id", "pair_id", "order", "history", "decision_margin", "chosen_log_prob"),
        *("rejected_log_prob", "preferred_count", "other_count", "reference", "beta", "pairs_seen"),
    ]
    assert len(predictions) == len(arms) * 18 * 2
    of_training = predictions.drop_duplicates("arm").set_index("arm")[["reference", "beta", "pairs_seen"]]
    assert of_training.loc["dpo"].tolist() == ["sft", 0.1, 24] and of_training.loc["sft", "pairs_seen"] == 12
    assert of_training.loc[[*BASELINES]].isna().all(axis=None)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert list(metrics["arms"]) == arms
    assert metrics["arms"]["popularity"]["brier_score"]["value"] is None
    assert metrics["arms"]["always A"]["ranking_accuracy"] == {"value": 50, "low": 50, "high": 50}
    assert metrics["arms"]["again"] == metrics["arms"]["dpo"]
    assert metrics["verdict"].endswith(" (these adapters)") and metrics["control_verdict"] == "no control was trained"
    assert metrics["arms"]["dpo"]["chosen_change"]["value"] is not None
    drawn = {path.name for path in (folder / "figures").iterdir()}
    names = ("accuracy", "position_bias", "reliability", "margins")  # 18 users are too few for popularity
    assert drawn == {f"{name}.{ending}" for name in names for ending in ("png", "pdf")}
    report = (folder / "report.md").read_text()
    assert "| popularity |" in report and all(f"(figures/{name}.png)" in report for name in names)
    assert "| `strangers` | `False` |" in report
    assert r"\toprule" in (folder / "table.tex").read_text()

    monkeypatch.setattr(evaluate_dpo, "plot_all", lambda *_: None)
    before = (folder / "metrics.json").read_bytes()
    saved = tmp_path / "predictions.csv"
    saved.write_bytes((folder / "predictions.csv").read_bytes())
    anew = [*flags, "--from_predictions", str(saved)]
    evaluate_dpo.main([*anew, "--outputs", str(tmp_path / "again")])
    assert (tmp_path / "again" / "evaluation" / "metrics.json").read_bytes() == before

    assert json.loads((folder / "run.json").read_text())["compute_dtype"] == "float32", "whatever was trained in"
    kept = [line for line in saved.read_text().splitlines(keepends=True) if not line.startswith("again,")]
    saved.write_text("".join(kept))
    there = {folder / name: (folder / name).read_bytes() for name in ("predictions.csv", "run.json", "metrics.json")}
    with pytest.raises(UserError, match="holds other predictions than .*\nGive --outputs another folder"):
        evaluate_dpo.main(anew)
    assert there == {path: path.read_bytes() for path in there}, "hours of scoring are kept"


def test_predictions_of_version_1_are_read_and_say_what_they_lack(evaluated, no_figures, tmp_path, capsys):
    rows = read_predictions(Path(evaluated.outputs) / "evaluation" / "predictions.csv")
    rows.to_csv(tmp_path / "first.csv", index=False, columns=COLUMNS[1])
    place = ["--preset", "small", "--outputs", str(tmp_path)]
    evaluate_dpo.main([*place, "--from_predictions", str(tmp_path / "first.csv")])
    assert "\n- note: these predictions are of version 1: every pair counts as a user." in capsys.readouterr().out
    first, second = (
        json.loads((folder / "evaluation" / "metrics.json").read_text())["arms"]["dpo"]
        for folder in (tmp_path, Path(evaluated.outputs))
    )
    assert first["ranking_accuracy"] == second["ranking_accuracy"]
    assert first["chosen_change"]["value"] is None and second["chosen_change"]["value"] is not None
    assert (tmp_path / "evaluation" / "predictions.csv").read_text() == (tmp_path / "first.csv").read_text()


def test_a_second_precision_is_scored_and_compared_with_the_first(mine, no_figures, tmp_path, monkeypatch):
    _, flags = mine
    evaluate_dpo.main([*flags, "--second_bits", "16"])
    metrics = json.loads((tmp_path / "outputs" / "evaluation" / "metrics.json").read_text())
    rows = pd.read_csv(tmp_path / "outputs" / "evaluation" / "predictions.csv")
    right = {arm: (rows.loc[rows["arm"] == arm, "decision_margin"] > 0).to_numpy() for arm in ("dpo", "dpo@16bit")}
    same = 100 * np.mean(right["dpo"] == right["dpo@16bit"])
    assert metrics["arms"]["dpo@16bit"]["precision_consistency"]["value"] == pytest.approx(same, abs=1e-4)
    assert metrics["arms"]["dpo"]["precision_consistency"]["value"] is None
    assert {"dpo - sft", "dpo@16bit - sft@16bit", "base@16bit - sft@16bit"} <= set(metrics["comparisons"])
    assert metrics["arms"]["dpo@16bit"]["dpo_temperature"].keys() >= {"value", "low", "high"}
    log_probs = {arm: rows.loc[rows["arm"] == arm, "chosen_log_prob"].to_numpy() for arm in right | {"sft@16bit": 0}}
    change = np.mean(log_probs["dpo@16bit"] - log_probs["sft@16bit"])
    assert metrics["arms"]["dpo@16bit"]["chosen_change"]["value"] == pytest.approx(change, abs=1e-5)
    margins = [log_probs[arm] for arm in ("dpo", "dpo@16bit")]
    assert not np.allclose(*margins, atol=1e-4), "the weights are other ones"
    with pytest.raises(UserError, match="second_bits is 4\nGive --second_bits a value other than --bits 4"):
        config.parse_settings(EvaluationSettings, [*flags, "--second_bits", "4"])
    for of_models in (["--second_bits", "16"], ["--adapters", "x=y"]):
        with pytest.raises(UserError, match="--from_predictions loads no model"):
            config.parse_settings(EvaluationSettings, [*flags, "--from_predictions", "p.csv", *of_models])
    monkeypatch.setattr(evaluate_dpo, "original_name", lambda name: "nowhere")
    monkeypatch.setattr(evaluate_dpo, "adapter_problem", lambda *_: "")
    monkeypatch.setattr(config, "load_model", lambda *_: pytest.fail("hours of scoring would be lost"))
    with pytest.raises(UserError, match="cannot load the base model nowhere"):
        evaluate_dpo.main([*flags, "--second_bits", "16"])


def test_a_base_model_stored_in_4_bits_gives_way_to_its_original():
    assert original_name("unsloth/llama-3-8b-bnb-4bit") == "unsloth/llama-3-8b"
    assert original_name("meta-llama/Meta-Llama-3-8B") == "meta-llama/Meta-Llama-3-8B"
    first, second = evaluate_dpo.precisions(config.preset_settings(EvaluationSettings, "thesis", second_bits=16))
    assert (first.base_model, first.bits) == ("unsloth/llama-3-8b-bnb-4bit", 4)
    assert (second.base_model, second.bits) == ("unsloth/llama-3-8b", 16)
