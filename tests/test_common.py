"""What transformers asks of every model, in short: the essence of its common tests, and what they do not ask of a loop."""

import copy

import pytest
import torch
from conftest import awake
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig
from transformers.integrations.executorch import convert_and_export_with_cache

from revdeq_hf import RevDEQConfig, RevDEQForCausalLM, RevDEQForTokenClassification, modeling_revdeq
from revdeq_hf.block_revdeq import RevDEQLayer
from revdeq_hf.training import LiveBytes

SMALL = dict(vocab_size=67, hidden_size=32, intermediate_size=48, num_attention_heads=4, max_steps=3, max_position_embeddings=64)
SMALL |= dict(drift_policy="raise")
IDS = torch.randint(0, 67, (2, 11), generator=torch.Generator().manual_seed(3))
BLOCKS = [dict(num_key_value_heads=2), dict(block_type="paper")]


def model_of(**kwargs) -> RevDEQForCausalLM:
    torch.manual_seed(0)
    model = awake(RevDEQForCausalLM(RevDEQConfig(**{**SMALL, **kwargs})))
    return model.eval()


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_attention_interfaces_agree(block):
    """Also on rows whose padding sees nothing at all; flex attention has no gradients on the CPU."""
    mask = torch.ones_like(IDS)
    mask[0, :4] = 0
    logits, gradients = [], []
    for name in ("eager", "sdpa", "flex_attention"):
        model = model_of(attn_implementation=name, **block)
        with torch.set_grad_enabled(name != "flex_attention"), torch.compiler.set_stance("force_eager"):
            out = model(IDS, attention_mask=mask).logits
        assert out.isfinite().all()
        logits.append(out.detach()[mask.bool()])
        if out.requires_grad:
            out[mask.bool()].square().sum().backward()
            gradients.append([parameter.grad for parameter in model.parameters()])
            assert model.model.solve.drift == 0
    for other in logits[1:]:
        torch.testing.assert_close(other, logits[0], rtol=0, atol=2e-5)
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    model = model_of(**block)
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model(IDS, attention_mask=mask).logits[mask.bool()], logits[0], rtol=0, atol=0)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_rows_without_any_visible_token_are_finite(attention):
    model = model_of(attn_implementation=attention).train()
    out = model(IDS, attention_mask=torch.zeros_like(IDS), labels=IDS)
    out.loss.backward()
    assert out.loss.isfinite()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("block", BLOCKS, ids=str)
@torch.no_grad()
def test_masks_of_two_and_four_dimensions_and_packed_sequences(block, attention):
    model = model_of(attn_implementation=attention, **block)
    mask = torch.ones_like(IDS)
    mask[0, 8:] = 0
    visible = mask[:, None, None, :].bool() & torch.ones(11, 11, dtype=torch.bool).tril()
    four = torch.zeros(2, 1, 11, 11).masked_fill(~visible, torch.finfo(torch.float32).min)
    expected = model(IDS, attention_mask=mask).logits[mask.bool()]
    torch.testing.assert_close(model(IDS, attention_mask=four).logits[mask.bool()], expected, rtol=0, atol=1e-6)
    if attention == "sdpa":
        torch.testing.assert_close(model(IDS, attention_mask=visible).logits[mask.bool()], expected, rtol=0, atol=1e-6)
    packed = torch.cat([IDS[0, :6], IDS[1, :5]])[None]
    got = model(packed, position_ids=torch.cat([torch.arange(6), torch.arange(5)])[None]).logits[0]
    torch.testing.assert_close(got[:6], model(IDS[:1, :6]).logits[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(got[6:], model(IDS[1:, :5]).logits[0], rtol=0, atol=1e-5)


def test_hidden_states_are_the_tape_of_the_loop():
    model = model_of(num_block_layers=2, num_prelude_layers=1, num_coda_layers=1, attn_implementation="eager")
    calls = []
    for module in model.modules():
        if isinstance(module, RevDEQLayer):
            module.register_forward_hook(lambda module, args, output: calls.append((args[0], output)))
    with torch.no_grad():
        out = model(IDS, output_hidden_states=True, output_attentions=True)
    assert len(out.hidden_states) == len(calls) + 1 == model.config.num_hidden_layers + 1 == 2 * 3 * 2 + 3
    assert torch.equal(out.hidden_states[0], calls[0][0])
    assert all(torch.equal(state, call[1]) for state, call in zip(out.hidden_states[1:-1], calls, strict=False))
    assert torch.equal(model.lm_head(out.hidden_states[-1]), out.logits)
    assert len(out.attentions) == len(calls)
    for weights in out.attentions:
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 11))
        assert torch.equal(weights, weights.tril())
    assert len(model(IDS, output_hidden_states=True, max_steps=1).hidden_states) == 2 * 2 + 3


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("tokens", [50, 80])
def test_resizing_embeddings(tied, tokens, tmp_path):
    model = model_of(tie_word_embeddings=tied)
    ids = IDS % 50
    before = model(ids).logits
    model.resize_token_embeddings(tokens)
    kept = min(tokens, 67)
    torch.testing.assert_close(model(ids).logits[..., :kept], before[..., :kept])
    assert model.config.vocab_size == model.get_output_embeddings().out_features == tokens
    assert (model.lm_head.weight is model.get_input_embeddings().weight) is tied
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (again.lm_head.weight is again.get_input_embeddings().weight) is tied
    assert torch.equal(again(ids).logits, model(ids).logits)
    with pytest.raises(ValueError, match=rf"\[0, {tokens}\)"):
        model(torch.tensor([[tokens]]))


def turn_on(model, **kwargs) -> None:
    """`activation_checkpointing_enable`, which transformers 5.17 knows by its older name only."""
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)(**kwargs)


def gradients_of(model) -> dict[str, torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(1)
    model(IDS, labels=IDS).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("gradient", ["backprop", "reversible", "checkpoint", "implicit"])
def test_activation_checkpointing_is_mapped_onto_the_gradient_mode(gradient, reentrant):
    """Same gradients with dropout in several layers; stored backpropagation keeps states instead of graphs."""
    settings = dict(num_block_layers=2, num_prelude_layers=1, num_coda_layers=1, hidden_dropout=0.1, attention_dropout=0.1)
    if gradient == "implicit":
        settings |= dict(hidden_dropout=0.0, attention_dropout=0.0)
    model = model_of(gradient=gradient, **settings).train()
    plain = gradients_of(model)
    with LiveBytes() as memory:
        kept = model(IDS, labels=IDS).loss
    before = memory.alive
    kept = None
    kwargs = "activation_checkpointing_kwargs" if hasattr(model, "activation_checkpointing_enable") else "gradient_checkpointing_kwargs"
    turn_on(model, **{kwargs: {"use_reentrant": reentrant}})
    again = gradients_of(model)
    assert model.model.solve.drift == 0
    for name, gradient_ in plain.items():
        torch.testing.assert_close(again[name], gradient_, rtol=1e-6, atol=1e-7)
    with LiveBytes() as memory:
        kept = model(IDS, labels=IDS).loss  # noqa: F841
    assert memory.alive < before
    if gradient == "backprop":
        assert memory.alive < before / 2


def kept_bytes(model) -> int:
    """What a forward pass leaves alive for its backward pass."""
    with LiveBytes() as memory:
        loss = model(IDS, labels=IDS).loss
    assert loss.requires_grad
    return memory.alive


def test_activation_checkpointing_keeps_less():
    """Of stored backpropagation the states only, also where an evaluation is one layer; of a kept evaluation of several layers their inputs only."""
    for settings, part in ((dict(gradient="backprop", max_steps=8), 0.3), (dict(num_block_layers=8, max_steps=1), 0.6)):
        model = model_of(**settings).train()
        before = kept_bytes(model)
        turn_on(model)
        assert kept_bytes(model) < part * before


def test_activation_checkpointing_says_when_it_has_nothing_to_do(monkeypatch):
    said = []
    monkeypatch.setattr(modeling_revdeq.logger, "warning_once", said.append)
    turn_on(model_of(gradient="backprop"))
    turn_on(model_of(num_block_layers=2))
    assert not said
    model = model_of()
    turn_on(model)
    assert len(said) == 1
    assert "does not grow with the number of steps" in said[0]
    expected = model(IDS, labels=IDS, use_cache=False).loss
    getattr(model, "activation_checkpointing_disable", model.gradient_checkpointing_disable)()
    assert torch.equal(model(IDS, labels=IDS, use_cache=False).loss, expected)
    assert len(said) == 1


def test_checkpointing_leaves_caches_and_generation_alone():
    model = model_of(num_prelude_layers=1, gradient="backprop")
    expected = model.generate(IDS, max_new_tokens=6, do_sample=False, pad_token_id=0)
    turn_on(model.train())
    assert torch.equal(model.generate(IDS, max_new_tokens=6, do_sample=False, pad_token_id=0), expected)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(IDS[:, :5], past_key_values=cache)
    model(IDS[:, 5:], past_key_values=cache).logits.sum().backward()
    assert cache.layers[0].get_seq_length() == 11  # a recomputation would have written twice


def test_device_maps_and_offload(tmp_path):
    """The solve is one piece (`_no_split_modules`): its weights may wait on the disk until it runs."""
    model = model_of(num_coda_layers=1)
    expected = model(IDS).logits
    model.save_pretrained(tmp_path / "model")
    places = {
        "model.embed_tokens": "cpu",
        "model.rotary_emb": "cpu",
        "model.input_norm": "cpu",
        "model.prelude": "cpu",
        "model.solve": "disk",
    }
    places |= {"model.coda": "disk", "model.norm": "cpu", "lm_head": "cpu"}
    for device_map in ("cpu", "auto", places):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", device_map=device_map, offload_folder=str(tmp_path / "disk"))
        with torch.no_grad():
            assert torch.equal(loaded(IDS).logits, expected)
    assert next(loaded.model.solve.parameters()).device.type == "meta"
    with torch.device("meta"):
        empty = RevDEQForCausalLM(model.config)
    assert all(parameter.device.type == "meta" for parameter in empty.parameters())


def test_low_precision_and_copies():
    model = model_of()
    assert model_of().to(torch.bfloat16)(IDS).logits.dtype == torch.bfloat16
    assert torch.equal(copy.deepcopy(model)(IDS).logits, model(IDS).logits)
    loss, logits = model(IDS, labels=IDS, return_dict=False)[:2]
    out = model(IDS, labels=IDS)
    assert torch.equal(loss, out.loss)
    assert torch.equal(logits, out.logits)


@pytest.mark.parametrize(
    "cast", [lambda model: model.bfloat16(), lambda model: model.to(torch.float16), lambda model: model.to("cpu", torch.bfloat16)]
)
def test_a_cast_model_keeps_its_rotary_frequencies(cast, tmp_path):
    """Rounded to bfloat16 they would turn late positions by other angles than those of the model that is loaded in bfloat16."""
    model, expected = cast(model_of()), model_of().model.rotary_emb.inv_freq
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.equal(model.model.rotary_emb.inv_freq, expected)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=model.dtype).eval()
    assert torch.equal(again(IDS).logits, model.eval()(IDS).logits)


def test_bad_shapes_are_told():
    model = model_of()
    for ids in (torch.zeros(2, 0, dtype=torch.long), torch.zeros(0, 3, dtype=torch.long)):
        with pytest.raises(ValueError, match="empty prompt"):
            model(ids)
    with pytest.raises(ValueError, match="empty prompt"):
        model.generate(torch.zeros(1, 0, dtype=torch.long), max_new_tokens=2)
    with pytest.raises(ValueError, match="whole numbers"):
        model(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"\(batch, seq\) of whole numbers, got \(3,\)"):
        model(torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match=r"attention_mask must be .* = \(2, 11\), got \(2, 5\)"):
        model(IDS, attention_mask=torch.ones(2, 5))
    with pytest.raises(ValueError, match=r"position_ids must be .* = \(2, 11\), got \(2, 5\)"):
        model(IDS, position_ids=torch.zeros(2, 5, dtype=torch.long))
    with pytest.raises(ValueError, match="must not be negative"):
        model_of(block_type="paper")(IDS, position_ids=torch.arange(11)[None] - 1)
    with pytest.raises(ValueError, match="labels must have a label for each hidden state"):
        model.train()(IDS, labels=IDS[:, :5])


@pytest.mark.parametrize("block", BLOCKS, ids=str)
@torch.no_grad()
def test_the_inference_path_exports_for_any_batch_and_length(block):
    if "num_key_value_heads" in block and torch.__version__ < "2.13":
        pytest.skip("torch 2.11's exporter cannot prove that min(8 s, 16 s) is 8 s")
    model = model_of(**block)
    sizes = {0: torch.export.Dim("batch", min=1, max=64), 1: torch.export.Dim("seq", min=2, max=64)}
    exported = torch.export.export(
        model, (), {"input_ids": IDS, "use_cache": False}, dynamic_shapes={"input_ids": sizes, "use_cache": None}, strict=False
    )
    for ids in (IDS.flip(0), IDS[:1, :4], torch.randint(0, 67, (3, 17))):
        got = exported.module()(input_ids=ids, use_cache=False).logits
        torch.testing.assert_close(got, model(ids).logits, rtol=0, atol=1e-6)


NEEDS_213 = pytest.mark.skipif(torch.__version__ < "2.13", reason="torch 2.11 does not tell a strict export from a compilation")


@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=NEEDS_213)])
def test_tokens_that_stop_by_themselves_export_where_gradients_are_on(strict):
    """What is exported is the inference path. It takes all steps, in which tokens that have settled stay as they are."""
    model = awake(model_of(tol=0.1, beta=0.8, max_steps=4), 0.2)
    exported = torch.export.export(model, (), {"input_ids": IDS, "use_cache": False}, strict=strict).module()
    for ids in (IDS, IDS.flip(0)):
        got = exported(input_ids=ids, use_cache=False).logits
        with torch.no_grad():
            expected = model(ids, output_solver_stats=True)
        assert expected.solver_steps.unique().numel() > 1
        torch.testing.assert_close(got.detach(), expected.logits, rtol=0, atol=1e-6)


def test_a_static_cache_exports_where_gradients_are_on():
    """As transformers does it for ExecuTorch, and token by token as one runs it."""
    model = model_of(max_steps=2)
    settings = dict(use_cache=True, cache_implementation="static", max_length=16, cache_config={"batch_size": 1, "max_cache_len": 16})
    model.generation_config = GenerationConfig(**settings)
    program = convert_and_export_with_cache(model).module()
    ids = IDS[:1]
    got = [program(input_ids=ids[:, i : i + 1], cache_position=torch.tensor([i])) for i in range(ids.shape[1])]
    torch.testing.assert_close(torch.cat(got, 1).detach(), model(ids).logits.detach(), rtol=0, atol=1e-5)


def test_heads_share_all_of_this():
    torch.manual_seed(0)
    model = RevDEQForTokenClassification(RevDEQConfig(**SMALL, num_labels=3, gradient="backprop")).train()
    turn_on(model)
    out = model(IDS, labels=IDS % 3, output_hidden_states=True)
    assert len(out.hidden_states) == 7
    out.loss.backward()
    with pytest.raises(ValueError, match="empty prompt"):
        model(torch.zeros(2, 0, dtype=torch.long))
