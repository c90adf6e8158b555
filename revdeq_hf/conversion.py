"""How do weights of the authors' JAX scripts become a model of this package, and the other way round? It does not travel to the Hub.

The authors' code (github.com/sammccallum/reversible-deq, commit a1bd296) saves nothing by itself; what is read here is what Equinox writes of their models:

    eqx.tree_serialise_leaves(FILE, model)            # experiments/language: Model; experiments/vision: SingleDEQ
    eqx.tree_serialise_leaves(FILE, (model, state))   # experiments/vision: ImplicitResNet, whose BatchNorm statistics are in the state

Such a file is a sequence of NumPy's .npy records, one for each array, number and truth value of the tree, in its order, without names. So the order and
the shapes are stated here (`leaves`), and each record's shape is compared with them. Neither JAX nor Equinox is needed, and nothing is unpickled.

    python -m revdeq_hf.conversion FILE FOLDER --config paper_wikitext103
    python -m revdeq_hf.conversion FOLDER FILE
"""

import argparse
import copy
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from .configuration_revdeq import RevDEQConfig, RevDEQVisionConfig
from .memory import PRESETS, load_config
from .modeling_revdeq import RevDEQForCausalLM
from .modeling_revdeq_vision import RevDEQForImageClassification

Config = RevDEQConfig | RevDEQVisionConfig
Model = RevDEQForCausalLM | RevDEQForImageClassification

MOMENTUM = 0.99  # of Equinox's BatchNorm
SETTLED = 4096  # updates of a BatchNorm after which MOMENTUM**updates is lost in float64: its statistics need no correction any more
PROJECTIONS = {"q_proj": "query_proj", "k_proj": "key_proj", "v_proj": "value_proj"}
# what the authors' classes have built in
SOLVE_ONLY = dict(solver="reversible", damping=0, initial_scale=0, num_restarts=1)
LANGUAGE_ONLY = dict(
    block_type="paper",
    num_block_layers=1,
    num_prelude_layers=0,
    num_coda_layers=0,
    hidden_act="gelu_pytorch_tanh",
    norm_eps=1e-5,
    tie_word_embeddings=False,
    is_causal=True,
    **SOLVE_ONLY,
)
VISION_ONLY = dict(block_type="paper", stem_stride=1, downsample="residual", group_width=16, norm_eps=1e-5, **SOLVE_ONLY)
MULTISCALE_ONLY = dict(stem="batch_norm", residual_stages=True, pool_size=1)
SINGLESCALE_ONLY = dict(stem="group_norm", residual_stages=False, pool_size=4)


class Leaf(NamedTuple):
    """A record of the file.

    Args:
        path: where it stands in the authors' model, as `jax.tree_util.keystr` writes it.
        shape: its shape.
        ours: the name of our parameter or buffer of the same values, or None.
        value: what is written where there is none of ours.
        fixed: whether it is an error to read anything else.
    """

    path: str
    shape: tuple[int, ...]
    ours: str | None = None
    value: Any = None
    fixed: bool = False


def from_equinox(file: str | os.PathLike, config: Config) -> Model:
    """The model whose leaves Equinox wrote to `file`.

    Their second projections of queries, keys and values are multiplied into the first ones (in float64, rounded once), and BatchNorm's statistics are
    corrected for their start as their code does at each use. `beta`, `max_steps` and `tol` are the file's. Their language model stops a sequence where
    `tol` is met, ours each token; `tol=None` or a `tol` that is never met makes no difference.

    Args:
        file: what `eqx.tree_serialise_leaves` wrote, see the head of this module.
        config: sizes and the number of heads, which the file does not tell: a preset such as `RevDEQConfig.paper_wikitext103()`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is cut short, of another model, or no such file; or the authors have no such model.
    """
    with Path(file).open("rb") as stream:
        values = _read(stream, leaves(config), str(file))
    config = copy.deepcopy(config)
    for name, value in _settings(values, str(file)).items():
        setattr(config, name, value)
    model = _model_class(config)(config)
    state = model.state_dict()
    for leaf in leaves(config):
        if leaf.ours is not None:
            state[leaf.ours] = torch.from_numpy(values[leaf.path]).reshape(state[leaf.ours].shape)
    if isinstance(config, RevDEQConfig):
        for ours, theirs in PROJECTIONS.items():
            _fold(state, f"model.solve.block.layers.0.self_attn.{ours}", values[f"deq.function.attention.attention.{theirs}.weight"])
    for name in [name for name in state if name.endswith("num_batches_tracked")]:
        _correct_statistics(state, name.removesuffix("num_batches_tracked"))
    model.load_state_dict(state, strict=True)
    return model.eval()


def to_equinox(model: Model, file: str | os.PathLike) -> None:
    """Writes a model as the leaves of the authors' classes, for `eqx.tree_deserialise_leaves` with `jax_enable_x64`.

    Their second projections become identities, what their forward pass does not use (a last norm) its initial values. `from_equinox` gives back the
    same bits, but for `num_batches_tracked`: BatchNorm's statistics are written without the correction that theirs need in the first updates, so a count from
    1 to 4,095 becomes 4,096.

    Args:
        model: in float32; half precisions are widened.
        file: where to write; it must not exist.

    Raises:
        FileExistsError: it does.
        ValueError: the authors have no such model.
    """
    file, config = Path(file), model.config
    layout = leaves(config)
    if file.exists():
        raise FileExistsError(f"{str(file)!r} exists; nothing was written, choose another name or delete it")
    state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    with _whole(file) as path, path.open("wb") as stream:
        for leaf in layout:
            value = np.asarray(leaf.value) if leaf.ours is None else _exported(leaf.ours, state[leaf.ours])
            np.save(stream, value.reshape(leaf.shape), allow_pickle=False)


def leaves(config: Config) -> list[Leaf]:
    """The records of the authors' model, in order.

    Raises:
        ValueError: they have no such model.
    """
    if isinstance(config, RevDEQConfig):
        _check_expressible(config, {**LANGUAGE_ONLY, "num_key_value_heads": config.num_attention_heads})
        return list(_language(config))
    several = len(config.hidden_sizes) > 1 or config.stem == "batch_norm"
    _check_expressible(config, {**VISION_ONLY, **(MULTISCALE_ONLY if several else SINGLESCALE_ONLY)})
    return list(_multiscale(config) if several else _singlescale(config))


@contextmanager
def whole_folder(target: str | os.PathLike) -> Iterator[Path]:
    """A folder beside `target` to write to, which takes its name at the end, or is deleted on an error.

    Raises:
        FileExistsError: `target` exists and is not an empty folder.
    """
    target = Path(target)
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise FileExistsError(f"{str(target)!r} exists and is not an empty folder; nothing was written, choose another name or delete it")
    target.absolute().parent.mkdir(parents=True, exist_ok=True)
    with _whole(target) as folder:
        folder.mkdir()
        yield folder


@contextmanager
def _whole(target: Path) -> Iterator[Path]:
    """A path to write to, beside `target`, which takes its place at the end; after an error nothing is left."""
    with tempfile.TemporaryDirectory(dir=target.absolute().parent, prefix=f".{target.name}.") as place:
        path = Path(place, target.name)
        yield path
        os.replace(path, target)


def _language(config: RevDEQConfig) -> Iterator[Leaf]:
    width, hidden, length = config.hidden_size, config.intermediate_size, config.max_position_embeddings
    theirs, ours = "deq.function", "model.solve.block.layers.0"
    yield Leaf("seq_length", (), value=length, fixed=True)
    yield Leaf("pos_emb.weight", (length, width), "model.embed_positions.weight")
    yield Leaf("tok_emb.weight", (config.vocab_size, width), "model.embed_tokens.weight")
    yield from _affine(f"{theirs}.norm1", f"{ours}.input_layernorm", (width,))
    yield from _affine(f"{theirs}.norm2", f"{ours}.post_attention_layernorm", (width,))
    attention = f"{theirs}.attention"
    for letter in "qkv":
        yield from _affine(f"{attention}.W_{letter}", f"{ours}.self_attn.{letter}_proj", (width, width))
    for name in PROJECTIONS.values():
        yield Leaf(f"{attention}.attention.{name}.weight", (width, width), value=np.eye(width, dtype=np.float32))
    yield Leaf(f"{attention}.attention.output_proj.weight", (width, width), f"{ours}.self_attn.o_proj.weight")
    yield Leaf(f"{attention}.attention.dropout.p", (), value=0.0)
    yield Leaf(f"{attention}.attention.dropout.inference", (), value=False)
    yield Leaf(f"{attention}.mask", (length, length), value=np.tri(length, dtype=np.float32), fixed=True)
    for index, (name, shape) in enumerate((("up_proj", (hidden, width)), ("mid_proj", (hidden, hidden)), ("down_proj", (width, hidden)))):
        yield from _affine(f"{theirs}.mlp.layers[{index}]", f"{ours}.mlp.{name}", shape)
    yield from _solver("deq", config, config.max_steps)
    yield Leaf("norm.weight", (width,), value=np.ones(width, np.float32))  # their forward pass leaves it out
    yield Leaf("norm.bias", (width,), value=np.zeros(width, np.float32))
    yield Leaf("head.weight", (config.vocab_size, width), "lm_head.weight")


def _multiscale(config: RevDEQVisionConfig) -> Iterator[Leaf]:
    sizes, statistics = config.hidden_sizes, []
    yield Leaf("[0].encoder_conv.weight", (sizes[0], config.num_channels, 3, 3), "model.stem.0.weight")
    yield from _batch_norm("[0].encoder_norm", "model.stem.1", sizes[0])
    statistics.append(("model.stem.1", sizes[0]))
    for index, (size, ratio, steps) in enumerate(zip(sizes, config.expansion_ratios, config.steps_per_stage, strict=True)):
        yield from _stage(f"[0].deq_layers[{index}]", f"model.stages.{index}", size, ratio)
        yield from _solver(f"[0].deq_layers[{index}]", config, steps)
        yield Leaf(f"[0].deq_layers[{index}].reg", (), value=False)
    for index, (size, next_size) in enumerate(zip(sizes, sizes[1:], strict=False)):
        theirs, ours = f"[0].down_layers[{index}]", f"model.downsamples.{index}"
        yield Leaf(f"{theirs}.conv1.weight", (next_size, size, 3, 3), f"{ours}.conv1.weight")
        yield Leaf(f"{theirs}.conv2.weight", (next_size, next_size, 3, 3), f"{ours}.conv2.weight")
        for norm, channels in (("norm1", size), ("norm2", next_size)):
            yield from _batch_norm(f"{theirs}.{norm}", f"{ours}.{norm}", channels)
            statistics.append((f"{ours}.{norm}", channels))
        yield Leaf(f"{theirs}.residual_conv.weight", (next_size, size, 1, 1), f"{ours}.shortcut.weight")
    yield Leaf("[0].pool.init", (), value=0)
    yield from _affine("[0].final_linear", "classifier", (config.num_labels, sizes[-1]))
    for index, (ours, channels) in enumerate(
        statistics
    ):  # the state: for each BatchNorm of the model, in order, its count and its statistics
        yield Leaf(f"[1][{2 * index}]", (), f"{ours}.num_batches_tracked")
        yield Leaf(f"[1][{2 * index + 1}][0]", (channels,), f"{ours}.running_mean")
        yield Leaf(f"[1][{2 * index + 1}][1]", (channels,), f"{ours}.running_var")


def _singlescale(config: RevDEQVisionConfig) -> Iterator[Leaf]:
    size, pooled = config.hidden_sizes[0], config.hidden_sizes[0] * config.pool_size**2
    yield Leaf("encoder_conv.weight", (size, config.num_channels, 3, 3), "model.stem.0.weight")
    yield Leaf("encoder_conv.bias", (size, 1, 1), "model.stem.0.bias")
    yield from _affine("encoder_norm", "model.stem.1", (size,))
    yield from _stage("deq_model", "model.stages.0", size, config.expansion_ratios[0])
    yield from _solver("deq_model", config, config.steps_per_stage[0])
    yield from _affine("decoder_layer", "classifier", (config.num_labels, pooled))
    yield Leaf("reg", (), value=False)
    yield Leaf("n_hutch", (), value=1)


def _affine(theirs: str, ours: str, shape: tuple[int, ...]) -> Iterator[Leaf]:
    yield Leaf(f"{theirs}.weight", shape, f"{ours}.weight")
    yield Leaf(f"{theirs}.bias", shape[:1], f"{ours}.bias")


def _batch_norm(theirs: str, ours: str, channels: int) -> Iterator[Leaf]:
    yield from _affine(theirs, ours, (channels,))
    yield Leaf(f"{theirs}.inference", (), value=False)


def _stage(theirs: str, ours: str, channels: int, ratio: int) -> Iterator[Leaf]:
    hidden = channels * ratio
    yield Leaf(f"{theirs}.function.conv1.weight", (hidden, channels, 3, 3), f"{ours}.block.conv1.weight")
    yield Leaf(f"{theirs}.function.conv2.weight", (channels, hidden, 3, 3), f"{ours}.block.conv2.weight")
    for norm, width in (("norm1", hidden), ("norm2", channels), ("norm3", channels)):
        yield from _affine(f"{theirs}.function.{norm}", f"{ours}.block.{norm}", (width,))


def _solver(theirs: str, config: Config, steps: int) -> Iterator[Leaf]:
    yield Leaf(f"{theirs}.solver.beta", (), value=float(config.beta))
    yield Leaf(f"{theirs}.tol", (), value=float(config.tol or 0.0))  # 0 is never met, as None
    yield Leaf(f"{theirs}.max_steps", (), value=steps)


def _check_expressible(config: Config, required: dict[str, Any]) -> None:
    wrong = [f"{name}={getattr(config, name)!r} instead of {value!r}" for name, value in required.items() if getattr(config, name) != value]
    if wrong:
        raise ValueError(
            f"the authors' scripts have no such model, it has {', '.join(wrong)}; theirs are {', '.join(PRESETS)} and these in other sizes"
        )


def _model_class(config: Config) -> type[Model]:
    return RevDEQForCausalLM if isinstance(config, RevDEQConfig) else RevDEQForImageClassification


def _read(stream: IO[bytes], layout: list[Leaf], name: str) -> dict[str, np.ndarray]:
    """The values by their paths. Headers are compared before values are read, so that a damaged size cannot ask for memory."""
    values: dict[str, np.ndarray] = {}
    for number, leaf in enumerate(layout, start=1):
        where = f"{name!r}, leaf {number} of {len(layout)}, {leaf.path}"
        began = stream.tell()
        if not stream.read(1):
            hint = (
                "; serialise the model with its state: eqx.tree_serialise_leaves(FILE, (model, state))"
                if leaf.path.startswith("[1]")
                else ""
            )
            raise ValueError(f"{where}: the file ends here; it is cut short, or of another model than the config's{hint}")
        stream.seek(began)
        try:
            version = np.lib.format.read_magic(stream)
            header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = header(stream)
        except ValueError as error:
            raise ValueError(f"{where}: expected a NumPy record, as eqx.tree_serialise_leaves writes them, got none ({error})") from error
        if shape != leaf.shape:
            raise ValueError(
                f"{where}: expected the shape {leaf.shape}, got {shape}; the file is of another model, or the config has other sizes"
            )
        if leaf.shape and dtype != np.float32:
            raise ValueError(f"{where}: expected float32, as the authors' weights are, got {dtype}")
        if not leaf.shape and dtype.kind not in "biuf":
            raise ValueError(f"{where}: expected a number, got {dtype}")
        stream.seek(began)
        try:
            value = np.load(stream, allow_pickle=False)
        except ValueError as error:
            raise ValueError(f"{where}: the file is cut short ({error})") from error
        if leaf.fixed and not np.array_equal(value, leaf.value):
            got = value.item() if not leaf.shape else "others"
            raise ValueError(f"{where}: expected {leaf.value if not leaf.shape else 'the values of a causal mask'}, got {got}")
        values[leaf.path] = value
    if stream.read(1):
        raise ValueError(f"{name!r} goes on after the last leaf, {layout[-1].path}: it is of another model than the config's")
    return values


def _settings(values: dict[str, np.ndarray], name: str) -> dict[str, Any]:
    """`beta`, `tol` and `max_steps` of the solves."""

    def of(ending: str) -> list[Any]:
        # the shortest text of a float32 gives back the number that was meant
        return [float(str(value[()])) for path, value in values.items() if path.endswith(ending)]

    betas, tols, steps = of("solver.beta"), of(".tol"), [int(number) for number in of(".max_steps")]
    for setting, found in (("beta", betas), ("tol", tols)):
        if len(set(found)) > 1:
            raise ValueError(f"{name!r} has several values of {setting} ({found}), a config holds one")
    return dict(beta=betas[0], tol=tols[0] or None, max_steps=steps[0] if len(set(steps)) == 1 else steps)


def _fold(state: dict[str, torch.Tensor], ours: str, second: np.ndarray) -> None:
    """`second @ (W h + b)` as one projection. An identity changes no bit (a product would lose the sign of zeros)."""
    if np.array_equal(second, np.eye(len(second))):
        return
    for name in (f"{ours}.weight", f"{ours}.bias"):
        state[name] = (torch.from_numpy(second).double() @ state[name].double()).float()


def _correct_statistics(state: dict[str, torch.Tensor], norm: str) -> None:
    """As `eqx.nn.BatchNorm(mode="batch")` does in inference: averages that began at 0 are divided by the weight they hold."""
    updates = int(state[f"{norm}num_batches_tracked"])
    if updates:
        for name in (f"{norm}running_mean", f"{norm}running_var"):
            state[name] = (state[name].double() / (1 - MOMENTUM**updates)).float()


def _exported(name: str, tensor: torch.Tensor) -> np.ndarray:
    if name.endswith("num_batches_tracked"):
        updates = int(tensor)
        return np.asarray(max(updates, SETTLED) if updates else 0)
    return tensor.float().numpy()


def load_whole(model_class: Any, source: str | os.PathLike, **settings: Any) -> Any:
    """`from_pretrained` of a source that has every weight, in safetensors: none is drawn anew, nothing is unpickled.

    Raises:
        ValueError: weights are missing.
        OSError: there are none in safetensors.
    """
    model, info = model_class.from_pretrained(source, output_loading_info=True, use_safetensors=True, **settings)
    if info["missing_keys"]:
        raise ValueError(f"{str(source)!r} lacks weights of its model ({type(model).__name__}): {', '.join(sorted(info['missing_keys']))}")
    return model


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; `arguments` instead of the command line's."""
    parser = argparse.ArgumentParser(prog="python -m revdeq_hf.conversion", description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    parser.add_argument("source", type=Path, help="a file that eqx.tree_serialise_leaves wrote, or (for the way back) a model folder")
    parser.add_argument("target", type=Path, help="the model folder, or (for the way back) the file, to write; it must not exist")
    parser.add_argument("--config", help=f"of a file: which model it holds, {', '.join(PRESETS)}, or a JSON file or model folder")
    options = parser.parse_args(arguments)
    try:
        if options.source.is_dir():
            if options.config is not None:
                parser.error(
                    f"--config {options.config} is for a file, which does not tell its model; {options.source} is a folder with a config of its own"
                )
            to_equinox(load_whole(_model_class(load_config(str(options.source))), options.source), options.target)
        elif options.config is None:
            parser.error("--config must tell which model the file holds, for it has no names: " + ", ".join(PRESETS))
        else:
            with whole_folder(options.target) as folder:
                from_equinox(options.source, load_config(options.config)).save_pretrained(folder)
    except (ValueError, OSError, RuntimeError, StrictDataclassError, SafetensorError) as error:  # RuntimeError: weights of other shapes
        parser.error(str(error))
    print(f"{options.source} -> {options.target}")


if __name__ == "__main__":
    main()
