"""The loss without logits: equal to the plain one in value and gradient, in every setting, with less memory; and what Trainer makes of it."""

import pytest
import torch
from conftest import awake, relative_error
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainingArguments
from transformers.trainer_pt_utils import LabelSmoother

from revdeq_hf import RevDEQConfig, RevDEQForCausalLM
from revdeq_hf.loss_revdeq import linear_cross_entropy
from revdeq_hf.training import LiveBytes

SMALL = dict(vocab_size=67, hidden_size=32, intermediate_size=48, num_attention_heads=4, max_steps=2, drift_policy="raise")
IDS = torch.randint(0, 67, (4, 11), generator=torch.Generator().manual_seed(3))


def model_of(**kwargs) -> RevDEQForCausalLM:
    torch.manual_seed(0)
    return awake(RevDEQForCausalLM(RevDEQConfig(**{**SMALL, **kwargs}))).train()


@pytest.mark.parametrize("chunk_rows", [1, 5, 21, 100])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("num_items", [None, 13, torch.tensor(13)])
def test_it_equals_the_plain_loss(chunk_rows, smoothing, num_items):
    hidden, weight = torch.randn(3, 7, 16, requires_grad=True), torch.randn(29, 16, requires_grad=True)
    labels = torch.randint(0, 29, (3, 7))
    labels[0, :4] = -100
    logits = hidden @ weight.T
    expected = cross_entropy(
        logits.flatten(0, 1), labels.flatten(), label_smoothing=smoothing, reduction="mean" if num_items is None else "sum"
    )
    expected = expected if num_items is None else expected / num_items
    got = linear_cross_entropy(hidden, weight, labels, num_items=num_items, label_smoothing=smoothing, chunk_rows=chunk_rows)
    torch.testing.assert_close(got, expected)
    for a, b in zip(torch.autograd.grad(3 * got, (hidden, weight)), torch.autograd.grad(3 * expected, (hidden, weight)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    smoother = LabelSmoother(epsilon=smoothing)
    torch.testing.assert_close(got, smoother({"logits": logits}, labels, num_items_in_batch=num_items))


def test_gradients_are_those_of_the_loss():
    hidden, weight = torch.randn(7, 5, dtype=torch.float64), torch.randn(9, 5, dtype=torch.float64)
    labels = torch.tensor([0, 8, -100, 3, 3, 1, -100])

    def loss(hidden, weight):
        return linear_cross_entropy(hidden, weight, labels, label_smoothing=0.2, chunk_rows=3)

    direction = [torch.randn_like(hidden), torch.randn_like(weight)]
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    slope = sum((a * b).sum() for a, b in zip(torch.autograd.grad(loss(*leaves), leaves), direction, strict=True)).item()
    step = 1e-2  # the loss itself is float32
    ends = [loss(*(leaf + sign * step * d for leaf, d in zip(leaves, direction, strict=True))).item() for sign in (1, -1)]
    assert slope == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=2e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision(dtype, autocast):
    """As exact as the plain loss, beside float32; also with many small chunks, whose sums half precision would round."""
    torch.manual_seed(1)
    hidden, weight = torch.randn(2048, 16), torch.randn(29, 16)
    labels = torch.randint(0, 29, (2048,))
    results = {}
    for name in ("exact", "plain", "chunks"):
        h, w = (t.clone().to(dtype if name != "exact" and not autocast else torch.float32).requires_grad_() for t in (hidden, weight))
        with torch.autocast("cpu", dtype=dtype, enabled=autocast and name != "exact"):
            loss = (
                linear_cross_entropy(h, w, labels, chunk_rows=2)
                if name == "chunks"
                else cross_entropy(nn.functional.linear(h, w).float(), labels)
            )
        assert loss.dtype == torch.float32
        (loss * 1024).backward()  # as a gradient scaler
        assert h.grad.dtype == h.dtype
        assert w.grad.dtype == w.dtype
        results[name] = (loss.detach(), h.grad.float(), w.grad.float())
    for exact, plain, chunks in zip(*results.values(), strict=True):
        assert relative_error(chunks, exact) < max(1.5 * relative_error(plain, exact), 1e-6)


def test_all_labels_ignored():
    """NaN with gradients of 0, as the plain loss; 0 where the number of items is given."""
    hidden, weight = torch.randn(5, 16, requires_grad=True), torch.randn(29, 16, requires_grad=True)
    labels = torch.full((5,), -100)
    for loss in (linear_cross_entropy(hidden, weight, labels), cross_entropy(hidden @ weight.T, labels)):
        assert loss.isnan()
        assert all((grad == 0).all() for grad in torch.autograd.grad(loss, (hidden, weight)))
    for items in (7, 0, torch.tensor(0)):  # none in all micro-batches of an update
        loss = linear_cross_entropy(hidden, weight, labels, num_items=items)
        assert loss == 0
        assert all((grad == 0).all() for grad in torch.autograd.grad(loss, (hidden, weight)))


@pytest.mark.parametrize("skip_logits", [True, False])
def test_an_update_without_a_label_changes_nothing(skip_logits):
    model = model_of()
    loss = model(IDS, labels=torch.full_like(IDS, -100), skip_logits=skip_logits, num_items_in_batch=torch.tensor(0)).loss
    assert loss == 0
    loss.backward()
    assert all((parameter.grad == 0).all() for parameter in model.parameters())


def test_many_rows_of_a_common_label_stay_within_float16():
    """A byte vocabulary, a fifth of the tokens the same, a channel that is large everywhere: their sum is beyond 65,504 before it is divided."""
    torch.manual_seed(0)
    count = 32 * 1024
    hidden, weight = torch.randn(count, 64), 0.02 * torch.randn(256, 64)
    hidden[:, 3] = 24.0
    labels = torch.where(torch.rand(count) < 0.2, 32, torch.randint(0, 256, (count,)))
    found = {}
    for dtype in (torch.float16, torch.float32):
        a, b = hidden.to(dtype).requires_grad_(), weight.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.float16, enabled=dtype == torch.float16):
            loss = linear_cross_entropy(a, b, labels)
        found[dtype] = torch.autograd.grad(2.0**12 * loss, (a, b))  # with a loss scale, as float16 is trained
    assert 24.0 * (labels == 32).sum() > torch.finfo(torch.float16).max
    for half, exact in zip(found[torch.float16], found[torch.float32], strict=True):
        assert relative_error(half, exact) < 5e-3


def test_only_what_is_asked_for():
    hidden, weight, labels = torch.randn(5, 16), torch.randn(29, 16), torch.randint(0, 29, (5,))
    assert not linear_cross_entropy(hidden, weight, labels).requires_grad
    loss = linear_cross_entropy(hidden.requires_grad_(), weight, labels)
    first = torch.autograd.grad(loss, hidden, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(loss, hidden)[0])  # twice, unchanged
    with pytest.raises(RuntimeError, match="skip_logits=False"):
        torch.autograd.grad(linear_cross_entropy(hidden, weight, labels), hidden, create_graph=True)
    hidden = torch.full((5, 16), torch.nan)
    assert linear_cross_entropy(hidden, weight, labels).isnan()
    with pytest.raises(ValueError, match=r"got shape \(4,\) for hidden states of \(5, 16\)"):
        linear_cross_entropy(hidden, weight, labels[:4])
    with pytest.raises(ValueError, match=r"\[0, 1\), got 1"):
        linear_cross_entropy(hidden, weight, labels, label_smoothing=1.0)
    with pytest.raises(ValueError, match="chunk_rows must be at least 1, got 0"):
        linear_cross_entropy(hidden, weight, labels, chunk_rows=0)
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        linear_cross_entropy(hidden, weight, torch.full((5,), 29))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_the_model_trains_alike_with_and_without_logits(tied, autocast):
    results = []
    labels = IDS.clone()
    labels[:2, :6] = -100
    for skip in (False, None):
        model = model_of(tie_word_embeddings=tied)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            out = model(IDS, labels=labels, skip_logits=skip, num_items_in_batch=torch.tensor(50))
        assert (out.logits is None) is (skip is None)
        out.loss.backward()
        results.append((out.loss, {name: parameter.grad for name, parameter in model.named_parameters()}))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=0)
    for name, gradient in results[0][1].items():
        assert relative_error(results[1][1][name], gradient) < (2e-2 if autocast else 1e-5), name


def test_labels_shifted_by_the_caller():
    model = model_of()
    shifted = torch.cat([IDS[:, 1:], torch.full((4, 1), -100)], 1)
    torch.testing.assert_close(model(IDS, labels=IDS, shift_labels=shifted).loss, model(IDS, labels=IDS).loss)
    flipped = model(IDS, labels=IDS, shift_labels=shifted.flip(1), skip_logits=False).loss
    torch.testing.assert_close(model(IDS, labels=IDS, shift_labels=shifted.flip(1)).loss, flipped)


def test_logits_are_there_unless_training():
    model = model_of()
    assert model(IDS).logits.shape == (4, 11, 67)
    with torch.no_grad():
        assert model(IDS, labels=IDS).logits is not None
        expected = model(IDS, labels=IDS).loss
        skipped = model(IDS, labels=IDS, skip_logits=True)
    assert skipped.logits is None
    torch.testing.assert_close(skipped.loss, expected)
    assert model.eval()(IDS, labels=IDS).logits is not None
    with pytest.raises(ValueError, match="without labels"):
        model(IDS, skip_logits=True)


def test_the_configuration_may_ask_for_logits(tmp_path):
    model_of().save_pretrained(tmp_path)
    model = RevDEQForCausalLM.from_pretrained(tmp_path, skip_logits=False).train()
    asked = model(IDS, labels=IDS)
    assert asked.logits is not None
    skipped = model(IDS, labels=IDS, skip_logits=True)
    assert skipped.logits is None
    torch.testing.assert_close(asked.loss, skipped.loss)
    model.save_pretrained(tmp_path)
    assert RevDEQForCausalLM.from_pretrained(tmp_path).config.skip_logits is False


def test_a_head_or_a_loss_that_was_replaced_is_used():
    model = model_of()
    model.loss_function = lambda logits, labels, vocab_size, **kwargs: logits.sum()
    out = model(IDS, labels=IDS)
    torch.testing.assert_close(out.loss, out.logits.sum())
    model = model_of()
    model.lm_head = nn.Sequential(model.lm_head)
    torch.testing.assert_close(model(IDS, labels=IDS).loss, model_of()(IDS, labels=IDS).loss)
    for tied in (False, True):
        model = model_of(tie_word_embeddings=tied)
        model.resize_token_embeddings(80)
        assert model(IDS, labels=IDS).logits is None
        assert model(IDS).logits.shape == (4, 11, 80)


def test_hooks_of_the_head_see_logits():
    """As they do in evaluation: a cap of the logits, for one."""
    losses = {}
    for skip_logits in (None, False):
        model = model_of()
        hook = model.lm_head.register_forward_hook(lambda module, inputs, logits: 0.5 * torch.tanh(logits))
        losses[skip_logits] = model(IDS, labels=IDS, skip_logits=skip_logits).loss
    torch.testing.assert_close(losses[None], losses[False])
    torch.testing.assert_close(losses[None], model.eval()(IDS, labels=IDS).loss)
    hook.remove()
    assert model.train()(IDS, labels=IDS).logits is None
    for origin, moves in (("torch.distributed.fsdp", True), ("accelerate", True), ("transformers_modules.mine", False), (None, False)):

        def looking(module, inputs, logits):
            return None

        looking.__module__ = origin
        hook = model.lm_head.register_forward_hook(looking)
        assert (model(IDS, labels=IDS).logits is None) == moves
        hook.remove()


def test_peak_memory_without_logits():
    """The logits of 1,024 tokens take 64 MB in float32, and as much again for their gradients."""
    hidden, labels = torch.randn(1024, 8), torch.randint(0, 16384, (1024,))
    weight = torch.randn(16384, 8)
    peaks = {}
    for name in ("plain", "chunks"):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        with LiveBytes() as memory:
            loss = cross_entropy(h @ w.T, labels) if name == "plain" else linear_cross_entropy(h, w, labels, chunk_rows=64)
            between = memory.alive
            loss.backward()
        peaks[name] = (between, memory.peak)
    assert peaks["plain"][0] > 64e6
    assert peaks["plain"][1] > 128e6
    assert peaks["chunks"][0] < 1.5e6  # the gradients, 0.5 MB, and the weights, as much, which are not new
    assert peaks["chunks"][1] < 14e6  # a chunk of 64 rows: 4 MB of logits


def test_the_model_keeps_no_logits():
    kept = {}
    for skip in (False, None):
        model = model_of(vocab_size=16384, hidden_size=16)
        ids = torch.randint(0, 16384, (4, 64))
        with LiveBytes() as memory:
            loss = model(ids, labels=ids, skip_logits=skip).loss
        kept[skip] = memory.alive
        loss.backward()
    assert kept[False] > 4 * 64 * 16384 * 4
    assert kept[None] < 4e6  # the head's gradient is 1 MB of it


def trainer(model: RevDEQForCausalLM, folder, **kwargs) -> Trainer:
    arguments = dict(output_dir=str(folder), max_steps=3, learning_rate=1e-2, lr_scheduler_type="constant", report_to="none", use_cpu=True)
    arguments |= dict(save_strategy="no", logging_steps=1, per_device_train_batch_size=4, disable_tqdm=True)
    metrics = kwargs.pop("compute_metrics", None)
    rows = [
        {"input_ids": ids, "labels": torch.where(torch.arange(11) < number % 7, -100, ids)} for number, ids in enumerate(IDS.repeat(3, 1))
    ]
    return Trainer(model, TrainingArguments(**{**arguments, **kwargs}), train_dataset=rows, eval_dataset=rows[:4], compute_metrics=metrics)


def losses(run: Trainer) -> list[float]:
    run.train()
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def test_trainer_accumulates_to_the_same_updates(tmp_path):
    """One batch of 4 equals 4 of 1, though their numbers of labels differ: the loss honours the items of the whole batch."""
    whole, parts = model_of(), model_of()
    expected = losses(trainer(whole, tmp_path, optim="sgd", learning_rate=0.1))
    got = losses(trainer(parts, tmp_path, optim="sgd", learning_rate=0.1, per_device_train_batch_size=1, gradient_accumulation_steps=4))
    assert got == pytest.approx(expected, rel=1e-5)
    assert expected[-1] < expected[0]
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_trainer_evaluates_with_metrics(tmp_path):
    seen = {}

    def metrics(prediction):
        seen["logits"] = prediction.predictions
        return {"right": float((prediction.predictions[:, :-1].argmax(-1) == prediction.label_ids[:, 1:]).mean())}

    run = trainer(model_of(), tmp_path, compute_metrics=metrics)
    run.train()
    result = run.evaluate()
    assert seen["logits"].shape == (4, 11, 67)
    assert 0 <= result["eval_right"] <= 1
    expected = run.model.eval()(IDS, labels=torch.stack([row["labels"] for row in run.eval_dataset])).loss.item()
    assert result["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_trainer_smooths_shifted_labels(tmp_path):
    """Trainer keeps the labels to itself then, and so gets the logits; the value is that of the smoothed loss without logits."""
    model = model_of()
    run = trainer(model, tmp_path, label_smoothing_factor=0.1, max_steps=1, learning_rate=0.0)
    batch = {"input_ids": IDS, "labels": IDS}
    got = run.compute_loss(model, dict(batch))
    hidden = model.model(IDS).last_hidden_state[:, :-1]
    torch.testing.assert_close(got, linear_cross_entropy(hidden, model.lm_head.weight, IDS[:, 1:], label_smoothing=0.1))
    assert losses(run)
