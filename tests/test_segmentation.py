"""The classifier of pixels: its block by hand, grids of any size and company, labels, training, saving, and what is refused."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional
from transformers import AutoConfig, AutoModelForSemanticSegmentation, BeitImageProcessorPil, Trainer, TrainingArguments, pipeline

from revdeq_hf import RevDEQForSemanticSegmentation, RevDEQVisionConfig, diagnose

SMALL = dict(num_channels=3, num_labels=4, hidden_sizes=[16], max_steps=5, steps_sampling=None, drift_policy="raise")
GRIDS = torch.randn(2, 3, 7, 10, generator=torch.Generator().manual_seed(3))
LABELS = torch.randint(4, (2, 7, 10), generator=torch.Generator().manual_seed(4))


def small(**settings) -> RevDEQForSemanticSegmentation:
    torch.manual_seed(0)
    return RevDEQForSemanticSegmentation(RevDEQVisionConfig.dense_prediction(**{**SMALL, **settings})).eval()


@torch.no_grad()
@pytest.mark.parametrize("expansion", [1, 2])
@pytest.mark.parametrize("kernel", [[3, 3], [1, 5]], ids=str)
def test_the_recall_block_is_its_formula(kernel, expansion):
    """f = LN(conv(ReLU(LN(conv(z) + x))) + x), written with explicit sums."""
    block = small(kernel_size=kernel, expansion_ratios=[expansion]).double().model.stages[0].block
    for parameter in block.parameters():
        parameter.uniform_(-0.5, 0.5)
    z, x = torch.randn(2, 2, 16, 5, 7, dtype=torch.float64).unbind()

    def convolution(value, module):
        padded = functional.pad(value, (kernel[1] // 2,) * 2 + (kernel[0] // 2,) * 2)
        sums = sum(
            torch.einsum("bchw,dc->bdhw", padded[:, :, i : i + 5, j : j + 7], module.weight[:, :, i, j])
            for i in range(kernel[0])
            for j in range(kernel[1])
        )
        return sums + module.bias[:, None, None]

    def norm(value, module):
        value = (value - value.mean(1, keepdim=True)) / (value.var(1, keepdim=True, unbiased=False) + 1e-5).sqrt()
        return value * module.weight[:, None, None] + module.bias[:, None, None]

    inner = convolution(z, block.conv1)
    inner[:, :16] += x
    assert inner.shape[1] == 16 * expansion
    expected = norm(convolution(norm(inner, block.norm1).clamp_min(0), block.conv2) + x, block.norm2)
    torch.testing.assert_close(block(z, x), expected, rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_nothing_depends_on_the_size_of_the_grid_or_on_the_company():
    """A position's answer hangs on what lies within reach of its steps, and on nothing else."""
    model = small()
    reach = 1 + 2 * 2 * 2  # the stem's convolution, and two of each of the four evaluations of two steps
    large = torch.randn(1, 3, 40, 40)
    cut = large[:, :, 5:35, 5:35]
    inner = slice(5 + reach, 35 - reach)
    assert torch.allclose(
        model(large, max_steps=2).logits[:, :, inner, inner], model(cut, max_steps=2).logits[:, :, reach:-reach, reach:-reach], atol=1e-5
    )
    assert not torch.allclose(
        model(large, max_steps=3).logits[:, :, inner, inner], model(cut, max_steps=3).logits[:, :, reach:-reach, reach:-reach], atol=1e-5
    )
    both = model(torch.cat([cut, torch.randn(3, 3, 30, 30)])).logits[:1]
    assert torch.allclose(both, model(cut).logits, atol=1e-5)


@torch.no_grad()
def test_adaptive_steps_give_each_grid_its_own_and_the_residual_comes_with_the_answer():
    model = small(tol=0.03, max_steps=200)
    model.model.stages[0].block.conv1.weight.mul_(0.5)  # contracts
    grids = torch.cat([GRIDS * 0.7, GRIDS * 9])
    out = model(grids)
    assert out.solver_steps.shape == out.solver_residual.shape == (4, 1)
    assert out.solver_residual.max() <= 0.03
    assert len(set(out.solver_steps[:, 0].tolist())) > 1
    one = model(grids[2:3])
    assert torch.equal(one.solver_steps, out.solver_steps[2:3])
    assert torch.allclose(one.logits, out.logits[2:3], atol=1e-4)
    assert diagnose(model, grids)["model.stages.0"].residuals.shape[0] > 0


@pytest.mark.parametrize("ignored", [0, 7])
def test_the_loss_is_the_mean_over_pixels_that_count(ignored):
    model, labels = small(), LABELS.clone()
    labels[:, :ignored] = 255
    out = model(GRIDS, labels=labels)
    assert out.logits.shape == (2, 4, 7, 10)
    shares = out.logits.log_softmax(1).movedim(1, -1)
    if ignored == 7:
        assert out.loss.isnan()  # as cross-entropy's mean of nothing
        return
    taken = [-shares[b, i, j, labels[b, i, j]] for b in range(2) for i in range(ignored, 7) for j in range(10)]
    torch.testing.assert_close(out.loss, torch.stack(taken).mean())


@pytest.mark.parametrize("ignored", [-100, 255])
def test_micro_batches_are_one_batch_where_trainer_can_count(ignored, tmp_path):
    """It counts labels other than -100; pixels that count are spread unevenly here."""
    labels = LABELS.clone()
    labels[1, 1:] = ignored
    rows = [{"pixel_values": grid, "labels": label} for grid, label in zip(GRIDS, labels, strict=True)]
    updated = []
    for size in (2, 1):
        torch.manual_seed(0)
        model = small(semantic_loss_ignore_index=ignored)
        settings = dict(
            max_steps=1, learning_rate=0.1, optim="sgd", max_grad_norm=0, lr_scheduler_type="constant", report_to="none", disable_tqdm=True
        )
        arguments = TrainingArguments(
            str(tmp_path),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=2 // size,
            save_strategy="no",
            use_cpu=True,
            **settings,
        )
        Trainer(model, arguments, train_dataset=rows).train()
        updated.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
    assert torch.allclose(*updated, atol=1e-6) == (ignored == -100)


@pytest.mark.parametrize("settings", [{}, dict(initial_scale=1.0, path_noise=0.05), dict(block_type="paper", stem="batch_norm")], ids=str)
def test_gradient_modes_agree_and_drift_is_zero(settings):
    gradients = {}
    for gradient in ("reversible", "checkpoint", "backprop"):
        model = small(gradient=gradient, **settings).train()
        torch.manual_seed(1)
        model(GRIDS, labels=LABELS).loss.backward()
        gradients[gradient] = [parameter.grad for parameter in model.parameters()]
        assert model.model.stages[0].drift == 0
    for a, b, c in zip(*gradients.values(), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gradient", ["reversible", "checkpoint", "backprop", "implicit", "phantom"])
def test_the_layout_of_the_states_changes_nothing_but_the_time(gradient, dtype):
    """On the CPU they lie channels_last, in which the block's norms copy nothing; where the block does not ask for it, contiguous as everywhere."""
    found = []
    for asked in (True, False):
        model = small(gradient=gradient).to(dtype)
        (stage,) = model.model.stages
        stage.block.channels_last_on_cpu = asked
        seen: list[tuple[int, bool]] = []
        hook = lambda block, given, seen=seen: seen.append((len(given[0]), given[0].is_contiguous(memory_format=torch.channels_last)))  # noqa: E731
        stage.block.register_forward_pre_hook(hook)
        out = model.train()(GRIDS.to(dtype), labels=LABELS)
        out.loss.backward()
        assert seen
        assert stage.drift == 0
        found.append([out.logits, *(parameter.grad for parameter in model.parameters())])
        with torch.no_grad():  # rows that are done leave the batch, the others keep their layout
            stage.tol = 0.05
            found[-1].append(model.eval()(GRIDS.to(dtype), max_steps=40).logits)
        assert {rows for rows, _ in seen} == {1, 2}
        assert all(lies is asked for _, lies in seen)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, **({} if dtype == torch.float32 else dict(rtol=0.1, atol=0.1)))


def test_trainer_learns_saves_and_the_auto_class_loads(tmp_path):
    """Each pixel's label is whether its left neighbour is bright."""
    generator = torch.Generator().manual_seed(0)
    grids = torch.randint(2, (64, 1, 6, 6), generator=generator).float()
    rows = [{"pixel_values": grid, "labels": functional.pad(grid[0, :, :-1], (1, 0)).long()} for grid in grids]
    arguments = TrainingArguments(
        str(tmp_path / "run"), max_steps=40, learning_rate=3e-3, report_to="none", use_cpu=True, disable_tqdm=True, logging_steps=40
    )
    trainer = Trainer(small(num_channels=1, num_labels=2, max_steps=3), arguments, train_dataset=rows[:48], eval_dataset=rows[48:])
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.1 * before
    assert trainer.predict(rows[48:]).predictions.shape == (16, 2, 6, 6)  # the logits alone: metrics need not know of solver_steps
    trainer.save_model(str(tmp_path / "saved"))
    loaded = AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "saved")
    assert isinstance(loaded, RevDEQForSemanticSegmentation)
    assert AutoConfig.from_pretrained(tmp_path / "saved").kernel_sides == (3, 3)
    assert torch.equal(loaded(grids).logits, trainer.model.eval()(grids).logits)
    assert (loaded(grids).logits.argmax(1)[48:] == torch.stack([row["labels"] for row in rows[48:]])).float().mean() > 0.99


def test_pipeline_on_a_file(tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (11, 14, 3), dtype=np.uint8)).save(tmp_path / "image.png")
    processor = BeitImageProcessorPil(do_resize=False, do_center_crop=False)
    labels = {0: "wall", 1: "floor", 2: "door", 3: "path"}
    model = small(id2label=labels, label2id={name: index for index, name in labels.items()})
    found = pipeline("image-segmentation", model=model, image_processor=processor)(str(tmp_path / "image.png"))
    assert {part["label"] for part in found} <= set(labels.values())
    with torch.no_grad():
        pixels = processor(Image.open(tmp_path / "image.png"), return_tensors="pt")["pixel_values"]
        expected = model(pixels).logits[0].argmax(0).numpy()
    for part in found:
        assert np.array_equal(np.array(part["mask"]) > 0, expected == model.config.label2id[part["label"]])
    assert sum((np.array(part["mask"]) > 0).sum() for part in found) == 11 * 14


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (LABELS[0], r"labels must be \(batch, height, width\) = \(2, 7, 10\) of torch.int64, one class per pixel, got \(7, 10\)"),
        (LABELS.float(), "torch.int64, one class per pixel, got .* of torch.float32"),
        (
            LABELS + 1,
            r"labels must lie in \[0, num_labels\) = \[0, 4\), or be config.semantic_loss_ignore_index = 255 to be ignored, got \[4\]",
        ),
        ([1], "one class per pixel, got list"),
    ],
    ids=["shape", "dtype", "range", "kind"],
)
def test_labels_that_do_not_fit_are_refused(labels, message):
    with pytest.raises(ValueError, match=message):
        small()(GRIDS, labels=labels)


def test_networks_and_grids_that_do_not_fit_are_refused():
    for settings in (dict(hidden_sizes=[16, 16], expansion_ratios=[1, 1]), dict(stem_stride=2)):
        with pytest.raises(ValueError, match=r"needs one stage at full resolution.*dense_prediction\(\) is such a network"):
            small(**settings)
    with pytest.raises(ValueError, match=r"pixel_values must be \(batch, 3 channels, height, width\), got \(2, 1, 7, 10\)"):
        small()(GRIDS[:, :1])
    with pytest.raises(ValueError, match="set initial_scale > 0"):
        small()(GRIDS, num_restarts=3)
