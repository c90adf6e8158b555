"""Publishing: checked before, in one commit, whole or not at all; the Hub is the loopback server of hub_server.py."""

import importlib
import json
import shutil
from pathlib import Path

import huggingface_hub.constants
import huggingface_hub.hf_api
import huggingface_hub.utils._http
import pytest
import torch
import transformers.utils.hub
from hub_server import HubServer
from safetensors.torch import load_file, save_file
from test_bundle import CLASSES, LANGUAGE, first_output, make, run_without_package
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments

import revdeq_hf
from revdeq_hf import publishing
from revdeq_hf.checkpoints import ResumableTrainer
from revdeq_hf.model_card import write_card
from revdeq_hf.publish import main
from revdeq_hf.publishing import BundleCallback, publish

NAME = "user/model"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub of its own for each test, and this process allowed to talk to it (the environment variables are read at import)."""
    with HubServer() as server:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
        monkeypatch.setattr(
            huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", server.url)  # of the functions of the package, made at import
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", None, raising=False)  # transformers' own, made at the first call, after 5.17
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
        monkeypatch.setattr(huggingface_hub.utils._http.time, "sleep", lambda seconds: None)  # between attempts
        monkeypatch.setenv("HF_TOKEN", server.token)
        yield server


@pytest.fixture
def folder(tmp_path) -> Path:
    place = tmp_path / "saved"
    make("RevDEQForCausalLM").save_pretrained(place)
    vocabulary = {f"word{index}": index for index in range(LANGUAGE["vocab_size"])}
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, "word0"))).save_pretrained(place)
    (place / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    return place


@pytest.fixture
def trusting(monkeypatch):
    """Leaves out the check in a clean process, which takes seconds, where a test is about something else."""

    def same_process(stage, auto_class, place):
        model = revdeq_hf.RevDEQForCausalLM.from_pretrained(stage)
        return publishing._examine(model.eval(), backward=True)

    monkeypatch.setattr(publishing, "_in_clean_process", same_process)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_published_loaded_by_name_older_revision_offline(hub, folder, tmp_path):
    """The whole way: published twice, the other classes pushed; loaded by name without the package, then an older revision, then without the Hub."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    before = contents(folder)
    first = publish(folder, NAME)
    assert contents(folder) == before
    assert first.url.startswith(hub.url)
    assert "AutoModelForCausalLM without this package: the same outputs, bit for bit" in first.checks
    assert "drift of a backward pass: 0" in first.checks
    assert len(hub.repositories[NAME].messages) == 2  # the Hub's own and one
    old = hub.repositories[NAME].refs["main"]
    expected = {"old": first_output(revdeq_hf.RevDEQForCausalLM.from_pretrained(folder))}
    assert hub.files(NAME)["model.safetensors"] == before["model.safetensors"]

    changed = make("RevDEQForCausalLM")
    changed.push_to_hub(NAME)
    expected["RevDEQForCausalLM"] = first_output(changed)
    names = {"RevDEQForCausalLM": NAME}
    for name in CLASSES.keys() - names.keys():
        names[name] = f"user/{name}"
        model = make(name)
        model.push_to_hub(names[name])
        expected[name] = first_output(model)
    code = f"""
from safetensors.torch import save_file
names, outputs = {names!r}, {{}}
for name, auto_class in {CLASSES!r}.items():
    if auto_class == "AutoBackbone" and transformers.utils.hub.is_offline_mode():
        continue  # transformers asks the Hub for its name
    outputs[name] = first_output(load(names[name], auto_class)).contiguous()
outputs["old"] = first_output(load({NAME!r}, "AutoModelForCausalLM", revision={old!r})).contiguous()
assert transformers.AutoTokenizer.from_pretrained({NAME!r}).decode([3]) == "word3"
save_file(outputs, "outputs.safetensors")
"""
    environment = dict(HF_ENDPOINT=hub.url, HF_HUB_DISABLE_XET="1")
    run_without_package(code, tmp_path, **environment, HF_HUB_OFFLINE="0")
    online = load_file(tmp_path / "outputs.safetensors")
    (tmp_path / "outputs.safetensors").unlink()
    asked = len(hub.requests)
    run_without_package(code, tmp_path, **environment, HF_HUB_OFFLINE="1")
    offline = load_file(tmp_path / "outputs.safetensors")
    assert len(hub.requests) == asked
    torch.set_num_threads(threads)
    assert online.keys() == expected.keys()
    assert offline.keys() == expected.keys() - {"RevDEQVisionBackbone"}
    assert not torch.equal(expected["old"], expected["RevDEQForCausalLM"])
    for outputs in (online, offline):
        for name, output in outputs.items():
            assert torch.equal(output, expected[name]), name


@pytest.mark.usefixtures("trusting")
@pytest.mark.parametrize("at", ["PUT /lfs", f"POST /api/models/{NAME}/commit", f"POST /api/models/{NAME}/preupload"])
def test_a_connection_that_breaks_leaves_what_was_there(hub, folder, at):
    publish(folder, NAME)
    served, before = hub.files(NAME), contents(folder)
    make("RevDEQForCausalLM").save_pretrained(folder)
    before = contents(folder)
    hub.break_at = at
    with pytest.raises(ConnectionError, match="nothing was published, 'user/model' shows what it showed before"):
        publish(folder, NAME)
    assert hub.files(NAME) == served
    assert contents(folder) == before
    hub.break_at = None
    assert publish(folder, NAME).url
    assert hub.files(NAME)["model.safetensors"] == before["model.safetensors"] != served["model.safetensors"]


@pytest.mark.usefixtures("trusting")
def test_no_network_no_token_no_right(hub, folder, monkeypatch):
    hub.break_at = ""
    with pytest.raises(ConnectionError, match="could not be reached"):
        publish(folder, NAME)
    hub.break_at = None
    with pytest.raises(PermissionError, match=r"403.*nothing was published.*no right to write"):
        publish(folder, NAME, token=hub.reader)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(PermissionError, match="hf auth login"):
        publish(folder, NAME)
    assert hub.repositories == {}


@pytest.mark.usefixtures("trusting")
def test_private_pull_request_and_branch(hub, folder):
    publish(folder, NAME, private=True)
    assert hub.repositories[NAME].private
    main_files = hub.files(NAME)
    make("RevDEQForCausalLM").save_pretrained(folder)
    asked = publish(folder, NAME, create_pr=True)
    assert asked.url == f"{hub.url}/{NAME}/discussions/1"
    assert hub.files(NAME, "refs/pr/1")["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    publish(folder, NAME, revision="trial")
    assert hub.files(NAME, "trial").keys() == main_files.keys()
    assert hub.files(NAME) == main_files
    assert "'user/model' was private before and stays so" in publish(folder, NAME, private=False).warnings[0]
    assert publish(folder, "user/open", private=False).warnings == []
    with pytest.raises(PermissionError, match="public already"):
        publish(folder, "user/open", private=True)


@pytest.mark.usefixtures("trusting")
def test_weights_under_other_names_are_replaced_in_the_same_commit(hub, folder, tmp_path):
    sharded = tmp_path / "sharded"
    revdeq_hf.RevDEQForCausalLM.from_pretrained(folder).save_pretrained(sharded, max_shard_size="30KB")
    publish(sharded, NAME)
    assert sum(name.endswith(".safetensors") for name in hub.files(NAME)) > 1
    done = publish(folder, NAME)
    assert "model.safetensors.index.json" in done.deleted
    assert [name for name in hub.files(NAME) if "safetensors" in name] == ["model.safetensors"]
    assert len(hub.repositories[NAME].messages) == 3


@pytest.mark.usefixtures("trusting")
def test_what_belongs_to_the_weights_before_is_deleted_and_nothing_else(hub, folder, tmp_path):
    measured = ("evaluation.json", "evaluation_steps.png", "results.json", "training.png")
    for name in (*measured, "LICENSE-DATA", "logo.png"):
        (folder / name).write_text("{}")
    publish(folder, NAME)
    make("RevDEQForCausalLM").save_pretrained(tmp_path / "other")
    done = publish(tmp_path / "other", NAME)
    assert set(done.deleted) == {*measured, "tokenizer.json", "tokenizer_config.json"}
    assert hub.files(NAME).keys() - done.files.keys() == {".gitattributes", "README.md", "LICENSE-DATA", "logo.png"}


@pytest.mark.usefixtures("trusting")
def test_a_card_on_the_hub_that_was_not_made_here_stays(hub, folder):
    publish(folder, NAME)
    own = (folder / "README.md").read_bytes()
    (folder / "README.md").unlink()
    done = publish(folder, NAME)
    assert hub.files(NAME)["README.md"] == own
    assert "README.md" not in done.files
    assert "README.md of 'user/model' was not made here and stays" in str(done)
    publish(folder, "user/made")
    write_card(folder, evaluated=False, title="Another")
    card = folder / "README.md"
    publish(folder, "user/made")
    assert b"# Another" in hub.files("user/made")["README.md"]
    card.unlink()
    assert "README.md" in publish(folder, "user/made").files  # one made here is made anew
    assert b"# Another" not in hub.files("user/made")["README.md"]


@pytest.mark.usefixtures("trusting")
def test_a_card_names_its_repository(hub, folder):
    (folder / "README.md").unlink()
    write_card(folder, evaluated=False)
    before = contents(folder)
    publish(folder, NAME)
    assert contents(folder) == before
    assert b'"USER/saved"' in before["README.md"]
    assert hub.files(NAME)["README.md"] == before["README.md"].replace(b"USER/saved", b"user/model")
    publish(make("RevDEQForCausalLM"), "user/of-memory")
    assert b"\n# of-memory\n" in hub.files("user/of-memory")["README.md"]


@pytest.mark.usefixtures("trusting")
def test_paths_of_this_machine_are_told(folder, capsys):
    assert publish(folder, NAME, dry_run=True).warnings == []
    command = "python examples/evaluate.py runs/a --test_file /home/somebody/private/test.txt"
    (folder / "evaluation.json").write_text(json.dumps({"command": command, "see": "https://example.org/a/b", "unit": "tokens/s/GPU"}))
    main([str(folder), NAME, "--dry_run"])
    told = [line.strip() for line in capsys.readouterr().out.splitlines() if "warning" in line]
    (told,) = told
    assert told.startswith(
        "warning  evaluation.json names paths of this machine: /home/somebody/private/test.txt; give the scripts relative"
    )


@pytest.mark.usefixtures("trusting")
def test_weights_that_are_not_loaded_are_not_sent(folder):
    for name in ("model.old.safetensors", "model-00001-of-00002.safetensors"):
        shutil.copy(folder / "model.safetensors", folder / name)
    shown = publish(folder, NAME, dry_run=True)
    assert [name for name in shown.files if "safetensors" in name] == ["model.safetensors"]
    assert {"model.old.safetensors", "model-00001-of-00002.safetensors"} <= shown.left_out.keys()


@pytest.mark.usefixtures("trusting")
def test_dry_run_tells_and_sends_nothing(hub, folder, capsys):
    for name in ("training_args.bin", "optimizer.pt", "notes.txt", ".env"):
        (folder / name).write_text("not for others")
    (folder / "checkpoint-5").mkdir()
    main([str(folder), NAME, "--dry_run"])
    shown = capsys.readouterr().out
    assert hub.requests == []
    for line in (
        "left out  training_args.bin: may hold a pickle",
        "left out  optimizer.pt: may hold a pickle",
        "left out  notes.txt: not a part",
        "left out  .env: not a part",
        "left out  checkpoint-5: a folder",
        "nothing was sent to user/model",
    ):
        assert line in shown
    sent = publish(folder, NAME, dry_run=True).files
    assert sent["model.safetensors"] == (folder / "model.safetensors").stat().st_size
    assert f"{sent['model.safetensors']:,}  model.safetensors" in shown
    assert set(sent) == {path.name for path in folder.iterdir()} - {
        "training_args.bin",
        "optimizer.pt",
        "notes.txt",
        ".env",
        "checkpoint-5",
    }


def test_a_model_in_memory_with_its_processor(folder, monkeypatch, trusting):
    model, tokenizer = make("RevDEQForCausalLM"), PreTrainedTokenizerFast.from_pretrained(folder)
    shown = publish(model, NAME, processor=tokenizer, dry_run=True)
    assert "tokenizer.json" in shown.files
    assert "README.md" in shown.files
    assert "the saved weights are the model's" in shown.checks
    with pytest.raises(ValueError, match="processor goes with a model"):
        publish(folder, NAME, processor=tokenizer, dry_run=True)
    save = type(model).save_pretrained

    def save_another(self, place, **kwargs):
        save(self, place, **kwargs)
        weights = load_file(place / "model.safetensors")
        save_file({**weights, "lm_head.weight": weights["lm_head.weight"] + 1}, place / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(type(model), "save_pretrained", save_another)
    with pytest.raises(ValueError, match=r"not the model's, they differ at 'lm_head.weight'"):
        publish(model, NAME, dry_run=True)


def spoil(folder: Path, kind: str) -> None:
    config, weights = folder / "config.json", folder / "model.safetensors"
    content = json.loads(config.read_text())
    tensors = load_file(weights)
    if kind == "no folder":
        shutil.rmtree(folder)
    elif kind == "no config":
        config.unlink()
    elif kind == "config cut short":
        config.write_text(config.read_text()[:50])
    elif kind == "another model":
        config.write_text(json.dumps({**content, "model_type": "llama"}))
    elif kind == "a billion steps":
        config.write_text(json.dumps({**content, "max_steps": 10**9}))
    elif kind == "without its code":
        config.write_text(json.dumps({name: value for name, value in content.items() if name != "auto_map"}))
    elif kind == "a class of somebody else":
        config.write_text(json.dumps({**content, "auto_map": {**content["auto_map"], "AutoModel": "somebody/else--module.Class"}}))
    elif kind == "code of somebody else":
        (folder / "layer_revdeq.py").write_text("import os\n")
    elif kind == "no weights":
        weights.unlink()
    elif kind == "a variant alone":
        weights.rename(folder / "model.fp16.safetensors")
    elif kind == "weights cut short":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif kind == "header tampered with":
        weights.write_bytes((10**9).to_bytes(8, "little") + weights.read_bytes()[8:])
    elif kind == "another shape":
        save_file({**tensors, "lm_head.weight": torch.zeros(5, 32)}, weights, metadata={"format": "pt"})
    elif kind == "a weight missing":
        del tensors["lm_head.weight"]
        save_file(tensors, weights, metadata={"format": "pt"})
    elif kind == "not finite":
        save_file({**tensors, "lm_head.weight": tensors["lm_head.weight"] * torch.nan}, weights, metadata={"format": "pt"})
    elif kind == "a token":
        (folder / "tokenizer_config.json").write_text(json.dumps({"token": "hf_" + "a" * 34}))
    elif kind == "a key in the weights' header":
        save_file(tensors, weights, metadata={"format": "pt", "key": "AKIA" + "A" * 16})
    elif kind == "an adapter":
        (folder / "adapter_config.json").write_text("{}")


def test_what_is_no_model_is_told():
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(make("RevDEQForCausalLM"), peft.LoraConfig(target_modules=["q_proj"]))
    for model, name in ((adapted, "PeftModel"), (torch.nn.Sequential(), "Sequential")):
        with pytest.raises(ValueError, match=rf"got {name}; merge an adapter first, model\.merge_and_unload\(\)"):
            publish(model, NAME, dry_run=True)


def test_a_name_that_no_repository_can_have_is_told_without_the_network(folder):
    with pytest.raises(ValueError, match="Repo id must use alphanumeric chars"):
        publish(folder, "a name", dry_run=True)


@pytest.mark.usefixtures("trusting")
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("no folder", "there is no folder"),
        ("no config", r"has no config\.json"),
        ("config cut short", "not the configuration of a model"),
        ("another model", "model_type is 'llama', expected one of 'revdeq'"),
        ("a billion steps", "max_steps must be a whole number from 1 to"),
        ("without its code", "save it once more"),
        ("a class of somebody else", "save it once more"),
        ("code of somebody else", r"layer_revdeq\.py missing or other"),
        ("no weights", r"holds no weights: expected model\.safetensors"),
        ("a variant alone", r"holds no weights: expected model\.safetensors .* without a variant"),
        ("weights cut short", "the model does not load"),
        ("header tampered with", "the model does not load"),
        ("another shape", "the model does not load"),
        ("a weight missing", r"do not belong to the configuration, missing keys: \['lm_head.weight'\]"),
        ("not finite", "not finite"),
        ("a token", r"tokenizer_config\.json seems to hold a Hugging Face token \(hf_aaa"),
        ("a key in the weights' header", r"model\.safetensors seems to hold an AWS key"),
        ("an adapter", "merge_and_unload"),
    ],
)
def test_bad_input_is_told_and_nothing_is_sent(hub, folder, kind, message):
    spoil(folder, kind)
    before = contents(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        publish(folder, NAME)
    assert contents(folder) == before
    assert hub.requests == []


@pytest.mark.usefixtures("trusting")
def test_other_outputs_or_a_drift_stop_it(folder, monkeypatch, capsys):
    examine = publishing._in_clean_process
    for change, message in (({"output": 1e-6}, "computes other outputs"), ({"drift": 1e-9}, "drift of a backward pass is 1e-09")):

        def changed(*arguments, change=change):
            return {name: value + change.get(name, 0) for name, value in examine(*arguments).items()}

        monkeypatch.setattr(publishing, "_in_clean_process", changed)
        with pytest.raises(ValueError, match=message):
            publish(folder, NAME, dry_run=True)
    with pytest.raises(SystemExit) as stopped:
        main([str(folder), NAME, "--dry_run"])
    assert stopped.value.code == 1
    assert "not published: the drift of a backward pass is 1e-09" in capsys.readouterr().err


def arguments_of(place: Path, **settings) -> TrainingArguments:
    rest = dict(push_to_hub=True, hub_model_id=NAME, report_to="none", use_cpu=True, disable_tqdm=True)
    return TrainingArguments(str(place), max_steps=2, save_steps=1, **{**rest, **settings})


DATA = [{"input_ids": torch.arange(8), "labels": torch.arange(8)}] * 8


def test_trainer_pushes_the_same_model(hub, tmp_path):
    """Also what it pushes during training, with BundleCallback: there transformers takes weights and configuration only."""
    place = tmp_path / "run"
    arguments = arguments_of(place, hub_always_push=True)
    trainer = Trainer(make("RevDEQForCausalLM"), arguments, train_dataset=DATA, callbacks=[BundleCallback()])
    trainer.train()
    trainer.push_in_progress.wait_until_done()
    code = {path.name for path in (tmp_path / "run" / "checkpoint-2").glob("*.py")}
    during = hub.files(NAME)
    assert "modeling_revdeq.py" in code
    assert code | {"requirements.txt", "LICENSE"} <= during.keys()
    trainer.push_to_hub()
    for name in (*code, "config.json", "model.safetensors", "LICENSE", "requirements.txt"):
        assert hub.files(NAME)[name] == (tmp_path / "run" / name).read_bytes(), name
    assert hub.files(NAME)["model.safetensors"] == (place / "checkpoint-2" / "model.safetensors").read_bytes()


@pytest.mark.usefixtures("trusting")
def test_resumable_trainer_pushes_what_publish_sends(hub, tmp_path):
    """Whatever it pushed during training, the end is one repository: no pickles, no logs, the card made from results; checkpoints of Trainer stay."""
    place = tmp_path / "run"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, "a")), pad_token="a")
    arguments = arguments_of(place, hub_always_push=True, hub_strategy="checkpoint")
    trainer = ResumableTrainer(make("RevDEQForCausalLM"), arguments, train_dataset=DATA, processing_class=tokenizer)
    trainer.train()
    during = hub.files(NAME)
    assert {"training_args.bin", "modeling_revdeq.py"} <= during.keys()  # Trainer's own, and BundleCallback's
    resumable = {name: content for name, content in during.items() if name.startswith("last-checkpoint/")}
    assert "last-checkpoint/optimizer.pt" in resumable
    trainer.save_model()  # pushes, as Trainer's does
    assert hub.repositories[NAME].messages[-1] == "Model save"
    assert trainer.push_to_hub().checks == publish(place, "user/published").checks
    pushed, published = hub.files(NAME), hub.files("user/published")
    assert {name: content for name, content in pushed.items() if "/" in name} == resumable
    assert pushed.keys() - resumable.keys() == published.keys()
    for name, content in published.items():
        if name != "README.md":  # names the repository
            assert pushed[name] == content, name
    assert pushed["README.md"].replace(NAME.encode(), b"user/published") == published["README.md"]
    assert (place / "training_args.bin").exists()


@pytest.mark.usefixtures("trusting")
def test_errors_of_a_push_are_those_of_publish(hub, tmp_path):
    trainer = ResumableTrainer(make("RevDEQForCausalLM"), arguments_of(tmp_path / "run"), train_dataset=DATA)
    with pytest.raises(ValueError, match=r"push_to_hub got language, tags, blocking=False, which it has no use for"):
        trainer.push_to_hub(language="en", tags="a", blocking=False)
    hub.break_at = f"POST /api/models/{NAME}/commit"
    with pytest.raises(ConnectionError, match="nothing was published"):
        trainer.save_model()
    assert (tmp_path / "run" / "model.safetensors").exists()
    hub.break_at = None
    trainer.save_model()
    assert "model.safetensors" in hub.files(NAME)
    later = ResumableTrainer(make("RevDEQForCausalLM"), arguments_of(tmp_path / "later", push_to_hub=False, hub_model_id=None))
    assert later.push_to_hub(private=True).repo_id == "user/later"  # named after the folder
    assert hub.repositories["user/later"].private


def test_other_models_are_pushed_as_trainer_does(hub, tmp_path):
    config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    trainer = ResumableTrainer(LlamaForCausalLM(config), arguments_of(tmp_path / "run"), train_dataset=DATA)
    trainer.push_to_hub(language="en")
    assert "generated_from_trainer" in hub.files(NAME)["README.md"].decode()
    assert "modeling_revdeq.py" not in hub.files(NAME)


@pytest.mark.usefixtures("trusting", "scripts")
def test_the_script_pushes_its_results(hub, tmp_path):
    train_language = importlib.import_module("train_language")
    (tmp_path / "text.txt").write_text("alpha beta gamma\n" * 300)
    files = [flag for split in ("train", "validation", "test") for flag in (f"--{split}_file", str(tmp_path / "text.txt"))]
    shape = ["--vocab_size", "300", "--block_size", "16", "--hidden_size", "16", "--intermediate_size", "16", "--sample_tokens", "1"]
    hub_arguments = ["--push_to_hub", "true", "--hub_model_id", NAME, "--hub_strategy", "end", "--hub_token", hub.token]
    place = tmp_path / "run"
    train_language.main([*files, *shape, *hub_arguments, "--output_dir", str(place), "--max_steps", "2", "--use_cpu", "true"])
    assert hub.repositories[NAME].messages[-2:] == ["Model save", "End of training"]
    assert hub.files(NAME)["results.json"] == (place / "results.json").read_bytes()
    assert {"modeling_revdeq.py", "tokenizer.json", "training.png"} <= hub.files(NAME).keys()
    assert "From the logs of the training" in hub.files(NAME)["README.md"].decode()
    assert not any(hub.token.encode() in content for content in hub.files(NAME).values())
