"""How does a model get to the Hub: what is sent, what is checked before, and that it arrives whole or not at all?

`publish` does it for a saved folder or a model; `python -m revdeq_hf.publish` is its command. Nothing is written to the folder.
"""

import copy
import importlib
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, StrictDataclassError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PreTrainedModel, TrainerCallback
from transformers.dynamic_module_utils import get_relative_import_files

from .configuration_revdeq import RevDEQConfig, RevDEQVisionConfig
from .hub_revdeq import AUTO_MAPS, BundledConfig, __version__
from .model_card import check_card, render_card, weight_files

# what a published model may consist of, beside its weights and its code
PARTS = (
    "config.json",
    "generation_config.json",
    "model.safetensors.index.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template.*",
    "preprocessor_config.json",
    "processor_config.json",
    "requirements.txt",
    "evaluation*.json",
    "evaluation*.png",
    "results*.json",
    "training.png",
    "fixed_point.png",
)
OTHERS = ("README.md", "LICENSE*", "*.png")  # parts, too, which in a repository may be somebody's own
PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt", "*.npy", "*.joblib")
# of an earlier publication, what the new one deletes where it has no such file
REPLACED = (*PARTS, "*.safetensors", "*.safetensors.index.json", "*_revdeq*.py", *PICKLES)
GENERATED = "<!-- generated: "  # of a card that was written here
PATH = re.compile(r"(?<![\w/:.<])/[\w.+-]+/[\w./+-]*\w")
SECRETS = {
    "a Hugging Face token": r"\bhf_[A-Za-z0-9]{30,}",
    "a GitHub token": r"\b(?:gh[pousr]_[A-Za-z0-9]{36,}|github_pat_\w{60,})",
    "an AWS key": r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",
    "a Google key": r"\bAIza[\w-]{35}",
    "an OpenAI or Anthropic key": r"\bsk-(?:ant-|proj-)?[\w-]{32,}",
    "a Slack token": r"\bxox[abprs]-[\w-]{10,}",
    "a Weights & Biases key": r"(?i)wandb_api_key\W{1,5}[0-9a-f]{40}",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
}
# the HTTP client's own base class, which differs between versions of huggingface_hub, and OSError
NETWORK_ERRORS = (*HfHubHTTPError.__bases__, HfHubHTTPError)


@dataclass
class Publication:
    """What `publish` did, or with `dry_run` would do.

    Attributes:
        repo_id: the repository, "user/name".
        files: bytes of each file that is sent.
        left_out: why a file or folder of the model's folder is not sent.
        checks: what was checked, with what came out.
        warnings: what to look at; nothing is refused for it.
        deleted: files of the repository that the same commit deletes, since they belong to what was there before.
        url: of the commit or pull request; None: nothing was sent.
    """

    repo_id: str
    files: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    checks: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    deleted: list[str] = field(default_factory=list)
    url: str | None = None

    def __str__(self) -> str:
        lines = [f"{size:>14,}  {name}" for name, size in self.files.items()]
        lines.append(f"{sum(self.files.values()):>14,}  bytes in {len(self.files)} files")
        lines += [f"      left out  {name}: {why}" for name, why in self.left_out.items()]
        lines += [f"       deleted  {name}" for name in self.deleted]
        lines += [f"            ok  {check}" for check in self.checks]
        lines += [f"       warning  {warning}" for warning in self.warnings]
        lines.append(f"published: {self.url}" if self.url else f"nothing was sent to {self.repo_id}")
        return "\n".join(lines)


def publish(
    model: "PreTrainedModel | str | os.PathLike",
    repo_id: str,
    *,
    processor: Any = None,
    private: bool | None = None,
    create_pr: bool = False,
    revision: str | None = None,
    commit_message: str = "Upload model",
    token: str | None = None,
    dry_run: bool = False,
) -> Publication:
    """Checks a model and sends it to the Hub, in one commit.

    Checked is what would be sent: that the weights belong to the configuration, that the code is this package's, that a process in which `revdeq_hf` cannot
    be imported computes the same outputs bit for bit and goes backward with a drift of 0, that tokenizer or processor load there, that the card says what
    its results say, that there are no pickles and no secrets. Cost: the model is loaded and copied twice, one after the other, and each evaluates a text of
    16 tokens or two images.

    Args:
        model: a folder as `save_pretrained` writes it, which stays as it is; or a model, which is compared with what is sent.
        repo_id: "user/name"; made where it does not exist.
        processor: with a model, its tokenizer or image processor.
        private: whether a new repository is private (None: as the account's default). True is refused for one that is public already; one that is private
            stays so.
        create_pr: open a pull request instead of committing.
        revision: branch to commit to, made where it does not exist (None: main).
        commit_message: first line of the commit.
        token: instead of the one of `hf auth login` or `HF_TOKEN`.
        dry_run: check, and say what would be sent; the network is not used.

    Raises:
        FileNotFoundError: there is no such folder, or a file that must be there is missing.
        ValueError: a check failed; the error says which and what to do.
        PermissionError: no token, or one without the right.
        ConnectionError: the Hub could not be reached or broke off. Then nothing was published: the repository shows what it showed before.
    """
    validate_repo_id(repo_id)
    with ExitStack() as stack:
        if isinstance(model, PreTrainedModel):
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()), repo_id.rpartition("/")[2])  # a card's title
            model.save_pretrained(folder)
            if processor is not None:
                processor.save_pretrained(folder)
        elif processor is not None:
            raise ValueError("processor goes with a model; a folder holds its own: processor.save_pretrained(folder)")
        elif not isinstance(model, str | os.PathLike):
            raise ValueError(
                f"a folder or a model of this package is published, got {type(model).__name__}; merge an adapter first, model.merge_and_unload(), and take "
                "the model itself out of a wrapper such as torch.compile's"
            )
        else:
            folder = Path(model)
        stage = Path(stack.enter_context(tempfile.TemporaryDirectory()))  # links to what is sent, and the card
        publication = Publication(repo_id)
        auto_class, module, name = _read_config(folder)
        _choose(folder, stage, module, publication)
        _write_card(folder, stage, publication)
        _check_secrets(stage, publication)
        _tell_paths(stage, publication)
        model_class = getattr(importlib.import_module(f".{module}", __package__), name)
        _check_model(stage, auto_class, model_class, model if isinstance(model, PreTrainedModel) else None, publication)
        publication.files = {path.name: path.stat().st_size for path in sorted(stage.iterdir())}
        if not dry_run:
            card = (folder / "README.md").is_file()
            _send(stage, publication, card, private=private, create_pr=create_pr, revision=revision, message=commit_message, token=token)
        return publication


class BundleCallback(TrainerCallback):
    """Adds the model's code to what Trainer pushes during training (`push_to_hub=True`), of which it takes the weights and the configuration only.

    The push at the end of training has the code without it.
    """

    def on_push_begin(self, args, state, control, model=None, **kwargs) -> None:
        config = getattr(model, "config", None)
        if state.is_world_process_zero and isinstance(config, BundledConfig) and not hasattr(model, "peft_config"):
            config.save_pretrained(args.output_dir)


def _read_config(folder: Path) -> tuple[str, str, str]:
    """The Auto class, module and class of the model in a folder; raises unless its configuration is one of ours, and valid."""
    path = folder / "config.json"
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {str(folder)!r}; give one that model.save_pretrained or a training script wrote")
    if (folder / "adapter_config.json").is_file():
        raise ValueError(f"{str(folder)!r} holds an adapter; merge it first: model.merge_and_unload().save_pretrained(...)")
    if not path.is_file():
        raise FileNotFoundError(f"{str(folder)!r} has no config.json; give a folder that model.save_pretrained or a training script wrote")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        kinds = {kind.model_type: kind for kind in (RevDEQConfig, RevDEQVisionConfig)}
        kind = kinds.get(content.get("model_type"))
        if kind is None:
            raise ValueError(f"its model_type is {content.get('model_type')!r}, expected one of {', '.join(map(repr, kinds))}")
        config = kind.from_dict(content)
    except (ValueError, TypeError, AttributeError, StrictDataclassError) as error:
        raise ValueError(f"{str(path)!r} is not the configuration of a model of this package: {error}") from error
    own = AUTO_MAPS[kind.__name__]
    for auto_class, reference in own.items():
        module, name = reference.split(".")
        if [name] == config.architectures and own.items() <= (content.get("auto_map") or {}).items():
            return auto_class, module, name
    raise ValueError(
        f"{str(path)!r} says architectures={config.architectures} and auto_map={content.get('auto_map')}; expected a class of this package and "
        f"{own}: load the model and save it once more with this version's save_pretrained"
    )


def _choose(folder: Path, stage: Path, module: str, publication: Publication) -> None:
    """Links in `stage` what is sent; raises unless weights and this package's code are there."""
    names = sorted(path.name for path in folder.iterdir())
    entry = Path(__file__).with_name(f"{module}.py")
    code = {Path(file).name: Path(file) for file in (str(entry), *get_relative_import_files(entry))}
    differing = [name for name, path in code.items() if name not in names or (folder / name).read_bytes() != path.read_bytes()]
    if differing:
        raise ValueError(
            f"{str(folder)!r} does not hold the code of the revdeq_hf that is installed ({__version__}): {', '.join(sorted(differing))} missing or other; load "
            "the model and save it once more with save_pretrained, or publish it with the version that saved it"
        )
    publication.checks.append(f"{len(code)} code files, the same as in revdeq_hf {__version__}")
    weights = [path.name for path in weight_files(folder)]
    for name in names:
        path = folder / name
        if path.is_dir():
            publication.left_out[name] = "a folder"
        elif any(fnmatch(name, pattern) for pattern in PICKLES):
            publication.left_out[name] = "may hold a pickle, which runs code where it is loaded"
        elif name in code or name in weights or any(fnmatch(name, pattern) for pattern in (*PARTS, *OTHERS)):
            (stage / name).symlink_to(path.resolve())
        else:
            publication.left_out[name] = "not a part of a published model"


def _check_secrets(stage: Path, publication: Publication) -> None:
    for path in sorted(stage.iterdir()):
        if path.suffix in (".safetensors", ".png"):
            with path.open("rb") as file:  # of weights, the header
                text = file.read(min(int.from_bytes(file.read(8), "little"), 10**7)).decode("utf-8", errors="replace")
        else:
            text = path.read_text(encoding="utf-8", errors="replace")
        for what, pattern in SECRETS.items():
            if found := re.search(pattern, text):
                raise ValueError(
                    f"{path.name} seems to hold {what} ({found[0][:6]}...); remove it, and revoke it where it may have been seen"
                )
    publication.checks.append("no pickles, no tokens or keys")


def _tell_paths(stage: Path, publication: Publication) -> None:
    for path in sorted(stage.iterdir()):
        if path.name == "README.md" or fnmatch(path.name, "results*.json") or fnmatch(path.name, "evaluation*.json"):
            found = dict.fromkeys(PATH.findall(path.read_text(encoding="utf-8", errors="replace")))
            if found:
                publication.warnings.append(
                    f"{path.name} names paths of this machine: {', '.join(found)}; give the scripts relative paths, or shorten them in the .json files and "
                    "write the card anew"
                )


def _write_card(folder: Path, stage: Path, publication: Publication) -> None:
    card = stage / "README.md"
    if card.exists():
        text = card.read_text(encoding="utf-8")
        if GENERATED in text:
            check_card(folder)
            publication.checks.append("README.md says what its results say")
            card.unlink()  # a link to the folder's
            card.write_text(re.sub(r'"USER/[^"\n]*"', f'"{publication.repo_id}"', text), encoding="utf-8")
        else:
            publication.checks.append("README.md is your own, its figures were not checked")
        return
    evaluated = (folder / "evaluation.json").is_file()
    card.write_text(render_card(folder, evaluated=evaluated, repo_id=publication.repo_id), encoding="utf-8")
    publication.checks.append(
        "README.md made from the results" if evaluated else "README.md made, without an evaluation (examples/evaluate.py makes one)"
    )


def _check_model(
    stage: Path, auto_class: str, model_class: type[PreTrainedModel], saved: PreTrainedModel | None, publication: Publication
) -> None:
    """Compares what is sent with the model in memory, and a process without this package with this one; raises ValueError where they differ."""
    try:
        model, info = model_class.from_pretrained(stage, output_loading_info=True, local_files_only=True)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError, StrictDataclassError) as error:
        raise ValueError(f"the model does not load: {error}") from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(kind):
            raise ValueError(
                f"the weights do not belong to the configuration, {kind.replace('_', ' ')}: {sorted(map(str, info[kind]))[:5]}"
            )
    if saved is not None:
        wanted, got = saved.state_dict(), model.state_dict()
        for name, weight in got.items():
            if not torch.equal(wanted[name].cpu(), weight):
                raise ValueError(f"the saved weights are not the model's, they differ at {name!r}; was it changed while it was saved?")
        publication.checks.append("the saved weights are the model's")
    expected = _examine(copy.deepcopy(model).eval(), backward=False)["output"]
    with tempfile.TemporaryDirectory() as place:
        got = _in_clean_process(stage, auto_class, Path(place))
    if not torch.isfinite(expected).all():
        raise ValueError("the outputs of an example are not finite; nobody could use this model")
    if not torch.equal(expected, got["output"]):
        raise ValueError(
            f"a process without this package computes other outputs, by up to {(expected - got['output']).abs().max():.3g}: "
            f"{auto_class}.from_pretrained(..., trust_remote_code=True) against {model_class.__name__}"
        )
    publication.checks.append(f"{auto_class} without this package: the same outputs, bit for bit")
    if "drift" in got:
        if got["drift"] != 0:
            raise ValueError(
                f"the drift of a backward pass is {got['drift'].item():.3g}, expected 0: its gradients are not exact (see revdeq_hf.diagnose)"
            )
        publication.checks.append("drift of a backward pass: 0")
    else:
        publication.checks.append(f"no drift to check: gradient={model.config.gradient!r} reverses nothing")


def _in_clean_process(stage: Path, auto_class: str, place: Path) -> dict[str, torch.Tensor]:
    source = "\n".join(inspect.getsource(function) for function in (_example, _examine, _examine_folder))
    command = f"{source}\n_examine_folder({str(stage)!r}, {auto_class!r}, {torch.get_num_threads()}, {str(place / 'result.safetensors')!r})"
    environment = {name: value for name, value in os.environ.items() if name not in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")}
    environment.update(HF_HUB_OFFLINE="1", HF_MODULES_CACHE=str(place / "modules"), CUDA_VISIBLE_DEVICES="")
    done = subprocess.run([sys.executable, "-c", command], cwd=place, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"the model does not run in a process without this package:\n{done.stderr[-2000:]}")
    return load_file(place / "result.safetensors")


# The next three also run in the process without this package, as text: they import what they need themselves.


def _example(model):
    import torch

    config, generator = model.config, torch.Generator().manual_seed(0)
    if config.model_type == "revdeq":
        return torch.randint(config.vocab_size, (1, min(16, config.max_position_embeddings)), generator=generator)
    return torch.randn(2, config.num_channels, config.image_size, config.image_size, generator=generator).to(model.dtype)


def _examine(model, backward):
    """The first output of an example and, after a backward pass in training mode, the drift of solves that are reversed."""
    import torch

    def output():
        first = model(_example(model))[0]
        return first[-1] if isinstance(first, tuple) else first

    with torch.no_grad():
        result = {"output": output()}
    if backward and model.config.gradient == "reversible":
        model.train()
        output().float().square().mean().backward()
        result["drift"] = torch.stack([module.drift for module in model.modules() if hasattr(module, "drift")]).max()
    return result


def _examine_folder(folder, auto_class, threads, result):
    import copy
    import os
    import sys

    class Absent:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] == "revdeq_hf":
                raise ImportError("revdeq_hf cannot be imported here")

    sys.meta_path.insert(0, Absent())
    import torch
    import transformers
    from safetensors.torch import save_file
    from transformers.dynamic_module_utils import get_class_from_dynamic_module
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    torch.set_num_threads(threads)
    if auto_class == "AutoBackbone":  # takes names on the Hub only
        name = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True).auto_map[auto_class]
        model = get_class_from_dynamic_module(name, folder).from_pretrained(folder)
    else:
        model = getattr(transformers, auto_class).from_pretrained(folder, trust_remote_code=True)
    if os.path.exists(os.path.join(folder, "tokenizer_config.json")):
        transformers.AutoTokenizer.from_pretrained(folder)
    if os.path.exists(os.path.join(folder, "preprocessor_config.json")):
        AutoImageProcessor.from_pretrained(folder)
    # a copy, since weights that are mapped from a file may lie where a matrix product rounds otherwise
    outputs = _examine(copy.deepcopy(model).eval(), backward=True)
    save_file({name: value.detach().contiguous() for name, value in outputs.items()}, result)


def _send(
    stage: Path,
    publication: Publication,
    card: bool,
    *,
    private: bool | None,
    create_pr: bool,
    revision: str | None,
    message: str,
    token: str | None,
) -> None:
    repo_id = publication.repo_id
    if (token or get_token()) is None:
        raise PermissionError("there is no token for the Hub: run `hf auth login`, or set HF_TOKEN, with a token that may write")
    api = HfApi(token=token)
    with _explained(f"nothing was published, {repo_id!r} shows what it showed before, and nothing where it is new"):
        if not api.repo_exists(repo_id):  # a pull request may be opened where nothing may be made
            api.create_repo(repo_id, private=private)
        hidden = api.model_info(repo_id).private
        if private and not hidden:
            raise PermissionError(
                f"{repo_id!r} is public already, so that private=True cannot be kept: change it on its page, or choose another name"
            )
        if hidden and private is False:
            publication.warnings.append(f"{repo_id!r} was private before and stays so; change it on its page")
        if revision is not None and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        head = api.model_info(repo_id, revision=revision)
        there = [sibling.rfilename for sibling in head.siblings or []]
        if not card and "README.md" in there:
            with tempfile.TemporaryDirectory() as place:
                theirs = Path(api.hf_hub_download(repo_id, "README.md", revision=head.sha, local_dir=place)).read_bytes()
            if GENERATED.encode() not in theirs:
                del publication.files["README.md"]
                publication.warnings.append(
                    f"README.md of {repo_id!r} was not made here and stays; to replace it, put a README.md into the folder"
                )
        deleted = [name for name in there if _is_replaced(name) and name not in publication.files]
        operations: list[Any] = [CommitOperationAdd(name, stage / name) for name in publication.files]
        operations += [CommitOperationDelete(name) for name in deleted]
        commit = api.create_commit(
            repo_id,
            operations,
            commit_message=message,
            create_pr=create_pr,
            revision=revision,
            parent_commit=None if create_pr else head.sha,  # nobody else's commit is undone
        )
    publication.deleted = deleted
    publication.url = commit.pr_url or commit.commit_url


def _is_replaced(name: str) -> bool:
    """Of a file of the repository; what lies in its folders is not of `publish` (Trainer's last-checkpoint, weights for other programs) and stays."""
    return "/" not in name and any(fnmatch(name, pattern) for pattern in REPLACED)


@contextmanager
def _explained(state: str) -> Iterator[None]:
    """Turns the errors of a request into PermissionError or ConnectionError, with what is the case now."""
    try:
        yield
    except PermissionError:
        raise
    except (*NETWORK_ERRORS, RuntimeError) as error:  # RuntimeError: of an upload
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403):
            raise PermissionError(f"the Hub refused ({status}), {state}: the token has no right to write there. {error}") from error
        what = f"the Hub answered {status}" if status else "the Hub could not be reached or broke off"
        cause = f" ({error.__cause__})" if error.__cause__ else ""
        raise ConnectionError(f"{what}, {state}; run it again. {error}{cause}") from error
