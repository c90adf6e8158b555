"""revdeq_hf.model_card: what a card says comes from the files of runs, and whatever does not is caught."""

import fnmatch
import importlib
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import ModelCardData, metadata_load
from huggingface_hub.repocard_data import model_index_to_eval_results
from safetensors.torch import load_file, save_file

from revdeq_hf import RevDEQConfig, RevDEQForImageClassification, RevDEQForSequenceClassification, RevDEQVisionConfig
from revdeq_hf.model_card import METRICS, TEMPLATE, check_card, main, render_card, write_card

ROOT = Path(__file__).parents[1]
KEPT = sorted(path.parent for path in (ROOT / "model_cards").glob("*/README.md"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory, scripts) -> Path:
    """A language model that was trained for four updates, and evaluated."""
    folder, words = tmp_path_factory.mktemp("trained") / "small-model", np.random.default_rng(0).choice(["alpha", "beta", "gamma"], (40, 6))
    text = folder.parent / "text.txt"
    text.write_text("\n".join(map(" ".join, words)) + "\n", encoding="utf-8")
    sizes = ["--vocab_size", "270", "--block_size", "24", "--hidden_size", "16", "--intermediate_size", "32", "--num_attention_heads", "2"]
    run = ["--max_steps", "4", "--logging_steps", "2", "--report_to", "none", "--sample_tokens", "0", "--disable_tqdm", "true"]
    importlib.import_module("train_language").main(["--train_file", str(text), "--output_dir", str(folder), *sizes, *run])
    importlib.import_module("evaluation").main([str(folder), "--test_file", str(text)])
    return folder


@pytest.fixture
def model(trained, tmp_path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "small-model"))


def change_json(path: Path, change) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def planted(folder: Path, old: str, new: str) -> None:
    path = folder / "README.md"
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


# --- what a card says ---


def test_a_card_says_what_the_runs_measured(model):
    record = json.loads((model / "evaluation.json").read_text())
    logs = json.loads((model / "trainer_state.json").read_text())["log_history"]
    text = render_card(model)
    assert not (model / "README.md").exists()
    for name, value in record["results"].items():
        assert f"| {METRICS['text-generation'][name]} | {value:.4g} |" in text
    for point in record["steps_curve"]:
        assert f"| {point['max_steps']} | {point['perplexity']:.4g} | {point['loss']:.4g} | {point['residual']:.4g} |" in text
    seconds = next(entry["train_runtime"] for entry in logs if "train_runtime" in entry)
    assert f"| seconds | {seconds:.4g} |" in text
    assert "| greatest drift | 0 |" in text
    assert "| drift of a backward pass with these weights | 0 |" in text
    run = json.loads((model / "results.json").read_text())["run"]
    assert run["weights"] == record["weights"]
    assert run["command"].startswith("python examples/train_language.py --train_file ")
    for said in (
        run["command"],
        run["device"],
        record["command"],
        record["weights"]["model.safetensors"],
        record["protocol"]["data_sha256"],
        record["date"],
        "| beta | 0.8 |",
    ):
        assert said in text
    assert "![Residual at each step, and quality over steps](evaluation_steps.png)" in text
    for section in ("Intended use", "Limits", "Training", "Solver", "Evaluation", "Use", "Licence", "Citation"):
        assert f"\n## {section}\n" in text
    assert "2509.12917" in text
    assert "Energy" not in text


def test_logs_of_a_training_that_gave_other_weights_are_refused(model):
    change_json(model / "results.json", lambda results: results["run"]["weights"].update({"model.safetensors": "0" * 64}))
    with pytest.raises(ValueError, match=r"results.json .* other weights than the folder holds, .*0000"):
        render_card(model)
    assert "| updates | 4 |" in render_card(model, weights=False)


def test_the_metadata_are_what_the_hub_reads(model):
    path = write_card(model, license="apache-2.0", base_model="user/base", datasets=["user/data"], tags="code", language="en")
    data = metadata_load(path)
    assert ModelCardData(**data).to_dict() == data
    expected = {"library_name": "transformers", "pipeline_tag": "text-generation", "license": "apache-2.0", "base_model": "user/base"}
    assert data.items() >= expected.items()
    assert (data["datasets"], data["tags"], data["language"]) == (["user/data"], ["revdeq", "deep-equilibrium-model", "code"], "en")
    record = json.loads((model / "evaluation.json").read_text())
    name, results = model_index_to_eval_results(data["model-index"])
    assert name == "small-model"
    assert {result.metric_type: result.metric_value for result in results} == record["results"]
    assert {(result.task_type, result.dataset_split, result.metric_args["window"]) for result in results} == {
        ("text-generation", "test", 24)
    }


def test_texts_come_from_card_yaml_and_energy_from_a_stated_power(model):
    (model / "card.yaml").write_text("title: Small\nhardware: one core\ntraining_command: python train.py\npower_watts: 40\n")
    text = render_card(model, limits="Made for a test.")
    assert text.split("---\n")[2].startswith("\n# Small\n")
    assert "as its author gives it: one core\n" in text
    assert "\n## Limits\n\nMade for a test.\n" in text
    seconds = float(re.search(r"\| seconds \| ([\d.,]+) \|", text)[1].replace(",", ""))
    hours = float(re.search(r"a power of 40 W, .*?, are\n([\d.e-]+) Wh", text)[1])
    assert hours == pytest.approx(40 * seconds / 3600, rel=1e-2)
    assert "an estimate, not a measurement" in text


def test_a_title_given_or_a_renamed_folder_changes_no_result(model):
    write_card(model, title="Another name")
    assert "# Another name\n" in (model / "README.md").read_text()
    check_card(model.rename(model.with_name("renamed")))


def test_without_logs_or_evaluation_a_card_says_so(model):
    for name in ("trainer_state.json", "results.json"):
        (model / name).unlink()
    assert "hold no log of its training" in render_card(model)
    (model / "evaluation.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"make it with python examples/evaluate\.py"):
        render_card(model)
    write_card(model, evaluated=False)
    check_card(model)
    text = (model / "README.md").read_text()
    assert "has not been evaluated" in text
    assert "model-index" not in text


def test_a_head_that_is_not_measured_gets_a_card_without_results(tmp_path):
    config = RevDEQConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_attention_heads=2)
    RevDEQForSequenceClassification(config).save_pretrained(tmp_path)
    path = write_card(tmp_path, evaluated=False)
    assert metadata_load(path)["pipeline_tag"] == "text-classification"
    assert 'pipeline("text-classification", model="USER/' in path.read_text()
    check_card(tmp_path)


def test_the_pipeline_of_a_card_runs(model):
    text = render_card(model, repo_id=str(model))
    (code,) = (part for part in re.findall(r"```python\n(.*?)```", text, re.S) if "import pipeline" in part)
    assert 'model_kwargs={"max_steps": 16}' in code
    names: dict = {}
    exec(code, names)  # as a reader of the card would run it
    assert names["use"].model.config.max_steps == 16
    assert "an_image.png" not in text


def test_images_of_a_card_s_pipeline_are_in_colour(tmp_path):
    for channels, told in ((1, False), (3, True)):
        sizes = dict(num_channels=channels, image_size=8, hidden_sizes=[16], expansion_ratios=[1])
        folder = tmp_path / str(channels)
        RevDEQForImageClassification(RevDEQVisionConfig(**sizes)).save_pretrained(folder)
        assert ('pipeline("image-classification", model="USER/' in render_card(folder, evaluated=False)) == told


def test_code_that_travels_is_told(model):
    change_json(model / "config.json", lambda config: config.pop("auto_map", None))
    assert "trust_remote_code" not in render_card(model)
    assert "pipeline(" in render_card(model)
    change_json(model / "config.json", lambda config: config.update(auto_map={"AutoModelForCausalLM": "modeling_revdeq.RevDEQForCausalLM"}))
    assert '.from_pretrained("USER/small-model", trust_remote_code=True)' in render_card(model)


# --- what is caught ---


@pytest.mark.parametrize(
    ("old", "new", "part"),
    [
        (r"(\| perplexity per token \| )[\d.]+", r"\g<1>3.21", "evaluation"),
        (r"(\| 4 \| )[\d.]+( \| )", r"\g<1>3.21\2", "evaluation"),
        (r"(\| drift of a backward pass with these weights \| )0", r"\g<1>3.21", "solver"),
        (r"(\| beta \| )0.8", r"\g<1>3.21", "solver"),
        (r"(\| training loss \| )[\d.]+", r"\g<1>3.21", "training"),
        (r"(\| parameters \| )[\d,]+", r"\g<1>3.21", "model"),
        (r"(<!-- end of evaluation -->)", r"It beats models of 3.21 times its size.\n\g<1>", "evaluation"),
    ],
)
def test_a_planted_number_is_caught(model, old, new, part, capsys):
    path = write_card(model)
    check_card(model)
    text = path.read_text()
    false, count = re.subn(old, new, text, count=1)
    assert count == 1
    path.write_text(false)
    with pytest.raises(ValueError, match=rf"(?s)the part '{part}' .*3\.21"):
        check_card(model)
    with pytest.raises(SystemExit, match="2"):
        main([str(model), "--check"])
    assert re.search(rf"error: the part '{part}' .*3\.21", capsys.readouterr().err)
    main([str(model)])  # writes the true one
    assert path.read_text() == text


def test_a_planted_number_in_the_metadata_or_in_a_sentence_is_caught(model):
    path = write_card(model)
    text = path.read_text()
    value = json.loads((model / "evaluation.json").read_text())["results"]["bits_per_byte"]
    planted(model, f"value: {value}", "value: 0.5")
    with pytest.raises(ValueError, match=r"eval_results .*0\.5"):
        check_card(model)
    for sentence in (
        "It has a perplexity of 3.21 on WikiText.",
        "Its accuracy\nis 99 percent.",
        "| bits per byte | 0.5 |",
        "```\naccuracy: 99\n```",
    ):
        path.write_text(text.replace("## Limits\n", f"## Limits\n\n{sentence}\n"))
        with pytest.raises(ValueError, match="a number of quality belongs in the generated parts"):
            check_card(model)
        with pytest.raises(ValueError, match="a number of quality belongs in the generated parts"):
            render_card(model, limits=sentence)
    false = "<!-- generated: evaluation -->\nperplexity 3.21\n<!-- end of evaluation -->\n\n## Limits\n"
    for changed in (text.replace("<!-- generated: solver -->", ""), text.replace("## Limits\n", false)):
        path.write_text(changed)
        with pytest.raises(ValueError, match="must have the generated parts"):
            check_card(model)


def test_prose_may_be_edited_and_outlives_new_results(model):
    (model / "card.yaml").write_text("license: mit\n")
    path = write_card(model)
    planted(model, "## Limits\n", "## Limits\n\nTrained on 40 lines only.\n")
    check_card(model)
    change_json(model / "evaluation.json", lambda record: record["results"].update(loss=1.25))
    with pytest.raises(ValueError, match=r"they say .*1\.25"):
        check_card(model)
    write_card(model)
    check_card(model)
    text = path.read_text()
    assert "Trained on 40 lines only." in text
    assert "| loss (nats per token) | 1.25 |" in text
    assert metadata_load(path)["license"] == "mit"
    path.write_text("# My own words\n")
    with pytest.raises(FileExistsError, match="move it away"):
        write_card(model)
    assert path.read_text() == "# My own words\n"


def test_what_card_yaml_no_longer_states_leaves_the_card(model):
    fields = model / "card.yaml"
    fields.write_text("license: mit\nbase_model: a/b\ndatasets: [a/c]\n")
    path = write_card(model)
    check_card(model)
    fields.write_text("license: cc-by-nc-4.0\n")
    with pytest.raises(ValueError, match=r"the part 'licence' .*'mit'.*'cc-by-nc-4\.0'"):
        check_card(model)
    write_card(model)
    check_card(model)
    assert metadata_load(path)["license"] == "cc-by-nc-4.0"
    assert metadata_load(path).keys().isdisjoint({"base_model", "datasets"})
    assert "## Licence\n\n<!-- generated: licence -->\ncc-by-nc-4.0\n<!-- end of licence -->\n" in path.read_text()
    planted(model, "license: cc-by-nc-4.0", "license: cc-by-nc-4.0\nlicense_name: mine")  # of which card.yaml knows nothing
    write_card(model)
    assert metadata_load(path)["license_name"] == "mine"
    planted(model, "license: cc-by-nc-4.0", "license: cc-by-nc-4.0\nbase_model: a/b")
    with pytest.raises(ValueError, match=r"base_model in the metadata .* is a/b, the files give None; state it in card\.yaml"):
        check_card(model)


def test_a_card_written_again_without_its_evaluation_has_no_results(model):
    path = write_card(model)
    (model / "evaluation.json").unlink()
    write_card(model, evaluated=False)
    check_card(model)
    assert metadata_load(path).keys().isdisjoint({"model-index", "metrics", "model_name"})


def test_results_of_other_settings_or_another_tokenizer_are_refused(model):
    write_card(model)
    config = (model / "config.json").read_text()
    for name, value in (("damping", 0.5), ("rope_parameters", {"rope_theta": 10.0, "rope_type": "default"}), ("hidden_act", "gelu")):
        change_json(model / "config.json", lambda content, name=name, value=value: content.update({name: value}))
        with pytest.raises(ValueError, match=f"was measured with {name} .*; measure anew"):
            check_card(model)
        (model / "config.json").write_text(config)
    change_json(model / "config.json", lambda content: content.update(drift_policy="raise", use_cache=False, attention_dropout=0.1))
    check_card(model)
    tokenizer = (model / "tokenizer.json").read_text()
    (model / "tokenizer.json").write_text(tokenizer + " ")
    with pytest.raises(ValueError, match=r"was measured with .*tokenizer\.json.*put these files back"):
        check_card(model)
    check_card(model, weights=False)
    change_json(
        model / "evaluation.json", lambda record: (record.pop("configuration"), record.pop("inputs"), record.update(solver={"beta": 0.8}))
    )
    check_card(model)  # of an evaluation that noted four settings


def test_results_of_other_weights_settings_or_plots_are_refused(model):
    write_card(model)
    record = (model / "evaluation.json").read_text()

    def refused(message: str) -> None:
        for act in (render_card, check_card):
            with pytest.raises(ValueError, match=message):
                act(model)
        (model / "evaluation.json").write_text(record)

    change_json(model / "evaluation.json", lambda content: content["results"].update(bleu=30.0))
    refused(r"bleu.*known for text-generation are perplexity")
    change_json(model / "evaluation.json", lambda content: content["results"].update(loss=float("nan")))
    refused("must be a finite number, got nan")
    change_json(model / "evaluation.json", lambda content: content.update(task="image-classification"))
    refused("is of a model for image-classification")
    change_json(model / "evaluation.json", lambda content: content.pop("protocol"))
    refused("lacks protocol")
    (model / "evaluation.json").write_text(record[:100])
    refused("is damaged, no JSON")
    plot = (model / "evaluation_steps.png").read_bytes()
    (model / "evaluation_steps.png").write_bytes(plot + b" ")
    refused("is not the plot that was drawn")
    (model / "evaluation_steps.png").write_bytes(plot)
    change_json(model / "config.json", lambda content: content.update(beta=0.7))
    refused(r"measured with beta 0\.8, config\.json has 0\.7")
    change_json(model / "config.json", lambda content: content.update(beta=0.8))
    check_card(model)
    weights = load_file(model / "model.safetensors")
    save_file({name: tensor + 1e-3 for name, tensor in weights.items()}, model / "model.safetensors", metadata={"format": "pt"})
    refused("is of other weights than the folder holds")
    check_card(model, weights=False)  # on request only


def test_errors_say_what_to_do(model, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no model in"):
        render_card(tmp_path)
    with pytest.raises(FileNotFoundError, match="writes it"):
        check_card(model)
    for texts, message in (
        ({"perplexity": "3"}, "no text 'perplexity'; known are title"),
        ({"power_watts": "40"}, r"it belongs in card\.yaml"),
        ({"title": 3}, "must be a text, got 3"),
        ({"tags": [1]}, "a text or a list of texts"),
    ):
        with pytest.raises(ValueError, match=message):
            render_card(model, **texts)
    for text, message in (("- a", "must hold names and texts"), ("a: [", "is no YAML"), ("power_watts: much", "must be a positive number")):
        (model / "card.yaml").write_text(text)
        with pytest.raises(ValueError, match=message):
            render_card(model)
    (model / "card.yaml").unlink()
    (model / "model.safetensors").rename(model / "weights.safetensors")
    with pytest.raises(FileNotFoundError, match="holds no weights"):
        render_card(model)
    change_json(model / "config.json", lambda config: config.update(model_type="llama", architectures=["LlamaForCausalLM"]))
    with pytest.raises(ValueError, match="models of this package"):
        render_card(model)


def test_the_command_tells_errors_in_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([str(tmp_path)])
    assert "python -m revdeq_hf.model_card: error: there is no model in" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("<!-- generated: evaluation -->\nperplexity 12.3\n<!-- end of evaluation -->", r"has a digit of its own: 'perplexity 12\.3'"),
        ("{{ results.perplexitty }}", "has no attribute 'perplexitty'"),
        ("{{ energy.watt_hours }}", "'energy' is undefined"),
        ("{% if %}", "cannot be filled"),
        ("A perplexity of 12.3.", "a number of quality"),
    ],
)
def test_a_template_takes_its_numbers_from_results(model, tmp_path, typed, message):
    template = tmp_path / "own.md"
    template.write_text("# {{ text.title }}\n<!-- generated: evaluation -->\n{{ results.perplexity }}\n<!-- end of evaluation -->\n")
    value = json.loads((model / "evaluation.json").read_text())["results"]["perplexity"]
    assert f"\n{value:.4g}\n" in render_card(model, template=template)
    template.write_text(typed)
    with pytest.raises(ValueError, match=message):
        render_card(model, template=template)


# --- the cards that are kept here ---


@pytest.mark.parametrize("folder", KEPT, ids=lambda folder: folder.name)
def test_kept_cards_say_what_their_results_give(folder):
    check_card(folder, weights=False)
    assert "license" in metadata_load(folder / "README.md")


def test_both_default_models_have_a_card():
    assert {folder.name for folder in KEPT} == {"image", "language"}


def test_the_template_is_one_file_and_travels_with_the_package():
    assert (ROOT / "model_cards" / "template.md").resolve() == TEMPLATE.resolve()
    listed = re.search(r"package-data\]\s*revdeq_hf = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.S)[1]
    assert any(fnmatch.fnmatch(TEMPLATE.name, pattern) for pattern in re.findall(r'"(.*?)"', listed))
