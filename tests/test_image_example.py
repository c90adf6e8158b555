"""examples/train_image.py: augmentation, soft labels, averaged weights, schedules, scores, and input that does not fit."""

import importlib
import json
import math
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForImageClassification, ResNetConfig, ResNetForImageClassification, TrainerCallback, ViTImageProcessorPil

from revdeq_hf import ResidualLoss, RevDEQForImageClassification, RevDEQVisionConfig, ReversibleFixedPoint

pytestmark = pytest.mark.usefixtures("scripts")
FEW = ["--disable_tqdm", "true", "--per_device_train_batch_size", "8"]
TINY = ["--hidden_sizes", "16", "--expansion_ratios", "1", "--solver_steps", "2", *FEW]


@pytest.fixture(scope="module")
def image(scripts):
    return importlib.import_module("train_image")


@pytest.fixture(scope="module")
def data(scripts):
    return importlib.import_module("image_data")


@pytest.fixture(scope="module")
def augmentation(scripts):
    return importlib.import_module("image_augmentation")


@pytest.fixture(scope="module")
def reports(scripts):
    return importlib.import_module("image_report")


def write_images(folder: Path, count: int, mode: str = "RGB", size=(9, 11), suffix: str = "png") -> None:
    """Dark and light noise in two classes."""
    generator = np.random.default_rng(0)
    for name, low in (("dark", 0), ("light", 200)):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            pixels = generator.integers(low, low + 50, (*size, 3), dtype=np.uint8)
            Image.fromarray(pixels).convert(mode).save(folder / name / f"{number}.{suffix}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("images")
    write_images(path / "train", 20)
    write_images(path / "valid", 6)
    return path


def folders(path: Path) -> list[str]:
    return ["--train_dir", str(path / "train"), "--validation_dir", str(path / "valid"), "--image_size", "8"]


def batch(count: int = 6, channels: int = 3, size: tuple[int, int] = (7, 9)) -> torch.Tensor:
    return torch.randn(count, channels, *size)


# --- the whole script ---


def test_digits_by_default(image, tmp_path, capsys):
    arguments = ["--output_dir", str(tmp_path), "--max_steps", "80", "--learning_rate", "2e-2", "--max_eval_images", "100"]
    results = image.main([*arguments, "--hidden_sizes", "16", "--expansion_ratios", "1", "--disable_tqdm", "true", "--logging_steps", "5"])
    assert results["greatest_drift"] == 0
    assert results["accuracy"] > 0.5 > results["accuracy_before"]
    assert "accuracy" in capsys.readouterr().out
    for name in ("training", "evaluation", "fixed_point"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    model, processor = AutoModelForImageClassification.from_pretrained(tmp_path), ViTImageProcessorPil.from_pretrained(tmp_path)
    assert model.config.id2label[7] == "7"
    assert model.config.num_channels == 1
    pixels = processor(np.zeros((8, 8, 1), dtype=np.uint8), input_data_format="channels_last", return_tensors="pt")["pixel_values"]
    assert model(pixels).logits.shape == (1, 10)
    written = json.loads((tmp_path / "results.json").read_text())
    matrix = np.array(written["confusion_matrix"])
    assert matrix.sum() == 100
    assert matrix.trace() / 100 == pytest.approx(results["accuracy"])
    assert written["stages"]["model.stages.0"]["solver_steps"] == 4


def test_a_folder_with_everything_on_resumed_equals_uninterrupted_bit_for_bit(image, folder, tmp_path):
    arguments = [*folders(folder), *TINY, "--max_steps", "14", "--save_steps", "7", "--logging_steps", "1", "--learning_rate", "2e-2"]
    arguments += ["--mixup", "0.4", "--cutmix", "1", "--erasing", "0.5", "--cutout", "3", "--label_smoothing_factor", "0.1"]
    arguments += ["--ema_decay", "0.8", "--one_cycle", "true", "--channels_last", "true", "--test_flip", "true", "--eval_strategy", "steps"]
    arguments += ["--eval_steps", "5", "--gradient_accumulation_steps", "2", "--per_device_train_batch_size", "3"]
    arguments += ["--muon_learning_rate", "0.01", "--residual_weight", "0.5"]
    results = image.main([*arguments, "--output_dir", str(tmp_path / "whole")])
    assert results["updates"] == 14
    shutil.copytree(tmp_path / "whole" / "checkpoint-7", tmp_path / "cut" / "checkpoint-7")
    image.main([*arguments, "--output_dir", str(tmp_path / "cut"), "--resume_from_checkpoint", "true"])
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())

    # what was saved is the average, not the weights of the last update
    last, average = (load_file(tmp_path / "whole" / "checkpoint-14" / name) for name in ("model.safetensors", "averaged.safetensors"))
    for name, tensor in whole.items():
        assert torch.equal(tensor, average[f"module.{name}"])
    assert not torch.equal(whole["model.stem.1.running_mean"], last["model.stem.1.running_mean"])
    assert whole["model.stem.1.num_batches_tracked"] == last["model.stem.1.num_batches_tracked"] == 28

    # and what was evaluated, with the mirror images
    model, processor = (kind.from_pretrained(tmp_path / "whole") for kind in (AutoModelForImageClassification, ViTImageProcessorPil))
    files = [(file, label) for label, name in enumerate(("dark", "light")) for file in sorted((folder / "valid" / name).iterdir())]
    pixels = processor([Image.open(file) for file, _ in files], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        logits = (model.eval()(pixels).logits + model(pixels.flip(-1)).logits) / 2
    labels = torch.tensor([label for _, label in files])
    assert results["loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-4)
    assert results["accuracy"] == (logits.argmax(-1) == labels).float().mean().item()
    state = json.loads((tmp_path / "whole" / "trainer_state.json").read_text())
    rates = [entry["learning_rate"] for entry in state["log_history"] if "loss" in entry]
    assert min(rates) == rates[-1] < 1e-5 * max(rates)
    assert max(rates) == pytest.approx(0.01)  # the first group is Muon's


def test_resnet_on_the_same_data_stops_after_its_minutes_and_reloads(image, folder, tmp_path):
    arguments = [*folders(folder), *FEW, "--model_type", "resnet", "--hidden_sizes", "8", "16", "--depths", "1", "2"]
    results = image.main(
        [*arguments, "--output_dir", str(tmp_path), "--max_steps", "100000", "--max_minutes", "0.02", "--logging_steps", "1"]
    )
    assert results["model_type"] == "resnet"
    assert results["stages"] == {}
    assert 1 < results["updates"] < 2000
    assert results["train_seconds"] < 20
    history = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    rates = [entry["learning_rate"] for entry in history if "loss" in entry]
    assert rates[-1] < 0.2 * max(rates)
    model = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert model.config.depths == [1, 2]
    assert type(model).__name__ == "ResNetForImageClassification"


def test_lazily_decoded_pixels_are_the_same(image, folder, tmp_path):
    arguments = [*folders(folder), *TINY, "--max_steps", "2", "--preset", "paper_cifar10_singlescale"]
    kept, lazy = (
        image.main([*arguments, "--keep_pixels", keep, "--output_dir", str(tmp_path / keep)])["loss"] for keep in ("true", "false")
    )
    assert kept == lazy


def test_a_held_out_tenth_of_the_training_images_to_choose_settings_by(image, folder, tmp_path):
    arguments = [*folders(folder), *TINY, "--max_steps", "2"]
    whole, held_out = (
        image.main([*arguments, *more, "--output_dir", str(tmp_path / str(len(more)))]) for more in ([], ["--eval_split", "held_out"])
    )
    assert held_out["train_images"] + held_out["eval_images"] == whole["train_images"]
    assert held_out["eval_images"] == math.ceil(whole["train_images"] / 10)
    assert len({*whole["data_sha256"].values(), *held_out["data_sha256"].values()}) == 4


# --- augmentation ---


def test_shift_flip_and_cutout_equal_a_loop_over_images(augmentation):
    pixels, padding, side = batch(), 2, 4
    down, right = np.random.default_rng(1).integers(0, 2 * padding + 1, (2, len(pixels)))
    got = augmentation.shifted(pixels, padding, np.random.default_rng(1))
    for index, picture in enumerate(pixels.numpy()):
        padded = np.pad(picture, ((0, 0), (padding, padding), (padding, padding)), mode="edge")
        np.testing.assert_array_equal(got[index], padded[:, down[index] : down[index] + 7, right[index] : right[index] + 9])

    chosen = np.random.default_rng(1).random(len(pixels)) < 0.5
    got = augmentation.mirrored(pixels, np.random.default_rng(1))
    assert 0 < chosen.sum() < len(pixels)
    for index, picture in enumerate(pixels.numpy()):
        np.testing.assert_array_equal(got[index], picture[..., ::-1] if chosen[index] else picture)

    rng = np.random.default_rng(1)
    rows, columns = rng.integers(0, 7, len(pixels)), rng.integers(0, 9, len(pixels))
    got = augmentation.cut_out(pixels, side, np.random.default_rng(1))
    for index, picture in enumerate(pixels.numpy().copy()):
        top, left = rows[index] - side // 2, columns[index] - side // 2
        picture[:, max(top, 0) : top + side, max(left, 0) : left + side] = 0
        np.testing.assert_array_equal(got[index], picture)


def test_erased_rectangles_have_the_share_and_the_area_asked_for(augmentation):
    pixels = torch.ones(400, 1, 20, 30)
    gone = augmentation.erased(pixels, 0.25, np.random.default_rng(0))[:, 0] == 0
    hit = gone.flatten(1).any(1)
    assert hit.float().mean().item() == pytest.approx(0.25, abs=0.06)
    for mask in gone[hit]:
        height, width = int(mask.any(1).sum()), int(mask.any(0).sum())
        assert mask.sum() == height * width  # a rectangle
        assert 0.01 < height * width / 600 < 0.36
        assert 0.2 < height / width < 4.5
    assert torch.equal(augmentation.erased(pixels, 0.0, np.random.default_rng(0)), pixels)


@pytest.mark.parametrize("way", ["mixup", "cutmix"])
def test_mixed_labels_tell_what_the_images_hold(augmentation, way):
    labels = torch.arange(40) % 5
    pixels = labels.float()[:, None, None, None].expand(-1, 2, 8, 6)  # every pixel is its class
    mixed, probabilities = getattr(augmentation, way)(pixels, F.one_hot(labels, 5).float(), 1.0, np.random.default_rng(0))
    torch.testing.assert_close(probabilities.sum(1), torch.ones(40))
    torch.testing.assert_close(mixed.mean((1, 2, 3)), probabilities @ torch.arange(5.0))
    assert ((probabilities > 0).sum(1) == 2).sum() > 15
    if way == "cutmix":
        assert set(mixed.unique().tolist()) <= set(range(5))
        own = (mixed[:, 0] == labels[:, None, None]).flatten(1).float().mean(1)
        torch.testing.assert_close(own, probabilities.gather(1, labels[:, None])[:, 0])


def test_what_is_drawn_depends_on_the_seed_and_the_images_alone(augmentation, data):
    processor = ViTImageProcessorPil(size={"height": 6, "width": 6})
    everything = augmentation.Augmentation(
        padding=1, flip=True, cutout=2, erasing=0.5, mixup=0.2, cutmix=1.0, label_smoothing=0.1, classes=4
    )
    rng = np.random.default_rng(0)
    rows = [{"pixels": rng.bytes(108), "label": index % 4, "index": index} for index in range(8)]

    def collate(rows, seed=0):
        torch.manual_seed(len(rows) + torch.seed() % 1000)
        return data.ImageCollator(data.Pixels(processor, (6, 6, 3)), augmentation=everything, seed=seed)(rows)

    elsewhere = [{**row, "index": row["index"] + 8} for row in rows]  # the same pixels, of other images
    first, again, others = collate(rows), collate(rows), (collate(rows, 1), collate(elsewhere))
    for name in ("pixel_values", "probabilities"):
        assert torch.equal(first[name], again[name])
        assert not any(torch.equal(first[name], other[name]) for other in others)
    torch.testing.assert_close(first["probabilities"].sum(1), torch.ones(8))
    plain = data.ImageCollator(data.Pixels(processor, (6, 6, 3)))(rows)
    assert set(plain) == {"pixel_values", "labels"}


def test_impossible_augmentations_are_refused(augmentation):
    for settings in ({"padding": -1}, {"erasing": 1.5}, {"mixup": -0.1}, {"label_smoothing": 1.0}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            augmentation.Augmentation(**settings)


@pytest.mark.parametrize("left_out", [{}, {"do_normalize": False}, {"do_rescale": False}], ids=str)
def test_normalised_pixels_are_those_of_the_processor(data, left_out):
    processor = ViTImageProcessorPil(size={"height": 5, "width": 4}, image_mean=[0.1, 0.5, 0.7], image_std=[0.2, 0.3, 0.4], **left_out)
    array = np.random.default_rng(0).integers(0, 256, (3, 5, 4, 3), dtype=np.uint8)
    expected = processor(list(array), input_data_format="channels_last", return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(data.Pixels(processor, (5, 4, 3)).normalised(array), expected, rtol=1e-6, atol=1e-6)


# --- soft labels ---


def small_trainer(image, tmp_path, model=None, **settings):
    torch.manual_seed(0)
    model = model or RevDEQForImageClassification(
        RevDEQVisionConfig(num_channels=1, hidden_sizes=[16], expansion_ratios=[1], max_steps=2, num_labels=3)
    )
    arguments = image.ImageTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", **settings)
    rows = datasets.Dataset.from_dict({"pixels": [bytes(range(n, n + 36)) for n in range(12)], "label": [0, 1, 2] * 4, "index": range(12)})
    processor = ViTImageProcessorPil(size={"height": 6, "width": 6}, image_mean=[0.5], image_std=[0.2])
    collator = image.ImageCollator(image.Pixels(processor, (6, 6, 1)))
    return image.ImageTrainer(
        model=model, args=arguments, train_dataset=rows, eval_dataset=rows, data_collator=collator, train_collator=collator
    )


def test_soft_loss_is_torchs_and_without_softening_the_models_own(image, augmentation, tmp_path):
    logits, labels = torch.randn(8, 3), torch.arange(8) % 3
    soft = augmentation.soft_labels(labels, 3, 0.2)
    expected = F.cross_entropy(logits, labels, label_smoothing=0.2)
    torch.testing.assert_close(augmentation.soft_cross_entropy(logits, soft), expected)
    torch.testing.assert_close(augmentation.soft_cross_entropy(logits, soft, 8), expected)
    parts = [augmentation.soft_cross_entropy(logits[part], soft[part], 8) for part in (slice(0, 3), slice(3, 8))]
    torch.testing.assert_close(sum(parts), expected)

    trainer = small_trainer(image, tmp_path)
    pixels = batch(8, 1, (6, 6))
    own = trainer.compute_loss(trainer.model.eval(), {"pixel_values": pixels, "labels": labels}, num_items_in_batch=torch.tensor(8))
    hard = F.one_hot(labels, 3).float()
    soft_loss = trainer.compute_loss(trainer.model, {"pixel_values": pixels, "labels": labels, "probabilities": hard}, num_items_in_batch=8)
    torch.testing.assert_close(soft_loss, own)


@pytest.mark.parametrize("residual_weight", [0.0, 0.7])
def test_accumulated_soft_gradients_are_those_of_the_mean_over_all_images(image, augmentation, tmp_path, residual_weight):
    trainer = small_trainer(image, tmp_path, gradient_accumulation_steps=2, residual_weight=residual_weight)
    trainer.state.global_step, trainer.state.max_steps = 3, 4
    pixels, labels = batch(8, 1, (6, 6)), torch.arange(8) % 3
    soft = augmentation.soft_labels(labels, 3, 0.3)
    parts = (slice(0, 3), slice(3, 8))
    micro = [{"pixel_values": pixels[part], "labels": labels[part], "probabilities": soft[part]} for part in parts]
    count = trainer._get_num_items_in_batch(micro, torch.device("cpu"))
    assert int(count) == 8  # images, not entries of the probabilities
    trainer.current_gradient_accumulation_steps = 2
    for inputs in micro:
        trainer.training_step(trainer.model, inputs, count)
    got = [parameter.grad.clone() for parameter in trainer.model.parameters()]
    trainer.model.zero_grad()
    residual = ResidualLoss(trainer.model)
    for part in parts:
        loss = F.cross_entropy(trainer.model(pixels[part]).logits, soft[part], reduction="sum")
        loss = loss + 0.75 * residual_weight * len(soft[part]) * residual()  # three quarters of the training are past
        (loss / 8).backward()
    for gradient, parameter in zip(got, trainer.model.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-6)


def test_accumulated_gradients_of_an_explicit_network_are_those_of_the_mean_over_all_images(image, tmp_path):
    """Its forward pass takes the number of images, so that Trainer divides nothing, and passes it over."""
    config = ResNetConfig(num_channels=1, embedding_size=8, hidden_sizes=[8], depths=[1], num_labels=3)
    trainer = small_trainer(image, tmp_path, ResNetForImageClassification(config).eval(), gradient_accumulation_steps=2)
    trainer.model.train = lambda mode=True: trainer.model  # its BatchNorm would tell the micro-batches apart
    pixels, labels = batch(8, 1, (32, 32)), torch.arange(8) % 3
    micro = [{"pixel_values": pixels[part], "labels": labels[part]} for part in (slice(0, 3), slice(3, 8))]
    count = trainer._get_num_items_in_batch(micro, torch.device("cpu"))
    trainer.current_gradient_accumulation_steps = 2
    for inputs in micro:
        trainer.training_step(trainer.model, inputs, count)
    got = [parameter.grad.clone() for parameter in trainer.model.parameters()]
    trainer.model.zero_grad()
    F.cross_entropy(trainer.model(pixels).logits, labels).backward()
    for gradient, parameter in zip(got, trainer.model.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-6)


def test_evaluation_keeps_the_last_batch(image, tmp_path):
    trainer = small_trainer(image, tmp_path, dataloader_drop_last=True, per_device_eval_batch_size=8, per_device_train_batch_size=8)
    assert sum(len(part["labels"]) for part in trainer.get_eval_dataloader()) == 12
    assert len(trainer.predict(trainer.eval_dataset).label_ids) == 12
    assert sum(len(part["labels"]) for part in trainer.get_train_dataloader()) == 8
    assert trainer.args.dataloader_drop_last


@pytest.mark.parametrize("flip", [False, True])
def test_the_evaluations_loss_is_that_of_each_image_once(image, tmp_path, flip):
    """On several ranks Trainer's own is the mean of batches that were filled up; on one the two are the same, whatever the training's loss is."""
    settings = dict(per_device_eval_batch_size=8, label_smoothing_factor=0.3, residual_weight=0.5, test_flip=flip)
    trainer = small_trainer(image, tmp_path, **settings)
    own = trainer.predict(trainer.eval_dataset, metric_key_prefix="eval").metrics["eval_loss"]  # evaluate without metrics would not flip
    trainer.compute_metrics = image.evaluation_metrics
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(own, rel=1e-6)
    step = trainer.prediction_step
    trainer.prediction_step = lambda *arguments, **kwargs: (torch.tensor(9.0), *step(*arguments, **kwargs)[1:])
    predicted = trainer.predict(trainer.eval_dataset, metric_key_prefix="eval")
    assert predicted.metrics["eval_loss"] == metrics["eval_loss"]

    logits, *figures = predicted.predictions
    five = image.EvalPrediction(predictions=(logits[:5], *(figure[:5] for figure in figures)), label_ids=predicted.label_ids[:5])
    found, expected = image.evaluation_metrics(five), F.cross_entropy(torch.tensor(logits[:5]), torch.tensor([0, 1, 2, 0, 1]))
    assert found["loss"] == pytest.approx(expected.item(), rel=1e-6)
    assert found["accuracy"] == (logits[:5].argmax(-1) == [0, 1, 2, 0, 1]).mean()


def test_the_loss_that_is_reported_is_not_trainers_mean_of_batches(image, folder, tmp_path, monkeypatch):
    step = image.ImageTrainer.prediction_step
    monkeypatch.setattr(
        image.ImageTrainer, "prediction_step", lambda *arguments, **kwargs: (torch.tensor(9.0), *step(*arguments, **kwargs)[1:])
    )
    results = image.main([*folders(folder), *TINY, "--max_steps", "1", "--output_dir", str(tmp_path)])
    assert 0 < results["loss"] < 5
    assert 0 < results["loss_before"] < 5


def test_a_run_without_an_update_is_an_error(image, folder, tmp_path):
    arguments = [*folders(folder), *TINY, "--max_steps", "2", "--max_train_images", "3", "--output_dir", str(tmp_path)]
    message = "3 training images make no whole batch of --per_device_train_batch_size 8 .*leave out --dataloader_drop_last true"
    with pytest.raises(ValueError, match=message):
        image.main([*arguments, "--dataloader_drop_last", "true"])
    assert not (tmp_path / "results.json").exists()
    assert image.main([*arguments, "--save_steps", "1"])["updates"] == 2
    assert image.main([*arguments, "--resume_from_checkpoint", "true", "--dataloader_drop_last", "true"])["updates"] == 2  # complete


# --- averaged weights, schedules ---


def test_averaged_weights_equal_an_average_by_hand(image, tmp_path):
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    kept = image.AveragedWeights(model, 0.6)
    expected: dict = {}
    for update in range(12):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        model(torch.randn(4, 3))
        kept.on_step_end(None, None, None, model=model)
        decay = min(0.6, (1 + update) / (10 + update))
        for name, value in model.state_dict().items():
            counted = update == 0 or not value.is_floating_point()
            expected[name] = value.clone() if counted else decay * expected[name] + (1 - decay) * value
    for name, value in kept.averaged.module.state_dict().items():
        torch.testing.assert_close(value, expected[name])

    own = {name: value.clone() for name, value in model.state_dict().items()}
    kept.save(tmp_path)
    other = image.AveragedWeights(model, 0.6)
    other.load(tmp_path)
    other.exchange(model)
    assert all(torch.equal(value, kept.averaged.module.state_dict()[name]) for name, value in model.state_dict().items())
    other.exchange(model)
    assert all(torch.equal(value, own[name]) for name, value in model.state_dict().items())


def test_training_averages_after_every_update_and_keeps_its_own_weights_through_evaluations(image, tmp_path):
    trainer = small_trainer(
        image, tmp_path, ema_decay=0.5, max_steps=6, per_device_train_batch_size=4, save_strategy="no", eval_strategy="steps", eval_steps=2
    )
    seen: list[dict] = []

    class Keep(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            seen.append({name: value.clone() for name, value in model.state_dict().items()})

    trainer.add_callback(Keep())
    trainer.train()
    expected = seen[0]
    for update, values in enumerate(seen[1:], start=1):
        decay = min(0.5, (1 + update) / (10 + update))
        for name, value in values.items():
            expected[name] = decay * expected[name] + (1 - decay) * value if value.is_floating_point() else value
    for name, value in trainer.model.state_dict().items():
        torch.testing.assert_close(value, expected[name])


def test_one_cycle_is_torchs_and_ends_at_its_minimum(image):
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    reference = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2.0, total_steps=40, pct_start=0.25, cycle_momentum=False)
    expected = []
    for _ in range(40):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if len(expected) < 40:
            reference.step()
    got = [2.0 * image.one_cycle(update, warmup=10, updates=40) for update in range(40)]
    np.testing.assert_allclose(got, expected, rtol=1e-9)
    assert got[-1] == min(got) == 2.0 / 250_000
    assert image.one_cycle(0, warmup=0, updates=1) <= 1


def test_every_block_is_compiled_where_that_is_asked_for(image, folder, tmp_path, monkeypatch):
    compiled: list[ReversibleFixedPoint] = []
    monkeypatch.setattr(ReversibleFixedPoint, "compile", lambda layer: compiled.append(layer))  # noqa: PLW0108 (a method must be a function)
    sizes = ["--hidden_sizes", "16", "16", "--expansion_ratios", "1", "1", "--max_steps", "1"]
    image.main([*folders(folder), *TINY, *sizes, "--compile_blocks", "true", "--output_dir", str(tmp_path)])
    assert len(set(compiled)) == 2


def test_the_schedule_follows_the_clock_where_it_is_ahead(image, tmp_path):
    trainer = small_trainer(image, tmp_path, max_minutes=1.0, max_steps=100, lr_scheduler_type="linear", warmup_steps=0, learning_rate=1.0)
    trainer.create_optimizer()
    scheduler = trainer.create_scheduler(100)
    rates = []
    for seconds in (0.0, 0.0, 30.0, 59.7, 75.0):
        trainer.limit.seconds = seconds
        trainer.optimizer.step()
        scheduler.step()
        rates.append(scheduler.get_last_lr()[0])
    np.testing.assert_allclose(rates, [0.99, 0.98, 0.5, 0.01, 0.0], atol=1e-9)
    with pytest.raises(ValueError, match="max_minutes needs a schedule"):
        small_trainer(image, tmp_path, max_minutes=1.0, lr_scheduler_type="reduce_lr_on_plateau", eval_strategy="steps").create_scheduler(
            10, trainer.optimizer
        )


def test_a_resumed_run_has_the_minutes_that_are_left(image, folder, tmp_path):
    arguments = [*folders(folder), *TINY, "--max_steps", "4", "--save_steps", "2", "--max_minutes", "5", "--output_dir", str(tmp_path)]
    first = image.main(arguments)
    shutil.rmtree(tmp_path / "checkpoint-4")
    shutil.copytree(tmp_path, tmp_path / "unlimited")
    path = tmp_path / "checkpoint-2" / "trainer_state.json"
    state = json.loads(path.read_text())
    assert 0 < state["stateful_callbacks"]["TrainingClock"]["attributes"]["earlier"] < first["train_seconds"]
    state["stateful_callbacks"]["TrainingClock"]["attributes"]["earlier"] = 299.9999
    path.write_text(json.dumps(state))
    then = image.main([*arguments, "--resume_from_checkpoint", "true", "--restore_callback_states_from_checkpoint", "true"])
    assert then["updates"] == 3
    assert 300 < then["train_seconds"] < 330  # of both parts
    (logged,) = (entry for entry in json.loads((tmp_path / "trainer_state.json").read_text())["log_history"] if "train_runtime" in entry)
    assert logged["train_runtime"] < 30 < logged["train_seconds"] == then["train_seconds"]

    # a checkpoint of another trainer, without a clock: its minutes begin now
    path = tmp_path / "unlimited" / "checkpoint-2" / "trainer_state.json"
    state = json.loads(path.read_text())
    del state["stateful_callbacks"]["TrainingClock"]
    path.write_text(json.dumps(state))
    resumed = [*arguments, "--output_dir", str(tmp_path / "unlimited"), "--resume_from_checkpoint", "true"]
    then = image.main(resumed)
    assert then["updates"] == 4
    assert then["train_seconds"] < 30


# --- scores and figures ---


def test_scores_by_hand(reports):
    confidence, right = np.array([0.95, 0.97, 0.55, 0.58, 0.2]), np.array([True, True, True, False, False])
    # parts of 1/15: [14/15, 1] holds two, [8/15, 9/15) two, [3/15, 4/15) or the one below it one
    expected = (abs(1 - 0.96) * 2 + abs(0.5 - 0.565) * 2 + abs(0 - 0.2)) / 5
    assert reports.calibration_error(confidence, right) == pytest.approx(expected)
    logits = np.log(np.array([[0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.1, 0.8, 0.1]]))
    found = reports.scores(logits, np.array([0, 1, 1]), ["a", "b", "c"])
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert found["per_class_accuracy"] == {"a": 1.0, "b": 0.5, "c": None}
    assert found["confusion_matrix"] == [[1, 0, 0], [1, 1, 0], [0, 0, 0]]
    assert found["expected_calibration_error"] == pytest.approx((0.3 + 0.6 + 0.2) / 3)


def test_reliability_has_the_means_of_scikit_learn(reports):
    from sklearn.calibration import calibration_curve

    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.3, 1, 500)
    right = rng.random(500) < confidence
    counts, means, accuracies = reports.reliability(confidence, right)
    expected_accuracies, expected_means = calibration_curve(right, confidence, n_bins=15)
    np.testing.assert_allclose(means[counts > 0], expected_means)
    np.testing.assert_allclose(accuracies[counts > 0], expected_accuracies)
    assert counts.sum() == 500


# --- input ---


def test_unreadable_files_are_listed_or_skipped(image, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "data")
    whole = (folder / "train" / "dark" / "0.png").read_bytes()
    (tmp_path / "data" / "train" / "dark" / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "data" / "train" / "light" / "text.png").write_text("no image")
    (tmp_path / "data" / "valid" / "light" / "empty.png").write_bytes(b"")
    arguments = [*folders(tmp_path / "data"), *TINY, "--max_steps", "2", "--output_dir", str(tmp_path / "out")]
    with pytest.raises(ValueError, match=r"2 of 42 images.*--bad_images skip(.|\n)*(cut\.png(.|\n)*text\.png|text\.png(.|\n)*cut\.png)"):
        image.main(arguments)
    results = image.main([*arguments, "--bad_images", "skip", "--keep_pixels", "false"])
    assert results["unreadable_images"] == 3
    assert (results["train_images"], results["eval_images"]) == (40, 12)


def parquet(path: Path, coarse, fine, declared: bool = True, count: int = 12) -> str:
    rng = np.random.default_rng(0)
    values = {
        "img": [Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)) for _ in range(count)],
        "coarse_label": [coarse[index % len(coarse)] for index in range(count)],
        "fine_label": [fine[index % len(fine)] for index in range(count)],
    }
    features = None
    if declared:
        names = datasets.ClassLabel(names=["a", "b", "c", "d"])
        features = datasets.Features({"img": datasets.Image(), "coarse_label": names, "fine_label": names})
    datasets.Dataset.from_dict(values, features=features).cast_column("img", datasets.Image()).to_parquet(str(path))
    return str(path)


def test_parquet_files_with_two_label_columns(image, tmp_path):
    train = parquet(tmp_path / "train.parquet", [0, 1], [0, 1, 2, 3])
    arguments = ["--train_file", train, "--validation_file", train, *TINY, "--max_steps", "2", "--output_dir", str(tmp_path / "out")]
    with pytest.raises(
        ValueError, match=r"2 columns of type ClassLabel \(\['coarse_label', 'fine_label'\]\); name one with --label_column"
    ):
        image.main(arguments)
    results = image.main([*arguments, "--label_column", "fine_label"])
    assert list(results["per_class_accuracy"]) == ["a", "b", "c", "d"]
    assert results["eval_images"] == 12


@pytest.mark.parametrize(("values", "names"), [([10, 9, 2], ["2", "9", "10"]), (["y", "x"], ["x", "y"])], ids=str)
def test_undeclared_labels_are_numbered_in_their_order(image, tmp_path, values, names):
    train = parquet(tmp_path / "train.parquet", values, values, declared=False)
    test = parquet(tmp_path / "test.parquet", values[:1], values[:1], declared=False)
    found = image.load_images(image.DataArguments(train_file=train, validation_file=test, label_column="fine_label"))
    for rows, expected in zip(found, (values, values[:1]), strict=True):
        assert rows.features["label"].names == names
        assert {names[label] for label in rows["label"]} == set(map(str, expected))


def test_labels_that_do_not_fit_are_told(image, tmp_path):
    train = parquet(tmp_path / "train.parquet", [0, 1], [0, 1])
    withheld = parquet(tmp_path / "test.parquet", [-1], [0])
    with pytest.raises(ValueError, match=r"labels of the split validation must be numbers from 0 to 3, also got \[-1\].*--eval_split"):
        image.load_images(image.DataArguments(train_file=train, validation_file=withheld, label_column="coarse_label"))
    train = parquet(tmp_path / "numbers.parquet", [1, 2], [1, 2], declared=False)
    more = parquet(tmp_path / "more.parquet", [1, 2, 3], [1, 2, 3], declared=False)
    with pytest.raises(ValueError, match=r"that no training image has: \['3'\]"):
        image.load_images(image.DataArguments(train_file=train, validation_file=more, label_column="fine_label"))
    floats = parquet(tmp_path / "floats.parquet", [0.5], [0.5], declared=False)
    with pytest.raises(ValueError, match="whole numbers or texts"):
        image.load_images(image.DataArguments(train_file=floats, label_column="fine_label"))


def test_going_on_from_a_grey_model_with_colour_images_and_the_other_way(image, data, folder, tmp_path, monkeypatch):
    write_images(tmp_path / "grey" / "train", 20, "L")
    write_images(tmp_path / "grey" / "valid", 6, "L")
    told: list[str] = []
    monkeypatch.setattr(data.logger, "warning", told.append)
    for first, second, what in (
        (tmp_path / "grey", folder, "in colour and were made grey"),
        (folder, tmp_path / "grey", "are grey and were made RGB"),
    ):
        saved = tmp_path / f"saved_{first.name}"
        image.main([*folders(first), *TINY, "--max_steps", "1", "--output_dir", str(saved)])
        assert not told
        on = ["--model_name_or_path", str(saved), "--solver_steps", "3", "--tol", "0.01", "--max_steps", "1", "--disable_tqdm", "true"]
        out = tmp_path / f"out_{first.name}"
        image.main([*folders(second), *on, "--output_dir", str(out)])
        config = RevDEQVisionConfig.from_pretrained(out)
        assert (config.max_steps, config.tol, config.beta, config.hidden_sizes) == (3, 0.01, 0.8, [16])
        assert any(what in message and "40 of 40" in message for message in told)
        told.clear()
    with pytest.raises(ValueError, match=r"--hidden_sizes, --expansion_ratios would have no effect: '.*' has a network already"):
        image.main([*folders(folder), *TINY, "--model_name_or_path", str(saved), "--output_dir", str(tmp_path / "out")])
    with pytest.raises(ValueError, match="--channels 1: the saved model takes images of 3 channels"):
        image.main([*folders(folder), "--model_name_or_path", str(saved), "--channels", "1", "--output_dir", str(tmp_path / "out")])

    settings = json.loads((saved / "preprocessor_config.json").read_text())
    (saved / "preprocessor_config.json").write_text(json.dumps({**settings, "image_mean": [0.5]}))
    with pytest.raises(ValueError, match=r"have 1 and 3 channels, the model's config.num_channels is 3"):
        image.main([*folders(folder), "--model_name_or_path", str(saved), "--output_dir", str(tmp_path / "out")])


def test_pixels_of_sixteen_bits_are_scaled_not_clipped(data):
    deep = Image.fromarray(np.array([[0, 256, 65535]], dtype=np.uint16))
    assert np.asarray(data.converted(deep, "L")).tolist() == [[0, 1, 255]]
    for kind in (np.float32, np.int32):
        with pytest.raises(ValueError, match="no known range"):
            data.converted(Image.fromarray(np.full((2, 2), 200, dtype=kind)), "L")


def test_eight_bits_saved_as_sixteen_are_refused_not_made_black(data, tmp_path):
    """Pillow 13 opens such files as "I;16", earlier ones as "I"."""
    pixels = np.full((2, 2), 200, dtype=np.uint16)
    for order in ("I;16", "I;16B"):
        with pytest.raises(ValueError, match=r"16-bit pixels, none of them above 255, have no known range: .* 8 bits a pixel"):
            data.converted(Image.frombytes(order, (2, 2), pixels.astype("<u2" if order == "I;16" else ">u2").tobytes()), "L")
    Image.fromarray(pixels).save(tmp_path / "small.png")
    with pytest.raises(ValueError, match="none of them above 255"):
        data.converted(Image.open(tmp_path / "small.png"), "L")
    assert not np.asarray(data.converted(Image.fromarray(0 * pixels), "L")).any()  # black in any range


@pytest.mark.parametrize(("greatest", "levels"), [(4095, 16), (1000, 4), (4096, None)])
def test_sixteen_bits_of_which_twelve_are_used_are_told_once(data, tmp_path, monkeypatch, greatest, levels):
    for number in range(3):
        Image.fromarray(np.array([[0, greatest - number % 2]], dtype=np.uint16)).save(tmp_path / f"{number}.png")
    rows = datasets.Dataset.from_dict({"image": [str(tmp_path / f"{number}.png") for number in range(3)], "label": [0, 1, 0]})
    rows = rows.cast_column("image", datasets.Image(decode=False))
    told: list[str] = []
    monkeypatch.setattr(data.logger, "warning", told.append)
    found, _ = data.decode(rows, ViTImageProcessorPil(size={"height": 1, "width": 2}), "L", True, "refuse", "train")
    assert [row["pixels"][0] for row in found] == [0, 0, 0]
    assert len(told) == (levels is not None)
    if levels is not None:
        assert f"no value above {greatest}" in told[0]
        assert f"they keep {levels}; scale their values to the full range, 0 to 65535" in told[0]


@pytest.mark.parametrize("kind", ["RGBA", "LA", "P", "RGB", "L"])
def test_transparent_pixels_are_white_and_opaque_ones_as_they_were(data, tmp_path, kind):
    grey, alpha = np.array([[7, 7, 90]], dtype=np.uint8), np.array([[0, 255, 128]], dtype=np.uint8)
    image = Image.fromarray(np.stack([grey, grey, grey, alpha], -1)).convert(kind)
    expected, settings = [255, 7, 172], {}  # 90 * 128 / 255 + 127
    if kind == "P":  # a palette knows transparency by an entry's number
        image = Image.fromarray(np.array([[0, 1, 2]], dtype=np.uint8), "L").convert("P")
        image.putpalette([7, 7, 7, 7, 7, 7, 90, 90, 90])
        settings = {"transparency": bytes([0, 255, 128])}
    elif kind in ("RGB", "L"):  # one colour alone is transparent
        expected, settings = [255, 255, 90], {"transparency": (7, 7, 7) if kind == "RGB" else 7}
    image.save(tmp_path / "seen.png", **settings)
    for mode in ("L", "RGB"):
        pixels = np.atleast_3d(np.asarray(data.converted(Image.open(tmp_path / "seen.png"), mode)))
        assert all(np.abs(channel.astype(int) - expected).max() <= 1 for channel in np.moveaxis(pixels, -1, 0))
    opaque = Image.fromarray(np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8))
    for mode in ("L", "RGB"):
        assert data.converted(opaque.convert("RGBA"), mode).tobytes() == opaque.convert(mode).tobytes()


def test_the_first_image_may_be_one_to_skip(image, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "data")
    Image.fromarray(np.full((9, 11), 200, dtype=np.uint16)).save(tmp_path / "data" / "train" / "dark" / "0.png")
    arguments = [*folders(tmp_path / "data"), *TINY, "--max_steps", "1", "--output_dir", str(tmp_path / "out"), "--channels", "3"]
    assert image.main([*arguments, "--bad_images", "skip"])["unreadable_images"] == 1


@pytest.mark.parametrize("elsewhere", [True, False], ids=["in the validation images", "nowhere"])
def test_a_class_without_training_images_is_told(image, data, folder, tmp_path, monkeypatch, elsewhere):
    shutil.copytree(folder, tmp_path / "data")
    (tmp_path / "data" / "train" / "void").mkdir()
    if elsewhere:
        shutil.copytree(folder / "valid" / "dark", tmp_path / "data" / "valid" / "void")
    told: list[str] = []
    monkeypatch.setattr(data.logger, "warning", told.append)
    train, valid = (str(tmp_path / "data" / split) for split in ("train", "valid"))
    rows, _ = image.load_images(image.DataArguments(train_dir=train, validation_dir=valid))
    assert rows.features["label"].names == (["dark", "light", "void"] if elsewhere else ["dark", "light"])
    expected = "1 of 3 classes have no training images, so that they cannot be learned" if elsewhere else "folders without images"
    assert len(told) == 1
    assert expected in told[0]
    assert "['void']" in told[0]


@pytest.mark.parametrize("values", [[5], ["x"]], ids=str)
def test_one_class_alone_is_refused(image, tmp_path, values):
    train = parquet(tmp_path / "train.parquet", values, values, declared=False)
    with pytest.raises(ValueError, match=rf"'fine_label' must have at least two classes, got \['{values[0]}'\].*--label_column"):
        image.load_images(image.DataArguments(train_file=train, label_column="fine_label"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train_dir", "nowhere"], "no folder 'nowhere'"),
        (["--validation_dir", "nowhere"], "needs --train_dir"),
        (["--train_dir", "{tmp_path}"], r"must hold a folder of images for each class, at least two, got \[\]"),
        (["--max_eval_images", "0"], "--max_eval_images must be at least 1, got 0"),
        (["--train_file", "nowhere.parquet"], "no file 'nowhere.parquet'"),
        (["--train_file", "images.csv"], "must be a .parquet file"),
        (["--train_file", "a.parquet", "--dataset_name", "x"], "one of --dataset_name, --train_dir and --train_file"),
        (["--eval_split", "other"], "no split 'other'"),
        (["--preset", "huge"], "--preset must be one of"),
        (["--per_device_train_batch_size", "1"], "one alone would be changed alike in every epoch"),
        (["--model_type", "vit"], "--model_type must be one of"),
        (["--model_type", "resnet", "--beta", "0.5"], "--beta would have no effect: a model of type 'resnet' has no fixed point"),
        (["--depths", "1", "1"], "--depths would have no effect: they are a resnet's"),
        (["--model_type", "resnet", "--depths", "1"], "--depths must have one entry per stage"),
        (["--label_column", "name"], "no column 'name'"),
        (["--hidden_sizes", "16", "20"], r"--hidden_sizes must be multiples of 16, .*got \[16, 20\]"),
        (["--image_size", "3", "--hidden_sizes", "16", "16", "16", "--expansion_ratios", "1", "1", "1"], "smaller than the network allows"),
        (["--model_type", "resnet", "--image_size", "7"], r"divides their sides by 8; enlarge them with --image_size \(at least 8\)"),
        (["--model_type", "resnet", "--compile_blocks", "true"], "'resnet' has no fixed points; take --torch_compile true"),
        (["--channels", "2"], "--channels must be 1 or 3"),
        (["--bad_images", "mend"], "--bad_images must be"),
        (["--ema_decay", "1"], "--ema_decay must lie"),
        (["--max_minutes", "0"], "--max_minutes must be positive"),
        (["--mixup", "-1"], "mixup must be at least 0"),
        (["--residual_weight", "-1"], "--residual_weight must not be negative, got -1"),
        (["--model_type", "resnet", "--residual_weight", "1"], "--residual_weight would have no effect"),
    ],
    ids=str,
)
def test_unusable_input_is_told(image, tmp_path, arguments, message):
    filled = [argument.format(tmp_path=tmp_path) for argument in arguments]
    with pytest.raises(Exception, match=message):
        image.main([*filled, "--output_dir", str(tmp_path / "out"), "--disable_tqdm", "true"])


def test_resuming_without_the_average_is_told(image, folder, tmp_path):
    arguments = [*folders(folder), *TINY, "--max_steps", "2", "--save_steps", "1", "--output_dir", str(tmp_path)]
    image.main(arguments)
    with pytest.raises(FileNotFoundError, match=r"no averaged\.safetensors"):
        image.main([*arguments, "--ema_decay", "0.9", "--resume_from_checkpoint", "true"])
