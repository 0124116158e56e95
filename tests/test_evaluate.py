"""Scoring, measures, verdict and what is written."""

import copy
import json

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from statsmodels.stats import contingency_tables, multitest

import config
import evaluate_dpo
import train_dpo
from config import EvaluationSettings, UserError
from benchmarks import simulation
from conftest import REAL_PAIRS, make_pairs
from data.pairs import ORDERS, ids_digest, load_pairs, preference_row, preference_rows, split_pairs


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
    trees = [evaluate_dpo.pair_tree(pair, tokenizer) for pair in pairs]
    decision, response = evaluate_dpo.score(model.eval(), trees, batch_users=3, description="test")
    assert decision.shape == response.shape == (7, 2)
    for user, pair in enumerate(pairs):
        for index, order in enumerate(ORDERS):
            row = preference_row(pair, order)
            chosen, rejected = (plain_log_prob(model, tokenizer, row["prompt"], row[name]) for name in ("chosen", "rejected"))
            assert response[user, index] == pytest.approx(chosen - rejected, abs=2e-4)
            ids = tokenizer(row["prompt"] + evaluate_dpo.STEM, return_tensors="pt")["input_ids"]
            letters = {letter: tokenizer(f" {letter}")["input_ids"][0] for letter in ORDERS}
            with torch.no_grad():
                logits = model(input_ids=ids).logits[0, -1]
            other = ORDERS[1 - index]
            assert decision[user, index] == pytest.approx((logits[letters[order]] - logits[letters[other]]).item(), abs=1e-4)


def test_scores_do_not_depend_on_the_batch(scorer):
    model, tokenizer = scorer
    trees = [evaluate_dpo.pair_tree(pair, tokenizer) for pair in make_pairs(9)]
    alone, together = (evaluate_dpo.score(model.eval(), trees, size, "test") for size in (1, 9))
    assert np.allclose(alone, together, atol=1e-4)


def test_a_tree_computes_each_shared_beginning_once(scorer):
    _, tokenizer = scorer
    pair = make_pairs(1)[0]
    tree = evaluate_dpo.pair_tree(pair, tokenizer)
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


def test_two_adapters_on_one_base_score_as_each_alone(training_flags, flags):
    train_dpo.main(training_flags)
    settings = config.parse_settings(EvaluationSettings, flags)
    _, test = config.load_split(settings)
    alone = {}
    for stage in ("sft", "dpo"):
        model, tokenizer = config.load_model(settings, torch.float32)
        trees = [evaluate_dpo.pair_tree(pair, tokenizer) for pair in test]
        model = evaluate_dpo.load_adapter(model, stage, config.adapter_folder(settings, stage))
        alone[stage] = evaluate_dpo.score(model, trees, 4, stage)[1]
    predictions, generated, run = evaluate_dpo.predict(settings)
    assert run["mismatches"] == [] and generated is None
    assert {"loading", "scoring base", "scoring sft 3407", "scoring dpo 3407"} == set(run["seconds"])
    predictions = predictions[predictions["history"] == "own"]
    for stage in ("sft", "dpo"):
        together = predictions.loc[predictions["arm"] == stage, "response_margin"].to_numpy()
        assert np.allclose(together, alone[stage].ravel(), atol=1e-5)
    assert not np.allclose(alone["sft"], alone["dpo"], atol=1e-5)


def test_evaluation_end_to_end(training_flags, flags, tmp_path, capsys):
    with pytest.raises(UserError, match="no adapter of the arm sft .*\nMake it with: python train_dpo.py --preset small --stage sft"):
        evaluate_dpo.main(flags)
    train_dpo.main(training_flags)
    folder = tmp_path / "outputs" / "evaluation"
    more = str(config.adapter_folder(config.parse_settings(EvaluationSettings, flags), "dpo"))
    capsys.readouterr()
    evaluate_dpo.main([*flags, "--resamples", "200", "--adapters", f"again={more}"])
    out = capsys.readouterr().out
    arms = ["always A", "genre overlap", "co-occurrence", "popularity", "base", "sft", "dpo", "again"]
    assert [line[:13].strip() for line in out.splitlines() if line[:13].strip() in arms] == arms
    assert "verdict: " in out.splitlines()[-3]

    predictions = pd.read_csv(folder / "predictions.csv")
    assert list(predictions) == [
        *("arm", "kind", "seed", "pair_id", "order", "history", "decision_margin", "response_margin", "preferred_more_popular")
    ]
    assert len(predictions) == len(arms) * 18 * 2
    metrics = json.loads((folder / "metrics.json").read_text())
    assert list(metrics["arms"]) == arms
    assert metrics["arms"]["popularity"]["brier_score"]["value"] is None
    assert metrics["arms"]["always A"]["ranking_accuracy"] == {"value": 50, "low": 50, "high": 50}
    assert metrics["arms"]["again"] == metrics["arms"]["dpo"]
    drawn = {path.name for path in (folder / "figures").iterdir()}
    names = ("accuracy", "popularity", "position_bias", "reliability", "margins")
    assert drawn == {f"{name}.{ending}" for name in names for ending in ("png", "pdf")}
    assert "| popularity |" in (folder / "report.md").read_text()

    before = (folder / "metrics.json").read_bytes()
    saved = tmp_path / "predictions.csv"
    saved.write_bytes((folder / "predictions.csv").read_bytes())
    evaluate_dpo.main([*flags, "--resamples", "200", "--from_predictions", str(saved), "--outputs", str(tmp_path / "again")])
    assert (tmp_path / "again" / "evaluation" / "metrics.json").read_bytes() == before

    assert json.loads((folder / "run.json").read_text())["compute_dtype"] == "float32", "whatever was trained in"
    saved.write_text("".join(line for line in saved.read_text().splitlines(keepends=True) if not line.startswith("again,")))
    evaluate_dpo.main([*flags, "--resamples", "200", "--from_predictions", str(saved)])
    assert not (folder / "run.json").exists(), "it was of other predictions"
    assert "again" not in set(pd.read_csv(folder / "predictions.csv")["arm"])


def test_a_second_precision_is_scored_and_compared_with_the_first(training_flags, flags, tmp_path, monkeypatch):
    train_dpo.main(training_flags)
    evaluate_dpo.main([*flags, "--resamples", "50", "--second_bits", "16"])
    metrics = json.loads((tmp_path / "outputs" / "evaluation" / "metrics.json").read_text())
    rows = pd.read_csv(tmp_path / "outputs" / "evaluation" / "predictions.csv")
    right = {arm: (rows.loc[rows["arm"] == arm, "decision_margin"] > 0).to_numpy() for arm in ("dpo", "dpo@16bit")}
    same = 100 * np.mean(right["dpo"] == right["dpo@16bit"])
    assert metrics["arms"]["dpo@16bit"]["precision_consistency"]["value"] == pytest.approx(same, abs=1e-4)
    assert metrics["arms"]["dpo"]["precision_consistency"]["value"] is None
    assert {"dpo - sft", "dpo@16bit - sft@16bit", "base@16bit - sft@16bit"} <= set(metrics["comparisons"])
    margins = [rows.loc[rows["arm"] == arm, "response_margin"].to_numpy() for arm in ("dpo", "dpo@16bit")]
    assert not np.allclose(*margins, atol=1e-4), "the weights are other ones"
    with pytest.raises(UserError, match="second_bits is 4\nGive --second_bits a value other than --bits 4"):
        config.parse_settings(EvaluationSettings, [*flags, "--second_bits", "4"])
    monkeypatch.setattr(config, "original_name", lambda name: "nowhere")
    monkeypatch.setattr(config, "adapter_problem", lambda *_: "")
    monkeypatch.setattr(config, "load_model", lambda *_: pytest.fail("hours of scoring would be lost"))
    with pytest.raises(UserError, match="cannot load the base model nowhere"):
        evaluate_dpo.main([*flags, "--second_bits", "16"])


def test_other_arms_can_be_evaluated_without_the_usual_two(training_flags, flags, tmp_path):
    train_dpo.main(training_flags)
    sft, dpo = (config.adapter_folder(config.parse_settings(EvaluationSettings, flags), stage) for stage in ("sft", "dpo"))
    elsewhere = [*flags, "--outputs", str(tmp_path / "elsewhere")]

    def arms(*adapters):
        settings = config.parse_settings(EvaluationSettings, [*elsewhere, "--adapters", *adapters])
        return [*evaluate_dpo.find_adapters(settings, ids_digest(config.load_split(settings)[1]))[0]]

    assert arms(f"other={dpo}") == ["other"]
    assert arms(f"sft={sft}", f"dpo={dpo}", f"other={dpo}") == ["sft", "dpo", "other"]
    with pytest.raises(UserError, match="no adapter of the arm dpo"):
        arms(f"sft={sft}", f"other={dpo}")
    for wrong in (f"dpo={sft}", f"sft_long={dpo}"):
        with pytest.raises(UserError, match="is an adapter of (sft, given as the arm dpo|dpo, given as the arm sft_long)"):
            arms(f"sft={sft}", *[f"dpo={dpo}"][: not wrong.startswith("dpo")], wrong)
    with pytest.raises(UserError, match="holds the same weights as"):
        arms(f"sft={sft}", f"dpo={dpo},{dpo}")
    with pytest.raises(UserError, match="--adapters is given twice"):
        arms(f"sft={sft}", "--adapters", f"dpo={dpo}")


def test_an_adapter_of_another_split_is_refused_or_reported(training_flags, flags, tmp_path, capsys):
    train_dpo.main(training_flags)
    with pytest.raises(UserError, match="it may have seen the test pairs"):
        evaluate_dpo.main([*flags, "--test_share", "0.4"])
    evaluate_dpo.main([*flags, "--test_share", "0.4", "--resamples", "20", "--allow_mismatch", "true", "--fast", "true"])
    assert capsys.readouterr().out.count("\nmismatch: ") == 2
    assert (tmp_path / "outputs" / "evaluation" / "report.md").read_text().count("**Mismatch:**") == 2
    evaluation = tmp_path / "outputs" / "evaluation"
    config.write_json(evaluation / "generation.json", {"dpo": dict.fromkeys(evaluate_dpo.OF_ANSWERS, 0.5), "sft": [], "base": {"answers": 1}})
    evaluate_dpo.main([*flags, "--resamples", "20", "--from_predictions", str(evaluation / "predictions.csv")])
    assert capsys.readouterr().out.count("\nmismatch: ") == 2, "made anew from its predictions"
    report = (evaluation / "report.md").read_text()
    assert report.count("**Mismatch:**") == 2 and "| dpo | 0.5 |" in report
    for outputs, source in ((tmp_path / "one", evaluation), (tmp_path / "two", tmp_path / "one" / "evaluation")):
        evaluate_dpo.main([*flags, "--resamples", "20", "--outputs", str(outputs), "--from_predictions", str(source / "predictions.csv")])
        assert capsys.readouterr().out.count("\nmismatch: ") == 2, "what is known of them goes with them"
        assert "| dpo | 0.5 |" in (outputs / "evaluation" / "report.md").read_text()
    config.write_json(evaluation / "run.json", {"mismatches": "none", "notes": None})
    evaluate_dpo.main([*flags, "--resamples", "20", "--from_predictions", str(evaluation / "predictions.csv")])
    assert "mismatch: " not in capsys.readouterr().out, "somebody's run.json may say anything"
    (config.adapter_folder(config.parse_settings(EvaluationSettings, flags), "sft") / "run.json").unlink()
    evaluate_dpo.main([*flags, "--resamples", "20", "--fast", "true"])
    assert "whether it was trained on test pairs is not known" in capsys.readouterr().out


def test_what_dpo_began_with_is_noted(training_flags, flags, tmp_path):
    train_dpo.main(training_flags)
    sft, dpo = (config.adapter_folder(config.parse_settings(EvaluationSettings, flags), stage) for stage in ("sft", "dpo"))
    runs = {}
    for seed, changes in {"1": {}, "2": {"seed": 2, "outputs": "elsewhere"}, "3": {"beta": 0.5}}.items():
        (tmp_path / seed).mkdir()
        run = json.loads((dpo / "run.json").read_text())
        config.write_json(tmp_path / seed / "run.json", run | {"settings": run["settings"] | changes})
        runs[seed] = tmp_path / seed
    assert evaluate_dpo.notes_on_training(4, {"dpo": runs}) == ["the training runs of dpo differ in beta, not in their seed alone"]
    config.write_json(runs.pop("3") / "run.json", {"stage": ["dpo"], "settings": {"beta": 1}})
    assert evaluate_dpo.of_another_stage(tmp_path / "3", "sft") == "", "somebody's run.json may say anything"
    assert evaluate_dpo.notes_on_training(4, {"dpo": {"3": tmp_path / "3"}}) == []
    assert evaluate_dpo.notes_on_training(4, {"dpo": runs}) == []
    adapters = {"sft": {"1": sft}, "dpo": {"1": dpo}}
    assert evaluate_dpo.notes_on_training(4, adapters) == []
    assert [note.partition(" was trained on weights in 4 bits")[0] for note in evaluate_dpo.notes_on_training(16, adapters)] == ["sft", "dpo"]
    (sft / "run.json").unlink()
    train_dpo.main([*training_flags, "--stage", "dpo", "--sft_adapter", str(sft)])
    settings = config.parse_settings(EvaluationSettings, flags)
    _, test = config.load_split(settings)
    _, mismatches = evaluate_dpo.find_adapters(settings, ids_digest(test))
    assert len(mismatches) == 2 and "dpo_4bit_final began with an adapter without run.json" in mismatches[1]
    train_dpo.main([*training_flags, "--stage", "sft", "--seed", "8"])
    assert evaluate_dpo.notes_on_training(4, adapters) == ["dpo began with another SFT adapter than the arm sft"]
    assert evaluate_dpo.notes_on_training(4, {"dpo": {"1": dpo}}) == []


def test_one_arm_of_several_seeds(training_flags, flags, tmp_path):
    folders = []
    for seed in ("1", "2"):
        mine = [*training_flags, "--outputs", str(tmp_path / seed), "--seed", seed]
        train_dpo.main(mine)
        folders.append(config.adapter_folder(config.parse_settings(config.TrainingSettings, mine), "dpo"))
    sft = str(folders[0]).replace("_dpo_", "_sft_")
    adapters = ["--adapters", f"sft={sft}", "dpo=" + ",".join(map(str, folders))]
    extra = [*adapters, "--strangers", "true", "--generate_users", "3", "--generate_samples", "2"]
    predictions, generated, _ = evaluate_dpo.predict(config.parse_settings(EvaluationSettings, [*flags, *extra]))
    assert list(generated.groupby(["arm", "seed"], sort=False).size()) == [6] * 4
    dpo = predictions[predictions["arm"] == "dpo"]
    assert list(dpo.groupby(["seed", "history"]).size()) == [36] * 4
    assert dpo[dpo["history"] == "stranger"]["response_margin"].isna().all()
    assert evaluate_dpo.compute_metrics(predictions, 50, 0)["arms"]["dpo"]["personalisation_gap"]["value"] is not None


def predictions_of(**arms: np.ndarray) -> pd.DataFrame:
    """Rows of predictions.csv from decision margins (users, orders)."""
    pairs = make_pairs(len(next(iter(arms.values()))))
    counts = evaluate_dpo.film_counts(pairs)
    return pd.concat([evaluate_dpo.frame(arm, "model", "1", "own", pairs, counts, margin, margin) for arm, margin in arms.items()])


def test_measures_are_what_arithmetic_says():
    always_a = np.tile([1.0, -1.0], (40, 1))
    perfect = np.full((40, 2), 2.0)
    only_in_a = np.tile([3.0, -1.0], (40, 1))
    metrics = evaluate_dpo.compute_metrics(predictions_of(a=always_a, perfect=perfect, only_a=only_in_a), 100, 0)
    found = {arm: {name: measures[name]["value"] for name in evaluate_dpo.MEASURES} for arm, measures in metrics["arms"].items()}
    assert (found["a"]["ranking_accuracy"], found["a"]["position_bias"], found["a"]["swap_consistency"]) == (50, 100, 0)
    assert found["a"]["order_free_accuracy"] == 50, "ties count one half"
    assert (found["perfect"]["ranking_accuracy"], found["perfect"]["position_bias"]) == (100, 0)
    assert (found["perfect"]["swap_consistency"], found["perfect"]["decision_margin"]) == (100, 2)
    assert (found["only_a"]["ranking_accuracy"], found["only_a"]["order_free_accuracy"]) == (50, 100)
    assert "verdict" not in metrics and metrics["comparisons"] == {}


def test_an_arm_that_answers_one_letter_is_told_so():
    always_b = np.tile([-1.0, 1.0], (40, 1))
    found = evaluate_dpo.compute_metrics(predictions_of(sft=always_b, dpo=always_b), 100, 0)
    assert any("dpo answers B" in caveat for caveat in found["caveats"])


def test_two_arms_that_answer_one_letter_are_not_called_comparable():
    always_b = np.tile([-1.0, 1.0], (400, 1))
    metrics = evaluate_dpo.compute_metrics(predictions_of(sft=always_b, dpo=always_b), 100, 0)
    assert (metrics["comparisons"]["dpo - sft"]["low"], metrics["verdict"]) == (-0.25, "INCONCLUSIVE")
    assert "both answer one letter" in metrics["sentence"] and "users needed" not in evaluate_dpo.summary(metrics)
    each_its_own = [predictions_of(sft=sign * always_b, dpo=sign * always_b).assign(seed=str(seed)) for seed, sign in enumerate((1, -1))]
    metrics = evaluate_dpo.compute_metrics(pd.concat(each_its_own), 100, 0)
    assert metrics["verdict"] == "INCONCLUSIVE" and any("dpo answers one letter" in caveat for caveat in metrics["caveats"])
    fair = np.where(np.arange(400)[:, None] % 2, [1.0, 1.0], [-1.0, -1.0])
    metrics = evaluate_dpo.compute_metrics(predictions_of(sft=fair, dpo=fair), 100, 0)
    assert metrics["verdict"] == "PARTIAL: comparable"


def test_dpo_is_compared_with_longer_sft_too():
    random = np.random.default_rng(1)
    level = random.uniform(size=(600, 1))
    sft, longer, dpo = (np.repeat(np.where(level < share, 1.0, -1.0), 2, axis=1) for share in (0.6, 0.7, 0.7))
    metrics = evaluate_dpo.compute_metrics(predictions_of(sft=sft, sft_long=longer, dpo=dpo), 300, 0)
    assert metrics["verdict"] == "SUPPORTED" and metrics["comparisons"]["dpo - sft_long"]["value"] == 0
    assert any("not clearly than sft_long" in caveat for caveat in metrics["caveats"])
    best = np.repeat(np.where(level < 0.8, 1.0, -1.0), 2, axis=1)
    metrics = evaluate_dpo.compute_metrics(predictions_of(sft=sft, sft_long=best, dpo=dpo), 300, 0)
    assert any("worse than sft_long" in caveat for caveat in metrics["caveats"])
    assert evaluate_dpo.summary(metrics).endswith("verdict: SUPPORTED; against sft_long: NOT SUPPORTED")
    assert "over this SFT. From the SFT control sft_long (8" in metrics["sentence"], "a gain that more SFT beats is not quoted alone"
    assert "which speaks against DPO improving ranking adherence over that one" in metrics["sentence"]
    metrics = evaluate_dpo.compute_metrics(predictions_of(sft=sft, sft_long=sft, dpo=dpo), 300, 0)
    assert not any("than sft_long" in caveat for caveat in metrics["caveats"])


def test_an_arm_loses_to_a_baseline_only_where_the_interval_says_so():
    level = np.random.default_rng(4).uniform(size=(400, 1))
    order = np.random.default_rng(5).permutation(400)  # another film right for other users, so that the difference is uncertain
    shares = {"sft": 0.6, "dpo": 0.7, "sft_long": 0.71, "popularity": 0.8, "co-occurrence": 0.72, "genre overlap": 0.5}
    margins = {arm: np.repeat(np.where(level < share, 1.0, -1.0), 2, axis=1) for arm, share in shares.items()}
    margins["co-occurrence"] = margins["co-occurrence"][order]
    rows = predictions_of(**margins)
    rows.loc[~rows["arm"].str.contains("sft|dpo"), "kind"] = "baseline"
    told = evaluate_dpo.compute_metrics(rows, 300, 0)["caveats"]
    for arm in ("dpo", "sft_long"):
        [lost] = [caveat for caveat in told if caveat.startswith(arm) and "loses to" in caveat]
        assert "taking the more popular film" in lost and "co-occurrence" not in lost
        [open_] = [caveat for caveat in told if caveat.startswith(arm) and "not shown to be better than co-occurrence" in caveat]
        assert "popular" not in open_
    assert not any("genre overlap" in caveat for caveat in told)


def test_differences_are_given_for_each_measure_that_is_compared():
    random = np.random.default_rng(2)
    sft, dpo = random.normal(size=(2, 300, 2))
    rows = predictions_of(sft=sft, dpo=dpo)
    rows.loc[rows["arm"] == "dpo", "response_margin"] = 1.0
    metrics = evaluate_dpo.compute_metrics(rows, 300, 0)
    found, arms = metrics["comparisons"]["dpo - sft"], metrics["arms"]
    for name in ("order_free_accuracy", "response_accuracy"):
        assert found[name]["value"] == pytest.approx(arms["dpo"][name]["value"] - arms["sft"][name]["value"], abs=1e-6)
        assert found[name]["low"] < found[name]["value"] < found[name]["high"]
    assert found["response_accuracy"]["low"] > 40


def test_chance_against_popularity_is_told():
    popular = np.arange(60) % 3 > 0
    follows = np.repeat(np.where(popular, 1.0, -1.0)[:, None], 2, axis=1)
    rows = predictions_of(sft=follows, dpo=np.ones((60, 2)))
    rows["preferred_more_popular"] = [str(bool(margin > 0)).lower() for margin in np.tile(rows[rows["arm"] == "sft"]["decision_margin"], 2)]
    told = [text for text in evaluate_dpo.compute_metrics(rows, 100, 0)["caveats"] if "less popular film is the right one" in text]
    assert len(told) == 1 and told[0].startswith("sft is not shown to be better than chance")


def test_the_model_named_beside_predictions_cannot_steer_the_terminal(tmp_path):
    path = tmp_path / "run.json"
    assert evaluate_dpo.model_of(path) == ""
    for text in ("no JSON", "[]", '{"settings": []}', '{"settings": {"base_model": "x"}}'):
        path.write_text(text)
        assert evaluate_dpo.model_of(path) == ""
    path.write_text(json.dumps({"settings": {"base_model": "somebody/model\x1b[2J<b>", "bits": 4}}))
    assert evaluate_dpo.model_of(path) == "model__2J_b_ in 4 bits"


def test_unequal_training_and_repeated_histories_are_noted(tmp_path):
    for name, seen, start in (("sft", 100, None), ("dpo", 50, "sft"), ("sft_long", 150, None)):
        (tmp_path / name).mkdir()
        run = {"rows_seen": seen, "initial_adapter": str(tmp_path / start) if start else None}
        (tmp_path / name / "run.json").write_text(json.dumps(run))
    adapters = {name: {"1": tmp_path / name} for name in ("sft", "dpo", "sft_long")}
    pairs = make_pairs(30)
    assert evaluate_dpo.notes_on(pairs, adapters) == []
    del adapters["sft_long"]
    [note] = evaluate_dpo.notes_on(pairs, adapters)
    assert "dpo has seen 150 pairs" in note and "sft 100" in note
    adapters["sft_long"] = {"1": tmp_path / "sft"}
    [note] = evaluate_dpo.notes_on(pairs, adapters)
    assert "sft 100 and sft_long 100" in note, "an arm is longer SFT by what it has seen, not by its name"
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "run.json").write_text(json.dumps({"rows_seen": 400}))
    [note] = evaluate_dpo.notes_on(pairs, adapters | {"sft_long": {"1": tmp_path / "more"}})
    assert note.startswith("sft_long has seen 400 pairs in training, more than dpo")
    del adapters["sft_long"]
    (tmp_path / "sft" / "run.json").write_text("no JSON")
    assert evaluate_dpo.notes_on(pairs, adapters) == [], "what is not known is not compared"
    assert "10 of 40 test pairs share their history" in evaluate_dpo.notes_on([*pairs, *pairs[:10]], {})[0]


def test_a_gain_that_is_only_less_position_bias_is_told_so():
    """Both arms prefer the same films; one of them leans so much to B that its letter says so half the time."""
    random = np.random.default_rng(0)
    preference = random.normal(0.5, 1, 400)
    leaning, fair = (np.column_stack([preference - lean, preference + lean]) for lean in (1.5, 0.0))
    metrics = evaluate_dpo.compute_metrics(predictions_of(sft=leaning, dpo=fair), 500, 0)
    assert metrics["verdict"] == "SUPPORTED"
    assert any("not which film they prefer" in caveat for caveat in metrics["caveats"])
    better = np.column_stack([preference + 1, preference + 1])
    metrics = evaluate_dpo.compute_metrics(predictions_of(sft=fair, dpo=better), 500, 0)
    assert metrics["verdict"] == "SUPPORTED" and not any("not which film" in caveat for caveat in metrics["caveats"])


def test_calibration_is_that_of_the_probability_of_option_a():
    random = np.random.default_rng(3)
    decision = random.normal(0.3, 1.5, (500, 2))
    p_a = np.concatenate([1 / (1 + np.exp(-decision[:, 0])), 1 / (1 + np.exp(decision[:, 1]))])
    is_a = np.concatenate([np.ones(500), np.zeros(500)])
    edges = np.linspace(0, 1, 16)
    wanted = 0.0
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        inside = (p_a >= low) & (p_a < high)
        if inside.any():
            wanted += inside.mean() * abs(is_a[inside].mean() - p_a[inside].mean())
    columns = evaluate_dpo.user_measures(decision, decision, decision, decision, np.ones(500))
    found = {name: evaluate_dpo.reduce_columns(name, value.mean(axis=0)) for name, value in columns.items()}
    assert found["calibration_error"] == pytest.approx(wanted)
    assert found["brier_score"] == pytest.approx(np.mean((p_a - is_a) ** 2))
    assert evaluate_dpo.reduce_columns("calibration_error", evaluate_dpo.calibration_columns(np.zeros((9, 2))).mean(axis=0)) == 0


def test_popularity_and_personalisation_measures():
    decision = np.array([[1.0, 1.0], [1.0, -1.0], [-1.0, -1.0], [2.0, 2.0]])
    stranger = np.array([[1.0, -1.0], [1.0, -1.0], [-1.0, -1.0], [-2.0, -2.0]])
    more_popular = np.array([1.0, 0.0, 0.0, np.nan])
    columns = evaluate_dpo.user_measures(decision, decision, stranger, -decision, more_popular)
    found = {name: float(evaluate_dpo.reduce_columns(name, value.mean(axis=0))) for name, value in columns.items()}
    assert found["accuracy_with_popularity"] == 1
    assert found["accuracy_against_popularity"] == 0.25
    assert found["personalisation_gap"] == pytest.approx((0.5 + 0 + 0 + 1) / 4)
    assert found["precision_consistency"] == 0


def test_generated_answers_are_read_by_what_they_recommend_and_cite():
    pair = make_pairs(1)[0]
    own, other = pair.preferred.genres[0], pair.other.genres[0]
    texts = [
        f"The better recommendation is Option A. Reasoning: themes found in {own}. Option B ({other}) does not align.",
        f"The better recommendation is Option B. Reasoning: themes found in {own}. Option A does not align.",
        "Option A and Option B are both good.",
        "I like films.",
    ]
    rows = evaluate_dpo.generation_rows("dpo", "1", [pair], ["A"], [texts], evaluate_dpo.genre_pattern([pair]))
    assert list(rows["answer"]) == ["A", "B", "", ""]
    assert list(rows["own_genre"]) == [True, False, False, False]
    assert not rows["foreign_genre"].any()
    torn = [rows.assign(seed=seed, answer=answer) for seed, answer in (("1", "A"), ("2", "B"))]
    assert evaluate_dpo.generation_measures(pd.concat(torn))["repeat_consistency"] == 1, "each run agrees with itself"
    found = evaluate_dpo.generation_measures(rows)
    assert (found["parsed"], found["right"], found["repeat_consistency"], found["cites_own_genre"]) == (0.5, 0.25, 0.25, 0.25)
    stranger = make_pairs(8)
    genres = evaluate_dpo.genre_pattern(make_pairs(60))
    rows = evaluate_dpo.generation_rows("dpo", "1", stranger, ["A"] * 8, [["Option A. War and Sci-Fi."] for _ in stranger], genres)
    wanted = [bool({"War", "Sci-Fi"} - {*pair.preferred.genres, *pair.other.genres}) for pair in stranger]
    assert list(rows["foreign_genre"]) == wanted


def test_answers_do_not_depend_on_how_a_base_model_was_published_to_generate(scorer):
    model, tokenizer = scorer
    prompts = [row["prompt"] for row in preference_rows(make_pairs(2), "balanced", 0)]
    answers = [evaluate_dpo.generate_answers(model, tokenizer, prompts, samples, 1, "") for samples in (None, 2)]
    published = copy.deepcopy(model.generation_config)
    try:
        model.generation_config.update(repetition_penalty=5.0, min_p=0.9, no_repeat_ngram_size=2, num_beams=2)
        assert [evaluate_dpo.generate_answers(model, tokenizer, prompts, samples, 1, "") for samples in (None, 2)] == answers
    finally:
        model.generation_config = published


def test_one_test_user_is_too_few(flags, monkeypatch):
    monkeypatch.setattr(config, "load_split", lambda settings: (make_pairs(5), make_pairs(1)))
    with pytest.raises(UserError, match="1 test users are too few for an interval\nGive more pairs, or raise --test_share"):
        evaluate_dpo.main(flags)


def test_a_stranger_is_another_user_and_always_the_same_one():
    pairs = make_pairs(20)
    strange = evaluate_dpo.with_strangers(pairs)
    assert all(own.history != other.history for own, other in zip(pairs, strange, strict=True))
    assert {pair.history for pair in pairs} == {pair.history for pair in strange}
    assert [(pair.preferred, pair.other) for pair in pairs] == [(pair.preferred, pair.other) for pair in strange]
    backwards = evaluate_dpo.with_strangers(pairs[::-1])
    assert [pair.history for pair in backwards[::-1]] == [pair.history for pair in strange]


def test_decisions_with_a_strangers_history_are_scored_without_the_responses(scorer):
    model, tokenizer = scorer
    pairs = make_pairs(4)
    whole = [evaluate_dpo.pair_tree(pair, tokenizer) for pair in pairs]
    short = [evaluate_dpo.pair_tree(pair, tokenizer, decision_only=True) for pair in pairs]
    assert all(len(few.tokens) < 0.8 * len(all_.tokens) for few, all_ in zip(short, whole, strict=True))
    one, other = (evaluate_dpo.score(model.eval(), trees, 4, "test")[0] for trees in (whole, short))
    assert np.allclose(one, other, atol=1e-4)


def test_holm_is_the_step_down_correction():
    assert evaluate_dpo.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert evaluate_dpo.holm([0.9, 0.8]) == [1.0, 1.0]
    assert evaluate_dpo.holm([]) == []


def test_seeds_widen_the_interval_by_their_spread(tmp_path):
    random = np.random.default_rng(1)
    users = 400
    sft = np.repeat(random.choice([-1.0, 1.0], users, p=[0.4, 0.6])[:, None], 2, axis=1)
    runs = [np.repeat(random.choice([-1.0, 1.0], users, p=[1 - right, right])[:, None], 2, axis=1) for right in (0.5, 0.65, 0.8)]
    rows = [predictions_of(sft=sft)]
    for seed, margin in enumerate(runs):
        rows.append(predictions_of(dpo=margin).assign(seed=str(seed)))
    many = evaluate_dpo.compute_metrics(pd.concat(rows), 2000, 0)
    assert evaluate_dpo.compute_metrics(pd.concat([rows[0], *rows[:0:-1]]), 2000, 0) == many, "in whatever order runs are given"
    one = evaluate_dpo.compute_metrics(pd.concat([rows[0], rows[2]]), 2000, 0)
    assert many["arms"]["dpo"]["seeds"] == 3
    value = many["arms"]["dpo"]["ranking_accuracy"]
    assert value["value"] == pytest.approx(100 * np.mean([(run[:, 0] > 0).mean() for run in runs]))
    width = {name: found["comparisons"]["dpo - sft"]["high"] - found["comparisons"]["dpo - sft"]["low"] for name, found in (("many", many), ("one", one))}
    assert width["many"] > 1.5 * width["one"]
    assert [caveat for caveat in many["caveats"] if "one training run" in caveat] == [
        "one training run of sft: what another seed would give there is not in the intervals"
    ]
    evaluate_dpo.plot_all(pd.concat(rows), many, tmp_path)
    assert (tmp_path / "seeds.pdf").exists()
    assert any("one training run" in caveat for caveat in one["caveats"])


def test_the_spread_of_seeds_counts_where_a_resample_has_no_user_of_a_kind():
    """As of users whose preferred film is the less popular one, where there are few."""
    values = np.random.default_rng(0).normal([60, 70, 80], 1, (2000, 3))
    some = values.copy()
    some[::100] = np.nan
    spread = [np.ptp(evaluate_dpo.percentile_interval(evaluate_dpo.over_seeds(part, 1))) for part in (values, some)]
    assert spread[1] == pytest.approx(spread[0], rel=0.1) and spread[0] > 20
    assert np.isnan(evaluate_dpo.over_seeds(np.full((9, 3), np.nan), 1)).all()


def test_no_interval_leaves_what_a_measure_can_be():
    rows = pd.concat([predictions_of(dpo=np.full((40, 2), margin)).assign(seed=str(seed)) for seed, margin in enumerate((1.0, 1.0, -1.0))])
    found = evaluate_dpo.compute_metrics(rows, 500, 0)["arms"]["dpo"]
    accuracy, brier = found["ranking_accuracy"], found["brier_score"]
    assert (accuracy["low"], accuracy["high"], brier["low"]) == (0, 100, 0)
    assert found["decision_margin"]["low"] < -1, "a margin has no limits"


def test_the_interval_of_the_calibration_error_is_about_the_error():
    """A resample adds to it what chance had added already: percentiles of resamples lie above the truth."""
    random = np.random.default_rng(3)
    many = random.normal(0, 1.2, 1_000_000)
    truth = np.abs(evaluate_dpo.expit(many) - evaluate_dpo.expit(many / 1.5)).mean()  # of an arm that is too sure
    covered = 0
    for _ in range(100):
        towards_a = random.normal(0, 1.2, 1000)
        right = random.random(1000) < evaluate_dpo.expit(towards_a / 1.5)
        decision = np.column_stack([towards_a[right][:200], -towards_a[~right][:200]])
        columns = evaluate_dpo.calibration_columns(decision)
        value = evaluate_dpo.reduce_columns("calibration_error", columns.mean(axis=0))
        samples = evaluate_dpo.reduce_columns("calibration_error", evaluate_dpo.bootstrap_means(columns, 300, 0))
        found = evaluate_dpo.estimate("calibration_error", value, samples)
        assert found["low"] <= found["value"] <= found["high"]
        covered += found["low"] <= truth <= found["high"]
    assert covered >= 80, "by percentiles 8 of 100"


def test_intervals_cover_the_truth_and_chance_is_not_called_support():
    """4,000 simulated studies of 300 users; tests/benchmarks/simulation.py has more users, differences and seeds."""
    none = simulation.simulate(users=300, difference=0, seeds=1, studies=4000, resamples=2000)
    assert 0.94 <= none["coverage"] <= 0.97 and none["SUPPORTED"] <= 0.025
    three = simulation.simulate(users=300, difference=0, seeds=3, studies=1000, resamples=1000, spread=8)
    assert 0.93 <= three["coverage"], "plain resampling of three seeds covers 80%"
    seen = simulation.simulate(users=300, difference=10, seeds=1, studies=1000, resamples=1000)
    assert seen["SUPPORTED"] > 0.8 and 0.93 <= seen["coverage"] <= 0.97


@pytest.mark.parametrize("users", [300, 1208, 6040])
@pytest.mark.parametrize("points", [1, 3, 5])
def test_a_dpo_that_is_better_on_some_users_gets_the_verdict_of_arithmetic(users, points):
    """DPO is right where SFT is, and on `points` percent of the users more: the bootstrap counts draws of those."""
    gained = round(points * users / 100)
    right = np.arange(users) < 0.6 * users
    better = right | (np.arange(users) >= users - gained)
    arms = {name: np.repeat(np.where(who, 1.0, -1.0)[:, None], 2, axis=1) for name, who in (("sft", right), ("dpo", better))}
    metrics = evaluate_dpo.compute_metrics(predictions_of(**arms), 2000, 0)
    found = metrics["comparisons"]["dpo - sft"]
    share = gained / users
    low, high = (100 / users * (stats.binom.ppf(level, users, share) + step) for level, step in ((0.025, -1), (0.975, 1)))
    assert found["value"] == pytest.approx(100 * share)
    assert (found["low"], found["high"]) == (pytest.approx(low, abs=110 / users), pytest.approx(high, abs=110 / users))
    assert found["p"] == pytest.approx(2 * 0.5**gained)
    wanted = {(300, 1): "INCONCLUSIVE", (1208, 1): "PARTIAL: small gain", (6040, 1): "PARTIAL: small gain"}
    assert metrics["verdict"] == wanted.get((users, points), "SUPPORTED")
    assert f"{found['value']:+.1f} percentage points" in metrics["sentence"]


def test_mcnemar_and_holm_agree_with_statsmodels():
    random = np.random.default_rng(2)
    p_values = []
    for _ in range(20):
        one, other = (random.random((2, 60)) < random.random((2, 1))).astype(float)
        table = [[np.sum((one == a) & (other == b)) for b in (1, 0)] for a in (1, 0)]
        p_values.append(evaluate_dpo.mcnemar(one, other))
        assert p_values[-1] == pytest.approx(contingency_tables.mcnemar(table, exact=True).pvalue)
    assert evaluate_dpo.holm(p_values) == pytest.approx(list(multitest.multipletests(p_values, method="holm")[1]))


def test_verdict_rules():
    for difference, low, high, wanted in [
        (3.0, 0.5, 5.5, "SUPPORTED"),
        (-2.0, -3.5, -0.5, "NOT SUPPORTED"),
        (0.3, -0.4, 0.9, "PARTIAL: comparable"),
        (1.5, 0.4, 2.6, "PARTIAL: small gain"),
        (3.0, -1.0, 7.0, "INCONCLUSIVE"),
        (-3.0, -7.0, 1.0, "INCONCLUSIVE"),
    ]:
        assert evaluate_dpo.verdict(difference, low, high) == wanted


def test_the_paired_bootstrap_agrees_with_scipy():
    random = np.random.default_rng(5)
    values = np.column_stack([random.random(150) < 0.7, random.random(150) < 0.6]).astype(float)
    samples = evaluate_dpo.bootstrap_means(values, 20_000, seed=1)
    low, high = evaluate_dpo.percentile_interval(samples[:, 0] - samples[:, 1])
    reference = stats.bootstrap(
        (values[:, 0], values[:, 1]), lambda x, y, axis: x.mean(axis) - y.mean(axis), paired=True, n_resamples=20_000, method="percentile", rng=2
    ).confidence_interval
    assert (low, high) == pytest.approx(tuple(reference), abs=0.01)


def test_mcnemar_and_detectable_difference():
    one, other = np.array([1] * 15 + [0] * 5 + [1] * 30), np.array([0] * 15 + [1] * 5 + [1] * 30)
    assert evaluate_dpo.mcnemar(one, other) == pytest.approx(2 * stats.binom.cdf(5, 20, 0.5))
    assert evaluate_dpo.mcnemar(one, one) == 1
    differences = np.random.default_rng(0).normal(0, 10, 400)
    shift = evaluate_dpo.detectable_difference(differences)
    power = stats.norm.cdf(shift / (differences.std(ddof=1) / 20) - stats.norm.ppf(0.975))
    assert power == pytest.approx(0.8, abs=1e-6)


def test_a_model_that_always_says_a_scores_exactly_half(scorer):
    model, tokenizer = scorer
    trees = [evaluate_dpo.pair_tree(pair, tokenizer) for pair in make_pairs(8)]
    letter = tokenizer(" A")["input_ids"][0]

    def prefer_a(module, inputs, logits):
        return logits.index_fill(-1, torch.tensor([letter]), 100.0)

    hook = model.get_output_embeddings().register_forward_hook(prefer_a)
    decision, _ = evaluate_dpo.score(model.eval(), trees, 4, "always A")
    hook.remove()
    assert evaluate_dpo.wins(decision).mean() == 0.5
    assert (decision[:, 0] > 0).all() and (decision[:, 1] < 0).all()


@pytest.mark.skipif(not REAL_PAIRS.exists(), reason="the 6,040 real pairs are not on this machine")
def test_baselines_on_the_real_pairs():
    train, test = split_pairs(load_pairs(REAL_PAIRS))
    accuracy = {arm: evaluate_dpo.wins(margin).mean() for arm, margin in evaluate_dpo.baseline_margins(train, test).items()}
    assert accuracy["always A"] == 0.5
    assert accuracy["popularity"] == pytest.approx(0.83, abs=0.02)
    assert 0.7 < accuracy["co-occurrence"] < 0.8
    assert 0.6 < accuracy["genre overlap"] < 0.75


def test_a_user_with_several_pairs_counts_once():
    pairs = make_pairs(3)
    more = [*pairs, pairs[0]]
    assert evaluate_dpo.film_counts(more) == evaluate_dpo.film_counts(pairs)
    together = [evaluate_dpo.baseline_margins(part, pairs)["co-occurrence"].tolist() for part in (more, pairs)]
    assert together[0] == together[1]


def test_baselines_are_fitted_on_the_training_part_only():
    pairs = make_pairs(30)
    margins = evaluate_dpo.baseline_margins([], pairs)
    assert not margins["popularity"].any() and not margins["co-occurrence"].any() and not margins["genre overlap"].any()


HEADER = "arm,kind,seed,pair_id,order,history,decision_margin,response_margin,preferred_more_popular\n"


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "cannot read"),
        ("arm,kind\na,b\n", "has no column"),
        (HEADER, "holds no rows"),
        (HEADER + "sft,model,,x,C,own,1,1,true\n", "neither A nor B"),
        (HEADER + "sft,model,,x,A,own,1,1,true\n" * 2, "two rows for the same"),
        (HEADER + "sft,model,,x,A,own,high,1,true\n", "cannot read"),
    ],
)
def test_a_file_that_holds_no_predictions_is_refused(tmp_path, content, problem):
    path = tmp_path / "p.csv"
    path.write_text(content)
    with pytest.raises(UserError, match=problem):
        evaluate_dpo.read_predictions(path)
