"""Fine-tuning as users do it: adapters of peft, trl's trainer on conversations, and evaluation by lm-evaluation-harness, each where it is installed."""

import copy
import json

import pytest
import torch
from conftest import awake, relative_error
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedTokenizerFast, TorchAoConfig, Trainer, TrainingArguments

from revdeq_hf import RevDEQConfig, RevDEQForCausalLM, RevDEQForSequenceClassification
from revdeq_hf.training import LiveBytes

SMALL = dict(vocab_size=260, hidden_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2, max_steps=3)
SMALL |= dict(beta=0.8, drift_policy="raise", pad_token_id=256, eos_token_id=257)
IDS = torch.randint(0, 256, (3, 12), generator=torch.Generator().manual_seed(3))
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def base_model(**kwargs) -> RevDEQForCausalLM:
    torch.manual_seed(0)
    return awake(RevDEQForCausalLM(RevDEQConfig(**{**SMALL, **kwargs})))


def adapted(model, **kwargs):
    """The model with adapters whose second factor is no longer zero."""
    peft = pytest.importorskip("peft", reason="needs peft: pip install 'revdeq_hf[finetune]'")
    model = peft.get_peft_model(model, peft.LoraConfig(**{"r": 4, "target_modules": PROJECTIONS, **kwargs}))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.2, generator=generator)
    return model


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("settings", [{}, dict(block_type="paper"), dict(num_block_layers=2, num_prelude_layers=1)], ids=str)
def test_adapters_get_exact_gradients(settings, autocast):
    target = ["q_proj", "k_proj", "v_proj", "o_proj"] if settings.get("block_type") == "paper" else PROJECTIONS
    results = {}
    for gradient in ("reversible", "checkpoint", "backprop"):
        model = adapted(base_model(gradient=gradient, **settings), target_modules=target, lora_dropout=0.1).train()
        torch.manual_seed(5)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        assert model.get_base_model().model.solve.drift == 0
        results[gradient] = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert all("lora_" in name for name in results[gradient])
        assert all(grad.abs().sum() > 0 for grad in results[gradient].values())
        assert all(parameter.grad is None for parameter in model.parameters() if not parameter.requires_grad)
    for gradient in ("reversible", "checkpoint"):
        for name, grad in results[gradient].items():
            assert torch.equal(grad, results["backprop"][name]), name


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", ["Linear4bit", "Linear8bitLt", "torchao"])
def test_adapters_on_quantized_weights(kind, autocast, tmp_path):
    """QLoRA: weights of four bits by bitsandbytes, or of eight, or by torchao, with the same gradients in all modes; saved, loaded, generating."""
    package = "torchao" if kind == "torchao" else "bitsandbytes"
    pytest.importorskip(package, reason=f"{package} is not installed, and no dependency of the package")
    peft = pytest.importorskip("peft", reason="needs peft: pip install 'revdeq_hf[finetune]'")
    if kind == "torchao":
        settings = TorchAoConfig(pytest.importorskip("torchao.quantization").Int8WeightOnlyConfig())
    elif kind == "Linear8bitLt":
        settings = BitsAndBytesConfig(load_in_8bit=True)
    else:
        settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    base_model(hidden_size=64, intermediate_size=128, num_prelude_layers=1).save_pretrained(tmp_path / "base")

    def quantized(**kwargs):
        given = dict(quantization_config=settings, device_map="cpu", **kwargs)
        return peft.prepare_model_for_kbit_training(AutoModelForCausalLM.from_pretrained(tmp_path / "base", **given))

    results = []
    for gradient in ("backprop", "checkpoint", "reversible"):
        torch.manual_seed(4)
        model = adapted(quantized(gradient=gradient), lora_dropout=0.1, task_type="CAUSAL_LM").train()
        base = model.get_base_model().model.solve.block.layers[0].mlp.up_proj.base_layer
        assert kind in {type(base).__name__, type(base.weight).__module__.split(".")[0]}
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        assert model.get_base_model().model.solve.drift == 0
        results.append([loss.detach(), *(parameter.grad for parameter in model.parameters() if parameter.requires_grad)])
        assert all(grad.abs().sum() > 0 for grad in results[-1])
    assert all(torch.equal(*pair) for other in results[1:] for pair in zip(results[0], other, strict=True))
    assert model.get_base_model().model.solve.reversed
    model.save_pretrained(tmp_path / "adapter")
    again, model = peft.PeftModel.from_pretrained(quantized(), tmp_path / "adapter").eval(), model.eval()
    with torch.no_grad():
        assert torch.equal(again(input_ids=IDS).logits, model(input_ids=IDS).logits)
    plain, cached = (again.generate(input_ids=IDS, max_new_tokens=5, do_sample=False, use_cache=flag) for flag in (False, True))
    assert torch.equal(plain, cached)


def test_adapters_that_are_told_where_to_act_by_hooks():
    """aLoRA acts from its invocation tokens on; peft tells its layers where they are by hooks, which are gone in the backward pass."""
    results = []
    for gradient in ("backprop", "checkpoint", "reversible"):
        model = adapted(base_model(gradient=gradient), task_type="CAUSAL_LM", alora_invocation_tokens=[int(IDS[0, 5])]).train()
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        results.append([loss.detach(), *(parameter.grad for parameter in model.parameters() if parameter.requires_grad)])
        assert all(grad.abs().sum() > 0 for grad in results[-1])
    assert all(torch.equal(*pair) for other in results[1:] for pair in zip(results[0], other, strict=True))


def test_frozen_parameters_cost_no_memory():
    """With all but the adapters frozen, the gradients of the rest are neither there after the backward pass nor on the way."""
    alive, peak = {}, {}
    for frozen in (False, True):
        model = adapted(base_model(hidden_size=128, intermediate_size=512), r=1)
        if not frozen:
            model.requires_grad_(True)
        with LiveBytes() as memory:
            model(input_ids=IDS, labels=IDS).loss.backward()
        alive[frozen], peak[frozen] = memory.alive, memory.peak
    block = sum(p.numel() * 4 for name, p in model.named_parameters() if ".block." in name and "lora_" not in name)
    assert alive[False] - alive[True] > block  # gradients of all its weights
    assert peak[False] - peak[True] > block


def test_frozen_body_with_a_trained_head_runs_no_backward_solve():
    model = base_model()
    model.model.requires_grad_(False)
    model(IDS, labels=IDS).loss.backward()
    assert model.lm_head.weight.grad.abs().sum() > 0
    assert model.model.solve.statistics.evaluations == 6


@pytest.mark.parametrize("frozen", ["model.solve", "model.embed_tokens", "lm_head"])
def test_what_is_not_frozen_gets_the_same_gradients_in_all_modes(frozen):
    """A frozen block still lets the gradient through to what is before it."""
    gradients = []
    for mode in ("reversible", "checkpoint", "backprop"):
        model = base_model(gradient=mode, num_prelude_layers=1)
        model.get_submodule(frozen).requires_grad_(False)
        model(IDS, labels=IDS).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
        assert all((grad is None) == name.startswith(frozen) for name, grad in gradients[-1].items())
        assert all(grad is None or grad.abs().sum() > 0 for grad in gradients[-1].values())
    for grads in gradients[:2]:
        assert all(grad is None or torch.equal(grad, gradients[2][name]) for name, grad in grads.items())


def test_merge_unload_save_and_load(tmp_path):
    peft = pytest.importorskip("peft", reason="needs peft: pip install 'revdeq_hf[finetune]'")
    base = base_model().eval()
    plain = base(IDS).logits
    model = adapted(copy.deepcopy(base)).eval()
    logits = model(input_ids=IDS).logits
    assert relative_error(logits, plain) > 1e-3
    with model.disable_adapter():
        assert torch.equal(model(input_ids=IDS).logits, plain)
    model.save_pretrained(tmp_path / "adapter")
    assert {file.name for file in (tmp_path / "adapter").iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter").eval()
    assert torch.equal(again(input_ids=IDS).logits, logits)
    base.save_pretrained(tmp_path / "base")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    loaded.load_adapter(str(tmp_path / "adapter"))  # transformers' own door
    assert torch.equal(loaded.eval()(IDS).logits, logits)
    merged = model.merge_and_unload()
    assert type(merged) is RevDEQForCausalLM
    torch.testing.assert_close(merged(IDS).logits, logits, rtol=0, atol=1e-5)
    generated = merged.generate(IDS, max_new_tokens=5, do_sample=False)
    assert torch.equal(again.generate(input_ids=IDS, max_new_tokens=5, do_sample=False), generated)
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()(IDS).logits, merged(IDS).logits)


def test_target_modules_by_word_and_an_adapted_head():
    """A model type that peft does not know has no default targets: name them, or say "all-linear"."""
    model = adapted(base_model(), target_modules="all-linear")
    assert {name.split(".")[-4] for name, _ in model.named_parameters() if "lora_A" in name} == set(PROJECTIONS)
    model = adapted(base_model(), target_modules=["q_proj", "lm_head"]).train()
    loss = model(input_ids=IDS, labels=IDS).loss  # the logits are computed then
    merged = copy.deepcopy(model).merge_and_unload().train()
    torch.testing.assert_close(merged(IDS, labels=IDS).loss, loss, rtol=1e-5, atol=1e-5)
    classifier = adapted(
        RevDEQForSequenceClassification(RevDEQConfig(**SMALL, num_labels=2)), task_type="SEQ_CLS", target_modules=PROJECTIONS
    )
    classifier(input_ids=IDS, labels=torch.tensor([0, 1, 1])).loss.backward()
    assert any(parameter.grad is not None for name, parameter in classifier.named_parameters() if "score" in name)


CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ '?' + message['content'] + '\\n' }}{% else %}"
    "{{ '!' }}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '!' }}{% endif %}"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(letters)}, merges=[]))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>")
    assert len(tokenizer) == 258
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def conversations() -> Dataset:
    words = ["red", "blue", "green", "one", "two", "three", "sun", "moon"]
    rows = [[{"role": "user", "content": f"upper {word}"}, {"role": "assistant", "content": word.upper()}] for word in words]
    return Dataset.from_list([{"messages": row} for row in rows * 4])


@pytest.mark.parametrize("lora", [False, True])
def test_trl_tunes_on_conversations(lora, tmp_path):
    trl = pytest.importorskip("trl", reason="needs trl: pip install 'revdeq_hf[finetune]'")
    peft = pytest.importorskip("peft", reason="needs peft: pip install 'revdeq_hf[finetune]'")
    tokenizer, model = byte_tokenizer(), base_model(hidden_size=64)
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path),
        max_steps=25,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        assistant_only_loss=True,
        logging_steps=5,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        max_length=64,
        disable_tqdm=True,
    )
    run = trl.SFTTrainer(
        model,
        arguments,
        train_dataset=conversations(),
        processing_class=tokenizer,
        peft_config=peft.LoraConfig(r=8, target_modules=PROJECTIONS, modules_to_save=["embed_tokens", "lm_head"]) if lora else None,
    )
    run.train()
    entries = [entry for entry in run.state.log_history if "loss" in entry]
    assert entries[-1]["loss"] < 0.6 * entries[0]["loss"]
    assert 0 < entries[-1]["mean_token_accuracy"] <= 1
    assert model.model.solve.drift == 0
    if not lora:
        assert entries[-1]["mean_token_accuracy"] > 0.6
        prompt = tokenizer.apply_chat_template([{"role": "user", "content": "upper sun"}], add_generation_prompt=True, return_tensors="pt")
        answer = model.eval().generate(prompt["input_ids"], max_new_tokens=8, do_sample=False)
        assert tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :]).isascii()


QUIET = dict(report_to="none", disable_tqdm=True, use_cpu=True, save_strategy="no", bf16=False, learning_rate=1e-2, logging_steps=1)


def test_trainer_trains_adapters_only(tmp_path):
    model = base_model()
    with torch.no_grad():  # an untrained head gives hardly any gradient to what is before it
        model.lm_head.weight.mul_(10)
    model, tokenizer = adapted(model), byte_tokenizer()
    frozen = {name: parameter.detach().clone() for name, parameter in model.named_parameters() if not parameter.requires_grad}
    texts = [tokenizer.apply_chat_template(row["messages"], tokenize=False) for row in conversations()]
    batch = tokenizer(texts, padding=True)
    labels = [[token if token != 256 else -100 for token in row] for row in batch["input_ids"]]
    rows = Dataset.from_dict({"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels})
    arguments = TrainingArguments(str(tmp_path), num_train_epochs=1, per_device_train_batch_size=4, **QUIET)
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < losses[0] - 0.3
    assert all(torch.equal(parameter, frozen[name]) for name, parameter in model.named_parameters() if name in frozen)


def test_trl_takes_the_same_steps_in_all_gradient_modes(tmp_path):
    trl = pytest.importorskip("trl", reason="needs trl: pip install 'revdeq_hf[finetune]'")
    weights = []
    for mode in ("reversible", "backprop"):
        model = base_model(gradient=mode)
        arguments = trl.SFTConfig(str(tmp_path), max_steps=2, per_device_train_batch_size=8, max_length=64, **QUIET)
        trl.SFTTrainer(model, arguments, train_dataset=conversations(), processing_class=byte_tokenizer()).train()
        weights.append(model.state_dict())
    assert all(torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())


@pytest.mark.slow  # importing the harness takes half a minute
def test_lm_evaluation_harness_on_a_local_task(tmp_path, monkeypatch):
    """Scores and generations of its `hf` model, batched with padding, are those of the model itself."""
    lm_eval = pytest.importorskip("lm_eval", reason="needs lm_eval: pip install lm_eval==0.4.13")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    questions = [
        ("1+1=", ["2", "seven", "31"], 0),
        ("the sun is:", ["hot", "a"], 0),
        ("abc", ["defg", "x", "yz"], 2),
        ("q:", ["no", "yes"], 1),
    ]
    rows = [{"question": question, "choices": choices, "answer": answer} for question, choices, answer in questions]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    task = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}}, "test_split": "test"}
    choice = {
        "task": "local_choice",
        **task,
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
    }
    choice |= {"doc_to_target": "{{answer}}", "target_delimiter": "", "metric_list": [{"metric": "acc"}]}
    write = {
        "task": "local_write",
        **task,
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{choices[answer]}}",
    }
    write |= {"generation_kwargs": {"max_gen_toks": 6, "do_sample": False, "until": ["\n\n"]}, "metric_list": [{"metric": "exact_match"}]}
    (tmp_path / "tasks").mkdir()
    for settings in (choice, write):
        (tmp_path / "tasks" / f"{settings['task']}.yaml").write_text(json.dumps(settings), encoding="utf-8")  # JSON is YAML
    model, tokenizer = base_model().eval(), byte_tokenizer()
    results = lm_eval.simple_evaluate(
        HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3, device="cpu"),
        tasks=["local_choice", "local_write"],
        task_manager=TaskManager(include_path=str(tmp_path / "tasks")),
        bootstrap_iters=0,
    )
    samples = sorted(results["samples"]["local_choice"], key=lambda sample: sample["doc_id"])
    for sample, row in zip(samples, rows, strict=True):
        for choice_text, got in zip(row["choices"], sample["filtered_resps"], strict=True):
            ids = tokenizer(row["question"] + choice_text, return_tensors="pt")["input_ids"]
            count = len(tokenizer(choice_text)["input_ids"])
            with torch.no_grad():
                scores = model(ids).logits.log_softmax(-1)[0, -count - 1 : -1]
            assert got[0] == pytest.approx(scores.gather(1, ids[0, -count:, None]).sum().item(), abs=1e-3)
    for sample in results["samples"]["local_write"]:
        ids = tokenizer(sample["doc"]["question"], return_tensors="pt")["input_ids"]
        answer = tokenizer.decode(model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :], skip_special_tokens=True)
        assert sample["filtered_resps"][0] == answer.split("\n\n")[0]
    assert 0 <= results["results"]["local_choice"]["acc,none"] <= 1
