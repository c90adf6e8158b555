"""The house: what a newcomer meets first works, and documentation does not lie."""

import doctest
import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import revdeq_hf

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", [module.name for module in pkgutil.iter_modules(revdeq_hf.__path__)])
def test_docstring_examples_run(name):
    module = importlib.import_module(f"revdeq_hf.{name}")
    result = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
    assert result.failed == 0
    if name in ("layer_revdeq", "configuration_revdeq"):
        assert result.attempted > 0


@pytest.mark.parametrize(
    "name", ["README.md", "docs/layer.md", "docs/language_model.md", "docs/image_model.md", "docs/think_longer.md", "docs/sharing.md"]
)
def test_examples_of_the_documentation_run(name):
    """The python blocks of a page one after another, as a reader would type them."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), re.S)
    assert blocks
    names: dict = {}
    for block in blocks:
        exec(compile(block, name, "exec"), names)


def test_readme_begins_with_the_two_commands():
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    assert "examples/train_language.py" in blocks[0]
    assert "AutoModelForCausalLM.from_pretrained" in blocks[0]
    assert "pytest" in blocks[1]
    assert all(block.startswith("python3 -m venv") for block in blocks[:2])


def test_import_is_light_and_registers_the_models():
    """Nothing is imported beyond what transformers' own model files import (5.17 imports scikit-learn for generation, where it finds it)."""
    code = (
        "import sys, transformers.models.llama.modeling_llama, transformers.models.vit.modeling_vit\n"
        "before = set(sys.modules)\n"
        "import revdeq_hf\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before} - {'revdeq_hf', 'torch', 'transformers'} - set(sys.stdlib_module_names)\n"
        "from transformers import AutoConfig\n"
        "print(sorted(new), type(AutoConfig.for_model('revdeq')).__name__, type(AutoConfig.for_model('revdeq_vision')).__name__)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[] RevDEQConfig RevDEQVisionConfig"


def test_files_that_travel_import_only_what_can_follow():
    for path in (ROOT / "revdeq_hf").glob("*_revdeq*.py"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"^\s*(from \. import|from \.\.|from \.\w+\.\w+ import|(import|from) revdeq_hf)", text, re.M), path.name
        assert "# Copyright 2026" in text
        assert "from __future__ import annotations" not in text


def test_nothing_unpickles():
    for folder in ("revdeq_hf", "examples"):
        for path in (ROOT / folder).rglob("*.py"):
            assert not re.search(r"pickle\.load|torch\.load\(", path.read_text(encoding="utf-8")), path.name
