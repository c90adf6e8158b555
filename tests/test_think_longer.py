"""examples/think_longer.py: trained on small problems, tested on larger ones, its answers judged by their residual."""

import importlib
import json
import operator

import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file
from transformers import AutoModelForSemanticSegmentation, AutoModelForTokenClassification

pytestmark = pytest.mark.usefixtures("scripts")
TINY = {
    "hidden_size": 8,
    "max_steps": 3,
    "logging_steps": 1,
    "train_count": 16,
    "train_guises": 2,
    "test_count": 5,
    "curve_count": 2,
    "test_steps": [2, 6],
    "train_steps": [1, 3],
    "per_device_train_batch_size": 4,
    "report_to": "none",
    "disable_tqdm": "true",
}


@pytest.fixture(scope="module")
def think(scripts):
    return importlib.import_module("think_longer")


def flags(**settings) -> list[str]:
    """Arguments of a tiny run, with these of their own, less those of TINY that they leave without effect."""
    idle = {"hidden_size"} if "model_name_or_path" in settings else set()
    idle |= {"train_steps"} if settings.get("network") == "stack" else set()
    idle |= set() if str(settings.get("problem")).startswith("sudoku") else {"train_guises"}
    idle |= {"train_guises", "train_count", "train_steps"} if settings.get("max_steps") == 0 else set()
    words = []
    for name, value in {**{name: value for name, value in TINY.items() if name not in idle}, **settings}.items():
        words += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return words


@pytest.mark.parametrize(
    ("problem", "sizes", "model_class", "files"),
    [
        ("prefix_sums", [8, 20], AutoModelForSemanticSegmentation, {"think_longer.png"}),
        ("mazes", [5, 9], AutoModelForSemanticSegmentation, {"think_longer.png", "maze.gif"}),
        ("sudoku", [60, 40], None, {"think_longer.png"}),
        ("sudoku_tokens", [60, 40], AutoModelForTokenClassification, {"think_longer.png"}),
        ("permutations", [12, 20], AutoModelForTokenClassification, {"think_longer.png"}),
    ],
)
def test_every_problem_from_training_to_pictures(think, tmp_path, problem, sizes, model_class, files):
    """The answers of an untrained network are wrong; what is looked at is that every one is counted once, and that the folder is whole."""
    starts = {} if problem == "permutations" else dict(num_restarts=2)  # a causal model has none to choose from
    settings = dict(
        problem=problem, train_size=sizes[0], test_sizes=sizes, tol=0.05, **starts, **(dict(initial_scale=1.0) if starts else {})
    )
    results = think.main(flags(**settings, path_noise=0.01, residual_weight=1.0, output_dir=tmp_path))
    assert results["greatest_drift"] == 0.0
    assert results["updates"] == 3
    assert results["test_damping"] == (0.0 if problem in ("prefix_sums", "sudoku_tokens") else 0.5)
    assert [(row["size"], row["steps"]) for row in results["curve"]] == [(size, steps) for size in sizes for steps in (2, 6)]
    kinds = ["", ", contradicting"] if problem.startswith("sudoku") else [""]
    assert [row["size"] for row in results["adaptive"]] == [f"{size}{kind}" for size in sizes for kind in kinds]
    for row in results["adaptive"]:
        count = 2 if "contradicting" in row["size"] else 5
        table = {name: row[name] for name in ("settled_right", "settled_wrong", "unsettled_right", "unsettled_wrong")}
        assert sum(table.values()) == count == len(row["residuals"]) == len(row["difficulty"])
        below, at_most = (sum(told(residual, 0.05) for residual in row["residuals"]) for told in (operator.lt, operator.le))
        assert below <= table["settled_right"] + table["settled_wrong"] <= at_most  # they are rounded to three digits
        assert table["settled_right"] + table["unsettled_right"] == sum(row["right"]) == round(count * row["exact"])
        assert all(steps <= 6 for steps in row["steps_taken"])
        if problem == "permutations":  # each place stops by itself
            assert len(row["steps_by_place"]) == len(row["right_by_place"]) == 1 + int(row["size"])
            assert 0 <= row["exact"] <= min(row["right_by_place"]) <= max(row["right_by_place"]) <= 1
            assert 1 <= min(row["steps_by_place"]) <= max(row["steps_by_place"]) <= max(row["steps_taken"])
    assert files | {"results.json", "model.safetensors"} <= {path.name for path in tmp_path.iterdir()}
    stored = json.loads((tmp_path / "results.json").read_text())
    assert stored["run"]["command"].startswith("python examples/think_longer.py --hidden_size 8 ")
    (model_class or think.SudokuNetwork).from_pretrained(tmp_path)

    before = (tmp_path / "results.json").read_text()
    again = dict(problem=problem, test_sizes=sizes, max_steps=0, model_name_or_path=tmp_path, tol=0.05, **starts)
    with pytest.raises(FileExistsError, match="holds the results of another run; choose another --output_dir"):
        think.main(flags(**again, output_dir=tmp_path))
    assert (tmp_path / "results.json").read_text() == before
    other = think.main(flags(**again, test_damping=0.25, output_dir=tmp_path / "damped"))
    assert other["test_damping"] == 0.25
    assert [row["residual"] for row in other["curve"]] != [row["residual"] for row in results["curve"]]
    tested = think.main(flags(**again, output_dir=tmp_path / "tests"))
    assert [row["residual"] for row in tested["curve"]] == [row["residual"] for row in results["curve"]]
    assert tested["adaptive"][0]["residuals"] == results["adaptive"][0]["residuals"]


def test_a_flag_that_is_not_given_is_that_of_the_problem_s_best_run(think, tmp_path):
    words = flags(problem="mazes", train_size=5, test_sizes=[5], output_dir=tmp_path)
    at = words.index("--hidden_size")
    found = think.main(words[:at] + words[at + 2 :])
    assert found["parameters"] == 19_586  # as docs/think_longer.md says
    for name, value in (("label_weights", [1, 1]), ("tiles", 1), ("residual_weight", 0)):  # each of them reaches the training
        other = flags(problem="mazes", hidden_size=32, **{name: value}, train_size=5, test_sizes=[5], output_dir=tmp_path / name)
        assert think.main(other)["train_loss"] != pytest.approx(found["train_loss"], rel=1e-3)


@pytest.mark.parametrize("problem", ["sudoku", "sudoku_tokens"])
def test_puzzles_of_a_file(think, tmp_path, problem):
    lines = ["".join(map(str, row["digits"])) for row in think.sudoku(4, 45, 0)]
    (tmp_path / "hard.txt").write_text("# four\n" + "\n".join(lines))
    train = dict(problem=problem, train_size=60, test_steps=[3], curve_count=3, test_count=3, output_dir=tmp_path / "run")
    results = think.main(flags(**train, test_file=tmp_path / "hard.txt"))
    assert [row["size"] for row in results["curve"]] == ["hard"]
    assert [row["size"] for row in results["adaptive"]] == ["hard", "hard, contradicting"]
    assert [row["difficulty"] for row in results["adaptive"]] == [[45] * 3, [46] * 3]
    (tmp_path / "broken.txt").write_text("1" * 80)
    with pytest.raises(ValueError, match="line 1: expected 81 digits"):
        think.main(flags(**train | dict(output_dir=tmp_path / "other"), test_file=tmp_path / "broken.txt"))
    assert not (tmp_path / "other" / "model.safetensors").exists()  # told before the training
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)))
    with pytest.raises(ValueError, match=r"binary\.txt is no text file .*expected lines of 81 digits") as told:
        think.sudoku_file(tmp_path / "binary.txt", 1, 0)
    assert not isinstance(told.value, UnicodeDecodeError)
    with pytest.raises(FileNotFoundError, match=r"there is no file '.*nowhere\.txt'; expected a text file with lines of 81 digits"):
        think.main(flags(**train | dict(output_dir=tmp_path / "other"), test_file=tmp_path / "nowhere.txt"))


def test_trained_on_one_side_tested_on_another(think, tmp_path):
    results = think.main(
        flags(problem="sudoku", train_size=60, test_side=16, test_sizes=[200, 180], test_count=2, output_dir=tmp_path / "run")
    )
    assert [row["size"] for row in results["adaptive"]] == ["200", "200, contradicting", "180", "180, contradicting"]
    assert [row["difficulty"] for row in results["adaptive"]] == [[200] * 2, [201] * 2, [180] * 2, [181] * 2]


@pytest.mark.parametrize(("problem", "size"), [("mazes", 7), ("sudoku_tokens", 50)])
def test_what_does_not_settle_is_looked_at_from_another_side(think, problem, size):
    """What settled stays as it was; of the others the answer of the smallest residual counts, and the steps of all views."""
    made, options = think.PROBLEMS[problem], think.NetworkArguments(hidden_size=8)
    torch.manual_seed(0)
    model = think.build_network(options, made)
    with torch.no_grad():
        for matrix in (parameter for parameter in model.parameters() if parameter.dim() > 1):
            matrix.mul_(3)  # far from settled, each problem differently

    def look(views: int, tol: float) -> dict:
        data = think.ProblemArguments(problem, test_views=views, tol=tol, test_sizes=[size], test_steps=[6], test_count=12, curve_count=1)
        return think.test(model, made, data, options, torch.device("cpu"))["adaptive"][0]

    residuals = sorted(look(1, 0.0)["residuals"])
    gap = max(range(3, 9), key=lambda index: residuals[index + 1] - residuals[index])  # rounded as they are, these two differ
    tol = (residuals[gap] + residuals[gap + 1]) / 2
    once, twice, thrice = (look(views, tol) for views in (1, 2, 3))
    for less, more in ((once, twice), (twice, thrice)):
        better = 0
        for before, after, steps, all_steps in zip(
            *(row[name] for name in ("residuals", "steps_taken") for row in (less, more)), strict=True
        ):
            if before <= tol:
                assert (after, all_steps) == (before, steps)
            else:
                assert after <= before
                assert all_steps > steps
                better += after < before
        assert better > 0
    assert [row["views"] for row in (once, twice, thrice)] == [1, 2, 3]


def test_an_answer_that_is_no_number_replaces_none(think, monkeypatch):
    found = iter([[0.01, 0.02], [float("nan"), 0.015]])

    def examine(*args):
        return {"residual": np.array(next(found)), "steps": np.ones(2), "exact": np.ones(2), "labels": np.ones(2)}

    made, options = think.PROBLEMS["mazes"], think.NetworkArguments(hidden_size=8)
    data = think.ProblemArguments("mazes", test_views=2, tol=1e-3, test_sizes=[5], test_steps=[6], test_count=2, curve_count=1)
    model = think.build_network(options, made)
    real, calls = think.examine, []

    def watched(*args):
        calls.append(args)
        return real(*args) if len(calls) == 1 else examine()  # the curve's comes first

    monkeypatch.setattr(think, "examine", watched)
    assert think.test(model, made, data, options, torch.device("cpu"))["adaptive"][0]["residuals"] == [0.01, 0.015]


def test_tests_have_the_precision_of_the_weights(think, tmp_path):
    """Under the training's autocast no residual would meet its tolerance."""
    trained = think.main(flags(bf16=True, use_cpu=True, output_dir=tmp_path / "a", test_sizes=[20], test_steps=[60]))
    tested = think.main(flags(max_steps=0, model_name_or_path=tmp_path / "a", output_dir=tmp_path / "b", test_sizes=[20], test_steps=[60]))
    for row, other in zip(trained["curve"] + trained["adaptive"], tested["curve"] + tested["adaptive"], strict=True):
        assert {**row, "seconds": 0} == {**other, "seconds": 0}


def test_epochs_in_place_of_updates(think, tmp_path):
    assert (
        think.main(flags(max_steps=-1, num_train_epochs=2, train_count=40, per_device_train_batch_size=20, output_dir=tmp_path))["updates"]
        == 4
    )


def test_going_on_trains_as_before_but_for_the_flags(think, tmp_path):
    """Steps, gradient and start states of a trained model stay unless a flag says otherwise; the flags were once ignored where a model was given."""
    problem, few = think.PROBLEMS["mazes"], dict(hidden_size=8)
    assert think.build_network(think.NetworkArguments(**few), problem).config.max_steps == 24  # the problem's
    think.build_network(think.NetworkArguments(**few, train_steps=[2, 5], gradient="phantom", initial_scale=0.5), problem).save_pretrained(
        tmp_path
    )

    def settings(**given) -> tuple:
        config = think.build_network(think.NetworkArguments(model_name_or_path=str(tmp_path), **given), problem).config
        least = config.steps_sampling and config.steps_sampling["min_steps"]
        return least, config.max_steps, config.gradient, config.initial_scale, config.path_noise

    assert settings() == (2, 5, "phantom", 0.5, 0.0)
    assert settings(train_steps=[4, 9]) == (4, 9, "phantom", 0.5, 0.0)
    assert settings(train_steps=[7], gradient="reversible", initial_scale=0.0, path_noise=0.1) == (None, 7, "reversible", 0.0, 0.1)


@pytest.mark.parametrize(
    ("problem", "size"), [("prefix_sums", 9), ("mazes", 9), ("sudoku", 60), ("sudoku_tokens", 60), ("permutations", 12)]
)
def test_explicit_stacks(think, tmp_path, problem, size):
    results = think.main(
        flags(problem=problem, network="stack", depth=2, train_size=size, test_sizes=[size], output_dir=tmp_path / problem)
    )
    assert results["greatest_drift"] is None
    assert results["adaptive"] == []
    assert [(row["size"], row["steps"]) for row in results["curve"]] == [(size, 2)]


def test_a_llama_goes_on_from_where_it_was(think, tmp_path):
    common = dict(problem="permutations", network="stack", test_sizes=[12])
    think.main(flags(**common, depth=2, train_size=12, output_dir=tmp_path / "first"))
    model = think.build_network(think.NetworkArguments(str(tmp_path / "first"), "stack"), think.PROBLEMS["permutations"])
    saved = load_file(tmp_path / "first" / "model.safetensors")
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())
    think.main(flags(**common, train_size=14, model_name_or_path=str(tmp_path / "first"), output_dir=tmp_path / "then"))
    then = load_file(tmp_path / "then" / "model.safetensors")
    assert 0 < max((then[name] - value).abs().max() for name, value in saved.items()) < 0.2


def test_equal_evaluations_means_equal_convolutions(think):
    """A block of the stack has the convolutions of one evaluation of the equilibrium's block; and the docstring's flags give about as many parameters."""
    options = think.NetworkArguments(network="stack", depth=30)
    problem = think.PROBLEMS["prefix_sums"]
    count = lambda model: sum(p.numel() for p in model.parameters())  # noqa: E731
    equilibrium = think.build_network(think.NetworkArguments(), problem)
    block = equilibrium.model.stages[0].block
    stack = think.build_network(options, problem)
    convolutions = lambda module: [m.weight.shape for m in module.modules() if isinstance(m, torch.nn.Conv2d)]  # noqa: E731
    assert convolutions(stack.blocks[0]) == convolutions(block)
    options.depth, options.hidden_size = 26, 6
    assert count(think.build_network(options, problem)) == pytest.approx(count(equilibrium), rel=0.05)


def test_the_residual_in_the_loss(think, tmp_path):
    """Half way through the training half of its weight, mean of the places' own; its gradient goes through the solve, which stays exact."""
    model = think.build_network(think.NetworkArguments(hidden_size=8, train_steps=[3]), think.PROBLEMS["mazes"])
    arguments = think.ThinkingArguments(output_dir=str(tmp_path), report_to="none", per_device_train_batch_size=4)
    trainer = think.ThinkingTrainer(residual_weight=0.6, model=model, args=arguments)
    trainer.state.global_step, trainer.state.max_steps = 5, 10
    batch = think.collate(list(think.mazes(4, 7, 0)))
    loss, _ = trainer.compute_loss(model, batch, return_outputs=True)
    model.zero_grad()
    loss.backward()
    layer = model.model.stages[0]
    assert layer.drift == 0.0
    found = [parameter.grad.clone() for parameter in model.parameters()]
    layer.gradient = "backprop"
    x, z = model.model.stem(batch["pixel_values"]), model.model(batch["pixel_values"]).last_hidden_state
    f = layer.block(z, x)
    residual = (torch.linalg.vector_norm(f - z, dim=1) / torch.linalg.vector_norm(f, dim=1)).mean()
    expected = model(**batch).loss + 0.3 * residual
    torch.testing.assert_close(loss, expected)
    model.zero_grad()
    expected.backward()
    for parameter, gradient in zip(model.parameters(), found, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)


def test_an_evaluation_takes_no_residual(think, tmp_path):
    """It runs without gradients, where a solve keeps nothing that the residual could be taken from; its loss is the model's own."""
    model = think.build_network(think.NetworkArguments(hidden_size=8, train_steps=[3]), think.PROBLEMS["mazes"])
    settings = dict(output_dir=str(tmp_path), report_to="none", per_device_train_batch_size=4, per_device_eval_batch_size=4, max_steps=2)
    arguments = think.ThinkingArguments(**settings, eval_strategy="steps", eval_steps=1, disable_tqdm=True)
    rows = think.mazes(4, 7, 0)
    trainer = think.ThinkingTrainer(
        residual_weight=0.6, model=model, args=arguments, train_dataset=rows, eval_dataset=rows, data_collator=think.collate
    )
    trainer.train()
    with torch.no_grad():
        own = model.eval()(**think.collate(list(rows))).loss.item()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(losses) == 2
    assert losses[-1] == trainer.evaluate()["eval_loss"] == pytest.approx(own, rel=1e-6)


def test_accumulated_batches_count_the_residual_once(think, tmp_path):
    """Token classifiers divide their loss by the labels of the whole update; a term beside it is a mean, to be divided by the batches."""
    same = dict(
        **dict(problem="sudoku_tokens", train_size=60, test_sizes=[60], train_steps=[3], learning_rate=0, max_steps=2),
        **dict(residual_weight=3.0, test_count=1),
    )
    once = think.main(flags(**same, per_device_train_batch_size=8, output_dir=tmp_path / "1"))
    halves = think.main(flags(**same, per_device_train_batch_size=4, gradient_accumulation_steps=2, output_dir=tmp_path / "2"))
    assert halves["train_loss"] == pytest.approx(once["train_loss"], rel=1e-4)


def test_labels_that_weigh_more(think, tmp_path):
    """A place of which nothing can be known: its best logits, by the weighted loss, are the log odds of its labels, not shifted by the weights."""

    class Guess(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.logit = torch.nn.Parameter(torch.zeros(()))

        def forward(self, labels):
            logits = torch.stack([torch.zeros(labels.shape), self.logit.expand(labels.shape)], 1)
            return {"loss": torch.zeros(()), "logits": logits}

    labels = torch.zeros(2, 4, 5, dtype=torch.long)
    labels[0, 0] = 1  # 5 of 40
    model = Guess()
    arguments = think.ThinkingArguments(output_dir=str(tmp_path), report_to="none", per_device_train_batch_size=4)
    trainer = think.ThinkingTrainer([1.0, 30.0], model=model, args=arguments)
    loss = trainer.compute_loss(model, {"labels": labels})
    odds = torch.tensor(30.0)
    by_hand = (5 * 30 * -(odds / (1 + odds)).log() + 35 * (1 + odds).log()) / (5 * 30 + 35)
    torch.testing.assert_close(loss, by_hand)
    with torch.no_grad():
        model.logit.fill_(5 / 35).log_()
    trainer.compute_loss(model, {"labels": labels}).backward()
    assert model.logit.grad.abs() < 1e-6


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(problem="chess"), "--problem must be one of prefix_sums, mazes, sudoku, sudoku_tokens, permutations, got 'chess'"),
        (dict(network="transformer"), "--network must be equilibrium or stack, got 'transformer'"),
        (
            dict(network="stack", model_name_or_path="runs/x"),
            "takes an equilibrium network, or a llama; other stacks are trained from the start",
        ),
        (
            dict(model_name_or_path="runs/x", hidden_size=8, block_type="paper"),
            "--hidden_size, --block_type would have no effect: 'runs/x' has",
        ),
        (dict(network="stack", train_steps=[4], beta=0.5), "--beta, --train_steps would have no effect: a stack has no fixed point"),
        (dict(network="stack", tol=1e-2, test_damping=0.5), "--tol, --test_damping would have no effect: a stack has no fixed point"),
        (dict(max_steps=0, model_name_or_path="runs/x", learning_rate=1), "--learning_rate.* would have no effect: --max_steps 0 trains"),
        (dict(depth=3), "--depth would have no effect: it is that of --network stack. Leave it out"),
        (dict(problem="permutations", block_type="paper"), "the network of permutations has a block of its own"),
        (dict(train_guises=2), "--train_guises would have no effect: --problem prefix_sums is no Sudoku"),
        (dict(max_steps=0, model_name_or_path="runs/x"), "--train_size would have no effect: --max_steps 0 trains nothing"),
        (dict(problem="sudoku", test_file="puzzles.txt"), "--test_sizes would have no effect: the tests are those of --test_file"),
        (dict(train_steps=[5, 3]), "--train_steps takes a number of steps, or the least and the most of them, got 5 3"),
        (dict(label_weights=[1, 0]), "--label_weights takes two positive numbers"),
        (dict(tiles=2), "--tiles is for mazes and at least 1, got 2 for prefix_sums"),
        (dict(problem="mazes", tiles=0), "--tiles is for mazes and at least 1, got 0 for mazes"),
        (dict(test_views=2), r"--test_views is for mazes \(1 to 8\) and sudoku_tokens \(1 or more\), got 2 for prefix_sums"),
        (dict(problem="sudoku", test_views=2), "got 2 for sudoku"),
        (dict(problem="sudoku_tokens", test_side=16), "--test_side is for puzzles that .* draws, got 16 for sudoku_tokens"),
        (dict(problem="sudoku", test_side=16, test_file="puzzles.txt"), "--test_side is for .*got 16 for puzzles.txt"),
        (dict(problem="mazes", test_file="puzzles.txt"), "--test_file holds Sudoku, got --problem mazes"),
        (dict(problem="mazes", test_views=9), "got 9 for mazes"),
        (dict(problem="sudoku_tokens", test_views=0), "got 0 for sudoku_tokens"),
        (dict(problem="mazes"), "--test_sizes 8: size must be odd"),
        (dict(problem="permutations"), "--test_sizes 8: length must be at least 12"),
        (dict(problem="permutations", test_sizes=[12]), "--train_size 8, --train_count 16: length must be at least 12"),
        (dict(tol=-1), "--tol must be a finite number above 0, got -1"),
        (dict(test_steps=[4, 0]), r"--test_steps must be at least 1 each, got \[4, 0\]"),
        (dict(curve_count=0), "--curve_count must be at least 1, got 0"),
        (dict(test_damping=2), r"--test_damping must be in \[0, 1\), got 2"),
        (dict(max_steps=0), "--max_steps 0 tests a trained model without training: name it with --model_name_or_path"),
        (dict(num_restarts=3), "num_restarts=3 from a start state of zero would find the same 3 times"),
    ],
)
def test_what_cannot_be_done_is_said(think, tmp_path, settings, message):
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        think.main(flags(**{**dict(train_size=8, test_sizes=[8], output_dir=tmp_path), **settings}))


@pytest.mark.slow
def test_trained_on_short_strings_right_on_long_ones(think, tmp_path):
    """The point of it all, small: 8 bits in training, 32 in the test, where more steps help and the residual says which answers can be trusted."""
    settings = dict(hidden_size=24, max_steps=500, train_count=4_000, train_size=8, train_steps=[4, 12], per_device_train_batch_size=32)
    tests = dict(test_sizes=[32], test_steps=[4, 64], test_count=60, curve_count=60, logging_steps=100, learning_rate=3e-3)
    results = think.main(flags(**settings, **tests, output_dir=tmp_path))
    few, many = results["curve"]
    assert few["exact"] < 0.2
    assert many["exact"] > 0.9
    assert results["greatest_drift"] == 0.0
    row = results["adaptive"][0]
    assert row["settled_right"] > 0.8 * 60
    assert row["settled_wrong"] <= 1


@pytest.mark.parametrize(
    ("settings", "logged"),
    [
        (dict(max_steps=3, logging_steps=50), [3]),
        (dict(max_steps=5, logging_steps=2), [2, 4, 5]),
        (dict(max_steps=4, logging_steps=2), [2, 4]),
        (dict(max_steps=100_000, max_minutes=0.01, logging_steps=100_000), None),
        (dict(max_steps=3, logging_strategy="no"), []),
    ],
    ids=str,
)
def test_the_last_update_is_logged_once(think, tmp_path, settings, logged):
    results = think.main(flags(**settings, test_sizes=[8], output_dir=tmp_path))
    history = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    for figure in ("loss", "drift", "residual", "solver_steps"):
        assert [entry["step"] for entry in history if figure in entry] == ([results["updates"]] if logged is None else logged)
    assert results["greatest_drift"] == (None if logged == [] else 0.0)


def test_minutes_end_a_training_its_rate_and_the_growth_of_the_residuals_weight(think, tmp_path, monkeypatch):
    shares: list[float] = []
    plain = think.ThinkingTrainer.share.fget
    monkeypatch.setattr(think.ThinkingTrainer, "share", property(lambda trainer: shares.append(plain(trainer)) or shares[-1]))
    results = think.main(
        flags(max_steps=100_000, max_minutes=0.02, warmup_steps=0, test_sizes=[8], residual_weight=1.0, output_dir=tmp_path)
    )
    assert 1 < results["updates"] < 100_000
    assert shares == sorted(shares)
    assert shares[-1] > 0.5
    history = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    rates = [entry["learning_rate"] for entry in history if "learning_rate" in entry]
    assert rates[-1] < 0.5 * rates[0]
    with pytest.raises(ValueError, match="--max_minutes must be positive, got 0"):
        think.main(flags(max_minutes=0, output_dir=tmp_path / "none"))
