"""How does a RevDEQ language model start from a pretrained transformer? It does not travel to the Hub.

Embeddings, last norm and head are taken over; the first layers may become the prelude, the last ones the coda, as in retrofitted looped models, and one of
the layers between them, several, or their mean the block that is iterated. What this is worth: docs/conversion.md.

    python -m revdeq_hf.init_from SOURCE TARGET --layers 3 --num_prelude_layers 2 --num_coda_layers 2
"""

import argparse
import os
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from .configuration_revdeq import RevDEQConfig
from .conversion import load_whole, whole_folder
from .diagnostics import evaluating
from .modeling_revdeq import RevDEQForCausalLM

LLAMA_TYPES = ("llama", "mistral", "qwen2")  # whose layers have the names of the modern block's
FAMILIES = (*LLAMA_TYPES, "gpt2")
GPT2_ACTIVATIONS = ("gelu_new", "gelu", "gelu_pytorch_tanh", "relu")
SCALE = 4.0  # act(SCALE * a) / SCALE is nearly a, for the positive values that another activation let through
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
    *("vocab.json", "merges.txt", "tokenizer.model"),
)
Weights = dict[str, torch.Tensor]


@torch.no_grad()
def init_from(
    source: str | os.PathLike | PreTrainedModel,
    layers: str | int | Sequence[int] = "all",
    num_prelude_layers: int = 0,
    num_coda_layers: int = 0,
    state_gain: float = 0.0,
    **settings: Any,
) -> RevDEQForCausalLM:
    """A RevDEQ language model with the weights of an ordinary one.

    Of a Llama-type model the block is the modern one. Its two norms, and the one before the fixed point, start with gains that give the layers inputs
    of the size they know; what is lost is how this size varies from token to token. With `state_gain=0` the block at first ignores its state, so the fixed
    point is what the layers make of the injected input: the model nearly computes what the source would with the layers that were taken, each once.

    Of a GPT-2-type model the block is the paper's, whose layers nearly hold GPT-2's (the MLP's second hidden layer starts close to the identity, the bias
    of the attention's output is moved to the values'), but whose identity path begins at the state: what follows the fixed point does not see the
    embeddings. Its last norm has no place: gain and mean go into the head, the bias is dropped, the size is set once for all tokens.

    Args:
        source: a model, or the folder or Hub name of one, of the types `FAMILIES`.
        layers: the block: an index from 0, indices ("2,3" or [2, 3]) for that many layers in the block, "all" between prelude and coda, or one layer that
            is the mean of these ("mean").
        num_prelude_layers, num_coda_layers: how many of the first and of the last layers stay ordinary ones.
        state_gain: how much of the block's input is the state at first, from 0 to 1; the rest is the injected input. (Not for GPT-2.)
        **settings: fields of `RevDEQConfig`, such as `max_steps`, `beta`, `gradient`. (`tie_word_embeddings=True` goes with a tied Llama-type source only:
            GPT-2's head takes in the last norm, so it is no longer the embeddings.)

    Returns:
        The model, in evaluation mode and in the source's dtype. Three forward passes of the source on 512 tokens, which it draws itself
        from a fixed seed, set the gains.

    Raises:
        ValueError: the source is of another type, has parts that the block lacks (such as biases in Llama-type layers), too few layers, or not all weights.
        OSError: its weights are not in safetensors.

    Source: retrofitted recurrence, arXiv 2511.07384 (prelude, block, coda from a pretrained model's layers).
    """
    if not isinstance(source, str | os.PathLike | PreTrainedModel):
        raise ValueError(
            f"source must be a model of transformers, or the folder or Hub name of one, got {type(source).__name__}; adapters of peft are merged first, "
            "source.merge_and_unload()"
        )
    if not isinstance(source, PreTrainedModel):
        _check_family(AutoConfig.from_pretrained(source).model_type)
        source = load_whole(AutoModelForCausalLM, source, dtype="auto")
    _check_family(source.config.model_type)
    if not 0 <= state_gain <= 1:
        raise ValueError(f"state_gain must lie in [0, 1], got {state_gain}")
    count = source.config.num_hidden_layers
    taken, mean = _taken(layers, count, num_prelude_layers, num_coda_layers)
    settings |= dict(num_prelude_layers=num_prelude_layers, num_coda_layers=num_coda_layers, num_block_layers=1 if mean else len(taken))
    gpt2 = source.config.model_type == "gpt2"
    config = _gpt2_config(source.config, settings) if gpt2 else _llama_config(source.config, settings)
    if config.tie_word_embeddings and (gpt2 or not source.config.tie_word_embeddings):
        why = "of a GPT-2-type model the head takes in the last norm" if gpt2 else "the source's are two"
        raise ValueError(f"tie_word_embeddings=True would give embeddings and head the same weights, but {why}; leave it out")
    model: Any = RevDEQForCausalLM(config).to(source.dtype).eval()
    given = source.state_dict()
    layer_of = partial(_gpt2_layer if gpt2 else _llama_layer, given)
    block = [layer_of(index) for index in taken]
    if mean:
        block = [{name: torch.stack([layer[name].float() for layer in block]).mean(0) for name in block[0]}]
    for destination, weights in (
        (model.model.prelude, [layer_of(index) for index in range(num_prelude_layers)]),
        (model.model.solve.block.layers, block),
        (model.model.coda, [layer_of(index) for index in range(count - num_coda_layers, count)]),
    ):
        for layer, values in zip(destination, weights, strict=True):
            layer.load_state_dict(values, strict=True)
    with evaluating(source):
        ids = _plausible_tokens(source)
        if gpt2:
            _finish_gpt2(model, given, ids)
        else:
            sizes = _sizes(source, ids)
            known = [sizes[index] for index in (taken if mean else taken[:1])]
            _finish_llama(model, given, sum(known) / len(known), sizes, state_gain)
    return model


def _check_family(model_type: str) -> None:
    if model_type not in FAMILIES:
        raise ValueError(f"a model can start from {', '.join(FAMILIES)}, got model_type {model_type!r}")


def _taken(layers: str | int | Sequence[int], count: int, prelude: int, coda: int) -> tuple[list[int], bool]:
    """Indices of the block's layers, and whether their mean is meant."""
    if prelude < 0 or coda < 0 or prelude + coda >= count:
        raise ValueError(
            f"num_prelude_layers and num_coda_layers must leave at least one of the source's {count} layers, got {prelude} and {coda}"
        )
    if layers in ("all", "mean"):
        return list(range(prelude, count - coda)), layers == "mean"
    listed: Any = layers.split(",") if isinstance(layers, str) else [layers] if isinstance(layers, int) else layers
    try:
        indices = [int(index) for index in listed]
    except ValueError as error:
        raise ValueError(f'layers must be "all", "mean" or indices such as "2,3", got {layers!r}') from error
    if not indices or min(indices) < 0 or max(indices) >= count:
        raise ValueError(f"layers must be indices from 0 to {count - 1}, the source has {count} layers, got {layers!r}")
    return indices, False


def _plausible_tokens(source: Any) -> torch.Tensor:
    """Token ids (8, 64 at most) of about the frequencies that the source expects: random ones, replaced twice by what it says to follow them."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(source.config.vocab_size, (8, min(64, source.config.max_position_embeddings)), generator=generator)
    for _ in range(2):
        chances = source(ids.to(source.device), use_cache=False).logits.float().softmax(-1).cpu()
        ids = torch.multinomial(chances.flatten(0, 1), 1, generator=generator).view_as(ids)
    return ids.to(source.device)


def _sizes(source: PreTrainedModel, ids: torch.Tensor) -> list[float]:
    """Root mean square of the values that enter each layer, the median of the tokens."""
    states = source(ids, output_hidden_states=True, use_cache=False).hidden_states[:-1]  # the last one is normed
    return [state.float().square().mean(-1).sqrt().median().item() for state in states]


def _llama_config(source: Any, settings: dict[str, Any]) -> RevDEQConfig:
    head = getattr(source, "head_dim", None) or source.hidden_size // source.num_attention_heads
    if head * source.num_attention_heads != source.hidden_size:
        raise ValueError(
            f"the block needs heads that make up the width, the source has {source.num_attention_heads} heads of {head} in a width of {source.hidden_size}"
        )
    window = getattr(source, "sliding_window", None) if getattr(source, "use_sliding_window", True) else None
    return RevDEQConfig(
        **{
            **dict(
                vocab_size=source.vocab_size,
                hidden_size=source.hidden_size,
                intermediate_size=source.intermediate_size,
                num_attention_heads=source.num_attention_heads,
                num_key_value_heads=source.num_key_value_heads,
                # a window is not kept: up to its length attention is the same
                max_position_embeddings=min(source.max_position_embeddings, window or source.max_position_embeddings),
                hidden_act=source.hidden_act,
                norm_eps=source.rms_norm_eps,
                rope_parameters=dict(source.rope_parameters),
                tie_word_embeddings=source.tie_word_embeddings,
            ),
            **_common(source),
            **settings,
        }
    )


def _gpt2_config(source: Any, settings: dict[str, Any]) -> RevDEQConfig:
    if source.activation_function not in GPT2_ACTIVATIONS:
        raise ValueError(f"activation_function must be one of {', '.join(GPT2_ACTIVATIONS)}, got {source.activation_function!r}")
    if not source.scale_attn_weights or source.scale_attn_by_inverse_layer_idx or source.add_cross_attention:
        raise ValueError(
            "the block's attention is scaled by 1/sqrt(head size) and looks at its own sequence; the source must have scale_attn_weights=True, "
            f"scale_attn_by_inverse_layer_idx=False and add_cross_attention=False, got {source.scale_attn_weights}, "
            f"{source.scale_attn_by_inverse_layer_idx} and {source.add_cross_attention}"
        )
    return RevDEQConfig(
        **{
            **dict(
                block_type="paper",
                vocab_size=source.vocab_size,
                hidden_size=source.n_embd,
                intermediate_size=source.n_inner or 4 * source.n_embd,
                num_attention_heads=source.n_head,
                max_position_embeddings=source.n_positions,
                hidden_act=source.activation_function,
                norm_eps=source.layer_norm_epsilon,
            ),
            **_common(source),
            **settings,
        }
    )


def _common(source: Any) -> dict[str, Any]:
    return {name: getattr(source, name) for name in ("initializer_range", "pad_token_id", "bos_token_id", "eos_token_id")}


def _llama_layer(given: Weights, index: int) -> Weights:
    """The weights of a layer by our names, which are theirs. Biases must be 0, for the block has none."""
    prefix = f"model.layers.{index}."
    weights = {name.removeprefix(prefix): tensor for name, tensor in given.items() if name.startswith(prefix)}
    biases = [name for name in weights if name.endswith(".bias")]
    lost = [name for name in biases if weights.pop(name).any()]
    if lost:
        raise ValueError(
            f"the modern block has no biases, but layer {index} of the source has {', '.join(lost)}; such a model cannot be taken over"
        )
    return weights


def _finish_llama(model: Any, given: Weights, entering: float, sizes: list[float], state_gain: float) -> None:
    """All but the layers; `entering` is the size of values that the block's first layer knows, `sizes` that of each layer."""
    body, coda = model.model, model.config.num_coda_layers
    body.embed_tokens.weight.copy_(given["model.embed_tokens.weight"])
    body.norm.weight.copy_(given["model.norm.weight"])
    model.lm_head.weight.copy_(given["lm_head.weight"])
    body.input_norm.weight.fill_((1 - state_gain) * entering)
    body.solve.block.state_norm.weight.fill_(state_gain * entering)
    body.solve.block.norm.weight.fill_(sizes[-coda] if coda else 1.0)  # without a coda the last norm follows, to which size is nothing


def _gpt2_layer(given: Weights, index: int) -> Weights:
    """GPT-2's layer as an ordinary layer of the paper's form, which computes nearly the same (the same with relu)."""
    prefix = f"transformer.h.{index}."
    layer = {name.removeprefix(prefix): tensor.float() for name, tensor in given.items() if name.startswith(prefix)}
    weights: Weights = {}
    for ours, theirs in (("input_layernorm", "ln_1"), ("post_attention_layernorm", "ln_2")):
        weights |= {f"{ours}.{kind}": layer[f"{theirs}.{kind}"] for kind in ("weight", "bias")}
    matrices, biases = layer["attn.c_attn.weight"].T.chunk(3), layer["attn.c_attn.bias"].chunk(3)  # theirs are (in, out)
    for letter, matrix, bias in zip("qkv", matrices, biases, strict=True):
        weights |= {f"self_attn.{letter}_proj.weight": matrix, f"self_attn.{letter}_proj.bias": bias}
    output = layer["attn.c_proj.weight"].T
    weights["self_attn.o_proj.weight"] = output
    # attention weights sum to 1, so a bias of the values comes out as `output @ bias`: it can stand for the bias that our output lacks
    missing = torch.linalg.lstsq(output.double(), layer["attn.c_proj.bias"].double()[:, None], driver="gelsd").solution[:, 0]
    weights["self_attn.v_proj.bias"] = (biases[2].double() + missing).float()
    down, hidden = layer["mlp.c_proj.weight"].T, layer["mlp.c_fc.bias"].numel()
    weights |= {"mlp.up_proj.weight": layer["mlp.c_fc.weight"].T, "mlp.up_proj.bias": layer["mlp.c_fc.bias"]}
    # a bias that is taken away again would bring the second activation closer to the identity, but such a model trains worse (docs/conversion.md)
    weights |= {"mlp.mid_proj.weight": SCALE * torch.eye(hidden), "mlp.mid_proj.bias": torch.zeros(hidden)}
    weights |= {"mlp.down_proj.weight": down / SCALE, "mlp.down_proj.bias": layer["mlp.c_proj.bias"]}
    return weights


def _finish_gpt2(model: Any, given: Weights, ids: torch.Tensor) -> None:
    """All but the layers. The last norm's gain and mean go into the head, and the size that final states have on `ids`."""
    body = model.model
    body.embed_tokens.weight.copy_(given["transformer.wte.weight"])
    body.embed_positions.weight.copy_(given["transformer.wpe.weight"])
    final = body(ids.to(model.device), use_cache=False).last_hidden_state.float()
    head = given["lm_head.weight"].float() * given["transformer.ln_f.weight"].float()
    model.lm_head.weight.copy_((head - head.mean(1, keepdim=True)) / final.std(-1).median())


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; `arguments` instead of the command line's."""
    parser = argparse.ArgumentParser(prog="python -m revdeq_hf.init_from", description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    parser.add_argument("source", help=f"folder or Hub name of a causal language model: {', '.join(FAMILIES)}")
    parser.add_argument("target", type=Path, help="the model folder to write; it must not exist")
    parser.add_argument("--layers", default="all", help='the block: an index from 0, several ("2,3"), "all" (default), or their "mean"')
    parser.add_argument("--num_prelude_layers", type=int, default=0, help="first layers that stay ordinary ones (default 0)")
    parser.add_argument("--num_coda_layers", type=int, default=0, help="last layers that stay ordinary ones (default 0)")
    parser.add_argument("--state_gain", type=float, default=0.0, help="share of the state in the block's input at first (default 0)")
    parser.add_argument("--max_steps", type=int, default=4, help="steps of the solve (default 4)")
    parser.add_argument("--beta", type=float, default=0.5, help="relaxation (default 0.5)")
    options = vars(parser.parse_args(arguments))
    source, target = options.pop("source"), options.pop("target")
    try:
        with whole_folder(target) as folder:
            init_from(source, **options).save_pretrained(folder)
            files = Path(source) if Path(source).is_dir() else Path(snapshot_download(source, allow_patterns=list(TOKENIZER_FILES)))
            copied = [shutil.copyfile(files / name, folder / name).name for name in TOKENIZER_FILES if (files / name).is_file()]
    except (ValueError, OSError, RuntimeError, StrictDataclassError, SafetensorError) as error:  # RuntimeError: weights of other shapes
        parser.error(str(error))
    print(f"{source} -> {target}, {'with the tokenizer' if copied else 'without a tokenizer, for the source has none'}")


if __name__ == "__main__":
    main()
