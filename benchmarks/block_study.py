"""Which block should the language model iterate? Variants of f(z, x), trained on the same tokens, judged at fewer and more steps than in training.

Every variant has the parameters of one ordinary transformer layer (the MLP's hidden width makes up for what else it has), sees the same sequences in
the same order, and is trained through `ReversibleFixedPoint` at N steps. Its validation loss is then taken at N/2, N, 2N and 4N steps. A row is kept
per finished run; runs that have a row are skipped, so the command can be stopped and started again.

    python benchmarks/block_study.py                               # all variants, then the finalists for longer (about three hours on one core)
    python benchmarks/block_study.py --variants paper --updates 100 --rate 2e-3
    python benchmarks/block_study.py --table                       # the rows kept so far, as Markdown
"""

import argparse
import gzip
import random
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from common import fit, keep, kept
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from torch.nn import functional

from revdeq_hf import Diagnosis, RevDEQConfig, ReversibleFixedPoint, diagnose
from revdeq_hf.block_revdeq import RevDEQAttention, RevDEQGatedMLP
from revdeq_hf.modeling_revdeq import RevDEQRotaryEmbedding

WIDTH, HEADS, STEPS, BETA, HIDDEN = 128, 4, 4, 0.5, 384
SEQUENCE, VOCABULARY = 128, 2048
VALIDATION_TOKENS = 65_536
FAN_IN = "fan_in"


@dataclass(frozen=True)
class Variant:
    """One block. The defaults are those of the package before this study; what it has now is
    "u skip, output norm, state norm, fan-in, outputs a tenth".

    Attributes:
        inject: what the first layer's norm sees: "add", z + x; "gain", g z + x with a gain per channel; "mix", W[z; x]; "state_norm", norm(z) + x;
            "norms", norm(z) + norm(x).
        skip: where the identity path comes from: "x", "z", "u" (what was injected), "none", or "between", a z + (1 - a) x with a in (0, `a_max`).
        mlp_sees: what is added to the input of the MLP's norm: "" (nothing), "x" or "z".
        init: standard deviation of the block's matrices; "fan_in": 1 / sqrt(inputs).
        out_scale: factor on the initial attention output and MLP output matrices.
        gain: initial gain of the sandwich norms and of g.
        embed: standard deviation of the embeddings.
        x_norm: whether x is RMS-normalised.
        sampled: least and most steps, drawn for every batch; None: N.
        explicit: depth of an ordinary transformer without a loop; 0: a loop.
    """

    inject: str = "add"
    skip: str = "x"
    sandwich: bool = False
    out_norm: bool = True
    qk_norm: bool = False
    mlp_sees: str = ""
    a_max: float = 0.9
    init: float | str = 0.02
    out_scale: float = 1.0
    gain: float = 1.0
    embed: float = 0.02
    x_norm: bool = True
    layers: int = 1
    sampled: tuple[int, int] | None = None
    explicit: int = 0

    def settings(self) -> str:
        """What differs from the defaults."""
        return " ".join(f"{f.name}={getattr(self, f.name)}".replace(" ", "") for f in fields(self) if getattr(self, f.name) != f.default)


ZERO: dict[str, Any] = dict(init=FAN_IN, out_scale=0.0)  # fan-in, and each branch starts at zero

VARIANTS: dict[str, Variant] = {
    "explicit": Variant(explicit=1),
    "explicit, fan-in": Variant(explicit=1, init=FAN_IN),
    "explicit, zero outputs": Variant(explicit=1, **ZERO),
    "explicit, zero outputs, qk norm": Variant(explicit=1, qk_norm=True, **ZERO),
    "explicit 8": Variant(explicit=8),
    "paper": Variant(skip="z", out_norm=False, embed=1.0, x_norm=False),
    "x skip": Variant(out_norm=False),
    "x skip, output norm": Variant(),
    "x skip, output norm, fan-in": Variant(init=FAN_IN),
    "x skip, output norm, zero outputs": Variant(**ZERO),
    "x skip, zero outputs": Variant(out_norm=False, **ZERO),
    "x skip, output norm, zero outputs, embeddings 1": Variant(embed=1.0, **ZERO),
    "x skip, output norm, zero outputs, z in MLP": Variant(mlp_sees="z", **ZERO),
    "x skip, output norm, zero outputs, qk norm": Variant(qk_norm=True, **ZERO),
    "x skip, output norm, zero outputs, two layers": Variant(layers=2, **ZERO),
    "x skip, output norm, zero outputs, gain": Variant(inject="gain", **ZERO),
    "x skip, output norm, zero outputs, norms": Variant(inject="norms", **ZERO),
    "x skip, output norm, norms": Variant(inject="norms"),
    "x skip, output norm, zero outputs, mix": Variant(inject="mix", **ZERO),
    "x skip, zero outputs, norms": Variant(out_norm=False, inject="norms", **ZERO),
    "x skip, output norm, zero outputs, norms, half": Variant(inject="norms", gain=0.5, **ZERO),
    "x skip, output norm, zero outputs, norms, sampled": Variant(inject="norms", sampled=(2, 8), **ZERO),
    "u skip, output norm, zero outputs, norms": Variant(skip="u", inject="norms", **ZERO),
    "u skip, output norm, zero outputs, state norm": Variant(skip="u", inject="state_norm", **ZERO),
    "u skip, output norm, state norm": Variant(skip="u", inject="state_norm"),
    "u skip, output norm, state norm, fan-in, outputs a tenth": Variant(skip="u", inject="state_norm", init=FAN_IN, out_scale=0.1),
    "u skip, output norm, state norm, 0.02, zero outputs": Variant(skip="u", inject="state_norm", out_scale=0.0),
    "u skip, output norm, zero outputs, state norm, sampled": Variant(skip="u", inject="state_norm", sampled=(2, 8), **ZERO),
    "u skip, output norm, zero outputs, state norm, two layers": Variant(skip="u", inject="state_norm", layers=2, **ZERO),
    "u skip, zero outputs, state norm": Variant(skip="u", inject="state_norm", out_norm=False, **ZERO),
    "x skip, output norm, sandwich, mix": Variant(inject="mix", sandwich=True),
    "x skip, output norm, sandwich, mix, fan-in": Variant(inject="mix", sandwich=True, init=FAN_IN),
    "u skip, output norm": Variant(skip="u"),
    "u skip, output norm, zero outputs": Variant(skip="u", **ZERO),
    "u skip, output norm, zero outputs, x in MLP": Variant(skip="u", mlp_sees="x", **ZERO),
    "between, output norm, zero outputs": Variant(skip="between", **ZERO),
    "x skip, output norm, zero outputs, sampled": Variant(sampled=(2, 8), **ZERO),
}

FINALISTS = ("explicit", "u skip, output norm, state norm, fan-in, outputs a tenth", "x skip, output norm, zero outputs, norms", "x skip")


class HeadNorm(nn.Module):
    """RMS norm of each head, for queries and keys."""

    def __init__(self, head_dim: int, eps: float) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(head_dim, eps=eps)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.norm(states.unflatten(-1, (-1, *self.norm.normalized_shape))).flatten(-2)


class StudyLayer(nn.Module):
    """A transformer layer, `h = skip + A(norm(u)); h + M(norm(h + more))`."""

    def __init__(self, config: RevDEQConfig, variant: Variant, index: int) -> None:
        super().__init__()

        def norm(there: bool = True) -> nn.Module:
            return nn.RMSNorm(config.hidden_size, eps=config.norm_eps) if there else nn.Identity()

        self.attention_norm, self.mlp_norm = norm(), norm()
        self.attention = RevDEQAttention(config, index)
        self.mlp = RevDEQGatedMLP(config)
        self.after_attention, self.after_mlp = norm(variant.sandwich), norm(variant.sandwich)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                std = module.in_features**-0.5 if variant.init == FAN_IN else float(variant.init)
                scale = variant.out_scale if module in (self.attention.o_proj, self.mlp.down_proj) else 1.0
                nn.init.normal_(module.weight, std=std * scale)
        if variant.sandwich:
            nn.init.constant_(self.after_attention.weight, variant.gain)  # type: ignore[arg-type]
            nn.init.constant_(self.after_mlp.weight, variant.gain)  # type: ignore[arg-type]
        if variant.qk_norm:
            projections: Any = self.attention
            projections.q_proj = nn.Sequential(projections.q_proj, HeadNorm(config.head_dim, config.norm_eps))
            projections.k_proj = nn.Sequential(projections.k_proj, HeadNorm(config.head_dim, config.norm_eps))

    def forward(self, u: torch.Tensor, skip: torch.Tensor, more: torch.Tensor | None = None, **attention) -> torch.Tensor:
        h = skip + self.after_attention(self.attention(self.attention_norm(u), **attention)[0])
        return h + self.after_mlp(self.mlp(self.mlp_norm(h if more is None else h + more)))


class StudyBlock(nn.Module):
    """f(z, x) of a variant."""

    def __init__(self, config: RevDEQConfig, variant: Variant) -> None:
        super().__init__()
        self.variant, width = variant, config.hidden_size
        self.layers = nn.ModuleList(StudyLayer(config, variant, index) for index in range(variant.layers))
        self.norm = nn.RMSNorm(width, eps=config.norm_eps) if variant.out_norm else nn.Identity()
        if variant.inject == "mix":
            self.mix = nn.Linear(2 * width, width, bias=False)
            nn.init.normal_(self.mix.weight, std=(2 * width) ** -0.5 if variant.init == FAN_IN else float(variant.init))
        elif variant.inject == "gain":
            self.gain = nn.Parameter(torch.full((width,), variant.gain))
        elif variant.inject in ("norms", "state_norm"):
            self.z_norm = nn.RMSNorm(width, eps=config.norm_eps)
            self.x_norm = nn.RMSNorm(width, eps=config.norm_eps) if variant.inject == "norms" else nn.Identity()
            nn.init.constant_(self.z_norm.weight, variant.gain)
        if variant.skip == "between":
            self.between = nn.Parameter(torch.zeros(width))

    def forward(self, z: torch.Tensor, x: torch.Tensor, **attention) -> torch.Tensor:
        match self.variant.inject:
            case "mix":
                u = self.mix(torch.cat((z, x), dim=-1))
            case "gain":
                u = self.gain * z + x
            case "norms" | "state_norm":
                u = self.z_norm(z) + self.x_norm(x)
            case _:
                u = z + x
        match self.variant.skip:
            case "x":
                h = x
            case "z":
                h = z
            case "u":
                h = u
            case "none":
                h = torch.zeros_like(z)
            case _:
                h = x + self.variant.a_max * torch.sigmoid(self.between) * (z - x)
        more = {"": None, "x": x, "z": z}[self.variant.mlp_sees]
        for index, layer in enumerate(self.layers):
            h = layer(h if index else u, h, more, **attention)
        return self.norm(h)


class StudyModel(nn.Module):
    """Embeddings, a variant's loop (or ordinary layers), a norm and an untied head."""

    def __init__(self, variant: Variant, hidden: int, vocabulary: int) -> None:
        super().__init__()
        config = RevDEQConfig(
            vocab_size=vocabulary,
            hidden_size=WIDTH,
            intermediate_size=hidden,
            num_attention_heads=HEADS,
            max_steps=STEPS,
            max_position_embeddings=SEQUENCE,
            attn_implementation="sdpa",
        )
        self.variant = variant
        self.embed = nn.Embedding(vocabulary, WIDTH)
        self.input_norm = nn.RMSNorm(WIDTH, eps=config.norm_eps) if variant.x_norm else nn.Identity()
        self.rotary = RevDEQRotaryEmbedding(config)
        self.layers = nn.ModuleList(StudyLayer(config, variant, index) for index in range(variant.explicit))
        # all is stored: the same gradients as by reversal, bit for bit, and the fastest at this size
        self.solve = None if variant.explicit else ReversibleFixedPoint(StudyBlock(config, variant), BETA, STEPS, gradient="backprop")
        self.norm = nn.RMSNorm(WIDTH, eps=config.norm_eps)
        self.head = nn.Linear(WIDTH, vocabulary, bias=False)
        nn.init.normal_(self.embed.weight, std=variant.embed)
        nn.init.normal_(self.head.weight, std=0.02)

    def parameters_without_embeddings(self) -> int:
        return sum(p.numel() for p in self.parameters()) - self.embed.weight.numel() - self.head.weight.numel()

    def forward(self, ids: torch.Tensor, **solver) -> tuple[torch.Tensor, Any]:
        """ids (batch, seq); returns the hidden states (batch, seq, width) and the solution, None without a loop."""
        h = self.input_norm(self.embed(ids))
        attention = dict(position_embeddings=self.rotary(h, torch.arange(ids.shape[1])[None]))
        if self.solve is not None:
            solution = self.solve(h, **solver, **attention)
            return solution.z, solution
        for layer in self.layers:
            h = layer(h, h, **attention)
        return h, None

    def loss(self, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(self.head(self.norm(hidden)).flatten(0, 1), labels.flatten())


def build(variant: Variant, vocabulary: int, seed: int) -> tuple[StudyModel, int]:
    """The model, its MLP as wide as brings it to the parameters of one ordinary layer, and that width. Explicit layers are all ordinary."""
    if not variant.explicit:
        target = StudyModel(Variant(explicit=1), HIDDEN, 8).parameters_without_embeddings()
        hidden = HIDDEN + round((target - StudyModel(variant, HIDDEN, 8).parameters_without_embeddings()) / (3 * WIDTH * variant.layers))
    else:
        hidden = HIDDEN
    torch.manual_seed(seed)
    return StudyModel(variant, hidden, vocabulary), hidden


def read(options: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids of the training and of the validation text, under a byte-level BPE made from the former."""
    paths = [options.train_file, options.validation_file]
    if paths == [None, None]:
        paths = [options.data / f"wiki.{split}.tokens.gz" for split in ("train", "valid")]
    texts = []
    for path in paths:
        if path is None or not path.is_file():
            raise SystemExit(
                f"there is no text {path}; name a folder with WikiText-2's files as --data, or give --train_file and --validation_file"
            )
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8", newline="") as file:
            texts.append(file.read())
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(texts[0].splitlines(keepends=True), trainer)
    lines = [tokenizer.encode_batch_fast(text.splitlines(keepends=True)) for text in texts]
    train, validation = (torch.tensor([token for line in part for token in line.ids]) for part in lines)
    if len(train) <= SEQUENCE or len(validation) <= SEQUENCE:
        raise SystemExit(f"each text must have more than {SEQUENCE} tokens, got {len(train)} and {len(validation)}")
    return train, validation


def sequences(ids: torch.Tensor) -> torch.Tensor:
    """(number, SEQUENCE + 1): each begins with the last token of the one before."""
    return ids[: (len(ids) - 1) // SEQUENCE * SEQUENCE + 1].unfold(0, SEQUENCE + 1, SEQUENCE)


def batches(ids: torch.Tensor, batch: int, seed: int) -> Iterator[torch.Tensor]:
    """Shuffled batches without end."""
    rows, generator = sequences(ids), torch.Generator().manual_seed(seed)
    while True:
        yield from (rows[index] for index in torch.randperm(len(rows), generator=generator).split(batch) if len(index) == batch)


@torch.no_grad()
def evaluate(model: StudyModel, ids: torch.Tensor) -> dict[str, Any]:
    """Losses at N/2, N, 2N and 4N steps, from one solve of 4N; mean residual at N and 4N; greatest value of the state and clamped evaluations."""
    model.eval()
    losses: dict[int, float] = dict.fromkeys([STEPS // 2, STEPS, 2 * STEPS, 4 * STEPS], 0.0)
    residual, last_residual, largest, clamped = 0.0, 0.0, 0.0, 0
    parts = sequences(ids[: VALIDATION_TOKENS + 1]).split(16)
    count = sum(len(part) for part in parts)
    for part in parts:
        inputs, labels = part[:, :-1], part[:, 1:]
        hidden, solution = model(inputs, **({} if model.solve is None else dict(max_steps=4 * STEPS, output_trajectory=True)))
        if solution is None:
            losses[STEPS] += model.loss(hidden, labels).item() * len(part) / count
            continue
        for steps in losses:
            losses[steps] += model.loss(solution.trajectory[steps - 1], labels).item() * len(part) / count
        residual += solution.step_residuals[STEPS].sum().item() / count
        last_residual += solution.step_residuals[-1].sum().item() / count
        largest, clamped = max(largest, hidden.abs().max().item()), clamped + int(solution.clamped.sum())
    looped = model.solve is not None
    names = ("loss_half", "loss", "loss_double", "loss_quadruple")
    found: dict[str, Any] = {
        name: round(value, 4) if looped or name == "loss" else "" for name, value in zip(names, losses.values(), strict=True)
    }
    figures = {
        "residual": round(residual, 4),
        "residual_quadruple": round(last_residual, 6),
        "state_max": round(largest, 2),
        "clamped": clamped,
    }
    return {**found, **(figures if looped else dict.fromkeys(figures, ""))}


def look(model: StudyModel, rows: torch.Tensor) -> dict[str, Any]:
    """Spectral radius where a solve of 4N steps ends, greatest of some sequences, and drift of its reversible backward pass; empty without a loop."""
    if model.solve is None:
        return {"spectral_radius": "", "drift": ""}
    model.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a radius above 1 need not converge
        looks = diagnose(model, rows[:8, :-1], max_steps=4 * STEPS, gradient="reversible")
    found = cast(dict[str, Diagnosis], looks)["solve"]
    return {"spectral_radius": round(found.spectral_radius.max().item(), 3), "drift": found.drift}


class Run(NamedTuple):
    """Under which conditions a variant is trained; the columns that tell whether it has a row."""

    text: str
    variant: str
    rate: float
    seed: int
    updates: int
    tokens: int


def train(run: Run, train_ids: torch.Tensor, validation_ids: torch.Tensor) -> dict[str, Any]:
    """One run; returns its row."""
    variant = VARIANTS[run.variant]
    model, hidden = build(variant, VOCABULARY, run.seed)
    draw = random.Random(run.seed)
    source = batches(train_ids, run.tokens // run.updates // SEQUENCE, run.seed)

    def next_loss() -> torch.Tensor:
        rows = next(source)
        solver = {} if variant.sampled is None else dict(max_steps=draw.randint(*variant.sampled))
        states, _ = model(rows[:, :-1], **solver)
        return model.loss(states, rows[:, 1:])

    loss, seconds = fit(run.variant, model, next_loss, run.updates, run.rate, weight_decay=0.1, warm_up=max(1, run.updates // 20))
    return {
        "text": run.text,
        "variant": run.variant,
        "settings": variant.settings(),
        "parameters": model.parameters_without_embeddings(),
        "mlp_width": hidden,
        "rate": run.rate,
        "seed": run.seed,
        "updates": run.updates,
        "tokens": run.tokens,
        "train_loss": loss,
        **evaluate(model, validation_ids),
        **look(model, sequences(validation_ids)),
        "seconds": seconds,
    }


def finished() -> set[tuple[str, ...]]:
    return {tuple(row[column] for column in Run._fields) for row in kept("block_study")}


def table() -> None:
    """Prints the rows of each text as Markdown, those of the most updates first, then by rate and loss."""
    columns = dict(loss_half=3, loss=3, loss_double=3, loss_quadruple=3, residual=3, residual_quadruple=4, spectral_radius=2)
    rows = sorted(kept("block_study"), key=lambda row: (-int(row["updates"]), float(row["rate"]), float(row["loss"])))
    for text in dict.fromkeys(row["text"] for row in kept("block_study")):
        print(f"\n{text}\n\n| variant | rate | updates | N/2 | N | 2N | 4N | residual at N | at 4N | radius |\n|{'---|' * 10}")
        for row in rows:
            if row["text"] == text:
                figures = (f"{float(row[column]):.{digits}f}" if row[column] else "" for column, digits in columns.items())
                print(f"| {row['variant']} | {row['rate']} | {row['updates']} | {' | '.join(figures)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    data = Path(__file__).resolve().parents[1].parent / "shared" / "data" / "wikitext-2"
    parser.add_argument("--data", type=Path, default=data, help="folder of wiki.train.tokens.gz and wiki.valid.tokens.gz")
    parser.add_argument("--train_file", type=Path, help="another training text, .gz or plain")
    parser.add_argument("--validation_file", type=Path, help="its validation text")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), metavar="NAME", help="only these, for --updates")
    parser.add_argument("--updates", type=int, default=300, help="updates for every variant")
    parser.add_argument("--final_updates", type=int, default=1200, help="updates for the finalists")
    parser.add_argument("--batch", type=int, default=16, help=f"sequences of {SEQUENCE} tokens in an update")
    parser.add_argument("--rate", type=float, default=4e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--list", action="store_true", help="print the variants and stop")
    parser.add_argument("--table", action="store_true", help="print the rows kept so far and stop")
    options = parser.parse_args()
    if options.table:
        table()
        return
    if options.list:
        for name, variant in VARIANTS.items():
            print(f"{name}: {variant.settings() or 'the defaults'}")
        return
    torch.set_num_threads(1)
    text = options.train_file.stem if options.train_file else "wikitext-2"
    wanted = [(name, options.updates) for name in options.variants or VARIANTS]
    if options.variants is None:
        wanted += [(name, options.final_updates) for name in FINALISTS]
    ids: tuple[torch.Tensor, torch.Tensor] | None = None
    for name, updates in wanted:
        run = Run(text, name, options.rate, options.seed, updates, updates * options.batch * SEQUENCE)
        if tuple(map(str, run)) in finished():
            print(f"{run}: has a row")
            continue
        ids = ids or read(options)
        row = train(run, *ids)
        print(row, flush=True)
        keep("block_study", [row])


if __name__ == "__main__":
    main()
