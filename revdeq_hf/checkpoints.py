"""Checkpoints of transformers' Trainer: which are whole, which one to go on from, what is told where one cannot be written; and what it sends to the Hub."""

import json
import os
import shutil
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from safetensors import SafetensorError, safe_open
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .flops import training_flops
from .hub_revdeq import BundledConfig
from .publishing import BundleCallback, publish

STATE = "trainer_state.json"
# what a checkpoint holds, by the names that Trainer gives; global_step* is DeepSpeed's
PARTS = {
    "weights": ("model*.safetensors", "**/adapter_model*.safetensors", "pytorch_model*", "global_step*"),
    "optimizer state": ("optimizer*", "global_step*"),
    "schedule": ("scheduler.pt", "global_step*"),
    "state of the random number generators": ("rng_state*",),
}
# fields of a configuration that the library, the Trainer or the first step sets
FREE_FIELDS = {
    "_name_or_path",
    "transformers_version",
    "auto_map",
    "architectures",
    "dtype",
    "use_cache",
    "problem_type",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
}
# what is named otherwise on the command line, where max_steps are updates
FLAGS = {"max_steps": "--solver_steps, of think_longer.py --train_steps"}


def checkpoint_defect(folder: str | os.PathLike) -> str | None:
    """Why a checkpoint cannot be gone on from, or None if it is whole. Reads the ends of its files, and unpickles nothing.

    Trainer writes weights, optimizer, schedule, generators and `trainer_state.json`, in this order, and deletes older checkpoints after that.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return "there is no such folder"
    if not (folder / STATE).is_file():
        return f"{STATE}, which is written last, is missing"
    for part, patterns in PARTS.items():
        if not any(True for pattern in patterns for _ in folder.glob(pattern)):
            return f"the {part} is missing ({', '.join(patterns)})"
    return next(filter(None, map(_file_defect, sorted(folder.rglob("*")))), None)


def _file_defect(path: Path) -> str | None:
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt"):  # compares the header with the length of the file
                pass
        elif path.suffix in {".pt", ".pth", ".bin"}:  # torch.save writes zip files, whose directory is at the end
            zipfile.ZipFile(path).close()
        elif path.suffix == ".json":
            content = json.loads(path.read_text(encoding="utf-8"))
            if path.name.endswith(".index.json"):
                missing = sorted(file for file in set(content["weight_map"].values()) if not (path.parent / file).is_file())
                if missing:
                    return f"{', '.join(missing)}, named in {path.name}, is missing"
    except (SafetensorError, zipfile.BadZipFile, json.JSONDecodeError, UnicodeDecodeError) as error:
        return f"{path.name} is cut short or damaged ({error})"
    if path.suffix == ".distcp" and not (path.parent / ".metadata").is_file():
        return f"{path.parent.name} has no .metadata, which is written last"
    return None


def _checkpoints(folder: str | os.PathLike) -> list[Path]:
    """Whole or not, the newest first."""
    numbered = ((path.name.rsplit("-", 1)[1], path) for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*"))
    return [path for _, path in sorted(((int(number), path) for number, path in numbered if number.isdigit()), reverse=True)]


def last_whole_checkpoint(folder: str | os.PathLike) -> str | None:
    """The newest whole checkpoint of a Trainer's output folder, or None."""
    return next((str(path) for path in _checkpoints(folder) if checkpoint_defect(path) is None), None)


def _holds_a_model_alone(folder: Path) -> bool:
    """Whether it is a checkpoint that `save_only_model` wrote."""
    there = {part for part, patterns in PARTS.items() if any(True for pattern in patterns for _ in folder.glob(pattern))}
    return (folder / STATE).is_file() and there == {"weights"}


def checkpoint_to_resume(args: TrainingArguments) -> str | None:
    """The checkpoint that `--resume_from_checkpoint` means: a folder, or with "true" the newest whole one of the output folder.

    Raises:
        FileNotFoundError: there is none.
        FileExistsError: a new run would overwrite the checkpoints of an earlier one.
    """
    wanted, folder = args.resume_from_checkpoint, args.output_dir or "."
    if not wanted or str(wanted).lower() == "false":
        earlier = last_whole_checkpoint(folder)
        if earlier is not None:
            raise FileExistsError(
                f"{folder!r} holds checkpoints of an earlier run, {Path(earlier).name} among them: go on from it with --resume_from_checkpoint true, "
                "or choose another --output_dir, or delete them"
            )
        models = next(filter(_holds_a_model_alone, _checkpoints(folder)), None)
        if models is not None:
            raise FileExistsError(
                f"{folder!r} holds models of an earlier run, {models.name} among them, without what it takes to go on (--save_only_model): choose another "
                "--output_dir, or delete them"
            )
        return None
    return _named_or_newest(True if str(wanted).lower() == "true" else wanted, folder)


def _named_or_newest(wanted: str | os.PathLike | bool, folder: str | os.PathLike) -> str:
    """The checkpoint of this path, or (True) the newest whole one of the output folder; FileNotFoundError where it is not whole, or there is none."""
    if wanted is True:
        found = last_whole_checkpoint(folder)
        if found is None:
            raise FileNotFoundError(f"--resume_from_checkpoint true: there is no whole checkpoint in {folder!r}; start without the flag")
        return found
    found = os.fspath(wanted)  # type: ignore[arg-type]
    defect = checkpoint_defect(found)
    if defect is not None:
        raise FileNotFoundError(f"--resume_from_checkpoint: {found!r} is not a whole checkpoint: {defect}")
    return found


def check_same_model(config: Any, checkpoint: str | os.PathLike) -> None:
    """Compares a model's configuration with the one in a checkpoint (adapters have none).

    Raises:
        ValueError: they differ.
    """
    path = Path(checkpoint) / "config.json"
    if not path.is_file():
        return
    there, here = json.loads(path.read_text(encoding="utf-8")), config.to_dict()
    if there.get("model_type") == here["model_type"]:
        there = type(config).from_json_file(path).to_dict()  # with the fields that have their defaults
    names = sorted((there.keys() & here.keys()) - FREE_FIELDS)
    differing = [
        f"{name}{f' ({FLAGS[name]})' if name in FLAGS else ''} {there[name]!r} instead of {here[name]!r}"
        for name in names
        if there[name] != here[name]
    ]
    if differing:
        raise ValueError(
            f"the checkpoint {str(checkpoint)!r} is of another model, it has {'; '.join(differing)}: give the settings that the run was started with, "
            "or start a new run from its weights with --model_name_or_path"
        )


class TrainingClock(TrainerCallback, ExportableState):
    """How long a training has taken, in seconds; what it took before an interruption comes from the checkpoint."""

    def __init__(self) -> None:
        self.earlier = 0.0
        self.began: float | None = None

    @property
    def seconds(self) -> float:
        """So far, each process by its own clock; 0 before and after the training."""
        return 0.0 if self.began is None else self.earlier + time.perf_counter() - self.began

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        # a checkpoint that was written without a clock knows of none
        self.earlier = state.stateful_callbacks.setdefault(type(self).__name__, self.state())["attributes"]["earlier"]
        self.began = time.perf_counter()

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self.began = None

    def state(self) -> dict:
        return {"args": {}, "attributes": {"earlier": self.seconds}}


class _GroupedByEpoch(LengthGroupedSampler):
    """transformers' sampler for `group_by_length`, in an order that follows from the seed and the epoch, as that of its other strategies does: by itself it
    draws from the global generator, which has moved otherwise in a run that is resumed, or on another rank."""

    def __init__(self, sampler: LengthGroupedSampler, seed: int) -> None:
        self.batch_size, self.lengths, self.seed = sampler.batch_size, sampler.lengths, seed
        self.generator = torch.Generator()
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Called by Trainer's data loader before each epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.generator.manual_seed(self.seed + self.epoch)
        return super().__iter__()


class ResumableTrainer(Trainer):
    """Trainer that goes on from whole checkpoints of the same model, tells what to do where one cannot be written, and pushes what `publish` sends.

    The last update is logged, whatever `logging_steps`, so that a short training has its figures, too; with `logging_strategy="no"` nothing is. Beside
    `train_runtime`, which is that of this call of `train`, metrics and log have `train_seconds`, those of the whole training, interrupted or not.
    """

    hub_model_id: str | None

    def __init__(self, *arguments: Any, **kwargs: Any) -> None:
        super().__init__(*arguments, **kwargs)
        if self.accelerator.mixed_precision == "fp16" and self.accelerator.device.type == "cpu":
            raise ValueError(
                "fp16 needs a gradient scaler, which accelerate has for accelerators only; on the CPU use --bf16 true --use_cpu true instead of --fp16"
            )
        started = int(os.environ.get("WORLD_SIZE", "1"))
        if self.args.world_size != started:
            raise ValueError(
                f"{started} processes were started, but each would train by itself into {self.args.output_dir!r} (world size {self.args.world_size}); on "
                "CPUs add --use_cpu true"
            )
        if self.args.n_gpu > 1:
            raise ValueError(
                f"one process sees {self.args.n_gpu} accelerators, of which Trainer would make an nn.DataParallel, whose copies of the weights get no exact "
                f"gradient: start one process for each (torchrun --nproc_per_node {self.args.n_gpu} SCRIPT ...), or show it one (CUDA_VISIBLE_DEVICES=0)"
            )
        self.add_callback(TrainingClock())
        if self.args.push_to_hub:
            self.add_callback(BundleCallback())

    @property
    def clock(self) -> TrainingClock:
        """That of the callbacks, which `restore_callback_states_from_checkpoint` makes anew."""
        return next(callback for callback in self.callback_handler.callbacks if isinstance(callback, TrainingClock))

    def log(self, logs: dict[str, float], *arguments: Any, **kwargs: Any) -> None:
        if "train_runtime" in logs:
            logs["train_seconds"] = round(logs["train_runtime"] + self.clock.earlier, 4)
        super().log(logs, *arguments, **kwargs)

    def train(self, resume_from_checkpoint: str | os.PathLike | bool | None = None, **kwargs: Any):
        """transformers' `train`; True goes on from the newest whole checkpoint of the output folder.

        Raises:
            FileNotFoundError: it is no whole checkpoint, or there is none.
            ValueError: it is one of another model.
        """
        if resume_from_checkpoint:
            found = _named_or_newest(resume_from_checkpoint, self.args.output_dir)
            config = getattr(self.model, "config", None)
            if config is not None:  # a plain module has none
                check_same_model(config, found)
            resume_from_checkpoint = found
        try:
            return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        finally:
            self.clock.began = None  # of a training that failed, too

    def _get_train_sampler(self, *arguments: Any, **kwargs: Any) -> Any:
        sampler = super()._get_train_sampler(*arguments, **kwargs)
        if isinstance(sampler, LengthGroupedSampler) and sampler.generator is None:
            return _GroupedByEpoch(sampler, self.args.seed if self.args.data_seed is None else self.args.data_seed)
        return sampler

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Of the micro-batch just trained on: Trainer's own `total_flos` takes a loop for a single evaluation."""
        return training_flops(self.model) or super().floating_point_ops(inputs)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        if self.state.global_step >= self.state.max_steps:  # killed between the last update and the end: nothing is left to train
            self.control.should_training_stop = True
            return [], None
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def _maybe_log_save_evaluate(self, *arguments: Any, **kwargs: Any) -> None:
        if self.control.should_training_stop and self.args.logging_strategy != "no":
            self.control.should_log = True  # Trainer itself logs no update twice
        super()._maybe_log_save_evaluate(*arguments, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if _internal_call:  # of a checkpoint
            return super().save_model(output_dir, _internal_call)
        with self._written(output_dir or self.args.output_dir):
            super().save_model(output_dir, _internal_call=True)
        if self.args.push_to_hub:
            self.push_to_hub("Model save")

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **card: Any,
    ):
        """Saves the model and sends it by `revdeq_hf.publishing.publish`, with its checks, its card and its errors; an adapter or a model of another kind
        as Trainer does.

        Args:
            commit_message, token, revision, private: as in `publish`; default: the hub_ arguments of the TrainingArguments.
            blocking: must be True for a model of this package.
            card: entries of Trainer's card; refused for a model of this package, whose card is made from results.

        Returns:
            The Publication on the first process, None on others; for other models what Trainer returns.
        """
        model = self.accelerator.unwrap_model(self.model)
        if not isinstance(getattr(model, "config", None), BundledConfig) or hasattr(model, "peft_config"):
            if private is not None:  # transformers 5.17 does not know it
                card["private"] = private
            return super().push_to_hub(commit_message, blocking, token, revision, **card)
        if card or not blocking:
            unused = sorted(card) + ([] if blocking else ["blocking=False"])
            raise ValueError(
                f"push_to_hub got {', '.join(unused)}, which it has no use for: the card is made from the results in {self.args.output_dir!r}, write your own "
                "README.md there to have another; the checks end before it returns"
            )
        with self._written(self.args.output_dir):
            self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        token = token or self.args.hub_token
        private = self.args.hub_private_repo if private is None else private
        if self.hub_model_id is None:  # not made at the start, since it was not to be pushed then
            name = self.args.hub_model_id or Path(self.args.output_dir).absolute().name
            self.hub_model_id = HfApi(token=token).create_repo(name, private=private, exist_ok=True).repo_id
        return publish(
            self.args.output_dir,
            self.hub_model_id,
            private=private,
            revision=revision or self.args.hub_revision,
            commit_message=commit_message or "End of training",
            token=token,
        )

    def _save_checkpoint(self, model, trial) -> None:
        folder = Path(self._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save and folder.is_dir():  # what a kill left of it; written over it would look whole too early
            shutil.rmtree(folder)
        self.accelerator.wait_for_everyone()
        with self._written(folder):
            super()._save_checkpoint(model, trial)

    @contextmanager
    def _written(self, folder: str | os.PathLike) -> Iterator[None]:
        try:
            yield
        except (OSError, RuntimeError, SafetensorError) as error:  # of files, torch.save and safetensors
            output = self.args.output_dir
            if Path(folder).name.startswith(PREFIX_CHECKPOINT_DIR):
                shutil.rmtree(folder, ignore_errors=True)  # makes room
            last = last_whole_checkpoint(output)
            free = f"{shutil.disk_usage(output).free / 1e6:,.1f} MB are free there; " if Path(output).is_dir() else ""
            rest = (
                f"the last whole checkpoint is {last!r}, go on with --resume_from_checkpoint true"
                if last
                else "there is no whole checkpoint"
            )
            raise OSError(f"{str(folder)!r} could not be written: {error}. Make room ({free}{rest})") from error
