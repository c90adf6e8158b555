"""Generation: every cache equals no cache, stopping token by token, shared slots, a model that drafts for itself."""

import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import relative_error
from test_language_model import IDS, small
from transformers import (
    AutoModelForCausalLM,
    CompileConfig,
    DynamicCache,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    StaticCache,
    TorchAoConfig,
)
from transformers.cache_utils import Cache, DynamicLayer

from revdeq_hf import RevDEQConfig, RevDEQForCausalLM
from revdeq_hf.cache_revdeq import CACHE_NAME

GREEDY = dict(max_new_tokens=10, do_sample=False, pad_token_id=0, output_logits=True, return_dict_in_generate=True)
TEXT = torch.randint(1, 67, (2, 70), generator=torch.Generator().manual_seed(5))


def contractive(scale: float = 0.7, **kwargs) -> RevDEQForCausalLM:
    """A model whose iteration converges quickly, but not at once; with larger weights it takes some tokens long."""
    model = small(**{"beta": 0.9, **kwargs})
    with torch.no_grad():
        for parameter in model.model.solve.parameters():
            if parameter.dim() == 2:
                parameter.mul_(scale)
    return model


def left_padded(ids: torch.Tensor, padding: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    ids, mask = ids.clone(), torch.ones_like(ids)
    ids[0, :padding], mask[0, :padding] = 0, 0
    return ids, mask


@pytest.mark.parametrize(
    "settings",
    [
        dict(tol=0.005, scale=2.0, beta=0.7),
        dict(tol=0.005, scale=2.0, beta=0.9),
        dict(tol=0.1, block_type="paper", beta=0.8),
        dict(tol=0.005, scale=2.0, beta=0.8, num_prelude_layers=1, num_coda_layers=1),
    ],
    ids=str,
)
def test_with_tol_each_token_stops_by_itself_and_the_cache_equals_no_cache(settings):
    model = contractive(max_steps=12, **settings)
    ids, mask = left_padded(IDS)
    out = model(ids, attention_mask=mask, output_solver_stats=True)
    assert out.solver_steps.shape == out.solver_residual.shape == ids.shape
    assert len(set(out.solver_steps[mask.bool()].tolist())) > 1, "all tokens stop at the same step: this proves little"
    assert (out.solver_residual[out.solver_steps < 12] <= settings["tol"]).all()
    assert model(ids).solver_steps is None
    out.logits.sum().backward()
    assert model.model.solve.drift == 0
    plain = model.generate(ids, attention_mask=mask, use_cache=False, **GREEDY)
    for implementation in ("dynamic", "static"):
        cached = model.generate(ids, attention_mask=mask, cache_implementation=implementation, disable_compile=True, **GREEDY)
        assert torch.equal(plain.sequences, cached.sequences)
        torch.testing.assert_close(torch.stack(plain.logits), torch.stack(cached.logits), rtol=0, atol=1e-5)


def test_a_token_that_stops_alone_leaves_what_its_later_evaluations_would_have_seen():
    """One token at a time: the solve ends with it, and the rest of its slots is filled with the keys and values of its pair of states in turn."""
    model = contractive(tol=0.02, scale=2.0, beta=0.8, max_steps=12, num_prelude_layers=1, num_coda_layers=1)
    ids = IDS[1:]
    with torch.no_grad():
        whole = model(ids, use_cache=False, output_solver_stats=True)
        cache, parts = DynamicCache(config=model.config), []
        for token in range(ids.shape[1]):
            parts.append(model(ids[:, token : token + 1], past_key_values=cache, use_cache=True, output_solver_stats=True))
    assert (torch.cat([part.solver_steps for part in parts], 1) == whole.solver_steps).all()
    assert (whole.solver_steps < 12).sum() > 3
    torch.testing.assert_close(torch.cat([part.logits for part in parts], 1), whole.logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 7, 64])
@pytest.mark.parametrize("tol", [None, 0.02])
@pytest.mark.parametrize("block", ["modern", "paper"])
def test_chunked_prefill_equals_the_whole(block, tol, chunk):
    model = contractive(tol=tol, max_steps=6, block_type=block, max_position_embeddings=128)
    ids, mask = left_padded(TEXT, 9)
    with torch.no_grad():
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        whole = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
        for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=80)):
            parts = []
            for start in range(0, ids.shape[1], chunk):
                end = min(start + chunk, ids.shape[1])
                step = dict(attention_mask=mask[:, :end], position_ids=positions[:, start:end], past_key_values=cache, use_cache=True)
                parts.append(model(ids[:, start:end], **step).logits)
            found = torch.cat(parts, dim=1)
            torch.testing.assert_close(found[mask.bool()], whole[mask.bool()], rtol=0, atol=1e-5)
    plain = model.generate(ids[:1], attention_mask=mask[:1], use_cache=False, **GREEDY)
    chunked = model.generate(ids[:1], attention_mask=mask[:1], prefill_chunk_size=chunk, **GREEDY)
    assert torch.equal(plain.sequences, chunked.sequences)


def test_beams_of_four_with_tol():
    model = contractive(tol=0.02, max_steps=6)
    ids, mask = left_padded(IDS)
    settings = {**GREEDY, "num_beams": 4, "attention_mask": mask}
    with_cache, without = (model.generate(ids, use_cache=flag, **settings) for flag in (True, False))
    assert torch.equal(with_cache.sequences, without.sequences)


@pytest.mark.parametrize("settings", [dict(), dict(num_prelude_layers=1, num_coda_layers=1, num_block_layers=2)], ids=str)
def test_a_shared_cache_is_one_slot_per_layer_exact_within_a_segment_and_at_the_fixed_point(settings):
    model = contractive(kv_cache="shared", max_steps=14, **settings)
    own = contractive(max_steps=14, **settings)
    layers = settings.get("num_block_layers", 1) + 2 * settings.get("num_prelude_layers", 0)
    assert model.config.num_hidden_layers == layers
    ids, mask = left_padded(IDS)
    with torch.no_grad():
        out = model(ids, attention_mask=mask, use_cache=True)
        assert len(out.past_key_values.layers) == layers
        assert out.past_key_values.get_seq_length() == ids.shape[1]
        assert torch.equal(out.logits, own(ids, attention_mask=mask, use_cache=False).logits), "the first segment knows no difference"
    plain = own.generate(ids, attention_mask=mask, use_cache=False, **GREEDY)
    for implementation in ("dynamic", "static"):
        cached = model.generate(ids, attention_mask=mask, cache_implementation=implementation, disable_compile=True, **GREEDY)
        assert torch.equal(plain.sequences, cached.sequences)
        torch.testing.assert_close(torch.stack(plain.logits), torch.stack(cached.logits), rtol=0, atol=1e-4)
    beams = [m.generate(ids, attention_mask=mask, num_beams=3, **GREEDY).sequences for m in (model, own)]
    assert torch.equal(*beams)


@pytest.mark.parametrize(
    "settings",
    [
        dict(num_prelude_layers=1, num_coda_layers=1),
        dict(kv_cache="shared", max_steps=4, num_block_layers=2),
        dict(block_type="paper", max_position_embeddings=64),
    ],
    ids=str,
)
def test_the_decoding_step_compiles_to_one_graph(settings):
    """The whole solve is in it. transformers compiles decoding with a static cache by itself on accelerators, and here where it is told to."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    how = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    how._compile_all_devices = True
    model = contractive(**settings)
    ids, mask = left_padded(IDS)
    settings = dict(attention_mask=mask, cache_implementation="static", **GREEDY)
    eager = model.generate(ids, disable_compile=True, **settings)
    assert not torch._dynamo.utils.counters["stats"]
    compiled = model.generate(ids, compile_config=how, **settings)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert torch.equal(eager.sequences, compiled.sequences)
    torch.testing.assert_close(torch.stack(eager.logits), torch.stack(compiled.logits), rtol=0, atol=1e-5)


def test_with_tol_compiled_decoding_leaves_the_solve_uncompiled():
    """Its block would be another program in each evaluation, since each has slots of its own."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    how = CompileConfig(fullgraph=False, backend="aot_eager", mode=None)
    how._compile_all_devices = True
    model = contractive(tol=0.005, scale=2.0, beta=0.8, max_steps=12)
    ids, mask = left_padded(IDS)
    settings = dict(attention_mask=mask, cache_implementation="static", **GREEDY)
    eager, compiled = (model.generate(ids, **way, **settings) for way in (dict(disable_compile=True), dict(compile_config=how)))
    assert 1 <= torch._dynamo.utils.counters["stats"]["unique_graphs"] < 8
    assert torch.equal(eager.sequences, compiled.sequences)


def inner_tensors(weight: torch.Tensor) -> list[torch.Tensor]:
    """What a tensor subclass consists of."""
    return [getattr(weight, name) for name in weight.__tensor_flatten__()[0]] if hasattr(weight, "__tensor_flatten__") else [weight]


def test_int8_weights_of_torchao(tmp_path):
    torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed, and no dependency of the package")
    model = contractive(hidden_size=64, intermediate_size=128)
    model.save_pretrained(tmp_path / "float")
    settings = TorchAoConfig(torchao.Int8WeightOnlyConfig())
    quantized = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=settings, device_map="cpu").eval()
    sizes = [
        sum(part.numel() * part.element_size() for w in m.model.solve.parameters() for part in inner_tensors(w)) for m in (model, quantized)
    ]
    assert sizes[1] < 0.3 * sizes[0]
    with torch.no_grad():
        assert relative_error(quantized(IDS).logits, model(IDS).logits) < 0.05
    plain, cached = (quantized.generate(IDS, use_cache=flag, **GREEDY).sequences for flag in (False, True))
    assert torch.equal(plain, cached)
    quantized.save_pretrained(tmp_path / "int8")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "int8").eval()
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, quantized(IDS).logits)


def test_a_shared_cache_is_an_approximation_before_the_fixed_point_and_serves_any_number_of_steps():
    model, own = contractive(kv_cache="shared", max_steps=2), contractive(max_steps=2)
    with torch.no_grad():
        cache = model(IDS[:, :6], use_cache=True).past_key_values
        approximate = model(IDS[:, 6:7], past_key_values=cache).logits
        exact = own(IDS[:, :7]).logits[:, -1:]
        assert not torch.allclose(approximate, exact, rtol=0, atol=1e-5), "converged already: this proves nothing"
        torch.testing.assert_close(approximate, exact, rtol=0, atol=0.5)
        assert model(IDS[:, 7:8], past_key_values=cache, max_steps=9).logits.isfinite().all()
        assert cache.get_seq_length() == 8
        filled = own(IDS, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="has 4 slots"):
        model(IDS[:, :1], past_key_values=filled)


def test_a_shared_cache_refuses_layers_whose_last_tokens_it_cannot_take_back():
    class Quantized(DynamicLayer):
        """Stands for a layer that keeps what `crop` does not reach."""

    with pytest.raises(ValueError, match="Quantized does not allow"), torch.no_grad():
        contractive(kv_cache="shared")(IDS, past_key_values=Cache(layers=[Quantized()]))
    offloaded = DynamicCache()
    offloaded.offloading = True
    with pytest.raises(ValueError, match="offloaded cache moves away"), torch.no_grad():
        contractive(kv_cache="shared")(IDS, past_key_values=offloaded)


def test_with_tol_a_shared_cache_keeps_the_last_evaluation_whichever_it_was():
    model, own = contractive(kv_cache="shared", max_steps=40, tol=1e-5), contractive(max_steps=40)
    cached, plain = model.generate(IDS, **GREEDY), own.generate(IDS, use_cache=False, **GREEDY)
    assert torch.equal(plain.sequences, cached.sequences)
    torch.testing.assert_close(torch.stack(plain.logits), torch.stack(cached.logits), rtol=0, atol=1e-3)


@pytest.mark.parametrize("kv_cache", ["per_evaluation", "shared"])
@pytest.mark.parametrize("tol", [None, 0.02])
def test_a_model_that_drafts_for_itself_writes_the_same(kv_cache, tol):
    model = contractive(kv_cache=kv_cache, tol=tol, max_steps=6)
    settings = dict(max_new_tokens=24, do_sample=False, pad_token_id=0)
    calls: list[tuple[int, int]] = []
    model.register_forward_pre_hook(lambda m, a, k: calls.append((k.get("max_steps") or 6, k["input_ids"].shape[1])), with_kwargs=True)
    for row in range(2):
        plain = model.generate(IDS[row : row + 1], **settings)
        calls.clear()
        drafted = model.generate(IDS[row : row + 1], draft_max_steps=2, **settings)
        assert torch.equal(plain, drafted)
        assert {steps for steps, _ in calls} == {2, 6}
        verifications = [length for steps, length in calls if steps == 6]
        assert len(verifications) < 24, "nothing proposed was ever accepted"
        assert max(verifications[1:], default=2) > 1, "several tokens are verified at once"
    longer = dict(max_steps=9, **settings)
    assert torch.equal(model.generate(IDS[:1], **longer), model.generate(IDS[:1], draft_max_steps=2, **longer))
    assert model.config.max_steps == 6
    assert model.generation_config.assistant_early_exit is None


@pytest.mark.parametrize(
    ("settings", "configured", "first"),
    [
        (dict(), dict(), 5),
        (dict(num_assistant_tokens=2), dict(), 2),
        (dict(), dict(num_assistant_tokens=3), 3),
        (dict(num_assistant_tokens=2), dict(num_assistant_tokens=3), 2),
        (dict(assistant_confidence_threshold=0.999), dict(), 1),  # no token of this model is that sure
    ],
    ids=str,
)
def test_how_long_drafts_are(settings, configured, first):
    """By default, by the generation config and by the call, in rising order of what counts."""
    model = contractive(max_steps=3)
    for name, value in configured.items():
        setattr(model.generation_config, name, value)
    verified = []
    model.register_forward_pre_hook(
        lambda module, given, named: verified.append(named["input_ids"].shape[1]) if named.get("max_steps") is None else None,
        with_kwargs=True,
    )
    model.generate(IDS[:1], draft_max_steps=2, max_new_tokens=16, do_sample=False, pad_token_id=0, eos_token_id=None, **settings)
    assert verified[0] == IDS.shape[1] + first
    assert model.generation_config.num_assistant_tokens == configured.get("num_assistant_tokens")


def test_tokens_stop_by_a_rule_of_ones_own():
    """Where what they would say no longer changes; with a cache as without one."""
    model = contractive(scale=3, max_steps=8)

    def rule(z, f):
        now, then = (model.lm_head(model.model.norm(state)).log_softmax(-1) for state in (z, f))
        return (then.exp() * (then - now)).sum(-1) < 1e-4

    with torch.no_grad():
        steps = model(IDS, tol=rule, output_solver_stats=True).solver_steps
    assert steps.unique().numel() > 1
    settings = dict(max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None, output_logits=True, return_dict_in_generate=True)
    found = [torch.stack(model.generate(IDS, tol=rule, use_cache=use_cache, **settings).logits) for use_cache in (True, False)]
    torch.testing.assert_close(*found, rtol=0, atol=1e-5)
    assert not torch.equal(found[0], torch.stack(model.generate(IDS, **settings).logits))


@pytest.mark.parametrize("way", [{"draft_max_steps": 1}, {"prompt_lookup_num_tokens": 3}])
@pytest.mark.parametrize("new", [1, 5])
def test_drafts_go_on_from_a_cache(way, new):
    """A conversation that goes on: transformers would write what is in the cache to it once more."""
    model = contractive(max_steps=3)
    settings = dict(max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None, output_logits=True, return_dict_in_generate=True)
    for first in ({}, way):
        before = model.generate(IDS[:1], **settings, **first)
        prompt = torch.cat([before.sequences, IDS[1:, :new]], 1)
        expected = model.generate(prompt, **settings)
        got = model.generate(prompt, **{CACHE_NAME: before[CACHE_NAME]}, **settings, **way)
        assert torch.equal(got.sequences, expected.sequences)
        torch.testing.assert_close(torch.stack(got.logits), torch.stack(expected.logits), rtol=0, atol=1e-5)


def test_only_new_tokens_go_on_from_a_cache():
    """Under a mask of the whole text, and in chunks of the whole text, as before."""
    model = contractive(max_steps=3)
    settings = dict(max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None, output_logits=True, return_dict_in_generate=True)
    ids = torch.cat([IDS[:1], IDS[1:]], 1)  # 22 tokens
    expected = torch.stack(model.generate(ids, **settings).logits)
    for seen in (3, 9):
        with torch.no_grad():
            caches = [model(ids[:, :seen], use_cache=True)[CACHE_NAME] for _ in range(2)]
        inputs = model.prepare_inputs_for_generation(ids[:, seen:], **{CACHE_NAME: caches[0]}, use_cache=True)
        assert inputs["input_ids"].shape[1] == 22 - seen
        got = model.generate(ids[:, seen:], attention_mask=torch.ones_like(ids), **{CACHE_NAME: caches[0]}, **settings)
        torch.testing.assert_close(torch.stack(got.logits), expected, rtol=0, atol=1e-5)


def test_drafts_that_cannot_be_are_told():
    model = contractive(max_steps=3)
    with pytest.raises(ValueError, match="drafts are continuations of tokens, and with inputs_embeds alone there are none"):
        model.generate(inputs_embeds=model.get_input_embeddings()(IDS[:1]), draft_max_steps=1)
    for steps in (3, 7):
        with pytest.raises(ValueError, match="below the steps of a full solve"):
            model.generate(IDS[:1], draft_max_steps=steps)
    with pytest.raises(ValueError, match="draft_max_steps must be a whole number"):
        model.generate(IDS[:1], draft_max_steps=0)
    with pytest.raises(ValueError, match="batch_size = 1"):
        model.generate(IDS, draft_max_steps=1, pad_token_id=0, max_new_tokens=4)


def steps_of_calls(model) -> list:
    calls: list = []
    model.model.register_forward_pre_hook(lambda module, given, named: calls.append(named["max_steps"]), with_kwargs=True)
    return calls


def test_steps_may_be_set_in_the_generation_config():
    model = contractive(max_steps=1)
    calls, settings = steps_of_calls(model), dict(max_new_tokens=4, pad_token_id=0, eos_token_id=None)
    plain = model.generate(IDS[:1], max_steps=7, **settings)
    calls.clear()
    assert torch.equal(model.generate(IDS[:1], generation_config=GenerationConfig(max_steps=7, **settings)), plain)
    model.generation_config.update(max_steps=7, draft_max_steps=None)
    model.generation_config.max_steps = 7
    assert torch.equal(model.generate(IDS[:1], **settings), plain)
    assert set(calls) == {7}
    calls.clear()
    model.generate(IDS[:1], max_steps=2, **settings)
    assert set(calls) == {2}
    calls.clear()
    model.generation_config.draft_max_steps = 1
    assert torch.equal(model.generate(IDS[:1], **settings), plain)
    assert set(calls) == {1, 7}
    assert (model.generation_config.max_steps, model.generation_config.draft_max_steps) == (7, 1)


@pytest.mark.parametrize("more", [dict(), dict(guidance_scale=3.0), dict(draft_max_steps=2)], ids=str)
def test_tol_of_a_call_or_of_the_generation_config_is_that_of_a_config(more):
    settings = dict(max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None, **more)
    found = {}
    for tol in (0.5, None):  # with one so large, tokens are others
        model = contractive(tol=tol, scale=2.0, beta=0.7, max_steps=12)
        found[tol] = model.generate(IDS[:1], **settings)
    assert not torch.equal(found[0.5], found[None])
    assert torch.equal(model.generate(IDS[:1], tol=0.5, **settings), found[0.5])
    assert torch.equal(model.generate(IDS[:1], generation_config=GenerationConfig(tol=0.5, **settings)), found[0.5])
    model.generation_config.tol = 0.5
    assert torch.equal(model.generate(IDS[:1], **settings), found[0.5])
    assert torch.equal(model.generate(IDS[:1], tol=0.0, **settings), found[None])
    assert model.model.solve.tol is None
    assert model.generation_config.tol == 0.5


def test_guidance_takes_the_steps_of_the_call():
    model = contractive(scale=2.0, max_steps=1)
    calls, settings = steps_of_calls(model), dict(guidance_scale=3.0, max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None)
    found = model.generate(IDS[:1], max_steps=7, **settings)
    assert set(calls) == {7}
    model.config.max_steps = 7
    assert torch.equal(found, model.generate(IDS[:1], **settings))


def assistants() -> dict[str, torch.nn.Module]:
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=67, hidden_size=16, intermediate_size=16, num_attention_heads=2, num_hidden_layers=1))
    return {"llama": llama.eval(), "revdeq": contractive(scale=2.0, beta=0.7, max_steps=2)}


@pytest.mark.parametrize("kind", ["llama", "revdeq"])
def test_an_assistant_keeps_its_own_steps(kind):
    model, assistant = contractive(scale=2.0, beta=0.7, max_steps=3), assistants()[kind]
    model.generation_config.num_assistant_tokens = 4
    settings = dict(max_new_tokens=16, do_sample=False, pad_token_id=0, eos_token_id=None, max_steps=7)
    asked, solved = [], []
    model.register_forward_pre_hook(lambda module, given, named: asked.append(named["max_steps"]), with_kwargs=True)
    if kind == "revdeq":
        assistant.model.solve.register_forward_hook(lambda module, given, out: solved.append(out.evaluations))
    plain = model.generate(IDS[:1], **settings)
    assert not torch.equal(plain, model.generate(IDS[:1], **{**settings, "max_steps": 2})), "the number of steps changes nothing here"
    asked.clear()
    assert torch.equal(model.generate(IDS[:1], assistant_model=assistant, **settings), plain)
    assert set(asked) == {7}
    assert set(solved) == ({2 * 2} if kind == "revdeq" else set())


def test_continuous_batching_is_refused():
    """Its paged cache files keys by layer: all evaluations of a solve would share one slot."""
    model = contractive(max_steps=3)
    prompts = [row.tolist() for row in IDS]
    with pytest.raises(NotImplementedError, match=r"RevDEQForCausalLM.*Use generate with left-padded batches"):
        model.generate_batch(prompts, max_new_tokens=2)
    with pytest.raises(NotImplementedError, match="one slot for each layer"):
        model.init_continuous_batching()
    with pytest.raises(NotImplementedError, match="continuous_batching"), model.continuous_batching_context_manager():
        pass
    with pytest.raises(NotImplementedError, match="paged"):
        model.generate(IDS, cache_implementation="paged", max_new_tokens=2)


def test_a_cache_given_with_gradients_takes_the_stored_path():
    model = contractive(tol=0.02, max_steps=6)
    whole = model(IDS, use_cache=False).logits
    cache = DynamicCache(config=model.config)
    model(IDS[:, :5], past_key_values=cache, use_cache=True)
    logits = model(IDS[:, 5:], past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(logits, whole[:, 5:], rtol=0, atol=1e-5)
    logits.sum().backward()
    assert model.model.embed_tokens.weight.grad[IDS[0, 0]].abs().sum() > 0, "the first segment gets gradients through the cache"


def test_the_slots_of_a_config_are_not_a_setting():
    shared = RevDEQConfig(kv_cache="shared", num_block_layers=2, num_attention_heads=4, hidden_size=32)
    assert shared.num_hidden_layers == 2
    shared.num_hidden_layers = 2
    with pytest.raises(ValueError, match="kv_cache='shared'"):
        shared.num_hidden_layers = 4
    own = RevDEQConfig(num_block_layers=2, num_attention_heads=4, hidden_size=32)
    own.num_hidden_layers = 40
    assert own.max_steps == 10


def test_threads_with_steps_of_their_own_leave_the_configuration_as_it_is():
    model, before = contractive(max_steps=3), sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    settings = dict(max_new_tokens=3, do_sample=False, pad_token_id=0, eos_token_id=None)
    alone = {steps: model.generate(IDS[:1], max_steps=steps, **settings) for steps in (1, 2, 4, 6)}
    try:
        with ThreadPoolExecutor(4) as pool:
            for _ in range(5):
                found = pool.map(lambda steps: (steps, model.generate(IDS[:1], max_steps=steps, **settings)), alone)
                assert all(torch.equal(ids, alone[steps]) for steps, ids in found)
    finally:
        sys.setswitchinterval(before)
    assert model.config.max_steps == 3
    assert model.config is model.model.config


def test_what_configs_say_reaches_decoding_functions_and_no_assistant():
    model, assistant, seen = contractive(max_steps=3), contractive(max_steps=2), {}
    model.generation_config.max_steps = 5

    def decode(model, input_ids, max_steps=None, tol=None, **kwargs):
        seen.update(max_steps=max_steps, tol=tol)
        return input_ids

    settings = dict(max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)
    model.generate(IDS[:1], GenerationConfig(tol=0.1, **settings), custom_generate=decode)
    assert seen == {"max_steps": 5, "tol": 0.1}
    model.generate(IDS[:1], GenerationConfig(tol=0.1, **settings), custom_generate=decode, max_steps=4)
    assert seen == {"max_steps": 4, "tol": 0.1}
    solved = steps_of_calls(assistant)
    plain = model.generate(IDS[:1], **settings)
    assert torch.equal(model.generate(IDS[:1], assistant_model=assistant, **settings), plain)
    assert set(solved) == {None}  # its own


def test_drafts_of_the_own_generation_config_are_those_of_the_call():
    """A model that said there how it drafts once drafted for its drafts, too."""
    model = contractive(max_steps=5)
    calls, settings = steps_of_calls(model), dict(max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None)
    plain = model.generate(IDS[:1], assistant_early_exit=1, **settings)
    of_the_call = list(calls)
    calls.clear()
    model.generation_config.assistant_early_exit = 1
    assert torch.equal(model.generate(IDS[:1], **settings), plain)
    assert calls == of_the_call
    model.generation_config.assistant_early_exit, model.generation_config.num_assistant_tokens = None, 2
    calls.clear()
    model.generate(IDS[:1], GenerationConfig(draft_max_steps=1, num_assistant_tokens_schedule="constant", **settings))
    assert calls[:4] == [1, 1, None, 1]  # two tokens a draft, as the own one says, though one was given


def test_generations_with_steps_of_the_generation_config_run_side_by_side():
    """One lock was once held for the whole of such a call, so that whoever waited for another one's tokens waited for ever."""
    model, meeting = contractive(max_steps=3), threading.Barrier(2)
    model.generation_config.max_steps = 4

    def meet(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        meeting.wait(timeout=60)
        return scores

    settings = dict(max_new_tokens=2, do_sample=False, pad_token_id=0, eos_token_id=None)
    alone = model.generate(IDS[:1], **settings)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda _: model.generate(IDS[:1], logits_processor=[meet], **settings), range(2)))
    assert all(torch.equal(ids, alone) for ids in found)


def test_steps_of_either_generation_config_and_of_the_call(tmp_path):
    """The call's count more than those of the config given with it, and these more than those of the model's own."""
    model = small()
    calls = []
    model.model.solve.register_forward_hook(lambda module, given, out: calls.append(out.evaluations // 2))

    def steps(*given, **named) -> set[int]:
        calls.clear()
        model.generate(IDS[:1], *given, max_new_tokens=2, eos_token_id=None, do_sample=False, pad_token_id=0, **named)
        return set(calls)

    assert steps() == {model.config.max_steps}
    model.generation_config.max_steps = 8
    given = GenerationConfig(num_beams=1)
    assert steps() == steps(given) == {8}
    assert steps(max_steps=5) == steps(given, max_steps=5) == {5}
    given.max_steps = 6
    assert steps(given) == {6}
    assert steps(given, max_steps=5) == {5}
    assert (model.generation_config.max_steps, given.max_steps) == (8, 6)
    model.save_pretrained(tmp_path)  # loading once passed over what is not transformers' own
    assert AutoModelForCausalLM.from_pretrained(tmp_path).generation_config.max_steps == 8
    given.max_steps = model.generation_config.max_steps = None  # unset
    assert steps(given) == {model.config.max_steps}
    assert steps(max_steps=5) == steps(given, max_steps=5, output_solver_stats=False) == {5}
    with pytest.raises(ValueError, match=r"returns no solver statistics: call the model with the tokens"):
        steps(output_solver_stats=True)


def test_another_thread_that_draws_meanwhile_leaves_the_cache_alone():
    """Whether a block draws was found out by one more call of it, which went on to the next slot of the cache."""
    model = small()
    settings = dict(max_new_tokens=4, eos_token_id=None, do_sample=False, pad_token_id=0)
    plain = model.generate(IDS[:1], **settings)

    def draw(*_) -> None:
        with ThreadPoolExecutor(1) as other:
            other.submit(torch.rand, 1).result()

    model.model.solve.block.register_forward_pre_hook(draw)
    assert torch.equal(model.generate(IDS[:1], **settings), plain)
