#!/usr/bin/env python
"""Runs a recipe: the training script with the recipe's settings for every variant and seed, then the evaluation, and keeps a results file of each.

    python examples/reproduce.py --list
    python examples/reproduce.py lm_wikitext2_small                       # every variant and seed that has no results file yet
    python examples/reproduce.py lm_wikitext2_small --table               # what has been measured, as Markdown; --plot draws it
    python examples/reproduce.py image_cifar10_best --scale 0.01 --built_in_data   # a smoke run, without a network
    python examples/reproduce.py image_cifar10_small --train_dir cifar10/train --validation_dir cifar10/test

A recipe is a YAML file in `recipes/`: `script`, `arguments` that all variants share, `variants` with what differs. Flags that are not known here go to the
script and win over the recipe's; a source of data among them (--dataset_name, --train_file, --train_dir, ...) replaces the recipe's source. `--dry_run`
prints the commands, which can be run by themselves. On a CPU `bf16`, `torch_compile` and `compile_blocks` are left out. Models and logs go to `runs/recipes`,
results to `recipes/results/RECIPE/VARIANT-seedN.json`. An interrupted training goes on where its last checkpoint is.
"""

import argparse
import itertools
import json
import math
import re
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from revdeq_hf.checkpoints import last_whole_checkpoint

EXAMPLES = Path(__file__).resolve().parent
RECIPES = EXAMPLES / "recipes"
RESULTS = RECIPES / "results"
SOURCES = ("dataset_name", "dataset_config", *(f"{split}_{kind}" for split in ("train", "validation", "test") for kind in ("file", "dir")))
# flags of the training scripts' data that an evaluation needs too
MEASURED_DATA = (
    *SOURCES,
    "text_column",
    "documents",
    "max_eval_rows",
    "eval_split",
    "image_column",
    "label_column",
    "max_eval_images",
    "bad_images",
)
COLUMNS = ("text_column", "image_column", "label_column")
OF_THE_SOURCE = ("tokenizer_name", *COLUMNS)  # what makes no sense with built-in data
# left out on a CPU, where half precision is emulated and compiling takes longer than a smoke run
FOR_ACCELERATORS = ("bf16", "torch_compile", "compile_blocks")
OF_EXAMPLES = ("residuals", "right", "steps_taken", "difficulty")  # lists of think_longer.py with an entry for each problem
CURVE_POINTS = 40  # of the training loss that a results file keeps

Settings = dict[str, Any]


@dataclass(frozen=True)
class Recipe:
    """What a file in `recipes/` says.

    Attributes:
        title, about: what it is and what it is for.
        expected: the result, with its spread, or that there is none yet.
        hardware: on which it is meant to run, and how long.
        script: the training script, relative to this folder.
        arguments: flags of the script that all variants share. `max_steps` (updates) is among them, so that `--scale` can shrink it.
        variants: flags that differ, by the variant's name; None takes a shared flag away. `script` may be among them, and `after`, an earlier variant
            from whose model of the same seed this one goes on.
        evaluation: flags of evaluate.py; None: the script evaluates by itself.
        seeds: those to run.
        columns: of the table, by their heading: a path into a results file, such as `test.perplexity` or `peak_memory_bytes/1e6`, see `at`.
        search: values of flags that `--search` tries for every variant, with seed 0; the one of the least validation loss is written into `variants` by hand.
    """

    name: str
    title: str
    about: str
    expected: str
    hardware: str
    script: str
    arguments: Settings
    variants: dict[str, Settings]
    columns: dict[str, str]
    evaluation: Settings | None = field(default_factory=dict)
    seeds: list[int] = field(default_factory=lambda: [1])
    search: dict[str, list] = field(default_factory=dict)

    def settings(self, variant: str) -> tuple[str, Settings]:
        """Script and flags of a variant."""
        merged = without({**self.arguments, **self.variants[variant]}, ["after"])
        script = merged.pop("script", self.script)
        return script, {name: value for name, value in merged.items() if value is not None}


def names() -> list[str]:
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load(name: str) -> Recipe:
    """The recipe of this name.

    Raises:
        ValueError: there is none, or its file has other fields than a recipe.
    """
    path = RECIPES / f"{name}.yaml"
    if not path.is_file():
        raise ValueError(f"there is no recipe {name!r}; there are {', '.join(names())}")
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    fields = Recipe.__dataclass_fields__.keys() - {"name"}
    if unknown := content.keys() - fields:
        raise ValueError(f"{path}: {', '.join(sorted(unknown))} is no field of a recipe; there are {', '.join(sorted(fields))}")
    recipe = Recipe(name=name, **content)
    earlier: set[str] = set()
    for variant, differing in recipe.variants.items():
        after = differing.get("after")
        if after is not None and after not in earlier:
            raise ValueError(
                f"{path}: variant {variant!r} goes on from {after!r}, which is none of those before it: {', '.join(sorted(earlier))}"
            )
        earlier.add(variant)
    return recipe


# --- settings ---


def flags(settings: Mapping[str, Any]) -> list[str]:
    """Settings as a script's command line has them."""
    found = []
    for name, value in settings.items():
        values = value if isinstance(value, list) else [value]
        found += [f"--{name}", *(json.dumps(part) if isinstance(part, dict | bool) else str(part) for part in values)]
    return found


def given(arguments: Iterable[str]) -> Settings:
    """The settings of a command line `--name value ...`."""
    settings: Settings = {}
    name = None
    for part in arguments:
        if part.startswith("--"):
            name, _, value = part[2:].partition("=")
            settings[name] = [value] if value else []
        elif name is None:
            raise ValueError(f"flags begin with --, got {part!r}")
        else:
            settings[name].append(part)
    return settings


def without(settings: Settings, dropped: Iterable[str]) -> Settings:
    return {name: value for name, value in settings.items() if name not in dropped}


def shrunk(settings: Settings, scale: float) -> Settings:
    """Settings of a run that is `scale` times as long, on a network of about `scale` times as many parameters.

    Updates (those of the warm-up, too), sequences or images in a batch and rows to evaluate on are multiplied by `scale`, widths by its square root; each
    is rounded to what a network can have (whole heads of even size, groups of 16 channels) and is never less than what a run needs. Rates, schedules, steps of
    the solver and everything else stay.
    """
    if not 0 < scale <= 1:
        raise ValueError(f"--scale must lie in (0, 1], got {scale}")
    if scale == 1:
        return settings

    if "problem" in settings:
        from think_longer import PROBLEMS

        settings = PROBLEMS[settings["problem"]].flags | settings  # which the recipe leaves as they are
    root, images, heads = math.sqrt(scale), "hidden_sizes" in settings, settings.get("num_attention_heads", 4)
    least = {"max_steps": 4, "warmup_steps": 0, "per_device_train_batch_size": 8 if images else 1}
    least |= dict.fromkeys(("save_steps", "eval_steps", "logging_steps"), 1)
    least |= dict.fromkeys(("max_eval_rows", "max_eval_images", "test_count", "curve_count"), 16)
    multiples = {"hidden_size": 2 * heads, "intermediate_size": 16, "hidden_sizes": 16}
    small = dict(settings)
    for name, value in settings.items():
        if name in least and value >= 1:
            small[name] = max(least[name], round(scale * value))
        elif name in multiples:
            widths = [rounded(root * width, multiples[name]) for width in (value if isinstance(value, list) else [value])]
            small[name] = widths if isinstance(value, list) else widths[0]
    few = {} if "problem" in settings else {"max_eval_images": 200} if images else {"max_eval_rows": 16}
    return {**few, **small}


def rounded(value: float, multiple: int) -> int:
    return max(1, round(value / multiple)) * multiple


# --- runs ---


@dataclass(frozen=True)
class Run:
    """One training of a recipe: its commands, its folder and its results file."""

    recipe: Recipe
    variant: str
    seed: int
    scale: float
    folder: Path
    results: Path
    more: Settings  # of the command line
    own_data: bool

    @property
    def before(self) -> "Run | None":
        """The run from whose model this one goes on."""
        variant = self.recipe.variants[self.variant].get("after")
        if variant is None:
            return None
        tag = run_tag(variant, self.seed)
        return replace(self, variant=variant, folder=self.folder.with_name(tag), results=self.results.with_name(f"{tag}.json"))

    @property
    def commands(self) -> list[list[str]]:
        script, settings = self.recipe.settings(self.variant)
        settings = shrunk(settings, self.scale)
        if self.own_data:
            settings = without(settings, (*SOURCES, *OF_THE_SOURCE))
        elif any(name in SOURCES for name in self.more):
            settings = without(settings, (*SOURCES, *COLUMNS))
        if not torch.accelerator.is_available():
            settings = without(settings, FOR_ACCELERATORS)
        if self.before:
            settings = without(settings, ["hidden_size"]) | {"model_name_or_path": str(self.before.folder)}
        settings = {**settings, **self.more, "seed": self.seed, "output_dir": str(self.folder)}
        found = [[str((EXAMPLES / script).resolve()), *flags(settings)]]
        if self.recipe.evaluation is not None:
            data = {name: value for name, value in settings.items() if name in MEASURED_DATA}
            found.append([str(EXAMPLES / "evaluate.py"), str(self.folder), *flags({**data, **self.recipe.evaluation})])
        return found

    def do(self) -> None:
        """Trains (on from the last checkpoint, if there is one), evaluates, writes the results file unless there is one. First comes the run before it.

        Raises:
            SystemExit: a command failed, or the folder holds a run with other settings.
        """
        if self.before and not self.before.trained:
            self.before.do()
        train, *evaluation = self.commands
        trained = self.trained
        if not trained and self.folder.is_dir() and last_whole_checkpoint(self.folder):
            train = [*train, "--resume_from_checkpoint", "true"]
        for command in ([] if trained else [train]) + evaluation:
            if command is not train and self.diverged:
                print(f"{self.folder}: the loss is not finite, so nothing is evaluated")
                break
            print("+", shown(command), flush=True)
            if code := subprocess.run([sys.executable, *command], check=False).returncode:
                raise SystemExit(f"that command failed ({code}); once its cause is mended, the same recipe goes on from here")
        if not self.results.exists():
            self.results.parent.mkdir(parents=True, exist_ok=True)
            self.results.write_text(readable(self.record()), encoding="utf-8")

    @property
    def trained(self) -> bool:
        """Whether its folder holds its model; SystemExit where it holds one of other settings."""
        finished = self.folder / "results.json"
        if not finished.exists():
            return False
        before = json.loads(finished.read_text(encoding="utf-8"))["run"]["command"]
        if before.removesuffix(" --resume_from_checkpoint true") != shown(self.commands[0]):
            raise SystemExit(
                f"{self.folder} holds a run of other settings; delete it or name another folder with --runs. It was\n  {before}"
            )
        return True

    @property
    def diverged(self) -> bool:
        found = json.loads((self.folder / "results.json").read_text(encoding="utf-8"))
        return not math.isfinite(found.get("validation_loss", found.get("loss", found.get("train_loss"))))

    def record(self) -> dict[str, Any]:
        """What the results file says."""

        def read(name: str) -> dict[str, Any]:
            path = self.folder / name
            return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

        found, measured, state = read("results.json"), read("evaluation.json"), read("trainer_state.json")
        losses = [[entry["step"], entry["loss"]] for entry in state.get("log_history", []) if "loss" in entry]
        keep = max(1, math.ceil(len(losses) / CURVE_POINTS))
        run = found.pop("run")
        run.pop("weights", None)
        protocol = measured.get("protocol", {})
        return compact(
            {
                "recipe": self.recipe.name,
                "variant": self.variant,
                "seed": self.seed,
                "scale": self.scale,
                "diverged": self.diverged,
                "command": run.pop("command"),
                **run,
                **{name: value for name, value in found.items() if name not in ("convergence", "stages")},
                "losses": losses[keep - 1 :: keep],
                "evaluation": {**measured.get("results", {}), **measured.get("solve", {})},
                "steps_curve": measured.get("steps_curve", []),
                "residual_per_step": measured.get("residual_per_step", {}),
                "protocol": {name: value for name, value in protocol.items() if not isinstance(value, dict)},
            }
        )


def readable(record: dict[str, Any]) -> str:
    """JSON whose lists of numbers take a line each."""
    text = json.dumps(record, indent=1)
    for _ in range(2):  # lists, then lists of these
        text = re.sub(r"\[\n((?:[^\[\]{}]|\[[^\[\]{}\n]*\])*?)\n *\]", lambda found: f"[{' '.join(found[1].split())}]", text)
    return text + "\n"


def compact(found: Any) -> Any:
    """Without the figures of single examples, floats with six digits, and None for what is not finite."""
    if isinstance(found, dict):
        return {name: compact(value) for name, value in found.items() if name not in OF_EXAMPLES}
    if isinstance(found, list):
        return [compact(value) for value in found]
    if isinstance(found, float):
        return float(f"{found:.6g}") if math.isfinite(found) else None
    return found


def shown(command: list[str]) -> str:
    script, *rest = command
    here = Path(script)
    root = EXAMPLES.parent
    return f"python {shlex.join([str(here.relative_to(root)) if here.is_relative_to(root) else script, *rest])}"


def run_tag(variant: str, seed: int) -> str:
    return f"{slug(variant)}-seed{seed}"


def slug(variant: str) -> str:
    return "".join(letter if letter.isalnum() or letter in ".-" else "_" for letter in variant.lower()).strip("_")


# --- what has been measured ---


def kept(recipe: Recipe, folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The results files by variant, in the recipe's order, by seed."""
    records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((folder / recipe.name).glob("*.json"))]
    found = {variant: [record for record in records if record["variant"] == variant] for variant in recipe.variants}
    return {variant: sorted(rows, key=lambda row: row["seed"]) for variant, rows in found.items() if rows}


def at(record: Any, path: str) -> Any:
    """What stands at a path `name.name`, or else at the next of several, `path|path`; None if nothing. Of rows the last whose first value is so named."""
    first, _, others = path.partition("|")
    found = record
    for name in first.split("."):
        if isinstance(found, list):
            found = next((row for row in reversed(found) if str(next(iter(row.values()))) == name), None)
        elif isinstance(found, dict):
            found = found.get(name)
    return at(record, others) if found is None and others else found


def measured(record: dict[str, Any], path: str) -> Any:
    """What stands at a path, in another unit for `path/1e6`."""
    path, _, unit = path.partition("/")
    value = at(record, path)
    return value / float(unit) if unit and value is not None else value


def summary(values: list[Any]) -> str:
    """Mean with four digits, and the sample standard deviation to the same place; nothing where nothing was measured."""
    numbers = [value for value in values if value is not None]
    if not numbers:
        return ""
    mean = statistics.mean(numbers)
    if len(set(numbers)) == 1 and float(mean).is_integer():
        return f"{int(mean):,}"
    places = max(0, 3 - math.floor(math.log10(abs(mean)))) if mean else 4
    if len(set(numbers)) == 1:
        return f"{mean:,.{places}f}"
    return f"{mean:,.{places}f} \u00b1 {statistics.stdev(numbers):,.{places}f}"


def table(recipe: Recipe, folder: Path, columns: list[str] | None = None) -> str:
    """Markdown: a row for each variant, mean and standard deviation over its seeds, and the commits that its runs were of.

    Of the recipe's columns all, or those named.
    """
    chosen = {name: recipe.columns[name] for name in columns or recipe.columns}
    lines = [f"| variant | {' | '.join(chosen)} | seeds | commit |", f"|{'---|' * (len(chosen) + 3)}"]
    for variant, records in kept(recipe, folder).items():
        cells = [summary([measured(record, path) for record in records]) for path in chosen.values()]
        diverged = sum(record.get("diverged", False) for record in records)
        named = f"{variant} (diverged in {diverged} of {len(records)})" if diverged else variant
        commits = dict.fromkeys(
            record.get("commit", "")[:7] + ("-dirty" if "dirty" in record.get("commit", "") else "") for record in records
        )
        lines.append(f"| {named} | {' | '.join(cells)} | {len(records)} | {', '.join(commits)} |")
    return "\n".join(lines)


def updated(text: str) -> str:
    """A page of Markdown with every table made anew from the results files: what stands between `<!-- table: RECIPE -->`, or
    `<!-- table: RECIPE (column; column) -->`, and `<!-- end -->`."""

    def block(found: re.Match) -> str:
        columns = found[3].split("; ") if found[3] else None
        return f"{found[1]}\n{table(load(found[2]), RESULTS, columns)}\n{found[4]}"

    return re.sub(r"(<!-- table: (\w+)(?: \((.*?)\))? -->)\n.*?(<!-- end -->)", block, text, flags=re.DOTALL)


def plot(recipe: Recipe, folder: Path, path: Path) -> None:
    """Quality over evaluations of the block (for think_longer.py: over the size), and the loss in training; bands from the least to the greatest seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.4), layout="constrained")
    quality, loss = figure.subplots(1, 2)

    def line(axes: Any, curves: list[list[Any]], **style: Any) -> None:
        if not all(curves):  # of a run that logged nothing
            return
        end = min(curve[-1][0] for curve in curves)
        x = [point for point, _ in curves[0] if point <= end]
        values = [np.interp(x, *np.transpose(curve)) for curve in curves]  # their points may lie elsewhere
        axes.plot(x, [statistics.mean(column) for column in zip(*values, strict=True)], **style)
        if len(curves) > 1:
            axes.fill_between(
                x, *([pick(column) for column in zip(*values, strict=True)] for pick in (min, max)), alpha=0.2, color=style["color"], lw=0
            )

    for number, (variant, every) in enumerate(kept(recipe, folder).items()):
        records = [record for record in every if not record.get("diverged")]
        if not records:
            continue
        label = variant if len(records) == len(every) else f"{variant} (without {len(every) - len(records)} that diverged)"
        style = {"color": f"C{number % 10}", "linestyle": ("-", "--", ":")[number // 10], "label": label}
        line(loss, [record["losses"] for record in records], **style)
        if "curve" in records[0]:  # of each size the most steps
            at_last = [{row["size"]: 100 * row["labels"] for row in record["curve"]} for record in records]
            line(quality, [list(sizes.items()) for sizes in at_last], marker="o", **style)
            quality.set(xlabel="size", ylabel="right labels (%)")
        elif records[0]["steps_curve"]:
            key = "accuracy" if "accuracy" in records[0]["steps_curve"][0] else "loss"
            curves = [
                [(2 * most(row["max_steps"]), row[key]) for row in record["steps_curve"] if row[key] is not None] for record in records
            ]
            line(quality, curves, marker="o", **style)
            quality.set(xlabel="evaluations of the block (of a stage)", ylabel=f"{key} on the test data")
        elif values := on_test_data(records, key := "accuracy") or on_test_data(records, key := "loss"):
            quality.axhline(statistics.mean(values), **style)
            quality.set(ylabel=f"{key} on the test data")
        else:
            print(f"{variant}: only its training is drawn, since no evaluation of it is kept")
    loss.set(xlabel="update", ylabel="loss in training", title="Training")
    quality.set(title=recipe.title)
    quality.set_xscale("log", base=2)
    quality.xaxis.set_major_formatter("{x:g}")
    if quality.lines:
        loss.legend(fontsize="small")
    for axes in (quality, loss):
        axes.grid(alpha=0.3, which="both")
        drawn = [value for drawn in axes.lines for value in drawn.get_ydata()]
        if drawn and axes.get_ylabel().startswith("loss") and max(drawn) > 5 * min(drawn) > 0:
            if min(drawn) < 1:
                axes.set_yscale("log")
            else:  # a way that fails must not flatten all others
                axes.set_ylim(0.9 * min(drawn), 2.5 * min(drawn))
                axes.set_title(f"{axes.get_title()} (cut off above)")
    figure.savefig(path, dpi=100)


def on_test_data(records: list[dict[str, Any]], key: str) -> list[float]:
    """What the records have of a figure of the test data, by the protocol of `evaluate.py` alone, not by that of the training script."""
    return [value for record in records if (value := at(record, f"evaluation.{key}")) is not None]


def most(steps: Any) -> int:
    return max(steps) if isinstance(steps, list) else steps


# --- the command ---


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("recipe", nargs="?", help="name of a recipe, see --list")
    parser.add_argument("--list", action="store_true", help="print the recipes, what each is for and what it is expected to give")
    parser.add_argument("--variants", nargs="+", metavar="NAME", help="only these variants")
    parser.add_argument("--seeds", nargs="+", type=int, help="instead of the recipe's")
    parser.add_argument(
        "--scale", type=float, default=1.0, help="share of the updates and parameters, to try a recipe out; 0.01 is a smoke run"
    )
    parser.add_argument(
        "--built_in_data", action="store_true", help="use the data that the script has without any flag instead of the recipe's"
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/recipes"), help="folder for models and logs")
    parser.add_argument(
        "--results", type=Path, help="folder for results files; default: recipes/results, with --scale the folder of the runs"
    )
    parser.add_argument(
        "--search",
        action="store_true",
        help="train every variant with every combination of the recipe's `search` and print what came of it",
    )
    parser.add_argument("--dry_run", action="store_true", help="print the commands and stop")
    parser.add_argument("--table", action="store_true", help="print what has been measured, as Markdown, and stop")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw what has been measured and stop")
    parser.add_argument("--update", nargs="+", type=Path, metavar="PAGE", help="make the tables in these Markdown pages anew and stop")
    options, rest = parser.parse_known_args(arguments)
    if options.update:
        for page in options.update:
            page.write_text(updated(page.read_text(encoding="utf-8")), encoding="utf-8")
        return
    if options.list or options.recipe is None:
        for recipe in map(load, names()):
            print(f"{recipe.name}: {recipe.title}; {len(recipe.variants)} variants, {len(recipe.seeds)} seeds")
            print(f"    on {recipe.hardware}\n    expected: {recipe.expected}")
        return
    recipe = load(options.recipe)
    whole = options.scale == 1 and not options.built_in_data
    results = options.results or (RESULTS if whole else options.runs / "results")
    if options.table or options.plot:
        if not kept(recipe, results):
            raise SystemExit(f"{results / recipe.name} holds no results yet; run the recipe without --table and --plot")
        if options.table:
            print(table(recipe, results))
        if options.plot:
            plot(recipe, results, options.plot)
        return
    if unknown := set(options.variants or []) - recipe.variants.keys():
        raise SystemExit(f"--variants: {recipe.name} has no {', '.join(sorted(unknown))}; it has {', '.join(recipe.variants)}")
    chosen = [variant for variant in recipe.variants if variant in (options.variants or recipe.variants)]
    more = given(rest)
    if own := sorted({"seed", "output_dir"} & more.keys()):
        raise SystemExit(f"--{', --'.join(own)}: a recipe's runs have seeds and folders of their own; choose with --seeds and --runs")
    runs = []
    if options.search:
        combinations = [dict(zip(recipe.search, values, strict=True)) for values in itertools.product(*recipe.search.values())]
        results = results / "search"
        for variant, values in itertools.product(chosen, combinations):
            tag = "-".join([slug(variant), *(f"{name}{value}" for name, value in values.items())])
            runs.append(make_run(recipe, variant, 0, options, tag, results, {**values, **more}))
    else:
        for seed, variant in itertools.product(options.seeds or recipe.seeds, chosen):
            runs.append(make_run(recipe, variant, seed, options, run_tag(variant, seed), results, more))
    for run in runs:
        if options.dry_run:
            print("\n".join(map(shown, run.commands)))
        elif run.results.exists():
            print(f"{run.results}: is there")
        else:
            run.do()
    if options.search and not options.dry_run:
        for run in runs:
            print(f"{run.results.stem}: validation loss {json.loads(run.results.read_text(encoding='utf-8'))['validation_loss']}")
    elif not options.dry_run:
        print(table(recipe, results))


def make_run(recipe: Recipe, variant: str, seed: int, options: argparse.Namespace, tag: str, results: Path, more: Settings) -> Run:
    return Run(
        *(recipe, variant, seed, options.scale),
        folder=options.runs / recipe.name / tag,
        results=results / recipe.name / f"{tag}.json",
        more=more,
        own_data=options.built_in_data,
    )


if __name__ == "__main__":
    main()
