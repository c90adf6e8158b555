"""Which checkpoints are whole, which one is gone on from, and what happens where one cannot be written."""

import json
import os
import shutil
import subprocess
import sys
import time
from itertools import chain
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    DataCollatorForTokenClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

from revdeq_hf import RevDEQConfig, RevDEQForCausalLM
from revdeq_hf.checkpoints import ResumableTrainer, checkpoint_defect, checkpoint_to_resume, last_whole_checkpoint
from revdeq_hf.flops import training_flops

SMALL = dict(vocab_size=32, hidden_size=16, intermediate_size=16, num_attention_heads=2)
ROWS = [{"input_ids": ids, "labels": ids} for ids in torch.randint(32, (16, 8), generator=torch.Generator().manual_seed(0)).tolist()]


def trainer(folder, steps: int = 4, **settings) -> ResumableTrainer:
    more = {name: settings.pop(name) for name in ("save_total_limit", "resume_from_checkpoint") if name in settings}
    arguments = TrainingArguments(
        str(folder), max_steps=steps, save_steps=2, per_device_train_batch_size=4, use_cpu=True, report_to="none", disable_tqdm=True, **more
    )
    return ResumableTrainer(RevDEQForCausalLM(RevDEQConfig(**{**SMALL, **settings})), arguments, train_dataset=ROWS)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run with the whole checkpoints 2 and 4."""
    folder = tmp_path_factory.mktemp("trained")
    trainer(folder).train()
    return folder


@pytest.fixture
def run(trained, tmp_path) -> Path:
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


FILES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "training_args.bin", "config.json")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("left", [0.0, 0.5, 0.99])
def test_a_file_cut_short_gives_a_checkpoint_away(run, name, left):
    assert last_whole_checkpoint(run) == str(run / "checkpoint-4")
    path = run / "checkpoint-4" / name
    path.write_bytes(path.read_bytes()[: int(left * path.stat().st_size)])
    assert name in checkpoint_defect(path.parent)
    assert last_whole_checkpoint(run) == str(run / "checkpoint-2")


@pytest.mark.parametrize("name", FILES[:5])
def test_a_missing_file_gives_a_checkpoint_away(run, name):
    (run / "checkpoint-4" / name).unlink()
    assert "missing" in checkpoint_defect(run / "checkpoint-4")
    assert last_whole_checkpoint(run) == str(run / "checkpoint-2")


def test_a_missing_shard_gives_a_checkpoint_away(run):
    folder = run / "checkpoint-4"
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model-00002-of-00002.safetensors, named in" in checkpoint_defect(folder)
    shutil.copy(folder / "model-00001-of-00002.safetensors", folder / "model-00002-of-00002.safetensors")
    assert checkpoint_defect(folder) is None


def test_the_newest_checkpoint_is_found_by_number_and_other_folders_are_no_checkpoints(run):
    (run / "checkpoint-4").rename(run / "checkpoint-10")
    for name in ("checkpoint-12.tmp", "checkpoint-best", "checkpoint-20"):
        (run / name).mkdir()
    assert last_whole_checkpoint(run) == str(run / "checkpoint-10")


def test_a_new_run_does_not_overwrite_the_checkpoints_of_another(run):
    arguments = TrainingArguments(str(run), use_cpu=True)
    with pytest.raises(FileExistsError, match=r"checkpoint-4.*--resume_from_checkpoint true"):
        checkpoint_to_resume(arguments)
    for checkpoint in run.glob("checkpoint-*"):
        (checkpoint / "trainer_state.json").unlink()
    assert checkpoint_to_resume(arguments) is None


def test_a_new_run_does_not_overwrite_models_saved_alone(run):
    shutil.rmtree(run / "checkpoint-4")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (run / "checkpoint-2" / name).unlink()
    with pytest.raises(FileExistsError, match=r"models of an earlier run, checkpoint-2 .*--save_only_model"):
        checkpoint_to_resume(TrainingArguments(str(run), use_cpu=True))


def test_a_run_from_a_loaded_model_is_resumed(run, tmp_path):
    def going_on(steps: int) -> ResumableTrainer:
        made = trainer(tmp_path / "further", steps=steps)
        made.model = made.model_wrapped = RevDEQForCausalLM.from_pretrained(run / "checkpoint-4")
        return made

    going_on(2).train()
    again = going_on(4)
    assert again.model.config.to_dict()["_name_or_path"]
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 4


@pytest.mark.parametrize("kind", [str, Path])
def test_what_is_given_to_train_is_looked_at(run, kind):
    (run / "checkpoint-4" / "trainer_state.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"checkpoint-4' is not a whole checkpoint: trainer_state\.json"):
        trainer(run, steps=6).train(resume_from_checkpoint=kind(run / "checkpoint-4"))
    with pytest.raises(ValueError, match=r"beta 0\.5 instead of 0\.7"):
        trainer(run, steps=6, beta=0.7).train(resume_from_checkpoint=kind(run / "checkpoint-2"))
    newest = trainer(run, steps=3)
    newest.train(resume_from_checkpoint=True)
    assert newest.state.global_step == 3
    shutil.rmtree(run)
    with pytest.raises(FileNotFoundError, match="there is no whole checkpoint in"):
        trainer(run).train(resume_from_checkpoint=True)


def test_batches_grouped_by_length_are_the_same_after_an_interruption(tmp_path):
    """By transformers alone they were others: rows of an epoch were trained on twice, and others not at all."""
    rows = [{"input_ids": ids, "labels": ids} for ids in ([n, *range(n % 5)] for n in range(20))]
    seen: list[list[int]] = []

    class Watched(ResumableTrainer):
        def training_step(self, model, inputs, *rest, **named):
            seen.append(inputs["input_ids"][:, 0].tolist())
            return super().training_step(model, inputs, *rest, **named)

    def run(checkpoint: str | None) -> list[torch.Tensor]:
        torch.manual_seed(0)
        arguments = TrainingArguments(
            str(tmp_path), max_steps=10, save_steps=7, per_device_train_batch_size=4, use_cpu=True, report_to="none", disable_tqdm=True,
            train_sampling_strategy="group_by_length",
        )  # fmt: skip
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0}, unk_token="a")), pad_token="a")
        collator = DataCollatorForTokenClassification(tokenizer)
        model = RevDEQForCausalLM(RevDEQConfig(**SMALL))
        Watched(model, arguments, train_dataset=rows, data_collator=collator).train(checkpoint)
        return [parameter.detach().clone() for parameter in model.parameters()]

    whole = run(None)
    assert sorted(chain(*seen[5:])) == list(range(20)), "each row once an epoch"
    batches = seen[7:]
    seen.clear()
    torch.rand(3)  # whatever has been drawn since
    resumed = run(str(tmp_path / "checkpoint-7"))
    assert seen == batches
    assert all(map(torch.equal, resumed, whole))


def test_a_model_without_a_configuration_is_resumed(tmp_path):
    class Plain(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Embedding(32, 32)

        def forward(self, input_ids, labels):
            return {"loss": torch.nn.functional.cross_entropy(self.table(input_ids).flatten(0, 1), labels.flatten())}

    def made(steps: int) -> ResumableTrainer:
        arguments = TrainingArguments(str(tmp_path), max_steps=steps, save_steps=2, use_cpu=True, report_to="none", disable_tqdm=True)
        return ResumableTrainer(Plain(), arguments, train_dataset=ROWS)

    made(2).train()
    newest = checkpoint_to_resume(TrainingArguments(str(tmp_path), resume_from_checkpoint="true", use_cpu=True))
    again = made(4)
    again.train(resume_from_checkpoint=newest)
    assert again.state.global_step == 4


def test_a_half_written_checkpoint_is_not_made_whole_by_writing_over_it(run, monkeypatch):
    """A kill while checkpoint-4 is written anew must not leave new weights beside the old state."""

    def killed(*_):
        raise KeyboardInterrupt

    again = trainer(run, resume_from_checkpoint=str(run / "checkpoint-2"))
    monkeypatch.setattr(again, "_save_optimizer_and_scheduler", killed)
    with pytest.raises(KeyboardInterrupt):
        again.train(resume_from_checkpoint=str(run / "checkpoint-2"))
    assert (run / "checkpoint-4" / "model.safetensors").exists()
    assert last_whole_checkpoint(run) == str(run / "checkpoint-2")


@pytest.mark.parametrize("settings", [{"hidden_size": 32}, {"beta": 0.7}, {"max_steps": 3}], ids=str)
def test_a_checkpoint_of_another_model_is_refused_before_a_step(run, settings):
    other = trainer(run, steps=6, **settings)
    other.training_step = lambda *_, **__: pytest.fail("a step was computed")
    ((name, value),) = settings.items()
    flag = r"\(--solver_steps, of think_longer\.py --train_steps\) " if name == "max_steps" else ""  # there max_steps are updates
    with pytest.raises(ValueError, match=f"it has {name} {flag}[\\d.]+ instead of {value}"):
        other.train(resume_from_checkpoint=str(run / "checkpoint-4"))


def test_the_clock_stands_still_after_a_training_that_failed(tmp_path, monkeypatch):
    failing = trainer(tmp_path, steps=1)
    monkeypatch.setattr(failing, "training_step", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        failing.train()
    assert failing.clock.seconds == 0
    monkeypatch.undo()
    metrics = failing.train().metrics
    assert metrics["train_seconds"] == metrics["train_runtime"]


def test_one_process_of_several_accelerators_is_refused(tmp_path):
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    arguments._n_gpu = 2  # what a machine with two accelerators gives
    with pytest.raises(ValueError, match=r"one process sees 2 accelerators.*torchrun --nproc_per_node 2"):
        ResumableTrainer(model=torch.nn.Linear(1, 1), args=arguments)


def test_processes_that_would_each_train_alone_are_refused(tmp_path, monkeypatch):
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    assert arguments.world_size == 1
    monkeypatch.setenv("WORLD_SIZE", "2")  # what a launcher sets that the arguments have not heard of
    with pytest.raises(ValueError, match="2 processes were started"):
        ResumableTrainer(RevDEQForCausalLM(RevDEQConfig(**SMALL)), arguments, train_dataset=ROWS)


def test_older_checkpoints_go_only_when_the_new_one_is_whole(tmp_path, monkeypatch):
    kept = trainer(tmp_path, steps=6, save_total_limit=1)
    save = type(kept)._save_rng_state
    seen = []

    def look(self, folder):
        save(self, folder)
        seen.append(last_whole_checkpoint(tmp_path))

    monkeypatch.setattr(type(kept), "_save_rng_state", look)
    kept.train()
    assert seen == [None, str(tmp_path / "checkpoint-2"), str(tmp_path / "checkpoint-4")]
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-6"]


CODE = """
import sys
sys.path.insert(0, sys.argv[1])
from test_checkpoints import trainer
trainer(sys.argv[2], steps=int(sys.argv[3]), save_total_limit=1).train(resume_from_checkpoint=sys.argv[4] if len(sys.argv) > 4 else None)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits the size of another process's files")
@pytest.mark.parametrize("limit", [8_000, 20_000], ids=["weights", "optimizer"])
def test_a_full_disk_is_told_and_the_last_good_checkpoint_stays(tmp_path, limit):
    """The kernel refuses to write more than `limit` bytes to a file once checkpoint-2 is there, as a full disk would."""
    import resource

    command = [sys.executable, "-c", CODE, str(Path(__file__).parent), str(tmp_path), "100000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 120
    while not (whole := last_whole_checkpoint(tmp_path)):
        assert process.poll() is None, process.stderr.read()
        assert time.time() < deadline
        time.sleep(0.01)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (limit, limit))
    _, errors = process.communicate(timeout=120)
    whole = Path(last_whole_checkpoint(tmp_path))
    sizes = {name: (whole / name).stat().st_size for name in ("model.safetensors", "optimizer.pt")}
    assert (sizes["model.safetensors"] < limit) == (limit == 20_000), sizes
    assert sizes["optimizer.pt"] > limit, sizes
    assert process.returncode == 1
    told = errors.strip().splitlines()[-1]
    assert "could not be written" in told
    assert repr(str(whole)) in told
    assert "--resume_from_checkpoint true" in told
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == [whole.name]  # the torn one makes room
    more = str(int(whole.name.rsplit("-")[-1]) + 4)
    subprocess.run([*command[:-1], more, str(whole)], check=True, capture_output=True, env=dict(os.environ))
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / f"checkpoint-{more}")


def test_operations_are_those_of_all_evaluations(tmp_path):
    run = trainer(tmp_path, steps=2)
    run.train()
    expected = 2 * run.args.gradient_accumulation_steps * training_flops(run.model)
    assert expected > 0
    assert run.state.total_flos == expected
    llama = LlamaForCausalLM(LlamaConfig(**SMALL, num_hidden_layers=1))  # has no fixed point
    stock = ResumableTrainer(llama, run.args, train_dataset=ROWS)
    batch = {"input_ids": torch.zeros(4, 8)}
    assert stock.floating_point_ops(batch) == Trainer.floating_point_ops(stock, batch) > 0
