#!/usr/bin/env python
"""Shows how a language model's fixed point converges while it writes: what it would say after each step, token by token.

    python examples/train_language.py --output_dir runs/language
    python examples/show_fixed_point.py --model runs/language --prompt "def read_"

Writes `fixed_point.png` (for each step and position the predicted token, coloured by how far its distribution is from the last step's, and the
residual) and `convergence.png` into the model's folder, and prints the same figures as text.
"""

import argparse
from pathlib import Path

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, AutoTokenizer

from revdeq_hf import diagnose, logit_lens
from revdeq_hf.training import print_table


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", default="runs/language", help="folder or name of a saved model with its tokenizer")
    parser.add_argument("--prompt", default="def read_", help="beginning of the text")
    parser.add_argument("--new_tokens", type=int, default=24, help="tokens that the model writes after it")
    parser.add_argument("--steps", type=int, default=None, help="steps of the solve to look at; default: twice the model's own")
    parser.add_argument("--output", default=None, help="folder for the figures; default: that of the model")
    options = parser.parse_args(arguments)
    config = AutoConfig.from_pretrained(options.model)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:  # it has no tokenizer either, of which transformers would say less
        kind = ", ".join(config.architectures or [type(config).__name__])
        raise ValueError(
            f"--model: {options.model!r} is a {kind} (model_type {config.model_type!r}); expected a language model, as train_language.py saves"
        )
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model).eval()
    folder = Path(options.output or options.model)
    if not folder.is_dir():
        raise FileNotFoundError(f"--output: there is no folder {str(folder)!r} to write the figures to")
    if getattr(model.config, "max_steps", None) is None:
        raise ValueError(f"--model: {options.model!r} is a {type(model).__name__}, which has no fixed point to show")
    if options.steps is not None and options.steps < 1:
        raise ValueError(f"--steps must be at least 1, got {options.steps}")
    ids = tokenizer(options.prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
    if not ids.numel():
        raise ValueError("--prompt must hold at least one token, got none")
    torch.manual_seed(0)
    ids = model.generate(ids, max_new_tokens=options.new_tokens, do_sample=True, top_p=0.9, pad_token_id=tokenizer.eos_token_id)
    print(tokenizer.decode(ids[0]))

    steps = options.steps or 2 * model.config.max_steps
    lens = logit_lens(model, ids, max_steps=steps)
    words = [tokenizer.decode([token]) for token in ids[0].tolist()]
    settled, residual = lens.settled[0].tolist(), lens.residual[-1, 0].tolist()
    said = [tokenizer.decode([token]) for token in lens.tokens[-1, 0, :, 0].tolist()]
    rows = [[repr(word), repr(next_word), step, value] for word, next_word, step, value in zip(words, said, settled, residual, strict=True)]
    print_table(["token", "most probable next", "settled at step", "residual"], rows)
    lens.plot(folder / "fixed_point.png", [repr(word)[1:-1] for word in words], tokenizer)

    found = diagnose(model, ids, max_steps=steps)
    assert isinstance(found, dict)
    for name, diagnosis in found.items():
        print(f"\n{name}: {diagnosis}")
        diagnosis.plot(folder / "convergence.png")
    print(f"\nfigures: {folder / 'fixed_point.png'}, {folder / 'convergence.png'}")


if __name__ == "__main__":
    main()
