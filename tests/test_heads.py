"""The heads: registered, saved and loaded, their arguments reach the body, and each learns a small real task from Python's own source text."""

import copy
import io
import itertools
import keyword
import random
import tokenize
from pathlib import Path

import pytest
import torch
from conftest import awake
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    DynamicCache,
    Trainer,
    TrainingArguments,
)
from transformers.models.auto import modeling_auto

from revdeq_hf import (
    RevDEQConfig,
    RevDEQForCausalLM,
    RevDEQForImageClassification,
    RevDEQForQuestionAnswering,
    RevDEQForSemanticSegmentation,
    RevDEQForSequenceClassification,
    RevDEQForTokenClassification,
    RevDEQModel,
    RevDEQVisionConfig,
)
from revdeq_hf.modeling_revdeq import RevDEQPreTrainedModel

SMALL = dict(
    vocab_size=260, hidden_size=32, intermediate_size=64, num_attention_heads=4, max_steps=3, drift_policy="raise", pad_token_id=256
)
IDS = torch.randint(0, 256, (3, 9), generator=torch.Generator().manual_seed(3))
HEADS = [
    (RevDEQForSequenceClassification, AutoModelForSequenceClassification, dict(labels=torch.tensor([0, 1, 2]))),
    (RevDEQForTokenClassification, AutoModelForTokenClassification, dict(labels=IDS % 3)),
    (
        RevDEQForQuestionAnswering,
        AutoModelForQuestionAnswering,
        dict(start_positions=torch.tensor([0, 1, 2]), end_positions=torch.tensor([3, 8, 2])),
    ),
]


@pytest.mark.parametrize(("head", "auto", "labels"), HEADS, ids=lambda value: getattr(value, "__name__", ""))
@pytest.mark.parametrize("block_type", ["modern", "paper"])
def test_heads_load_train_exactly_and_take_max_steps(head, auto, labels, block_type, tmp_path):
    results = []
    for gradient in ("reversible", "backprop"):
        torch.manual_seed(0)
        model = awake(head(RevDEQConfig(**SMALL, num_labels=3, block_type=block_type, gradient=gradient)))
        out = model(IDS, **labels)
        out.loss.backward()
        assert model.model.solve.drift == 0
        results.append({name: parameter.grad for name, parameter in model.named_parameters()})
        assert all(grad is not None and grad.abs().sum() > 0 for grad in results[-1].values())
    assert all(torch.equal(grad, results[1][name]) for name, grad in results[0].items())
    logits = out[1]
    assert not torch.equal(logits, model(IDS, **labels, max_steps=1)[1])
    assert model.model.solve.statistics.evaluations == 2
    model(IDS, **labels, tol=10.0)
    assert model.model.solve.statistics.steps.max() == 0
    model.save_pretrained(tmp_path)
    loaded, info = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is head
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    torch.testing.assert_close(loaded(IDS, **labels)[1], logits, rtol=0, atol=0)
    assert isinstance(AutoModel.from_pretrained(tmp_path), RevDEQModel)
    body = RevDEQForCausalLM.from_pretrained(tmp_path)  # the body's weights serve other heads
    assert torch.equal(body.model.embed_tokens.weight, model.model.embed_tokens.weight)


def test_the_tables_of_names_know_the_heads():
    """Trainer and pipelines look there."""
    for table, name in (
        (modeling_auto.MODEL_MAPPING_NAMES, "RevDEQModel"),
        (modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "RevDEQForCausalLM"),
        (modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES, "RevDEQForSequenceClassification"),
        (modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES, "RevDEQForTokenClassification"),
        (modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES, "RevDEQForQuestionAnswering"),
    ):
        assert table["revdeq"] == name
    for table, name in (
        (modeling_auto.MODEL_MAPPING_NAMES, "RevDEQVisionModel"),
        (modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES, "RevDEQForImageClassification"),
        (modeling_auto.MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES, "RevDEQForSemanticSegmentation"),
        (modeling_auto.MODEL_FOR_BACKBONE_MAPPING_NAMES, "RevDEQVisionBackbone"),
    ):
        assert table["revdeq_vision"] == name


def test_a_sequence_is_read_at_its_last_token_wherever_the_padding_is():
    torch.manual_seed(0)
    model = awake(RevDEQForSequenceClassification(RevDEQConfig(**SMALL, num_labels=3))).eval()
    alone = model(IDS[:1, :5]).logits
    padded = IDS.clone()
    padded[0, 5:] = 256
    torch.testing.assert_close(model(padded, attention_mask=(padded != 256).long()).logits[:1], alone, rtol=0, atol=1e-6)
    padded[0] = torch.cat([torch.full((4,), 256), IDS[0, :5]])
    positions = (padded != 256).long().cumsum(-1).sub(1).clamp(0)
    got = model(padded, attention_mask=(padded != 256).long(), position_ids=positions).logits[:1]
    torch.testing.assert_close(got, alone, rtol=0, atol=1e-6)
    model.config.pad_token_id = None
    with pytest.raises(ValueError, match="padding token"):
        model(IDS)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("block_type", ["modern", "paper"])
def test_attention_in_both_directions(attention, block_type):
    torch.manual_seed(0)
    config = RevDEQConfig(**SMALL, num_labels=3, is_causal=False, block_type=block_type, attn_implementation=attention)
    model = awake(RevDEQForTokenClassification(config)).eval()
    changed = IDS.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 256
    first = model(IDS).logits
    assert not torch.equal(first[:, 0], model(changed).logits[:, 0])
    padded = torch.cat([IDS, torch.full((3, 4), 256)], 1)
    got = model(padded, attention_mask=(padded != 256).long()).logits[:, :9]
    torch.testing.assert_close(got, first, rtol=0, atol=1e-6)
    assert got.isfinite().all()
    causal = RevDEQForTokenClassification(RevDEQConfig(**SMALL, num_labels=3, block_type=block_type, attn_implementation=attention)).eval()
    assert torch.equal(causal(IDS).logits[:, 0], causal(changed).logits[:, 0])


def test_a_model_that_sees_the_future_keeps_no_cache_and_does_not_generate():
    model = RevDEQForCausalLM(RevDEQConfig(**SMALL, is_causal=False)).eval()
    with torch.no_grad():
        assert model(IDS, use_cache=True).past_key_values is None
        with pytest.raises(ValueError, match="is_causal=False"):
            model(IDS, past_key_values=DynamicCache(config=model.config))
    for use_cache in (True, False):
        with pytest.raises(ValueError, match="cannot generate"):
            model.generate(IDS, max_new_tokens=2, use_cache=use_cache)
    assert AutoConfig.for_model("revdeq").is_causal


def test_bad_inputs_are_told():
    sequence, token, question = (head(RevDEQConfig(**SMALL, num_labels=3)) for head, _, _ in HEADS)
    for model in (sequence, token, question):
        with pytest.raises(ValueError, match=r"\[0, 260\), got 1 to 260"):
            model(torch.tensor([[1, 260]]))
        with pytest.raises(ValueError, match="exactly one"):
            model()
        with pytest.raises(ValueError, match="max_steps"):
            model(IDS, max_steps=0)
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        sequence(IDS, labels=torch.tensor([0, 1, 3]))


def test_regression_and_several_labels_at_once():
    """The loss follows from the labels, as in transformers' own models."""
    torch.manual_seed(0)
    one = RevDEQForSequenceClassification(RevDEQConfig(**SMALL, num_labels=1))
    wanted = torch.tensor([0.5, -1.0, 2.0])
    out = one(IDS, labels=wanted)
    torch.testing.assert_close(out.loss, ((out.logits[:, 0] - wanted) ** 2).mean())
    several = RevDEQForSequenceClassification(RevDEQConfig(**SMALL, num_labels=3))
    wanted = torch.tensor([[1.0, 0, 1], [0, 0, 0], [0, 1, 0]])
    out = several(IDS, labels=wanted)
    torch.testing.assert_close(out.loss, torch.nn.functional.binary_cross_entropy_with_logits(out.logits, wanted))
    assert several.config.problem_type == "multi_label_classification"


GENERATOR = torch.Generator().manual_seed(5)
UNEVEN = torch.where(torch.arange(9) < torch.tensor([[9], [2], [0], [5]]), torch.randint(0, 3, (4, 9), generator=GENERATOR), -100)
IMAGE = dict(hidden_sizes=[16], max_steps=2)  # one stage
ACCUMULATED = {
    "classes": (RevDEQForSequenceClassification, dict(num_labels=3), torch.tensor([0, 1, 2, 1])),
    "a regression": (RevDEQForSequenceClassification, dict(num_labels=1), torch.tensor([0.5, -1.0, 2.0, 0.0])),
    "several labels": (RevDEQForSequenceClassification, dict(num_labels=3), torch.randint(0, 2, (4, 3), generator=GENERATOR).float()),
    "tokens": (RevDEQForTokenClassification, dict(num_labels=3), UNEVEN),
    "answers": (RevDEQForQuestionAnswering, dict(), torch.tensor([0, 1, 2, 3])),
    "image classes": (RevDEQForImageClassification, dict(num_labels=3), torch.tensor([0, 1, -100, 1])),
    "an image regression": (RevDEQForImageClassification, dict(num_labels=1), torch.tensor([0.5, -1.0, 2.0, 0.0])),
    "several image labels": (RevDEQForImageClassification, dict(num_labels=3), torch.randint(0, 2, (4, 3), generator=GENERATOR).float()),
    "pixels": (RevDEQForSemanticSegmentation, dict(num_labels=3), torch.randint(0, 3, (4, 5, 5), generator=GENERATOR)),
}


@pytest.mark.parametrize("task", ACCUMULATED)
@pytest.mark.parametrize("parts", [2, 4])
def test_accumulated_micro_batches_train_as_one_batch(task, parts, tmp_path):
    """Losses and gradients of Trainer, of every head and every kind of label; those of transformers' own heads are as many times too large (5.23)."""
    head, settings, labels = ACCUMULATED[task]
    text = issubclass(head, RevDEQPreTrainedModel)
    generator = torch.Generator().manual_seed(7)
    if text:
        inputs, name = torch.randint(0, 256, (4, 9), generator=generator), "input_ids"
        config = RevDEQConfig(**SMALL, **settings)
    else:
        inputs, name = torch.randn(4, 3, 5, 5, generator=generator), "pixel_values"
        config = RevDEQVisionConfig.dense_prediction(**IMAGE, **settings)  # whose norms do not look at the other images of a batch
    rows = [
        {name: a, "labels": b} if task != "answers" else {name: a, "start_positions": b, "end_positions": b + 2}
        for a, b in zip(inputs, labels, strict=True)
    ]
    runs = []
    for size in (4, 4 // parts):
        torch.manual_seed(0)
        model = head(copy.deepcopy(config))
        arguments = TrainingArguments(
            str(tmp_path), max_steps=2, per_device_train_batch_size=size, gradient_accumulation_steps=4 // size, learning_rate=0.05, optim="sgd",
            max_grad_norm=0.0, lr_scheduler_type="constant", logging_steps=1, save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=rows)
        trainer.train()
        runs.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry] + [p.detach() for p in model.parameters()])
    for whole, accumulated in zip(*runs, strict=True):
        torch.testing.assert_close(torch.as_tensor(accumulated), torch.as_tensor(whole), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("head", "auto", "labels"), HEADS, ids=lambda value: getattr(value, "__name__", ""))
def test_heads_return_the_figures_of_the_solve(head, auto, labels):
    model = awake(head(RevDEQConfig(**SMALL, num_labels=3))).eval()
    out = model(IDS, **labels, output_solver_stats=True, max_steps=2)
    assert out.solver_steps.tolist() == [[2] * 9] * 3
    assert torch.equal(out.solver_residual, model.model.solve.statistics.residual)
    assert "solver_steps" not in model(IDS)
    as_tuple = model(IDS, **labels, output_solver_stats=True, max_steps=2, return_dict=False)
    assert torch.equal(as_tuple[-1], out.solver_residual)


# Tasks made of the standard library's source text, read as bytes.
WIDTH = 24
SOURCES = ("argparse.py", "ast.py", "heapq.py", "inspect.py", "subprocess.py", "tarfile.py", "threading.py", "typing.py")
TINY = {**SMALL, "max_steps": 2}


def source_lines() -> list[str]:
    folder = Path(random.__file__).parent
    lines = [line.strip() for name in SOURCES for line in (folder / name).read_text(encoding="utf-8").splitlines()]
    return list(dict.fromkeys(line for line in lines if 12 <= len(line) <= WIDTH and line.isascii()))


def encode(texts: list[str]) -> torch.Tensor:
    return torch.tensor([[*text.encode(), *[256] * (WIDTH - len(text))] for text in texts])


def train(model, batch: dict[str, torch.Tensor], updates: int, size: int = 16, rate: float = 1e-2) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=updates)
    generator = torch.Generator().manual_seed(0)
    model.train()
    for _ in range(updates):
        rows = torch.randint(0, batch["input_ids"].shape[0], (size,), generator=generator)
        optimizer.zero_grad()
        model(**{name: value[rows] for name, value in batch.items()}).loss.backward()
        optimizer.step()
        schedule.step()
    assert model.model.solve.drift == 0
    model.eval()


def test_sequence_classification_learns_comments_from_code():
    """Is a line of source prose or code? The comment sign is taken away."""
    lines = source_lines()
    prose = [line.lstrip("# ") for line in lines if line.startswith("# ")]
    code = [line for line in lines if line.endswith((":", ")", "]")) and not line.startswith("#") and '"' not in line]
    random.Random(0).shuffle(code)
    count = min(len(prose), len(code)) // 2 * 2
    texts = [text for pair in zip(prose[:count], code[:count], strict=True) for text in pair]
    ids, labels = encode(texts), torch.arange(len(texts)) % 2
    batch = {"input_ids": ids, "attention_mask": (ids != 256).long(), "labels": labels}
    torch.manual_seed(0)
    model = RevDEQForSequenceClassification(RevDEQConfig(**TINY, num_labels=2))
    held = len(texts) // 4
    train(model, {name: value[held:] for name, value in batch.items()}, updates=80)
    with torch.no_grad():
        right = model(ids[:held], attention_mask=batch["attention_mask"][:held]).logits.argmax(-1) == labels[:held]
    assert right.float().mean() > 0.8  # chance: 0.5


def token_task() -> tuple[list[str], list[list[int]]]:
    """Lines, and for every character of a name 0 where it is a keyword, 1 where it is called, 2 for other names; -100 for other characters."""
    texts, kinds = [], []
    for line in source_lines():
        marks = [-100] * len(line)
        try:
            tokens = list(tokenize.generate_tokens(io.StringIO(line).readline))
        except (tokenize.TokenError, IndentationError, SyntaxError):
            continue
        for token, following in itertools.pairwise(tokens):
            if token.type == tokenize.NAME:
                kind = 0 if keyword.iskeyword(token.string) else 1 if following.string == "(" else 2
                marks[token.start[1] : token.end[1]] = [kind] * len(token.string)
        if "(" in line:
            texts.append(line)
            kinds.append(marks)
    return texts, kinds


def test_with_tol_an_example_that_is_seen_in_both_directions_stops_as_a_whole():
    """A token that sees all others has not settled before they have."""
    torch.manual_seed(0)
    model = RevDEQForTokenClassification(RevDEQConfig(**SMALL, num_labels=3, is_causal=False, tol=1e-3)).eval()
    ids = torch.randint(0, 10, (4, 7))
    with torch.no_grad():
        logits = model(ids, max_steps=100).logits
        found = model.model.solve.statistics
        model.model.solve.tol = None
        settled = model(ids, max_steps=100).logits
    assert found.steps.shape == found.residual.shape == (4,)
    assert found.steps.max() < 100
    assert found.residual.max() <= 1e-3
    torch.testing.assert_close(logits, settled, rtol=0, atol=1e-2)


def test_token_classification_learns_which_names_are_called():
    """Whether a bracket follows is not known before it: a model that sees what follows should be better at it."""
    texts, kinds = token_task()
    order = random.Random(0).sample(range(len(texts)), len(texts))
    texts, kinds = [texts[i] for i in order], [kinds[i] for i in order]
    ids = encode(texts)
    labels = torch.tensor([marks + [-100] * (WIDTH - len(marks)) for marks in kinds])
    batch = {"input_ids": ids, "attention_mask": (ids != 256).long(), "labels": labels}
    held = len(texts) // 4
    truth = labels[:held]
    counted = truth != -100
    most = torch.bincount(truth[counted], minlength=3).max() / counted.sum()
    right = {}
    for is_causal in (False, True):
        torch.manual_seed(0)
        model = RevDEQForTokenClassification(RevDEQConfig(**TINY, num_labels=3, is_causal=is_causal))
        train(model, {name: value[held:] for name, value in batch.items()}, updates=120)
        with torch.no_grad():
            guess = model(ids[:held], attention_mask=batch["attention_mask"][:held]).logits.argmax(-1)
        right[is_causal] = (guess == truth)[counted].float().mean()
    assert right[False] > most + 0.25
    assert right[False] > right[True]


def test_question_answering_finds_the_argument():
    """Where in a line is what stands between the first pair of brackets?"""
    lines = [line for line in source_lines() if "(" in line]
    spans = [(line.index("(") + 1, line.find(")", line.index("("))) for line in lines]
    kept = [(line, span) for line, span in zip(lines, spans, strict=True) if span[0] < span[1]]
    random.Random(0).shuffle(kept)
    ids = encode([line for line, _ in kept])
    batch = {"input_ids": ids, "attention_mask": (ids != 256).long()}
    batch["start_positions"] = torch.tensor([span[0] for _, span in kept])
    batch["end_positions"] = torch.tensor([span[1] - 1 for _, span in kept])
    held = len(kept) // 4
    torch.manual_seed(0)
    model = RevDEQForQuestionAnswering(RevDEQConfig(**TINY, is_causal=False))
    train(model, {name: value[held:] for name, value in batch.items()}, updates=150)
    with torch.no_grad():
        out = model(ids[:held], attention_mask=batch["attention_mask"][:held])
    starts = (out.start_logits.argmax(-1) == batch["start_positions"][:held]).float().mean()
    ends = (out.end_logits.argmax(-1) == batch["end_positions"][:held]).float().mean()
    assert starts > 0.6  # chance: 0.05
    assert ends > 0.6
