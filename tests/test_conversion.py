"""Weights of the authors' JAX scripts become models that compute the same, and go back (`revdeq_hf.conversion`)."""

import importlib.util
import io
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoModelForImageClassification

from revdeq_hf import RevDEQConfig, RevDEQForCausalLM, RevDEQForImageClassification, RevDEQVisionConfig
from revdeq_hf.conversion import from_equinox, leaves, main, to_equinox

VOCABULARY, WIDTH, HEADS, LENGTH, HIDDEN = 29, 16, 2, 10, 40
LANGUAGE = dict(
    vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=HIDDEN, num_attention_heads=HEADS, max_position_embeddings=LENGTH, tol=None
)
MULTISCALE = dict(hidden_sizes=[16, 32], expansion_ratios=[1, 2], num_labels=7)


def config_of(kind: str):
    if kind == "language":
        return RevDEQConfig.paper_wikitext103(**LANGUAGE)
    if kind == "multiscale":
        return RevDEQVisionConfig.paper_cifar10_multiscale(**MULTISCALE)
    return RevDEQVisionConfig.paper_cifar10_singlescale(expansion_ratios=[2])


# What the authors' models hold, in the order of their fields, written down a second time and from Equinox's classes, not from revdeq_hf.conversion.


def weights(*shape: int) -> np.ndarray:
    fan_in = int(np.prod(shape[1:])) if len(shape) > 1 else 25
    return (np.random.default_rng(len(shape) + sum(shape) * 7).standard_normal(shape) / fan_in**0.5).astype(np.float32)


def gain(size: int) -> np.ndarray:
    return 1 + weights(size)


def language_tree() -> dict[str, np.ndarray]:
    w = WIDTH
    tree = {"seq_length": np.asarray(LENGTH), "pos": weights(LENGTH, w), "tok": weights(VOCABULARY, w) * 3}
    for norm in ("norm1", "norm2"):
        tree |= {f"{norm}_w": gain(w), f"{norm}_b": weights(w)}
    for number, name in enumerate("qkv"):
        tree |= {f"{name}_w": weights(w, w) + 0.01 * number, f"{name}_b": weights(w) - 0.1 * number}
    for number, name in enumerate("qkv"):
        tree[f"{name}_again"] = weights(w, w).T + 0.02 * number
    tree |= {
        "o": weights(w, w),
        "p": np.asarray(0.0),
        "inference": np.asarray(False),
        "mask": np.tril(np.ones((LENGTH, LENGTH), np.float32)),
    }
    for number, (outputs, inputs) in enumerate(((HIDDEN, w), (HIDDEN, HIDDEN), (w, HIDDEN))):
        tree |= {f"mlp{number}_w": weights(outputs, inputs), f"mlp{number}_b": weights(outputs)}
    tree |= {"beta": np.asarray(0.5), "tol": np.asarray(0.0), "max_steps": np.asarray(3)}
    return tree | {"norm_w": gain(w), "norm_b": weights(w), "head": weights(VOCABULARY, w)}


def stage_tree(channels: int, ratio: int, name: str = "") -> dict[str, np.ndarray]:
    hidden = channels * ratio
    tree = {f"{name}conv1": weights(hidden, channels, 3, 3), f"{name}conv2": weights(channels, hidden, 3, 3)}
    for norm, width in (("norm1", hidden), ("norm2", channels), ("norm3", channels)):
        tree |= {f"{name}{norm}_w": gain(width), f"{name}{norm}_b": weights(width)}
    return tree | {f"{name}beta": np.asarray(0.8), f"{name}tol": np.asarray(1e-6), f"{name}max_steps": np.asarray(3)}


def multiscale_tree(updates: int) -> dict[str, np.ndarray]:
    false = np.asarray(False)
    tree = {"stem": weights(16, 3, 3, 3), "stem_w": gain(16), "stem_b": weights(16), "stem_inference": false}
    tree |= stage_tree(16, 1, "0.") | {"0.reg": false} | stage_tree(32, 2, "1.") | {"1.reg": false}
    tree |= {"down1": weights(32, 16, 3, 3), "down2": weights(32, 32, 3, 3)}
    tree |= {"d1_w": gain(16), "d1_b": weights(16), "d1_inference": false, "d2_w": gain(32), "d2_b": weights(32), "d2_inference": false}
    tree |= {"shortcut": weights(32, 16, 1, 1), "pool": np.asarray(0), "linear_w": weights(7, 32), "linear_b": weights(7)}
    for number, (norm, width) in enumerate((("stem", 16), ("d1", 16), ("d2", 32))):
        tree |= {f"{norm}_count": np.asarray(updates), f"{norm}_mean": weights(width) * 0.1 * (number + 1), f"{norm}_var": gain(width) ** 2}
    return tree


def singlescale_tree() -> dict[str, np.ndarray]:
    tree = {"stem": weights(32, 3, 3, 3), "stem_bias": weights(32, 1, 1), "stem_w": gain(32), "stem_b": weights(32)}
    tree |= stage_tree(32, 2) | {"linear_w": weights(10, 512), "linear_b": weights(10)}
    return tree | {"reg": np.asarray(False), "n_hutch": np.asarray(1)}


def tree_of(kind: str, updates: int = 5) -> dict[str, np.ndarray]:
    return {"language": language_tree, "multiscale": lambda: multiscale_tree(updates), "singlescale": singlescale_tree}[kind]()


def write(path, tree) -> None:
    with open(path, "wb") as file:
        for array in tree.values():
            np.save(file, array)


def read(path, tree) -> dict[str, np.ndarray]:
    with open(path, "rb") as file:
        return {name: np.load(file, allow_pickle=False) for name in tree}


# What their forward passes compute, in float64.


def iterate(f, x, beta: float, steps: int):
    y = z = torch.zeros_like(x)
    for _ in range(steps):
        y = (1 - beta) * y + beta * f(z)
        z = (1 - beta) * z + beta * f(y)
    return z


def language_reference(tree, ids):
    t = {name: torch.from_numpy(array.astype(np.float64)) for name, array in tree.items()}

    def norm(name, h):
        return functional.layer_norm(h, (WIDTH,), t[f"{name}_w"], t[f"{name}_b"], eps=1e-5)

    def heads(name, h):
        projected = (h @ t[f"{name}_w"].T + t[f"{name}_b"]) @ t[f"{name}_again"].T
        return projected.unflatten(-1, (HEADS, WIDTH // HEADS)).transpose(1, 2)

    def attention(h):
        q, k, v = (heads(name, h) for name in "qkv")
        scores = (q @ k.transpose(2, 3) / (WIDTH // HEADS) ** 0.5).masked_fill(t["mask"] == 0, -torch.inf)
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2) @ t["o"].T

    def mlp(h):
        for number in range(3):
            h = h @ t[f"mlp{number}_w"].T + t[f"mlp{number}_b"]
            h = functional.gelu(h, approximate="tanh") if number < 2 else h
        return h

    def block(z):
        h = z + attention(norm("norm1", z + x))
        return h + mlp(norm("norm2", h))

    x = t["tok"][ids] + t["pos"]
    return iterate(block, x, float(tree["beta"]), int(tree["max_steps"])) @ t["head"].T


def vision_reference(tree, images):
    t = {name: torch.from_numpy(array.astype(np.float64)) for name, array in tree.items()}

    def group_norm(name, h):
        return functional.group_norm(h, h.shape[1] // 16, t[f"{name}_w"], t[f"{name}_b"], eps=1e-5)

    def batch_norm(name, h):
        count = int(tree[f"{name}_count"])
        scale = 1 - 0.99**count if count else 1.0
        return functional.batch_norm(h, t[f"{name}_mean"] / scale, t[f"{name}_var"] / scale, t[f"{name}_w"], t[f"{name}_b"], eps=1e-5)

    def stage(x, name=""):
        def block(z):
            inner = functional.conv2d(
                torch.relu(group_norm(f"{name}norm1", functional.conv2d(z, t[f"{name}conv1"], padding=1))), t[f"{name}conv2"], padding=1
            )
            return group_norm(f"{name}norm3", torch.relu(z + group_norm(f"{name}norm2", x + inner)))

        return iterate(block, x, float(tree[f"{name}beta"]), int(tree[f"{name}max_steps"]))

    h = functional.conv2d(images.double(), t["stem"], t["stem_bias"].flatten() if "stem_bias" in t else None, padding=1)
    if "stem_bias" in t:
        h = functional.adaptive_avg_pool2d(stage(group_norm("stem", h)), 4)
    else:
        h = torch.relu(batch_norm("stem", h))
        h = h + stage(h, "0.")
        inner = functional.conv2d(torch.relu(batch_norm("d1", h)), t["down1"], stride=2, padding=1)
        h = functional.conv2d(h, t["shortcut"], stride=2) + functional.conv2d(torch.relu(batch_norm("d2", inner)), t["down2"], padding=1)
        h = (h + stage(h, "1.")).mean((2, 3))
    return h.flatten(1) @ t["linear_w"].T + t["linear_b"]


def reference(kind: str, tree):
    """Inputs and what their model says of them."""
    if kind == "language":
        ids = torch.randint(0, VOCABULARY, (2, LENGTH))
        return ids, language_reference(tree, ids)
    images = torch.randn(2, 3, 8, 8)
    return images, vision_reference(tree, images)


KINDS = ["language", "multiscale", "singlescale"]


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_converted_model_computes_what_theirs_does(tmp_path, kind):
    tree = tree_of(kind)
    write(tmp_path / "theirs.eqx", tree)
    inputs, expected = reference(kind, tree)
    model = from_equinox(tmp_path / "theirs.eqx", config_of(kind))
    assert not model.training
    torch.testing.assert_close(model(inputs).logits, expected.float(), rtol=0, atol=1e-5)
    assert model.config.max_steps == 3
    assert (model.config.beta, model.config.tol) == ((0.5, None) if kind == "language" else (0.8, 1e-6))
    # and back, where their function has the same values again
    to_equinox(model, tmp_path / "back.eqx")
    back = read(tmp_path / "back.eqx", tree)
    expected_again = language_reference(back, inputs) if kind == "language" else vision_reference(back, inputs)
    torch.testing.assert_close(expected_again, expected, rtol=0, atol=2e-6)
    assert [array.shape for array in back.values()] == [array.shape for array in tree.values()]
    assert [array.dtype for array in back.values()] == [array.dtype for array in tree.values()]  # Equinox compares both


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("updates", [0, 3, 5000])
def test_ours_to_theirs_to_ours_changes_no_bit(tmp_path, kind, updates):
    config = config_of(kind)
    config.beta, config.max_steps = 0.7, 5 if kind == "language" else [2] * len(config.hidden_sizes)
    model = (RevDEQForCausalLM if kind == "language" else RevDEQForImageClassification)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
            parameter.flatten()[:2] = -0.0
        for name, buffer in model.named_buffers():
            if "running" in name:
                buffer.copy_(torch.rand_like(buffer) + 0.1)
            elif name.endswith("num_batches_tracked"):
                buffer.fill_(updates)
    to_equinox(model, tmp_path / "theirs.eqx")
    again = from_equinox(tmp_path / "theirs.eqx", config_of(kind))
    expected = model.state_dict()
    assert again.state_dict().keys() == expected.keys()
    for name, tensor in again.state_dict().items():
        if name.endswith("num_batches_tracked"):
            assert tensor == {0: 0, 3: 4096, 5000: 5000}[updates]
        else:
            assert torch.equal(tensor.view(torch.int32), expected[name].view(torch.int32)), name
    assert (again.config.beta, again.config.tol) == (0.7, config.tol)
    assert again.config.max_steps in (5, 2)


@pytest.mark.parametrize("kind", KINDS)
def test_the_papers_shapes(kind):
    """The presets themselves: as many values as the authors' models have, of which ours lack the second projections, the mask and a norm."""
    presets = {"language": RevDEQConfig.paper_wikitext103, "multiscale": RevDEQVisionConfig.paper_cifar10_multiscale}
    config = presets.get(kind, RevDEQVisionConfig.paper_cifar10_singlescale)()
    with torch.device("meta"):
        model = (RevDEQForCausalLM if kind == "language" else RevDEQForImageClassification)(config)
    named = {leaf.ours: int(np.prod(leaf.shape)) for leaf in leaves(config) if leaf.ours}
    assert named == {name: tensor.numel() for name, tensor in model.state_dict().items()}


def test_the_command_goes_both_ways(tmp_path, capsys):
    for kind, auto in (("language", AutoModelForCausalLM), ("singlescale", AutoModelForImageClassification)):
        file, folder, back = (tmp_path / f"{kind}{ending}" for ending in (".eqx", "", "_back.eqx"))
        write(file, tree_of(kind))
        config_of(kind).to_json_file(tmp_path / "config.json", use_diff=False)
        main([str(file), str(folder), "--config", str(tmp_path / "config.json")])
        assert {path.name for path in folder.iterdir()} >= {"config.json", "model.safetensors"}
        assert folder.stat().st_mode & 0o777 == 0o755
        model, expected = auto.from_pretrained(folder), from_equinox(file, config_of(kind))
        assert all(torch.equal(tensor, expected.state_dict()[name]) for name, tensor in model.state_dict().items())
        main([str(folder), str(back)])
        again = from_equinox(back, config_of(kind))
        assert all(torch.equal(tensor, expected.state_dict()[name]) for name, tensor in again.state_dict().items())
    assert "language.eqx" in capsys.readouterr().out


def refused(tmp_path, capsys, *arguments: str) -> str:
    """What the command says when it refuses; it must leave nothing."""
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(SystemExit) as stopped:
        main([str(tmp_path / "file.eqx"), str(tmp_path / "out"), *arguments])
    assert stopped.value.code == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    return capsys.readouterr().err


def test_bad_files_are_named_and_nothing_is_written(tmp_path, capsys):
    path, config, tree = tmp_path / "file.eqx", tmp_path / "config.json", language_tree()
    config_of("language").to_json_file(config, use_diff=False)
    arguments = ("--config", str(config))
    assert "No such file" in refused(tmp_path, capsys, *arguments)
    write(path, tree)
    whole = path.read_bytes()
    for length in (0, 1, 6, 60, 128, 200, 900, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert f"leaf {1 if length < 130 else ''}" in refused(tmp_path, capsys, *arguments)
    path.write_bytes(whole + b"x")
    assert "goes on after the last leaf, head.weight" in refused(tmp_path, capsys, *arguments)

    def changed(name, value):
        write(path, {**tree, name: value})
        return refused(tmp_path, capsys, *arguments)

    text = changed("norm2_w", np.ones(WIDTH + 1, np.float32))
    assert all(part in text for part in ("leaf 6 of 32, deq.function.norm2.weight", "expected the shape (16,), got (17,)"))
    assert "expected float32, as the authors' weights are, got float64" in changed("tok", tree["tok"].astype(np.float64))
    assert "expected 10, got 11" in changed("seq_length", np.asarray(11))
    assert "causal mask" in changed("mask", np.ones((LENGTH, LENGTH), np.float32))
    assert "beta must" in changed("beta", np.asarray(1.0))
    (tmp_path / "out").mkdir()
    with pytest.raises(SystemExit):
        main([str(tmp_path / "out"), str(tmp_path / "other.eqx"), "--config", "nonsense"])
    assert "--config nonsense is for a file" in capsys.readouterr().err
    (tmp_path / "out").rmdir()
    pickled = io.BytesIO()
    np.save(pickled, np.asarray(print), allow_pickle=True)
    path.write_bytes(pickled.getvalue())
    assert "expected a number, got object" in refused(tmp_path, capsys, *arguments)
    path.write_bytes(whole[:100].replace(b"()", b"(9,)") + whole[100:])
    assert "seq_length" in refused(tmp_path, capsys, *arguments)

    write(path, tree)
    assert "--config must tell" in refused(tmp_path, capsys)
    assert "one of paper_wikitext103" in refused(tmp_path, capsys, "--config", "paper_wikitext")
    assert "seq_length: expected 448, got 10" in refused(tmp_path, capsys, "--config", "paper_wikitext103")


def test_a_network_without_its_statistics_is_refused(tmp_path):
    tree = multiscale_tree(3)
    write(tmp_path / "model.eqx", dict(list(tree.items())[:-9]))
    with pytest.raises(ValueError, match=r"leaf 41 of 49, \[1\]\[0\]: the file ends here.*\(model, state\)"):
        from_equinox(tmp_path / "model.eqx", config_of("multiscale"))
    write(tmp_path / "model.eqx", {**tree, "1.beta": np.asarray(0.5)})
    with pytest.raises(ValueError, match=r"several values of beta \(\[0.8, 0.5\]\)"):
        from_equinox(tmp_path / "model.eqx", config_of("multiscale"))


def test_models_the_authors_do_not_have_are_refused(tmp_path):
    modern = RevDEQForCausalLM(RevDEQConfig(vocab_size=8, hidden_size=16, intermediate_size=16, num_attention_heads=2))
    with pytest.raises(ValueError, match="block_type='modern' instead of 'paper'"):
        to_equinox(modern, tmp_path / "file.eqx")
    with pytest.raises(ValueError, match="num_coda_layers=1 instead of 0, norm_eps=1e-06 instead of 1e-05"):
        leaves(RevDEQConfig.paper_wikitext103(num_coda_layers=1, norm_eps=1e-6))
    with pytest.raises(ValueError, match="block_type='modern' instead of 'paper', stem_stride=2 instead of 1"):
        leaves(RevDEQVisionConfig.paper_cifar10_multiscale(block_type="modern", stem_stride=2))
    for setting, value in (("damping", 0.5), ("initial_scale", 1.0), ("num_restarts", 3)):
        with pytest.raises(ValueError, match=f"{setting}={value} instead of {1 if setting == 'num_restarts' else 0}"):
            leaves(RevDEQVisionConfig.paper_cifar10_multiscale(**{"initial_scale": 1.0, setting: value}))
    with pytest.raises(ValueError, match=r"damping=0\.5 instead of 0"):
        leaves(RevDEQConfig.paper_wikitext103(damping=0.5))
    with pytest.raises(ValueError, match="pool_size=2 instead of 4"):
        leaves(RevDEQVisionConfig.paper_cifar10_singlescale(pool_size=2))
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_leaves_nothing(tmp_path, monkeypatch):
    model, room = RevDEQForImageClassification(RevDEQVisionConfig.paper_cifar10_singlescale()), iter(range(3))

    def save(stream, value, **kwargs):
        if next(room, None) is None:
            raise OSError(28, "No space left on device")
        stream.write(value.tobytes())

    monkeypatch.setattr(np, "save", save)
    with pytest.raises(OSError, match="No space left"):
        to_equinox(model, tmp_path / "file.eqx")
    assert list(tmp_path.iterdir()) == []


def test_what_exists_is_kept(tmp_path, capsys):
    write(tmp_path / "file.eqx", language_tree())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("kept")
    assert "exists and is not an empty folder" in refused(tmp_path, capsys, "--config", "paper_wikitext103")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]
    model = from_equinox(tmp_path / "file.eqx", config_of("language"))
    with pytest.raises(FileExistsError, match="nothing was written"):
        to_equinox(model, tmp_path / "file.eqx")


def test_a_folder_that_lacks_weights_is_not_written_with_random_ones(tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    write(tmp_path / "file.eqx", language_tree())
    model = from_equinox(tmp_path / "file.eqx", config_of("language"))
    model.save_pretrained(tmp_path / "model")
    state = load_file(tmp_path / "model" / "model.safetensors")
    del state["model.embed_positions.weight"]
    save_file(state, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SystemExit):
        main([str(tmp_path / "model"), str(tmp_path / "back.eqx")])
    assert "lacks weights of its model (RevDEQForCausalLM): model.embed_positions.weight" in capsys.readouterr().err
    assert not (tmp_path / "back.eqx").exists()


# The same with Equinox itself: its layers in the order that the authors' classes hold them, with forward passes of our own.
EQUINOX = """
import sys
from pathlib import Path
import jax
jax.config.update("jax_enable_x64", True)
import equinox as eqx, jax.numpy as jnp, jax.random as jr, numpy as np
nn, f32, f64 = eqx.nn, jnp.float32, jnp.float64
keys = iter(jr.split(jr.PRNGKey(0), 99))
linear = lambda i, o, **kw: nn.Linear(i, o, key=next(keys), dtype=f32, **kw)
conv = lambda i, o, size=3, **kw: nn.Conv2d(i, o, size, use_bias=False, key=next(keys), dtype=f32, **kw)
each = eqx.filter_vmap

class Solver(eqx.Module):
    beta: float

class Fixed(eqx.Module):
    function: eqx.Module
    solver: Solver
    tol: float
    max_steps: int
    def __call__(self, x):
        beta, f = self.solver.beta, lambda z: self.function(z.astype(f32), x).astype(f64)
        def step(_, pair):
            y = (1 - beta) * pair[0] + beta * f(pair[1])
            return y, (1 - beta) * pair[1] + beta * f(y)
        zeros = jnp.zeros_like(x, dtype=f64)
        return jax.lax.fori_loop(0, self.max_steps, step, (zeros, zeros))[1].astype(f32)

class Regularised(Fixed):
    reg: bool = False

class Attention(eqx.Module):
    W_q: nn.Linear
    W_k: nn.Linear
    W_v: nn.Linear
    attention: nn.MultiheadAttention
    mask: jax.Array

class Block(eqx.Module):
    norm1: nn.LayerNorm
    norm2: nn.LayerNorm
    attention: Attention
    mlp: nn.MLP
    def __call__(self, z, x):
        a, h = self.attention, each(self.norm1)(z + x)
        z = z + a.attention(each(a.W_q)(h), each(a.W_k)(h), each(a.W_v)(h), mask=a.mask)
        return z + each(self.mlp)(each(self.norm2)(z))

class Language(eqx.Module):
    seq_length: int
    pos_emb: nn.Embedding
    tok_emb: nn.Embedding
    deq: Fixed
    norm: nn.LayerNorm
    head: nn.Linear
    def __call__(self, ids):
        return each(self.head)(self.deq(self.pos_emb.weight + self.tok_emb.weight[ids]))

class Residual(eqx.Module):
    conv1: nn.Conv2d
    conv2: nn.Conv2d
    norm1: nn.GroupNorm
    norm2: nn.GroupNorm
    norm3: nn.GroupNorm
    def __call__(self, z, x):
        inner = self.norm2(x + self.conv2(jax.nn.relu(self.norm1(self.conv1(z)))))
        return self.norm3(jax.nn.relu(z + inner))

def normed(norm, x, state):
    x, state = norm(x, state)
    return x.astype(f32), state  # under jit its inference is in float64

class Down(eqx.Module):
    conv1: nn.Conv2d
    conv2: nn.Conv2d
    norm1: nn.BatchNorm
    norm2: nn.BatchNorm
    residual_conv: nn.Conv2d
    def __call__(self, x, state):
        h, state = normed(self.norm1, x, state)
        h, state = normed(self.norm2, self.conv1(jax.nn.relu(h)), state)
        return self.residual_conv(x) + self.conv2(jax.nn.relu(h)), state

batch_norm = lambda n: nn.BatchNorm(n, axis_name="batch", mode="batch", dtype=f32)
group_norm = lambda n: nn.GroupNorm(n // 16, n, dtype=f32)

def stage(n, ratio):
    block = Residual(conv(n, ratio * n, padding=1), conv(ratio * n, n, padding=1), group_norm(ratio * n), group_norm(n), group_norm(n))
    return Regularised(block, Solver(0.8), 1e-6, 3)

class Image(eqx.Module):
    encoder_conv: nn.Conv2d
    encoder_norm: nn.BatchNorm
    deq_layers: list
    down_layers: list
    pool: nn.AvgPool2d
    final_linear: nn.Linear
    def __init__(self):
        self.encoder_conv, self.encoder_norm = conv(3, 16, padding=1), batch_norm(16)
        self.deq_layers = [stage(16, 1), stage(32, 2)]
        self.down_layers = [Down(conv(16, 32, stride=2, padding=1), conv(32, 32, padding=1), batch_norm(16), batch_norm(32), conv(16, 32, 1, stride=2))]
        self.pool, self.final_linear = nn.AvgPool2d(4, 4), linear(32, 7)
    def __call__(self, x, state):
        x, state = normed(self.encoder_norm, self.encoder_conv(x), state)
        x = jax.nn.relu(x)
        x, state = self.down_layers[0](x + self.deq_layers[0](x), state)
        x = x + self.deq_layers[1](x)
        return self.final_linear(self.pool(x).ravel()), state

def noisy(tree):
    arrays, rest = eqx.partition(tree, lambda leaf: eqx.is_inexact_array(leaf) and leaf.shape != (10, 10))
    return eqx.combine(jax.tree_util.tree_map(lambda leaf: leaf + 0.1 * jr.normal(next(keys), leaf.shape, leaf.dtype), arrays), rest)

w, length, vocabulary = 16, 10, 29
heads, mask = nn.MultiheadAttention(2, w, key=next(keys), dtype=f32), jnp.tril(jnp.ones((length, length), f32))
attention = Attention(linear(w, w), linear(w, w), linear(w, w), heads, mask)
norm = lambda: nn.LayerNorm(w, dtype=f32)
block = Block(norm(), norm(), attention, nn.MLP(w, w, 40, depth=2, activation=jax.nn.gelu, key=next(keys), dtype=f32))
embedding = lambda n: nn.Embedding(n, w, key=next(keys), dtype=f32)
language = noisy(Language(length, embedding(length), embedding(vocabulary), Fixed(block, Solver(0.5), 0.0, 3), norm(), linear(w, vocabulary, use_bias=False)))
image, state = nn.make_with_state(Image)()
image = noisy(image)
run = eqx.filter_jit(lambda model, state, x: each(model, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(x, state))
for number in range(4):
    _, state = run(image, state, 1 + 2 * jr.normal(next(keys), (4, 3, 8, 8), f32))

folder, back = Path(sys.argv[1]), sys.argv[2] == "back"
for name, tree, call in (
    ("language", language, eqx.filter_jit(lambda tree, x: each(tree)(x))),
    ("multiscale", (image, state), lambda tree, x: run(nn.inference_mode(tree[0]), tree[1], x)[0]),
):
    inputs = jnp.asarray(np.load(folder / f"{name}_inputs.npy"))
    if back:
        tree = eqx.tree_deserialise_leaves(folder / f"{name}_back.eqx", tree)
    else:
        eqx.tree_serialise_leaves(folder / f"{name}.eqx", tree)
    np.save(folder / f"{name}_{sys.argv[2]}.npy", call(tree, inputs))
"""


@pytest.mark.slow
@torch.no_grad()
def test_files_of_equinox_itself(tmp_path):
    python = os.environ.get("REVDEQ_JAX_PYTHON") or (sys.executable if importlib.util.find_spec("equinox") else None)
    if python is None:
        pytest.skip("needs Equinox, which is no dependency: set REVDEQ_JAX_PYTHON to a Python that has jax and equinox")

    def equinox(direction: str) -> None:
        command = [python, "-c", EQUINOX, str(tmp_path), direction]
        done = subprocess.run(command, env={**os.environ, "JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    inputs = {"language": torch.randint(0, VOCABULARY, (2, LENGTH)), "multiscale": torch.randn(2, 3, 8, 8)}
    for kind, values in inputs.items():
        np.save(tmp_path / f"{kind}_inputs.npy", values.numpy())
    equinox("out")
    for kind, values in inputs.items():
        model = from_equinox(tmp_path / f"{kind}.eqx", config_of(kind))
        torch.testing.assert_close(model(values).logits, torch.from_numpy(np.load(tmp_path / f"{kind}_out.npy")), rtol=0, atol=1e-5)
        to_equinox(model, tmp_path / f"{kind}_back.eqx")
    equinox("back")
    for kind in inputs:
        np.testing.assert_allclose(np.load(tmp_path / f"{kind}_back.npy"), np.load(tmp_path / f"{kind}_out.npy"), rtol=0, atol=1e-5)
