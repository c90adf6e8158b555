"""A RevDEQ language model starts from an ordinary transformer's weights (`revdeq_hf.init_from`)."""

import pytest
import torch
from conftest import relative_error
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from revdeq_hf import RevDEQConfig, RevDEQForCausalLM
from revdeq_hf.init_from import init_from, main

SIZES = dict(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, max_position_embeddings=64)


def llama(**kwargs) -> LlamaForCausalLM:
    model = LlamaForCausalLM(LlamaConfig(**{**SIZES, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, **kwargs})).eval()
    return rough(model)


def gpt2(**kwargs) -> GPT2LMHeadModel:
    config = GPT2Config(vocab_size=61, n_positions=24, n_embd=32, n_layer=4, n_head=4, bos_token_id=1, eos_token_id=2, **kwargs)
    return rough(GPT2LMHeadModel(config).eval())


@torch.no_grad()
def rough(model):
    """Gives every weight a size, biases and the norms' gains included, so that nothing can be left out unseen."""
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * (0.2 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5))
    return model


def ids_of(length: int = 12) -> torch.Tensor:
    return torch.randint(61, (2, length))


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"tie_word_embeddings": True, "num_key_value_heads": 4, "hidden_act": "gelu"},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}, "rms_norm_eps": 1e-4},
    ],
)
@torch.no_grad()
def test_all_layers_once_are_the_source(kwargs):
    """Where all tokens have one size, nothing is lost: with all layers in the block the model computes what the source does, after any number of steps."""
    source, ids = llama(**kwargs), ids_of()
    table = source.get_input_embeddings().weight
    table.copy_(0.3 * table / table.square().mean(-1, keepdim=True).sqrt())
    expected = source(ids).logits
    model = init_from(source)
    assert model.config.num_block_layers == 4
    assert not model.training
    for steps in (1, 4):
        torch.testing.assert_close(model(ids, max_steps=steps).logits, expected, rtol=0, atol=0.003 if "rms_norm_eps" in kwargs else 1e-4)
    out = model(ids, max_steps=20, output_solver_stats=True)
    assert out.solver_residual.max() < 1e-4  # a fixed point that does not depend on the state


@torch.no_grad()
def test_sizes_are_those_that_the_layers_know():
    """Embeddings far smaller than what the layers make of them, as in real models: the block still sees the middle layer's size, the coda its own."""
    source, ids = llama(), ids_of(40)
    source.get_input_embeddings().weight.mul_(0.05)
    for layer in source.model.layers:
        layer.mlp.down_proj.weight.mul_(6)
    states = source(ids, output_hidden_states=True).hidden_states
    size = [state.square().mean(-1).sqrt().median().item() for state in states]
    assert size[1] > 1.5 * size[0]
    assert size[2] > 1.5
    assert size[3] > 1.2 * size[2]
    seen = {}

    def look(module, args):
        seen[module] = args[0].square().mean(-1).sqrt().median().item()

    for state_gain in (0.0, 0.25):
        model = init_from(source, layers=2, num_prelude_layers=1, num_coda_layers=1, state_gain=state_gain)
        block, coda = model.model.solve.block.layers[0], model.model.coda[0]
        hooks = [module.register_forward_pre_hook(look) for module in (block, coda)]
        model(ids, max_steps=12, use_cache=False)
        for hook in hooks:
            hook.remove()
        assert seen[coda] == pytest.approx(size[3], rel=0.15)
        if state_gain == 0:
            assert seen[block] == pytest.approx(size[2], rel=0.15)
        assert model.model.solve.block.state_norm.weight.unique().item() == pytest.approx(state_gain * size[2], rel=0.15, abs=1e-9)
        assert model.model.input_norm.weight.unique().item() == pytest.approx((1 - state_gain) * size[2], rel=0.15)


@torch.no_grad()
def test_sizes_are_measured_on_tokens_that_the_source_says():
    """Most of a vocabulary is rare and small; where the first layer is iterated its gain must be the size of what occurs."""
    source = llama()
    table = source.get_input_embeddings().weight
    table.copy_(table / table.square().mean(-1, keepdim=True).sqrt())
    table[20:] *= 0.01
    source.lm_head.weight[:20] *= 20
    source.lm_head.weight[20:] = 0
    assert init_from(source, layers=0).model.input_norm.weight.unique().item() == pytest.approx(1, abs=0.01)


def same(layer, source_layer) -> bool:
    theirs = source_layer.state_dict()
    return all(torch.equal(tensor, theirs[name]) for name, tensor in layer.state_dict().items())


def test_which_layers_go_where():
    source = llama()
    theirs = source.model.layers
    model = init_from(source, layers="1,2", num_prelude_layers=1, num_coda_layers=1, max_steps=3, beta=0.8)
    assert (model.config.num_block_layers, model.config.max_steps, model.config.beta) == (2, 3, 0.8)
    assert same(model.model.prelude[0], theirs[0])
    assert same(model.model.coda[0], theirs[3])
    assert all(same(layer, theirs[index]) for layer, index in zip(model.model.solve.block.layers, (1, 2), strict=True))
    assert same(init_from(source, layers=3).model.solve.block.layers[0], theirs[3])
    assert same(init_from(source, layers=[0]).model.solve.block.layers[0], theirs[0])
    mean = init_from(source, layers="mean", num_prelude_layers=1).model.solve.block.layers
    expected = (theirs[1].mlp.up_proj.weight + theirs[2].mlp.up_proj.weight + theirs[3].mlp.up_proj.weight) / 3
    torch.testing.assert_close(mean[0].mlp.up_proj.weight, expected)
    assert len(mean) == 1
    assert torch.equal(model.model.embed_tokens.weight, source.model.embed_tokens.weight)
    assert torch.equal(model.model.norm.weight, source.model.norm.weight)
    assert torch.equal(model.lm_head.weight, source.lm_head.weight)


def test_the_source_stays_as_it_was_and_its_type_is_kept():
    source = gpt2(resid_pdrop=0.5).train()
    before = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    first, second = init_from(source), init_from(source)
    assert source.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in source.state_dict().items())
    assert all(torch.equal(tensor, second.state_dict()[name]) for name, tensor in first.state_dict().items())
    assert init_from(llama().to(torch.bfloat16), layers="mean").dtype == torch.bfloat16


@pytest.mark.parametrize("activation", ["gelu_new", "gelu", "relu"])
@torch.no_grad()
def test_gpt2s_layers_are_ordinary_layers_of_the_papers_form(activation):
    source, ids = gpt2(activation_function=activation), ids_of()
    model = init_from(source, layers=2, num_prelude_layers=2, num_coda_layers=1)
    entered = {}
    for name, module in (("x", model.model.input_norm), ("coda", model.model.coda[0])):
        module.register_forward_pre_hook(lambda module, args, name=name: entered.__setitem__(name, args[0]))
    model.model.coda[0].register_forward_hook(lambda module, args, output: entered.__setitem__("last", output))
    logits = model(ids, use_cache=False).logits
    near = 1e-5 if activation == "relu" else 0.3  # a second gelu keeps what is positive
    assert relative_error(entered["x"], source(ids, output_hidden_states=True).hidden_states[2]) < near
    # the coda is GPT-2's last layer, the head its last norm and head, but for the norm's bias and one size for all tokens
    given = source.transformer.h[3](entered["coda"])
    assert relative_error(entered["last"], given[0] if isinstance(given, tuple) else given) < near
    state = entered["last"]
    normed = (state - state.mean(-1, keepdim=True)) * source.transformer.ln_f.weight
    ratio = source.lm_head(normed) / logits
    size = ratio.median()
    torch.testing.assert_close(logits * size, source.lm_head(normed), rtol=1e-3, atol=1e-3)
    assert size.item() == pytest.approx(state.std(-1).median().item(), rel=0.2)


def test_it_starts_better_than_random():
    """A small Llama learns to count in steps of 1 to 4; what starts from it knows more than what starts from nothing."""
    source = LlamaForCausalLM(LlamaConfig(**{**SIZES, "num_hidden_layers": 3}))

    def batch() -> torch.Tensor:
        first, step = torch.randint(61, (16, 1)), torch.randint(1, 5, (16, 1))
        return (first + step * torch.arange(16)) % 61

    optimizer = torch.optim.AdamW(source.parameters(), lr=5e-3)
    for _ in range(150):
        ids = batch()
        loss = source(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    ids = batch()
    with torch.no_grad():
        learned = source.eval()(ids, labels=ids).loss.item()
        random = RevDEQForCausalLM(RevDEQConfig(**{name: n for name, n in SIZES.items() if name != "num_hidden_layers"}))(
            ids, labels=ids
        ).loss.item()
        started = init_from(source, layers=1, num_prelude_layers=1, num_coda_layers=1)(ids, labels=ids).loss.item()
    assert learned < 2.0
    assert random > 3.9
    assert started < learned + 0.5


def test_what_cannot_be_mapped_is_refused():
    with pytest.raises(ValueError, match="a model can start from llama, mistral, qwen2, gpt2, got model_type 'opt'"):
        init_from(OPTForCausalLM(OPTConfig(hidden_size=16, ffn_dim=16, num_attention_heads=2, num_hidden_layers=1, word_embed_proj_dim=16)))
    source = llama()
    for layers, text in (
        (4, "from 0 to 3"),
        ("-1", "from 0 to 3"),
        ("1,9", "the source has 4 layers"),
        ("", "or indices"),
        ([], "from 0 to 3"),
    ):
        with pytest.raises(ValueError, match=text):
            init_from(source, layers=layers)
    with pytest.raises(ValueError, match="must leave at least one of the source's 4 layers, got 3 and 1"):
        init_from(source, num_prelude_layers=3, num_coda_layers=1)
    with pytest.raises(ValueError, match=r"state_gain must lie in \[0, 1\], got 2"):
        init_from(source, state_gain=2)
    with pytest.raises(ValueError, match="4 heads of 16 in a width of 32"):
        init_from(llama(head_dim=16))
    with pytest.raises(
        ValueError, match=r"no biases, but layer 0 of the source has self_attn.q_proj.bias, .*such a model cannot be taken over"
    ):
        init_from(rough(Qwen2ForCausalLM(Qwen2Config(**SIZES, num_key_value_heads=2))))
    with pytest.raises(ValueError, match=r"mlp\.up_proj\.bias"):
        init_from(llama(mlp_bias=True))
    with pytest.raises(ValueError, match=r"activation_function must be one of .* got 'silu'"):
        init_from(gpt2(activation_function="silu"))
    with pytest.raises(ValueError, match="scale_attn_by_inverse_layer_idx=False"):
        init_from(gpt2(scale_attn_by_inverse_layer_idx=True))
    for untied in (gpt2(), llama()):
        with pytest.raises(ValueError, match="tie_word_embeddings=True would give embeddings and head the same weights, but"):
            init_from(untied, tie_word_embeddings=True)
    with pytest.raises(ValueError, match=r"got Sequential; adapters of peft are merged first"):
        init_from(torch.nn.Sequential(llama()))


def test_a_source_without_all_its_weights_is_not_filled_with_random_ones(tmp_path):
    llama().model.save_pretrained(tmp_path / "headless")
    with pytest.raises(ValueError, match=r"headless' lacks weights of its model \(LlamaForCausalLM\): lm_head.weight"):
        init_from(tmp_path / "headless")
    torch.save(llama().state_dict(), tmp_path / "headless" / "pytorch_model.bin")
    (tmp_path / "headless" / "model.safetensors").unlink()
    with pytest.raises(OSError, match="safetensors"):  # nothing is unpickled
        init_from(tmp_path / "headless")


@torch.no_grad()
def test_llamas_relatives():
    biases_of_zero = Qwen2ForCausalLM(Qwen2Config(**SIZES, num_key_value_heads=2))
    for name, parameter in biases_of_zero.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()
    model = init_from(biases_of_zero, num_prelude_layers=1)
    assert same(model.model.prelude[0], biases_of_zero.model.layers[0])
    mistral = MistralForCausalLM(MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=16))
    assert init_from(mistral).config.max_position_embeddings == 16  # up to there attention is the same


def test_the_source_stays_in_the_modes_it_was_in():
    source = llama().train()
    source.model.layers[1].eval()
    resting = set(source.model.layers[1].modules())
    init_from(source)
    assert all(module.training == (module not in resting) for module in source.modules())


def test_the_command(tmp_path, capsys):
    source, target = tmp_path / "source", tmp_path / "target"
    llama().save_pretrained(source)
    words = {"<s>": 1, "</s>": 2, **{f"w{index}": index for index in (0, *range(3, 61))}}
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")), eos_token="</s>").save_pretrained(source)
    main([str(source), str(target), "--layers", "mean", "--num_prelude_layers", "1", "--num_coda_layers", "1", "--max_steps", "2"])
    assert "with the tokenizer" in capsys.readouterr().out
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (target / name).read_bytes() == (source / name).read_bytes()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(target), AutoTokenizer.from_pretrained(target)
    assert isinstance(model, RevDEQForCausalLM)
    assert (model.config.max_steps, model.config.eos_token_id) == (2, 2)
    expected = init_from(source, layers="mean", num_prelude_layers=1, num_coda_layers=1, max_steps=2)
    assert all(torch.equal(tensor, expected.state_dict()[name]) for name, tensor in model.state_dict().items())
    prompt = torch.tensor([tokenizer.convert_tokens_to_ids(["w5", "w6"])])
    assert model.generate(prompt, max_new_tokens=3, min_new_tokens=3, do_sample=False).shape == (1, 5)


def test_the_command_refuses_and_leaves_nothing(tmp_path, capsys):
    source = tmp_path / "source"
    llama(attention_bias=True).save_pretrained(source)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("kept")

    def refused(*arguments: str) -> str:
        before = sorted(path.name for path in tmp_path.rglob("*"))
        with pytest.raises(SystemExit) as stopped:
            main([str(argument) for argument in arguments])
        assert stopped.value.code == 2
        assert sorted(path.name for path in tmp_path.rglob("*")) == before
        return capsys.readouterr().err

    assert "no biases" in refused(source, tmp_path / "target")
    assert "--beta" in refused(source, tmp_path / "target", "--beta", "one")
    assert "beta" in refused(source, tmp_path / "target", "--beta", "1")
    assert "exists and is not an empty folder" in refused(source, tmp_path / "full")
    assert "nowhere" in refused(tmp_path / "nowhere", tmp_path / "target")
    whole = (source / "model.safetensors").read_bytes()
    (source / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    assert "error" in refused(source, tmp_path / "target")
