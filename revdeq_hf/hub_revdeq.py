# Copyright 2026 The revdeq_hf authors. Licensed under the Apache License, Version 2.0.
"""What does a saved model bring along, so that it loads where this package is not installed?

Its configuration writes it, next to `config.json`: the code files it needs (some 300 kB), `auto_map` with the names of its classes, `requirements.txt`
and `LICENSE`. transformers' own way, `register_for_auto_class`, names the saved class only, and takes FSDP2's wrapper class for the model's own.
"""

import shutil
import warnings
from collections.abc import Iterable
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.dynamic_module_utils import get_relative_import_files

from .layer_revdeq import fixed_point_layers
from .license_revdeq import LICENSE

__version__ = "0.1.0"

# of the code, not of the weights; one bound a line, as transformers' check_python_requirements reads them
REQUIREMENTS = ("torch>=2.11", "transformers>=5.17", "transformers<6")

AUTO_MAPS = {
    "RevDEQConfig": {
        "AutoConfig": "configuration_revdeq.RevDEQConfig",
        "AutoModel": "modeling_revdeq.RevDEQModel",
        "AutoModelForCausalLM": "modeling_revdeq.RevDEQForCausalLM",
        "AutoModelForSequenceClassification": "modeling_revdeq.RevDEQForSequenceClassification",
        "AutoModelForTokenClassification": "modeling_revdeq.RevDEQForTokenClassification",
        "AutoModelForQuestionAnswering": "modeling_revdeq.RevDEQForQuestionAnswering",
    },
    "RevDEQVisionConfig": {
        "AutoConfig": "configuration_revdeq.RevDEQVisionConfig",
        "AutoModel": "modeling_revdeq_vision.RevDEQVisionModel",
        "AutoModelForImageClassification": "modeling_revdeq_vision.RevDEQForImageClassification",
        "AutoModelForSemanticSegmentation": "modeling_revdeq_vision.RevDEQForSemanticSegmentation",
        "AutoBackbone": "modeling_revdeq_vision.RevDEQVisionBackbone",
    },
}

# what other projects call a setting, where the spelling does not tell
ELSEWHERE = {
    "max_iter": "max_steps",
    "f_max_iter": "max_steps",
    "num_iterations": "max_steps",
    "num_steps": "max_steps",
    "solver_steps": "max_steps",
    "steps": "max_steps",
    "tolerance": "tol",
    "relaxation": "beta",
    "tau": "beta",
    "num_layers": "num_block_layers",
    "n_layer": "num_block_layers",
    "dropout": "hidden_dropout",
    "layer_norm_eps": "norm_eps",
}

UNDECLARED = {"tie_last_hidden_states"}  # a setting of transformers' that is no field

# that a model's fixed-point layers take from its configuration when they are made, and when it is changed
SOLVER_SETTINGS = (
    *("beta", "tol", "gradient", "solver", "keep_evaluations", "steps_sampling", "drift_policy"),
    *("damping", "initial_scale", "path_noise", "num_restarts"),
)

# that are not transformers' own
GENERATION_SETTINGS = ("max_steps", "tol", "draft_max_steps")

# of these, and of what is theirs besides, a call cannot change anything
NOT_PER_CALL = {*SOLVER_SETTINGS, "z0", "measure_mask"} - {"tol", "num_restarts"}


def refuse_settings(call: Iterable[str]) -> None:
    """Raises ValueError where keywords of a model's call are settings of its solves, which would be passed over without a word."""
    found = sorted(NOT_PER_CALL.intersection(call))
    if found:
        raise ValueError(
            f"{', '.join(found)}: settings of the model's fixed-point layers, not of a call (max_steps and tol are). They are given when the model is made or "
            "loaded, from_pretrained(folder, beta=0.5), or set on the layers: for _, layer in revdeq_hf.fixed_point_layers(model): layer.beta = 0.5"
        )


_MARK = "# The code files (*.py) of this folder, revdeq_hf "


class BundledConfig:
    """Mixed into both configurations: saving one saves its model's code; a version other than this one, and a misspelt setting, are told.

    `config.json` states the version of the code that wrote it as `revdeq_version`.
    """

    def __post_init__(self, **kwargs: Any) -> None:
        written = kwargs.pop("revdeq_version", None)
        if written is None:  # what a saved one holds besides has been told, or is another library's
            self._warn_of_misspelt(kwargs)
        super().__post_init__(**kwargs)  # type: ignore[misc]
        if written is not None and written != __version__:
            warnings.warn(
                f"this model was saved by revdeq_hf {written} and is run by the code of revdeq_hf {__version__}, whose numbers may differ (see the "
                f"heading Numerics of its CHANGELOG.md): install revdeq_hf {written}, or, where trust_remote_code=True may be used, load it in a process "
                "that has not imported revdeq_hf, which runs the code saved with the model",
                stacklevel=2,
            )

    def _warn_of_misspelt(self, names: Iterable[str]) -> None:
        """transformers keeps a keyword that is no field as an attribute, whatever it is."""
        settings = [field.name for field in fields(self)]  # type: ignore[arg-type]
        for name in names:
            meant = [ELSEWHERE[name]] if ELSEWHERE.get(name) in settings else get_close_matches(name, settings, n=1, cutoff=0.75)
            if meant and not hasattr(type(self), name) and not hasattr(GenerationConfig(), name) and name not in UNDECLARED:
                warnings.warn(
                    f"{type(self).__name__} has no setting {name!r}; did you mean {meant[0]!r}? It is kept as an attribute and changes nothing",
                    stacklevel=3,
                )

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "revdeq_version": __version__}  # type: ignore[misc]

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs: Any) -> None:
        """As transformers', and with the code; a class derived from these configurations is left to `register_for_auto_class`."""
        model_file = self.__dict__.pop("model_file", None)  # of a model that is being saved
        own = AUTO_MAPS.get(type(self).__name__)
        if own is None:
            super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)  # type: ignore[misc]
            return
        module = own["AutoModel"].split(".")[0]
        folder, code = Path(save_directory), Path(model_file or Path(__file__).with_name(f"{module}.py"))
        if not code.is_file():  # as remote code from a folder: transformers keeps the configuration's files apart from the model's
            code, saved = Path(__file__).with_name("configuration_revdeq.py"), folder / "configuration_revdeq.py"
            if not (saved.is_file() and saved.read_bytes() == code.read_bytes() and (folder / f"{module}.py").is_file()):
                own = {"AutoConfig": own["AutoConfig"]}
        before = getattr(self, "auto_map", None) or {}
        self.auto_map = own | {key: name for key, name in before.items() if not _is_ours(name)}
        super().save_pretrained(folder)  # type: ignore[misc]
        for file in {str(code), *get_relative_import_files(code)}:
            shutil.copyfile(file, folder / Path(file).name)
        _write_unless_foreign(folder / "requirements.txt", "need:\n" + "\n".join(REQUIREMENTS) + "\n")
        _write_unless_foreign(
            folder / "LICENSE", "are licensed as follows; what holds for the weights, their model card says.\n\n" + LICENSE
        )
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", folder.name), **kwargs)  # type: ignore[attr-defined]


class BundledModel:
    """Mixed into the models' base classes, which state the file that defines them as `model_file = __file__`."""

    model_file: str

    def _remember_configuration(self, layers: Iterable[Any]) -> None:
        """To be called when the layers have been made from it."""
        self._layers_steps = [layer.max_steps for layer in layers]
        self._configured = self._solver_settings()

    def _solver_settings(self) -> dict[str, Any]:
        found = {name: getattr(self.config, name) for name in SOLVER_SETTINGS}  # type: ignore[attr-defined]
        return found | {"steps_sampling": found["steps_sampling"] and dict(found["steps_sampling"])}

    def _follow_configuration(self, layers: Iterable[Any]) -> None:
        """Sets on the fixed-point layers what was changed in the configuration since; what was set on them stays otherwise.

        A setting is held three times: by the configuration, by the layers, and by `_configured`, which is the configuration as the layers last saw it. Of the
        first two the one that differs from it was changed, and wins; if both were, the configuration.

        Raises:
            StrictDataclassError: the configuration is none that a model could be made from.
            ValueError: `max_steps` was set on a layer: a model runs, and caches for, its configuration's.
        """
        now = self._solver_settings()
        if now != self._configured:
            if torch.compiler.is_compiling():  # torch 2.11 cannot trace the rest of what transformers validates
                self.config.validate_solver()  # type: ignore[attr-defined]
            else:
                self.config.validate()  # type: ignore[attr-defined]
            for _, layer in fixed_point_layers(self):  # type: ignore[arg-type]  # not of what they may be wrapped in, where it would stay
                for name, value in now.items():
                    if value != self._configured[name]:
                        setattr(layer, name, dict(value) if isinstance(value, dict) else value)
            self._configured = now
        steps = [layer.max_steps for layer in layers]
        if steps != self._layers_steps:
            raise ValueError(
                f"max_steps of the model's fixed-point layers was changed from {self._layers_steps} to {steps}, and is not what a model runs; give "
                "max_steps in the call, or set it in the configuration, model.config.max_steps"
            )

    def save_pretrained(self, save_directory, *args: Any, **kwargs: Any) -> None:
        config = self.config  # type: ignore[attr-defined]
        self._warn_of_settings_that_differ()
        generation: Any = getattr(self, "generation_config", None)
        if any(hasattr(generation, name) for name in GENERATION_SETTINGS):
            generation._from_model_config = False  # else loading passes over every field that is not transformers' own
        config.model_file = self.model_file
        try:
            super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        finally:
            config.__dict__.pop("model_file", None)

    def _warn_of_settings_that_differ(self) -> None:
        """What is saved is the configuration, and what has been run are the layers, on which other settings may have been set."""
        config, differ = self.config, {}  # type: ignore[attr-defined]
        following = [part for part in self.modules() if hasattr(part, "_configured") and part.config is config]  # type: ignore[attr-defined]
        configured = {id(layer): part._configured for part in following for _, layer in fixed_point_layers(part)}
        for _, module in fixed_point_layers(self):  # type: ignore[arg-type]
            if all(hasattr(config, name) for name in SOLVER_SETTINGS):
                for name, saved in self._solver_settings().items():
                    used = getattr(module, name)
                    # with the next call; or it changes no result
                    reaches = name == "drift_policy" or saved != configured.get(id(module), {}).get(name, saved)
                    if saved != used and not reaches and not (name == "beta" and abs(saved - used) < 1e-6):  # a nearby fraction
                        differ[name] = f"{name}={saved!r} (run with {used!r})"
        if differ:
            warnings.warn(
                f"the configuration being saved and the layers that have been run differ: {', '.join(differ.values())}. What is set on layers is not "
                "saved; set it in the configuration, whose changes reach the layers with the next call",
                stacklevel=3,
            )

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoModel") -> None:
        """As transformers', for classes derived from ours, whose file is then saved too. Ours, which it registers as it loads them, need none of it."""
        if not _is_ours(f"{cls.__module__.split('.')[-1]}.{cls.__name__}"):
            super().register_for_auto_class(auto_class)  # type: ignore[misc]


def may_look(values: torch.Tensor) -> bool:
    """Whether values can be checked for free: on an accelerator the host would wait, in a compiled graph the look would break it."""
    return values.device.type == "cpu" and values.numel() > 0 and not torch.compiler.is_compiling()


def _is_ours(class_reference: Any) -> bool:
    """Whether a value of an auto map, `module.Class` or `user/name--module.Class`, names a class of these files."""
    return isinstance(class_reference, str) and any(class_reference.split("--")[-1] in own.values() for own in AUTO_MAPS.values())


def _write_unless_foreign(path: Path, text: str) -> None:
    """Writes a file of ours, new or again; one that somebody else wrote stays as it is."""
    if path.is_file() and not path.read_text(encoding="utf-8", errors="replace").startswith(_MARK):
        return
    path.write_text(f"{_MARK}{__version__}, {text}", encoding="utf-8")
