"""Real processes: two ranks equal one, a run that was stopped equals one that was not, and a rank that fails ends the others.

What is run and what must agree stands in distributed_worker.py; all runs but the scripts' are made once, by `folder`.
"""

import time
from pathlib import Path

import distributed_worker as worker
import pytest
import torch
import transformers
from accelerate.commands.config import load_config_from_file
from accelerate.utils import merge_fsdp_weights
from packaging.version import Version
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

from revdeq_hf import RevDEQForCausalLM

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="these ranks are processes on a CPU")
# transformers 5.17 reads an optimizer's state to args.device, which torch.load does not know where it is called cpu:0, as under DDP on a CPU
IMPOSSIBLE = {"ddp_noisy_resumed"} if Version(transformers.__version__) < Version("5.23") else set()
PAIRS = [pytest.param(pair, id=f"{pair.run}-{pair.other}") for pair in worker.EQUIVALENCES if pair.run not in IMPOSSIBLE]
# one of each script and configuration; benchmarks/equivalences.py runs all four
SCRIPTS = [
    pytest.param(pair, id=pair.run) for pair in worker.SCRIPT_EQUIVALENCES if pair.run in ("language_script_ddp", "image_script_fsdp2")
]
INSIDE = [f"{gradient}_inside" for gradient in worker.REFUSED_INSIDE]
ZERO_REFUSED = {"zero3_frozen": "got an x without a gradient", "zero3_trajectory": "got output_trajectory=True"}
CONFIGS = sorted((worker.EXAMPLES / "accelerate").glob("*.yaml"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    names = dict.fromkeys(name for pair in worker.EQUIVALENCES for name in (pair.other, pair.run) if name not in IMPOSSIBLE)
    worker.launch_all(folder, [*names, *INSIDE, "tp_heads"])
    return folder


@pytest.mark.parametrize("pair", PAIRS)
def test_law_8_runs_agree(pair, folder):
    found = worker.difference(folder, pair)
    if pair.tolerance is None:
        assert worker.worst(found) > 1e-3, "they agree after all: say so"
    else:
        assert worker.worst(found) <= pair.tolerance, found


def test_law_2_no_run_drifted(folder):
    drifts = {
        path.stem: worker.figures_of(folder, path.stem).get("drift")
        for path in folder.glob("*.json")
        if path.stem.split(".")[0] not in (*INSIDE, "tp_heads")
    }
    assert len(drifts) > 50
    assert set(drifts.values()) == {0.0}, drifts


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
def test_sampled_steps_are_those_of_rank_0(wrapper, folder):
    steps = worker.figures_of(folder, f"{wrapper}_sampled")["steps"]
    assert steps == worker.figures_of(folder, f"{wrapper}_sampled.1")["steps"] == worker.figures_of(folder, "one_sampled")["steps"]
    assert len(set(steps)) > 2


def test_shards_are_looked_into_as_whole_weights_are(folder):
    found, expected = (worker.figures_of(folder, f"{wrapper}_smoothed") for wrapper in ("fsdp2", "ddp"))
    assert found["looked_drift"] == expected["looked_drift"] == [0.0]
    torch.testing.assert_close(torch.tensor(found["radius"]), torch.tensor(expected["radius"]), rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", ["reversible", *worker.TENSOR_PARALLEL])
def test_a_model_in_parts_stops_generates_and_is_saved_as_a_whole_one(name, folder):
    found, expected = (worker.figures_of(folder, f"{name}_{kind}") for kind in ("tp", "none"))
    assert found["tokens"] == expected["tokens"]
    assert found["solver_steps"] == expected["solver_steps"]
    assert (len({step for row in found["solver_steps"] for step in row}) > 1) == (name == "stopping")
    before, after = (RevDEQForCausalLM.from_pretrained(folder / f"{name}_tp{end}").state_dict() for end in ("", "_again"))
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())


def test_heads_that_ranks_would_have_to_divide_are_refused(folder):
    for name in ("tp_heads", "tp_heads.1"):
        error = worker.figures_of(folder, name)["error"]
        assert "got num_key_value_heads=1, of which a rank has 0.5; choose a tp_size that divides num_key_value_heads" in error


@pytest.mark.parametrize("run", INSIDE)
def test_law_11_a_sharded_unit_inside_the_solve_is_refused(run, folder):
    for name in (run, f"{run}.1"):
        assert "requires grad and is neither one of its parameters" in worker.figures_of(folder, name)["error"]


@pytest.mark.parametrize("saved", ["checkpoint-6", "final"])
@pytest.mark.parametrize("run", ["ddp_noisy", "fsdp2_full"])
def test_whole_weights_load_on_one_rank(run, saved, folder):
    expected = load_file(folder / f"{run}.safetensors")
    for name, tensor in RevDEQForCausalLM.from_pretrained(folder / run / saved).state_dict().items():
        assert torch.equal(tensor, expected[f"weight {name}"]), name


def test_shards_are_merged_to_whole_weights(folder, tmp_path):
    checkpoint, expected = folder / "fsdp2_sharded" / "checkpoint-6", load_file(folder / "fsdp2_sharded.safetensors")
    assert not list(checkpoint.glob("model*"))
    merge_fsdp_weights(checkpoint / "pytorch_model_fsdp_0", tmp_path)
    merged = load_file(tmp_path / "model.safetensors")
    assert merged.keys() == {name.removeprefix("weight ") for name in expected if name.startswith("weight ")}
    for name, tensor in merged.items():
        assert torch.equal(tensor, expected[f"weight {name}"]), name


def test_shards_without_fsdp_are_refused(folder, tmp_path):
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    trainer = Trainer(model=worker.build("language"), args=arguments, train_dataset=worker.rows_of("language", 8))
    with pytest.raises(ValueError, match=r"checkpoint-3 is only supported when using PyTorch FSDP"):
        trainer.train(resume_from_checkpoint=str(folder / "fsdp2_sharded" / "checkpoint-3"))


@pytest.mark.parametrize("wrapper", ["ddp", pytest.param("fsdp2", marks=pytest.mark.slow)])
def test_a_rank_that_dies_ends_the_other_with_its_error(wrapper, tmp_path):
    began = time.monotonic()
    done = worker.launch(2, tmp_path, [f"{wrapper}_dies"], timeout=120)
    assert time.monotonic() - began < 100
    assert done.returncode != 0
    assert f"[rank1]: RuntimeError: {worker.DEATH}" in done.stdout
    assert done.stdout.count("'loss': ") == 2, "it died in the third update"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configurations_are_accelerate_s(path):
    config = load_config_from_file(str(path))
    assert config.num_processes == 2
    assert config.mixed_precision == "no"  # the script's flag decides
    if path.stem == "fsdp2":
        assert config.fsdp_config["fsdp_version"] == 2
        assert "fsdp_transformer_layer_cls_to_wrap" not in config.fsdp_config  # the models' own `_no_split_modules`
    assert f"accelerate launch --config_file examples/accelerate/{path.name}" in path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def zero_folder(tmp_path_factory) -> Path:
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed, and no dependency of the package")
    folder = tmp_path_factory.mktemp("zero")
    worker.launch_all(folder, [*dict.fromkeys(name for pair in worker.ZERO_EQUIVALENCES for name in (pair.other, pair.run)), *ZERO_REFUSED])
    return folder


@pytest.mark.parametrize("pair", worker.ZERO_EQUIVALENCES, ids=lambda pair: f"{pair.run}-{pair.other}")
def test_law_8_deepspeed_trains_what_one_rank_does(pair, zero_folder):
    found = worker.difference(zero_folder, pair)
    assert worker.worst(found) <= pair.tolerance, found
    assert worker.figures_of(zero_folder, pair.run)["drift"] == 0


@pytest.mark.parametrize(("run", "words"), ZERO_REFUSED.items())
def test_what_zero3_would_not_reduce_is_refused(run, words, zero_folder):
    for name in (run, f"{run}.1"):
        assert words in worker.figures_of(zero_folder, name)["error"]


@pytest.fixture(scope="module")
def script_folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("scripts")


@pytest.mark.slow
@pytest.mark.parametrize("pair", SCRIPTS)
def test_the_scripts_train_the_same_model_on_two_ranks(pair, script_folder):
    for name in (pair.other, pair.run):
        if not (script_folder / f"{name}.json").exists():
            worker.launch_script(script_folder, name)
    found = worker.difference(script_folder, pair)
    assert worker.worst(found) <= pair.tolerance, found
    assert worker.figures_of(script_folder, pair.run)["drift"] == 0
