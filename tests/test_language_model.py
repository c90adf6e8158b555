"""The language model: gradients, save and load, generation, padding, and errors."""

import json
import math
import re
import subprocess
import sys

import pytest
import torch
from conftest import awake, relative_error
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, DynamicCache, pipeline

from revdeq_hf import RevDEQConfig, RevDEQForCausalLM, RevDEQForTokenClassification, RevDEQModel, modeling_revdeq
from revdeq_hf.cache_revdeq import CACHE_NAME

SMALL = dict(vocab_size=67, hidden_size=32, intermediate_size=48, num_attention_heads=4, max_position_embeddings=64, max_steps=3)


def small(**kwargs) -> RevDEQForCausalLM:
    torch.manual_seed(0)
    settings = {**SMALL, **kwargs}
    if settings.get("block_type") != "paper":
        settings.setdefault("num_key_value_heads", 2)
    model = RevDEQForCausalLM(RevDEQConfig(**settings))
    awake(model)
    return model.eval()


VARIANTS = [
    dict(),
    dict(block_type="paper"),
    dict(num_block_layers=2, tie_word_embeddings=True, beta=0.8),
    dict(num_prelude_layers=1, num_coda_layers=1),
]
IDS = torch.randint(0, 67, (2, 11), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_modes_agree_on_the_whole_model(variant, autocast):
    gradients, losses = {}, {}
    for mode in ("reversible", "checkpoint", "backprop"):
        model = small(**variant, gradient=mode, attention_dropout=0.1, hidden_dropout=0.1).train()
        torch.manual_seed(7)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = model(IDS, labels=IDS).loss
        loss.backward()
        losses[mode] = loss.item()
        gradients[mode] = {name: parameter.grad for name, parameter in model.named_parameters()}
        assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients[mode].values())
        assert model.model.solve.drift == 0
    assert len(set(losses.values())) == 1
    for mode in ("reversible", "checkpoint"):
        for name, gradient in gradients[mode].items():
            assert torch.equal(gradient, gradients["backprop"][name]), name


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_save_and_load_give_the_same_logits_in_another_process(variant, tmp_path):
    model = small(**variant)
    model.save_pretrained(tmp_path)
    # what is data is JSON and safetensors; the rest is the code of the bundle, its licence and its requirements
    code_files = {file.name for file in tmp_path.iterdir() if file.suffix == ".py"} | {"LICENSE", "requirements.txt"}
    assert {file.suffix for file in tmp_path.iterdir() if file.name not in code_files} == {".json", ".safetensors"}
    assert isinstance(AutoModel.from_pretrained(tmp_path), RevDEQModel)
    assert AutoConfig.from_pretrained(tmp_path).max_steps == 3
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    with torch.no_grad():
        expected = model(IDS).logits
        assert torch.equal(loaded.eval()(IDS).logits, expected)
    code = (
        "import sys, torch, revdeq_hf; from transformers import AutoModelForCausalLM; torch.set_num_threads(int(sys.argv[2]));"
        "m = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval();"
        f"print('LOGITS', m(torch.tensor({IDS.tolist()})).logits.double().flatten().tolist())"
    )
    command = [sys.executable, "-c", code, str(tmp_path), str(torch.get_num_threads())]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    other = json.loads(next(line for line in out.splitlines() if line.startswith("LOGITS")).removeprefix("LOGITS "))
    assert torch.equal(torch.tensor(other, dtype=torch.float64), expected.double().flatten())


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_law_6_cache_equals_no_cache_on_a_left_padded_batch(variant, cache):
    model = small(**variant)
    ids, mask = IDS.clone(), torch.ones_like(IDS)
    ids[0, :4], mask[0, :4] = 0, 0
    settings = dict(
        attention_mask=mask, max_new_tokens=12, do_sample=False, output_logits=True, return_dict_in_generate=True, pad_token_id=0
    )
    plain = model.generate(ids, use_cache=False, **settings)
    cached = model.generate(ids, cache_implementation=cache, disable_compile=True, **settings)
    assert torch.equal(plain.sequences, cached.sequences)
    torch.testing.assert_close(torch.stack(plain.logits), torch.stack(cached.logits), rtol=0, atol=1e-5)
    alone = model.generate(ids[:1, 4:], **{**settings, "attention_mask": mask[:1, 4:]})
    assert torch.equal(alone.sequences[0], cached.sequences[0, 4:])
    beams = {flag: model.generate(ids, num_beams=3, use_cache=flag, **settings).sequences for flag in (True, False)}
    assert torch.equal(beams[True], beams[False])
    longer = {flag: model.generate(ids, max_steps=5, use_cache=flag, **settings) for flag in (True, False)}
    assert torch.equal(longer[True].sequences, longer[False].sequences)
    assert not torch.equal(torch.stack(longer[True].logits), torch.stack(cached.logits))
    assert model.config.max_steps == 3


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_law_6_two_segments_equal_one_and_padding_changes_nothing(variant):
    model = small(**variant)
    with torch.no_grad():
        whole = model(IDS).logits
        cache = DynamicCache(config=model.config)
        parts = [model(IDS[:, a:b], past_key_values=cache, use_cache=True).logits for a, b in ((0, 4), (4, 5), (5, 11))]
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-5)
        right = torch.cat([IDS, torch.zeros(2, 5, dtype=torch.long)], 1)
        mask = (torch.arange(16) < 11).long().expand(2, -1)
        torch.testing.assert_close(model(right, attention_mask=mask).logits[:, :11], whole, rtol=0, atol=1e-5)
        left = torch.cat([torch.zeros(2, 5, dtype=torch.long), IDS], 1)
        positions = torch.cat([torch.zeros(5, dtype=torch.long), torch.arange(11)]).expand(2, -1)
        got = model(left, attention_mask=mask.flip(1), position_ids=positions).logits[:, 5:]
        torch.testing.assert_close(got, whole, rtol=0, atol=1e-5)
        assert got.isfinite().all()
        torch.testing.assert_close(model(inputs_embeds=model.get_input_embeddings()(IDS)).logits, whole, rtol=0, atol=0)
        torch.testing.assert_close(model(IDS, logits_to_keep=2).logits, whole[:, -2:], rtol=0, atol=1e-6)


def test_a_token_that_pads_and_ends_texts_learns():
    model = small(pad_token_id=5, eos_token_id=5).train()
    texts = torch.where(IDS == 5, 6, IDS)
    for told in (True, False):  # whether it stands between two texts, or for nothing, where nobody sees it
        model.zero_grad()
        ids = torch.cat([nn.functional.pad(texts, (0, 1), value=5), texts], 1)
        mask = torch.ones_like(ids).index_fill(1, torch.tensor([11]), int(told))
        labels = ids.index_fill(1, torch.tensor([11, 12]), -100)  # what stands there, and what it would say comes next
        model(ids, attention_mask=mask, labels=labels).loss.backward()
        assert (model.model.embed_tokens.weight.grad[5].abs().sum() > 0) == told


def test_attention_kernels_agree():
    logits = []
    for name in ("eager", "sdpa"):
        model = small(attn_implementation=name)
        assert model.config._attn_implementation == name
        logits.append(model(IDS).logits)
        logits[-1].sum().backward()
        assert model.model.solve.drift == 0
    torch.testing.assert_close(*logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("variant", [dict(num_block_layers=2), dict(num_prelude_layers=1), dict(num_coda_layers=1)], ids=str)
def test_padding_on_the_left_is_no_nan_in_float64(variant):
    """A padding token sees nobody; in float32 the most negative number of float64 is an infinity, and its weights were NaN."""
    ids, mask = IDS.clone(), torch.ones_like(IDS)
    ids[0, :4], mask[0, :4] = 0, 0
    logits = []
    for attention in ("eager", "sdpa"):
        model = small(attn_implementation=attention, **variant).double()
        with torch.no_grad():
            logits.append(model(ids, attention_mask=mask).logits[mask.bool()])
    torch.testing.assert_close(*logits, rtol=0, atol=1e-12)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("variant", [*VARIANTS, dict(is_causal=False)], ids=str)
def test_masks_of_truth_values_hide_what_masks_of_numbers_hide(variant, attention):
    """A mask of a user's own, (batch, 1, queries, keys): True where a token may look, or 0 and the most negative number."""
    model = small(attn_implementation=attention, **variant)
    may = torch.ones(11, 11, dtype=torch.bool).tril() & (torch.arange(11) < 9) | torch.eye(11, dtype=torch.bool)
    may = may.expand(2, 1, 11, 11)
    numbers = torch.zeros(may.shape).masked_fill(~may, torch.finfo(torch.float32).min)
    with torch.no_grad():
        wanted = model(IDS, attention_mask=numbers).logits
        torch.testing.assert_close(model(IDS, attention_mask=may).logits, wanted, rtol=0, atol=1e-5)
        if attention == "eager":
            with pytest.raises(ValueError, match=r"must be bool \(True where a token may look\) or floating .* got torch.int64"):
                model(IDS, attention_mask=may.long())


def test_a_cache_of_other_steps_is_refused_before_anything_is_written():
    model = small()
    with torch.no_grad():
        cache = model(IDS, use_cache=True).past_key_values
        before = [layer.keys.clone() for layer in cache.layers]
        for steps in (2, 4):
            with pytest.raises(ValueError, match="slots"):
                model(IDS[:, :1], past_key_values=cache, max_steps=steps)
        assert all(torch.equal(a, layer.keys) for a, layer in zip(before, cache.layers, strict=True))
        assert len(cache.layers) == model.config.num_hidden_layers == 6
        made_elsewhere = DynamicCache()  # without a config, slots appear as they are used
        torch.testing.assert_close(model(IDS, past_key_values=made_elsewhere).logits, model(IDS).logits)


def test_gradients_flow_through_a_cache_into_a_frozen_block():
    """As in prefix tuning: what is learned lies in the cache, and no parameter of the model wants a gradient."""
    model = small().requires_grad_(False)
    cache = DynamicCache(config=model.config)
    prompt = torch.randn(2, 3, 32, requires_grad=True)
    model(inputs_embeds=prompt, past_key_values=cache)
    model(IDS, past_key_values=cache).logits.square().sum().backward()
    frozen = prompt.grad
    trainable = small()
    cache, prompt = DynamicCache(config=model.config), prompt.detach().requires_grad_()
    trainable(inputs_embeds=prompt, past_key_values=cache)
    trainable(IDS, past_key_values=cache).logits.square().sum().backward()
    torch.testing.assert_close(frozen, prompt.grad)
    assert frozen.abs().sum() > 0


def test_a_decoding_loop_outside_no_grad_is_told_that_it_gets_no_cache(monkeypatch):
    said = []
    monkeypatch.setattr(modeling_revdeq.logger, "warning_once", said.append)
    model = small()
    with torch.no_grad():
        assert model(IDS).past_key_values is not None
    assert model(IDS, use_cache=False).past_key_values is None
    assert model.train()(IDS).past_key_values is None
    assert not said
    assert model.eval()(IDS).past_key_values is None
    assert "torch.no_grad()" in said[0]


@torch.no_grad()
def test_a_cache_may_be_given_by_either_name():
    """transformers calls it `past_key_values`, and from 5.24 on `cache`: by the name that a model does not know it was passed over."""
    model = small()
    head = awake(RevDEQForTokenClassification(model.config)).eval()
    for name in ("past_key_values", "cache"):
        for called, whole in ((model, model(IDS, use_cache=False).logits), (head, head(IDS).logits)):
            given = DynamicCache(config=model.config)
            first = called(IDS[:, :6], **{name: given}, use_cache=True)
            second = called(IDS[:, 6:], attention_mask=torch.ones_like(IDS), **{name: given}, use_cache=True)
            assert given.get_seq_length() == IDS.shape[1]
            assert relative_error(torch.cat([first.logits, second.logits], 1), whole) < 1e-5
            assert called is head or getattr(first, CACHE_NAME) is first.past_key_values is given
        assert torch.equal(model.generate(IDS, **{name: None}, max_new_tokens=2, pad_token_id=0)[:, :11], IDS)
    with pytest.raises(ValueError, match=r"two names of one argument, got both"):
        model(IDS, cache=given, past_key_values=given)
    with pytest.raises(ValueError, match=r"a cache was passed as 'memory', which this model does not know"):
        model(IDS, memory=given)  # the next name


def test_training_keeps_no_cache_and_a_cache_given_with_gradients_is_exact():
    model = small()
    assert model(IDS, use_cache=True).past_key_values is None
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(IDS[:, :5], past_key_values=cache)
    model(IDS[:, 5:], past_key_values=cache).logits.sum().backward()
    assert cache.get_seq_length() == 11


@pytest.mark.parametrize("solver", ["reversible", "anderson", "picard"])
def test_approximate_gradients_train_and_generate(solver):
    model = small(solver=solver, gradient="implicit", beta=0.8, max_steps=8)
    model(IDS, labels=IDS).loss.backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())
    settings = dict(max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(model.generate(IDS, **settings), model.generate(IDS, use_cache=False, **settings))
    with torch.no_grad():
        cache = model(IDS, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="use_cache=False"):
        model(IDS[:, :1], past_key_values=cache)


def test_hidden_states_and_attentions():
    model = small(attn_implementation="eager")
    out = model(IDS, output_hidden_states=True, output_attentions=True)
    assert len(out.hidden_states) == model.config.num_hidden_layers + 1
    assert len(out.attentions) == model.config.num_hidden_layers
    out.hidden_states[2].retain_grad()
    out.logits.sum().backward()
    assert out.hidden_states[2].grad.abs().sum() > 0


def test_loss_counts_items_and_shifts_labels():
    model = small()
    logits = model(IDS).logits
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    torch.testing.assert_close(model(IDS, labels=IDS).loss, expected)
    torch.testing.assert_close(model(IDS, labels=IDS, num_items_in_batch=40).loss, expected * 20 / 40)


def test_label_smoothing_of_trainer_shifts_labels():
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    assert MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["revdeq"] == "RevDEQForCausalLM"


def test_pipeline(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.WordLevel({f"w{i}": i for i in range(67)}, unk_token="w0"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="w0", eos_token="w1", pad_token="w1")
    small().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    generate = pipeline("text-generation", model=str(tmp_path))
    out = generate(["w3 w4", "w5 w6 w7"], max_new_tokens=5, do_sample=False, batch_size=2)
    assert all(text[0]["generated_text"].startswith("w") for text in out)


def test_how_a_new_model_begins():
    """Through `_init_weights`, which transformers does not call for a module of ours without parameters of its own."""
    torch.manual_seed(0)
    model = RevDEQForCausalLM(
        RevDEQConfig(vocab_size=64, hidden_size=64, intermediate_size=256, num_attention_heads=4, num_prelude_layers=1)
    )
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            expected = 0.1 * parameter.shape[1] ** -0.5
        elif name.endswith(("embed_tokens.weight", "lm_head.weight")):
            expected = 0.02
        else:
            expected = 64**-0.5 if parameter.dim() == 2 else 0.0  # norms: all 1
        assert abs(parameter.std().item() - expected) <= 0.05 * expected, name


def test_presets_and_counts():
    assert RevDEQForCausalLM(RevDEQConfig.paper_wikitext103()).num_parameters() == 94_138_368
    config = RevDEQConfig.paper_wikitext103(max_steps=12)
    assert (config.max_steps, config.num_hidden_layers, config.beta, config.tol) == (12, 24, 0.5, 1e-3)
    config.num_hidden_layers = 6
    assert config.max_steps == 3
    with pytest.raises(ValueError, match="set max_steps or num_block_layers instead"):
        config.num_hidden_layers = 5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(beta=1), "must not be 1"),
        (dict(beta=2.5), r"\(0, 2\)"),
        (dict(max_steps=-1), "max_steps"),
        (dict(tol=-1.0), "tol"),
        (dict(gradient="exact"), "gradient must be one of"),
        (dict(solver="newton"), "solver must be one of"),
        (dict(block_type="deep"), "block_type must be one of"),
        (dict(kv_cache="none"), "kv_cache must be one of"),
        (dict(num_attention_heads=5), "num_attention_heads must divide"),
        (dict(num_key_value_heads=3), "num_key_value_heads must divide"),
        (dict(hidden_size=12), "even head size"),
        (dict(hidden_dropout=1.0), "hidden_dropout"),
        (dict(vocab_size=0), "vocab_size"),
        (dict(vocab_size="many"), "vocab_size"),
        (dict(num_hidden_layers=7), "set max_steps or num_block_layers"),
        (
            dict(rope_parameters={"rope_type": "spiral", "rope_theta": 1e4}),
            "rope_type of rope_parameters must be one of .*'yarn'.*got 'spiral'",
        ),
        (
            dict(rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}),
            "partial_rotary_factor .* must be 1, got 0.5",
        ),
    ],
    ids=str,
)
def test_unusable_configs_are_refused(settings, message):
    with pytest.raises(Exception, match=message) as error:
        RevDEQConfig(**{**SMALL, **settings})
    assert "Validation" in type(error.value).__name__ or isinstance(error.value, ValueError)


def test_head_dim_follows_from_width_and_heads():
    assert RevDEQConfig(**SMALL, head_dim=8).head_dim == 8
    assert "head_dim" not in RevDEQConfig(**SMALL, head_dim=8).to_dict()
    with pytest.raises(ValueError, match="head_dim of a RevDEQ is hidden_size / num_attention_heads = 8, got 16"):
        RevDEQConfig(**SMALL, head_dim=16)


@torch.no_grad()
def test_tol_of_a_call_is_that_of_a_config():
    own, asked = small(tol=0.05, max_steps=30), small(max_steps=30)
    expected = own(IDS, labels=IDS, output_solver_stats=True)
    found = asked(IDS, labels=IDS, output_solver_stats=True, tol=0.05)
    assert expected.solver_steps.max() in range(2, 30)
    assert all(torch.equal(found[name], expected[name]) for name in ("loss", "logits", "solver_steps", "solver_residual"))
    assert torch.equal(own.model(IDS)[0], asked.model(IDS, tol=0.05)[0])
    assert (asked(IDS, output_solver_stats=True).solver_steps == 30).all()


@pytest.mark.parametrize(
    "settings",
    [
        dict(beta=0.8),
        dict(tol=0.05),
        dict(damping=0.5),
        dict(solver="picard", gradient="backprop"),
        dict(max_steps=5),
        dict(max_steps=30, tol=1e-3),
    ],
    ids=str,
)
def test_what_is_set_in_the_configuration_later_is_as_if_it_had_been_so_from_the_start(settings):
    model, made = small(), small(**settings)
    made.load_state_dict(model.state_dict())
    model(IDS)
    for name, value in settings.items():
        setattr(model.config, name, value)
    out, expected = (each(IDS, output_solver_stats=True) for each in (model, made))
    assert torch.equal(out.logits, expected.logits)
    assert torch.equal(out.solver_steps, expected.solver_steps)
    for each in (model, made):
        each(IDS, labels=IDS).loss.backward()
    for (name, parameter), other in zip(model.named_parameters(), made.parameters(), strict=True):
        assert torch.equal(parameter.grad, other.grad), name


def test_the_last_word_on_a_setting_counts():
    model = small()
    model.config.damping = 0.5
    model(IDS)
    model.model.solve.damping = 0.25  # one layer, later
    model(IDS)
    assert model.model.solve.damping == 0.25
    model.config.damping = 0.0
    model(IDS)
    assert model.model.solve.damping == 0.0
    model.config.steps_sampling = {"distribution": "uniform", "min_steps": 1, "max_steps": 4}
    model(IDS)
    model.config.steps_sampling["max_steps"] = 6  # in place
    model(IDS)
    assert model.model.solve.steps_sampling["max_steps"] == 6
    for name, value, message in (
        ("beta", 1.0, "must not be 1"),
        ("gradient", "exact", "gradient must be one of"),
        ("initial_scale", 0.1, "needs is_causal"),
    ):
        model = small()
        setattr(model.config, name, value)
        for _ in range(2):  # it stays so until it is mended
            with pytest.raises(StrictDataclassError, match=message):
                model(IDS)


def test_steps_set_in_the_layer_are_refused():
    model = small()
    model.model.solve.max_steps = 5
    with pytest.raises(ValueError, match=r"was changed from \[3\] to \[5\], and is not what a model runs"):
        model(IDS)


@pytest.mark.parametrize("name", ["beta", "gradient", "damping", "steps_sampling", "z0", "measure_mask"])
def test_settings_of_the_layer_are_refused_in_a_call(name):
    with pytest.raises(ValueError, match=f"{name}: settings of the model's fixed-point layers, not of a call"):
        small()(IDS, **{name: 0.5})


def test_packed_sequences_that_would_see_one_another_are_refused():
    ids, positions = IDS[:1, :9], torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    model = small(is_causal=False)
    with pytest.raises(ValueError, match=r"with config\.is_causal=False their tokens would see one another"):
        model.model(ids, position_ids=positions)
    apart = torch.block_diag(torch.ones(4, 4), torch.ones(5, 5)).bool()[None, None]
    packed = model.model(ids, position_ids=positions, attention_mask=apart).last_hidden_state
    alone = [model.model(ids[:, part]).last_hidden_state for part in (slice(0, 4), slice(4, 9))]
    torch.testing.assert_close(packed, torch.cat(alone, 1), rtol=1e-4, atol=1e-5)
    for other in (torch.zeros_like(positions), 2 * positions, positions.flip(1)):  # no sign of packing
        model.model(ids, position_ids=other)


def test_a_larger_embedding_may_take_the_place_of_the_models_own():
    model = small()
    model.set_input_embeddings(nn.Embedding(100, 32))
    assert model(torch.tensor([[0, 99]])).logits.shape == (1, 2, 67)
    with pytest.raises(ValueError, match=r"\[0, 100\), got 0 to 100"):
        model(torch.tensor([[0, 100]]))


def test_a_config_broken_by_assignment_is_refused_by_the_model():
    config = RevDEQConfig(**SMALL)
    config.beta = 1
    with pytest.raises(Exception, match="must not be 1"):
        RevDEQForCausalLM(config)


def test_bad_inputs_are_told():
    model = small()
    with pytest.raises(ValueError, match=r"\[0, 67\), got 0 to 67"):
        model(torch.tensor([[0, 67]]))
    with pytest.raises(ValueError, match="got -1 to 3"):
        model(torch.tensor([[-1, 3]]))
    with pytest.raises(ValueError, match="exactly one"):
        model()
    with pytest.raises(ValueError, match="exactly one"):
        model(IDS, inputs_embeds=torch.zeros(2, 11, 32))
    with pytest.raises(ValueError, match=r"\(batch, seq, 32\)"):
        model(inputs_embeds=torch.zeros(2, 11, 31))
    with pytest.raises(ValueError, match="max_steps"):
        model(IDS, max_steps=0)
    paper = small(block_type="paper")
    with pytest.raises(ValueError, match="64 tokens"):
        paper(torch.zeros(1, 65, dtype=torch.long))
    small()(torch.zeros(1, 65, dtype=torch.long))  # rotary positions go on


def test_a_nan_in_the_weights_comes_out_as_a_nan():
    model = small()
    with torch.no_grad():
        model.model.solve.block.layers[0].mlp.down_proj.weight[0, 0] = math.nan
    out = model(IDS, labels=IDS)
    assert out.loss.isnan()
    assert (model.model.solve.statistics.nonfinite > 0).all()


@pytest.mark.parametrize("outside", [0, 1])
@pytest.mark.parametrize("block_type", ["modern", "paper"])
def test_the_plan_of_tensor_parallelism_names_what_there_is(block_type, outside):
    model = small(block_type=block_type, num_block_layers=2, num_prelude_layers=outside, num_coda_layers=outside).model
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    named = [
        {name for name in linear if re.fullmatch(pattern.replace(".", r"\.").replace("*", r"\d+"), name)}
        for pattern in model.config.base_model_tp_plan
    ]
    assert all(named), "transformers warns of names that there are not"
    left = linear.difference(*named)
    assert all(name.endswith("mlp.down_proj") for name in left)
    assert bool(left) == (block_type == "paper")  # whose last matrix follows one that is summed up
    assert "tp_plan" not in model.config.to_json_string()
