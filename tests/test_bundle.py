"""Law 7: a saved model gives the same outputs, bit for bit, where `revdeq_hf` cannot be imported."""

import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from conftest import awake
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.dynamic_module_utils import check_python_requirements

import revdeq_hf
from revdeq_hf import RevDEQConfig, RevDEQForCausalLM, RevDEQForImageClassification, RevDEQModel, RevDEQVisionConfig, hub_revdeq
from revdeq_hf.modeling_revdeq import RevDEQPreTrainedModel

ROOT = Path(__file__).parents[1]
LANGUAGE = dict(
    vocab_size=97, hidden_size=32, intermediate_size=48, num_attention_heads=4, beta=0.8, max_steps=3, num_labels=3, pad_token_id=0
)
IMAGES = dict(hidden_sizes=[16, 32], expansion_ratios=[1, 1], max_steps=3, image_size=8, num_labels=4)
GRIDS = dict(
    hidden_sizes=[16], expansion_ratios=[1], block_type="recall", stem="plain", kernel_size=3, residual_stages=False, initial_scale=1.0
)
CLASSES = {
    "RevDEQModel": "AutoModel",
    "RevDEQForCausalLM": "AutoModelForCausalLM",
    "RevDEQForSequenceClassification": "AutoModelForSequenceClassification",
    "RevDEQForTokenClassification": "AutoModelForTokenClassification",
    "RevDEQForQuestionAnswering": "AutoModelForQuestionAnswering",
    "RevDEQVisionModel": "AutoModel",
    "RevDEQForImageClassification": "AutoModelForImageClassification",
    "RevDEQForSemanticSegmentation": "AutoModelForSemanticSegmentation",
    "RevDEQVisionBackbone": "AutoBackbone",
}
# The rest of this text runs where the package is absent, here and in test_publishing.py: `folders` holds what to load, by class.
WITHOUT_PACKAGE = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "revdeq_hf":
            raise ImportError("revdeq_hf cannot be imported here")

sys.meta_path.insert(0, Absent())
import copy, torch, transformers
from transformers.dynamic_module_utils import get_class_from_dynamic_module

def load(where, auto_class, **kwargs):
    if auto_class == "AutoBackbone" and where.startswith("/"):  # transformers looks for backbones on the Hub only
        name = transformers.AutoConfig.from_pretrained(where, trust_remote_code=True).auto_map[auto_class]
        return get_class_from_dynamic_module(name, where).from_pretrained(where)
    return getattr(transformers, auto_class).from_pretrained(where, trust_remote_code=True, **kwargs)

def first_output(model):
    # a copy, since weights that are mapped from a file may lie where a matrix product rounds otherwise
    model = copy.deepcopy(model).eval()
    if model.config.model_type == "revdeq":
        inputs = torch.arange(1, 13).reshape(1, 12)
    else:
        inputs = torch.linspace(-1, 1, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8)
    with torch.no_grad():
        output = model(inputs)[0]
    return output[-1] if isinstance(output, tuple) else output
"""


def first_output(model: torch.nn.Module) -> torch.Tensor:
    """As in the process without the package: from the same text."""
    names: dict = {}
    exec("import copy, torch\n" + WITHOUT_PACKAGE[WITHOUT_PACKAGE.index("def first_output") :], names)
    return names["first_output"](model)


def is_vision(name: str) -> bool:
    return any(word in name for word in ("Vision", "Image", "Segmentation"))


def make(name: str) -> torch.nn.Module:
    model_class = getattr(revdeq_hf, name)
    vision = is_vision(name)
    images = IMAGES | GRIDS if "Segmentation" in name else IMAGES
    model = model_class(revdeq_hf.RevDEQVisionConfig(**images) if vision else revdeq_hf.RevDEQConfig(**LANGUAGE))
    return model.eval() if vision else awake(model.eval())


def run_without_package(code: str, place: Path, python: str = sys.executable, **environment: str) -> str:
    environment = {**os.environ, "HF_HOME": str(place / "cache"), "OMP_NUM_THREADS": "1", **environment}
    text = WITHOUT_PACKAGE + "torch.set_num_threads(1)\n" + code
    done = subprocess.run([python, "-c", text], cwd=place, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def bundles(tmp_path_factory) -> Path:
    """A folder of saved models, named by their classes."""
    torch.manual_seed(0)
    place = tmp_path_factory.mktemp("bundles")
    for name in CLASSES:
        make(name).save_pretrained(place / name)
    return place


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def code_files(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*.py")}


def test_folder_holds_the_package_s_code_and_only_what_is_needed(bundles):
    shared = {
        "adjoint",
        "block",
        "certificate",
        "checks",
        "configuration",
        "evaluator",
        "fixed_point_solvers",
        "hub",
        "implicit",
        "layer",
        "license",
        "loss",
        "solver",
        "steps",
    }
    for name in CLASSES:
        vision = is_vision(name)
        own = {"modeling_revdeq_vision.py"} if vision else {f"{stem}_revdeq.py" for stem in ("cache", "generation", "modeling")}
        assert code_files(bundles / name) == own | {f"{stem}_revdeq.py" for stem in shared}
        for file in code_files(bundles / name):
            assert (bundles / name / file).read_bytes() == (ROOT / "revdeq_hf" / file).read_bytes()
        extra = [path for path in (bundles / name).iterdir() if path.suffix != ".safetensors"]
        assert sum(path.stat().st_size for path in extra) < 320_000


def test_auto_map_names_every_class_of_the_family(bundles):
    for name, auto_class in CLASSES.items():
        auto_map = json.loads((bundles / name / "config.json").read_text())["auto_map"]
        assert auto_map[auto_class].endswith(f".{name}")
        assert len(auto_map) == (5 if "revdeq_vision" in auto_map[auto_class] else 6)
        for auto, reference in auto_map.items():
            assert hasattr(transformers, auto)
            assert hasattr(sys.modules[f"revdeq_hf.{reference.split('.')[0]}"], reference.split(".")[1])


def test_licence_and_requirements_are_the_package_s(bundles):
    folder = bundles / "RevDEQForCausalLM"
    assert (folder / "LICENSE").read_text().endswith((ROOT / "LICENSE").read_text().rstrip("\n") + "\n")
    check_python_requirements(folder)  # raises unless they are met, in transformers' own reading
    bounds = [line for line in (folder / "requirements.txt").read_text().splitlines() if not line.startswith("#")]
    package = (ROOT / "pyproject.toml").read_text()
    for name in ("torch", "transformers"):
        (stated,) = re.findall(rf'"{name}([<>=][^"]+)"', package)
        assert [f"{name}{bound}" for bound in stated.split(",")] == [line for line in bounds if line.startswith(name)]
    assert hub_revdeq.__version__ == revdeq_hf.__version__ == json.loads((folder / "config.json").read_text())["revdeq_version"]


def test_same_outputs_without_the_package_and_saved_again(bundles, tmp_path, one_thread):
    """All classes in one process: each folder runs code of its own, and saves it again, also when FSDP2 has put its wrapper class around the model's."""
    expected = {name: first_output(getattr(revdeq_hf, name).from_pretrained(bundles / name)) for name in CLASSES}
    code = f"""
place, again = {str(bundles)!r}, {str(tmp_path / "again")!r}
outputs = {{}}
for name, auto_class in CLASSES.items():
    model = load(f"{{place}}/{{name}}", auto_class)
    assert type(model).__module__.split(".")[1] == name, type(model).__module__
    outputs[name] = first_output(model).contiguous()
    if name == "RevDEQForCausalLM":
        ids = model.generate(torch.arange(1, 7)[None], max_new_tokens=4, do_sample=False, draft_max_steps=1)
        assert ids.shape == (1, 10)
        model.__class__ = type(f"FSDP{{name}}", (type(model),), {{"__module__": "torch.nn.modules.linear"}})
    model.save_pretrained(f"{{again}}/{{name}}")
import shutil
for name in ("RevDEQForCausalLM", "RevDEQForImageClassification"):  # a configuration is changed in its folder, and saved alone elsewhere
    edited = shutil.copytree(f"{{again}}/{{name}}", f"edited/{{name}}")
    config = transformers.AutoConfig.from_pretrained(edited, trust_remote_code=True)
    config.max_steps = 2
    config.save_pretrained(edited)
    assert load(str(edited), CLASSES[name]).config.max_steps == 2
    config.save_pretrained(f"alone/{{name}}")
    assert list(config.auto_map) == ["AutoConfig"]
from safetensors.torch import save_file
save_file(outputs, "outputs.safetensors")
"""
    run_without_package(f"CLASSES = {CLASSES!r}\n{code}", tmp_path)
    for name, output in load_file(tmp_path / "outputs.safetensors").items():
        assert torch.equal(output, expected[name]), name
        for path in (bundles / name).iterdir():
            assert (tmp_path / "again" / name / path.name).read_bytes() == path.read_bytes(), path
        assert len(list((bundles / name).iterdir())) == len(list((tmp_path / "again" / name).iterdir()))


@pytest.mark.slow
@pytest.mark.skipif("REVDEQ_OTHER_PYTHON" not in os.environ, reason="REVDEQ_OTHER_PYTHON names no interpreter with another transformers")
def test_same_outputs_under_another_version_of_transformers_both_ways(bundles, tmp_path, one_thread):
    """There and back: saved here, loaded and saved there, loaded here."""

    def load_and_save(source: Path, target: Path, python: str) -> dict[str, torch.Tensor]:
        code = f"""
from safetensors.torch import save_file
outputs = {{}}
for name, auto_class in {CLASSES!r}.items():
    model = load(f"{source}/{{name}}", auto_class)
    outputs[name] = first_output(model).contiguous()
    model.save_pretrained(f"{target}/{{name}}")
save_file(outputs, "outputs.safetensors", metadata={{"transformers": transformers.__version__}})
"""
        run_without_package(code, tmp_path, python=python)
        with safe_open(tmp_path / "outputs.safetensors", "pt") as file:
            versions.append(file.metadata()["transformers"])
        return load_file(tmp_path / "outputs.safetensors")

    versions: list[str] = []
    there = load_and_save(bundles, tmp_path / "there", os.environ["REVDEQ_OTHER_PYTHON"])
    back = load_and_save(tmp_path / "there", tmp_path / "back", sys.executable)
    assert versions[0] != versions[1] == transformers.__version__
    for name in CLASSES:
        here = first_output(getattr(revdeq_hf, name).from_pretrained(bundles / name))
        assert torch.equal(there[name], here), name
        assert torch.equal(back[name], here), name


def test_the_installed_code_is_used_and_another_version_is_told(bundles, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(bundles / "RevDEQForCausalLM", trust_remote_code=True)
    assert type(model) is revdeq_hf.RevDEQForCausalLM
    config = json.loads((bundles / "RevDEQForCausalLM" / "config.json").read_text())
    for version in ("0.0.1", hub_revdeq.__version__):
        (tmp_path / "config.json").write_text(json.dumps({**config, "revdeq_version": version}))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            loaded = AutoConfig.from_pretrained(tmp_path)
        told = [str(warning.message) for warning in caught if "revdeq_hf" in str(warning.message)]
        assert len(told) == (version == "0.0.1")
        assert all("0.0.1" in text and hub_revdeq.__version__ in text for text in told)
        assert loaded.to_dict()["revdeq_version"] == hub_revdeq.__version__  # of the code that runs it now


@pytest.mark.parametrize(
    ("settings", "meant"),
    [
        (
            dict(betta=0.3, num_steps=9, sovler="anderson", max_iter=5, num_layers=2),
            ["beta", "max_steps", "solver", "max_steps", "num_block_layers"],
        ),
        (dict(hidden_size=3, num_layer=5, tie_last_hidden_states=True), ["hidden_sizes"]),
    ],
    ids=["language", "images"],
)
def test_a_misspelt_setting_is_told(settings, meant, tmp_path):
    kind = revdeq_hf.RevDEQVisionConfig if "hidden_sizes" in meant else revdeq_hf.RevDEQConfig
    with pytest.warns(UserWarning, match="did you mean") as told:
        config = kind(**settings)
    assert [str(warning.message) for warning in told] == [
        f"{kind.__name__} has no setting {name!r}; did you mean {guess!r}? It is kept as an attribute and changes nothing"
        for name, guess in zip(settings, meant, strict=False)
    ]
    assert all(getattr(config, name) == value for name, value in settings.items())
    config.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert kind.from_pretrained(tmp_path).to_dict() == config.to_dict()  # has been told


@pytest.mark.parametrize("name", ["RevDEQForSequenceClassification", "RevDEQVisionBackbone"])
def test_nothing_that_a_config_holds_is_taken_for_misspelt(name, tmp_path):
    cls = getattr(revdeq_hf, name)
    given = dict(
        id2label={0: "a", 1: "b", 2: "c"}, label2id={"a": 0, "b": 1, "c": 2}, dtype="bfloat16", forced_eos_token_id=3, my_note="kept"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = cls(cls.config_class(**{**(LANGUAGE if "Vision" not in name else IMAGES), "num_labels": 3}, **given))
        model.config.quantization_config = None
        model.save_pretrained(tmp_path)
        assert cls.from_pretrained(tmp_path).config.my_note == "kept"
        saved = json.loads((tmp_path / "config.json").read_text())
        assert {"auto_map", "architectures", "transformers_version", "dtype", "id2label", "revdeq_version"} <= set(saved)
        for more in ({}, dict(num_labels=2, output_attentions=True, return_dict=False)):
            cls.config_class.from_pretrained(tmp_path, **more)
        del saved["revdeq_version"]  # as one of before it was written
        cls.config_class.from_dict(saved)


def test_what_others_wrote_stays(tmp_path):
    (tmp_path / "requirements.txt").write_text("mine\n")
    (tmp_path / "LICENSE").write_text("All rights reserved\n")
    model = make("RevDEQModel")
    model.config.auto_map = {"AutoTokenizer": ["my.Tokenizer", None], "AutoModel": "somebody/else--modeling_revdeq.RevDEQModel"}
    model.save_pretrained(tmp_path)
    assert (tmp_path / "requirements.txt").read_text() == "mine\n"
    assert (tmp_path / "LICENSE").read_text() == "All rights reserved\n"
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert auto_map["AutoTokenizer"] == ["my.Tokenizer", None]
    assert auto_map["AutoModel"] == "modeling_revdeq.RevDEQModel"
    assert "model_file" not in model.config.to_dict()


def test_ours_are_replaced_when_saved_over(tmp_path):
    make("RevDEQModel").save_pretrained(tmp_path)
    path = tmp_path / "requirements.txt"
    written = path.read_text()
    path.write_text(written.replace(hub_revdeq.__version__, "0.0.1") + "old\n")
    (tmp_path / "layer_revdeq.py").write_text("old")
    make("RevDEQModel").save_pretrained(tmp_path)
    assert path.read_text() == written
    assert (tmp_path / "layer_revdeq.py").read_text() == (ROOT / "revdeq_hf" / "layer_revdeq.py").read_text()


def test_a_class_of_one_s_own_travels_as_transformers_does_it(tmp_path, monkeypatch):
    (tmp_path / "modeling_mine.py").write_text("from revdeq_hf import RevDEQForCausalLM\n\nclass Mine(RevDEQForCausalLM):\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    import modeling_mine

    modeling_mine.Mine.register_for_auto_class("AutoModelForCausalLM")
    modeling_mine.Mine(revdeq_hf.RevDEQConfig(**LANGUAGE)).save_pretrained(tmp_path / "saved")
    auto_map = json.loads((tmp_path / "saved" / "config.json").read_text())["auto_map"]
    assert auto_map["AutoModelForCausalLM"] == "modeling_mine.Mine"
    assert auto_map["AutoModel"] == "modeling_revdeq.RevDEQModel"
    assert {"modeling_mine.py", "modeling_revdeq.py"} <= code_files(tmp_path / "saved")


def test_merged_adapters_and_a_bare_configuration_bring_the_code(tmp_path):
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(make("RevDEQForCausalLM"), peft.LoraConfig(target_modules=["q_proj"], r=2))
    adapted.save_pretrained(tmp_path / "adapter")
    assert not code_files(tmp_path / "adapter")  # it names its base model
    merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    merged.config.save_pretrained(tmp_path / "config")
    assert "modeling_revdeq.py" in code_files(tmp_path / "merged")
    assert code_files(tmp_path / "merged") == code_files(tmp_path / "config")


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("RevDEQForCausalLM", "max_steps", 10**9),
        ("RevDEQForCausalLM", "hidden_size", -32),
        ("RevDEQForCausalLM", "num_block_layers", 10**9),
        ("RevDEQForCausalLM", "num_prelude_layers", 10**9),
        ("RevDEQForImageClassification", "max_steps", [3, 10**9]),
        ("RevDEQForImageClassification", "hidden_sizes", [-16, 32]),
    ],
)
def test_dangerous_values_are_refused_before_anything_is_built(bundles, tmp_path, name, field, value):
    config = json.loads((bundles / name / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, field: value}))
    with pytest.raises(
        StrictDataclassError, match=rf"{field}.* got .*{value if isinstance(value, int) else min(value, key=lambda n: -abs(n))}"
    ):
        AutoConfig.from_pretrained(tmp_path)


def test_weights_of_another_shape_or_cut_short_are_refused(bundles, tmp_path):
    folder = bundles / "RevDEQForCausalLM"
    for name in ("config.json", "generation_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, "lm_head.weight": torch.zeros(5, 32)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match="mismatch"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(SafetensorError):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_saving_a_model_that_ran_with_other_settings_is_told(tmp_path):
    """The folder would hold another model than the one that was measured."""
    for model, layers in (
        (
            RevDEQForCausalLM(RevDEQConfig(vocab_size=20, hidden_size=16, intermediate_size=16, num_attention_heads=2)),
            lambda m: [m.model.solve],
        ),
        (RevDEQForImageClassification(RevDEQVisionConfig(hidden_sizes=[16, 32], expansion_ratios=[1, 1])), lambda m: m.model.stages),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model.save_pretrained(tmp_path)
            model.config.beta = 0.9  # reaches the layers with the next call
            model.save_pretrained(tmp_path)
        for layer in layers(model):
            layer.damping = 0.5
        with pytest.warns(UserWarning, match=r"differ: damping=0\.0 \(run with 0\.5\)\."):
            model.save_pretrained(tmp_path)
        model.config.damping = 0.5
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model.save_pretrained(tmp_path)
        assert (type(model).from_pretrained(tmp_path).config.beta, model.config.damping) == (0.9, 0.5)


def test_settings_reach_wrapped_layers_and_saving_knows_whose_they_are(tmp_path):
    """Where the body has another name, the layer is wrapped, or the head has got a configuration of its own."""

    class Mine(RevDEQPreTrainedModel):
        def __init__(self, config: RevDEQConfig) -> None:
            super().__init__(config)
            self.encoder = RevDEQModel(config)

    config = RevDEQConfig(vocab_size=20, hidden_size=16, intermediate_size=16, num_attention_heads=2)
    Mine(config).save_pretrained(tmp_path / "mine")
    model = RevDEQForCausalLM(config)
    inner, ids = model.model.solve, torch.arange(6)[None]
    model.model.solve = checkpoint_wrapper(inner)
    model.config.damping = 0.25
    model(ids)
    assert inner.damping == 0.25
    model.model.solve = inner
    model.config = RevDEQConfig(**{**config.to_diff_dict(), "damping": 0.75})  # the body keeps its own
    with pytest.warns(UserWarning, match=r"differ: damping=0\.75 \(run with 0\.25\)"):
        model.save_pretrained(tmp_path / "other")
