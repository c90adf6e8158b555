# Copyright 2026 The revdeq_hf authors. Licensed under the Apache License, Version 2.0.
"""What `generate` needs beyond transformers' own: caches for the steps of a call, and a model that drafts for itself."""

import copy
import functools
import threading
from typing import Any

from transformers.generation import GenerationConfig, GenerationMixin
from transformers.generation.candidate_generator import AssistedCandidateGenerator, CandidateGenerator

from .cache_revdeq import CACHE_NAME
from .configuration_revdeq import RevDEQConfig
from .hub_revdeq import GENERATION_SETTINGS
from .steps_revdeq import check_steps

# How a model drafts for itself, where nothing else is asked for. A draft of the same weights is wrong where few steps differ from all, not where it is
# unsure, so no threshold ends it; its length follows what was accepted.
DRAFTING = {"num_assistant_tokens": 5, "num_assistant_tokens_schedule": "heuristic_transient", "assistant_confidence_threshold": 0.0}

OWN_ARGUMENTS = {"max_steps", "tol"}  # of a call, which mean nothing to another model that drafts for this one

VERIFYING = "verifying"  # what assisted decoding passes to `prepare_inputs_for_generation`

_LOCK = threading.RLock()  # held while a model shows transformers another config than its own


class RevDEQGenerationMixin(GenerationMixin):
    """`generate` with `max_steps`, `tol` and `draft_max_steps`; everything else is transformers'."""

    config: RevDEQConfig
    generation_config: GenerationConfig

    def generate(self, inputs=None, generation_config=None, *args, draft_max_steps: int | None = None, **kwargs):
        """transformers' `generate`, and

        Args:
            max_steps, tol (`int` and `float`, *optional*): steps of every solve, and the residual at which a token stops, instead of those of the config. An
                `assistant_model` keeps its own. Like `draft_max_steps` they may be fields of the generation config, of the model's or of the call's.
            draft_max_steps (`int`, *optional*): the model drafts for itself: solves of so few steps propose tokens one by one, one solve of all steps
                verifies them together. Greedy decoding gives the very tokens of plain greedy decoding (sampling the same distribution; with
                `kv_cache="shared"` at the fixed point only). Drafts begin with
                5 tokens, 2 more after each that was accepted whole, 1 less after others; `num_assistant_tokens`, `num_assistant_tokens_schedule` and
                `assistant_confidence_threshold`, here or in the generation config, change that. As all assisted decoding in transformers it takes one
                sequence at a time and a dynamic cache. `assistant_early_exit`, whose exits are steps here, does the
                same with transformers' own defaults for the drafts.

        Raises:
            ValueError: `draft_max_steps` is not below the steps of a full solve; `output_solver_stats`; or what transformers' `generate` raises.
        """
        if kwargs.pop("output_solver_stats", None):
            raise ValueError(
                "generate returns no solver statistics: call the model with the tokens, model(generated, output_solver_stats=True), whose steps and "
                "residuals of each are those of its generation"
            )
        if draft_max_steps is not None:
            kwargs["draft_max_steps"] = draft_max_steps
        # into the call, by which decoding functions of the Hub and of users get them, too
        for config in (generation_config, self.generation_config):
            for name in GENERATION_SETTINGS:
                value = getattr(config, name, None)
                if value is not None and kwargs.get(name) is None:
                    kwargs[name] = value
        return super().generate(inputs, generation_config, *args, **kwargs)

    def _prepare_generation_config(self, generation_config: GenerationConfig | None, **kwargs) -> tuple[GenerationConfig, dict[str, Any]]:
        """transformers' merging of the configs, which takes a call's argument that is a field of one of them for the config's. This file's own arguments,
        into which `generate` has put what the configs say, go on to the model; a decoding function that takes one by its name has it already."""
        asked = {name: kwargs.pop(name, None) for name in GENERATION_SETTINGS}
        given = [config for config in (generation_config, self.generation_config) if config is not None]
        unset = {
            name: value for name, value in DRAFTING.items() if name not in kwargs and all(getattr(config, name) is None for config in given)
        }
        merged, found = super()._prepare_generation_config(generation_config, **kwargs)
        for name in asked:
            merged.__dict__.pop(name, None)
        draft_max_steps = asked.pop("draft_max_steps")
        found |= {name: value for name, value in asked.items() if value is not None}
        if merged.is_assistant:  # a draft has none of its own
            merged.assistant_early_exit = None
        elif draft_max_steps is not None:
            with _LOCK:  # not what another thread shows just now
                configured = self.config.max_steps
            steps = check_steps(found.get("max_steps", configured))
            if check_steps(draft_max_steps, "draft_max_steps") >= steps:
                raise ValueError(f"draft_max_steps must be below the steps of a full solve, got {draft_max_steps} and max_steps={steps}")
            merged.update(assistant_early_exit=draft_max_steps, **unset)
        return merged, found

    def _get_candidate_generator(
        self, generation_config, input_ids, inputs_tensor, logits_processor, model_kwargs, assistant_model=None, *args, **kwargs
    ) -> CandidateGenerator:
        steps = generation_config.assistant_early_exit
        model_kwargs = {name: value for name, value in model_kwargs.items() if name != VERIFYING}
        if steps is None:
            if assistant_model is not None:  # has steps of its own, or none
                model_kwargs = {name: value for name, value in model_kwargs.items() if name not in OWN_ARGUMENTS}
            return super()._get_candidate_generator(
                generation_config, input_ids, inputs_tensor, logits_processor, model_kwargs, assistant_model, *args, **kwargs
            )
        if not input_ids.shape[1]:
            raise ValueError(
                "drafts are continuations of tokens, and with inputs_embeds alone there are none; pass input_ids, or leave draft_max_steps out"
            )
        # transformers' own early exit changes the config while it drafts, and not at all where max_steps is given in the call
        generation_config = copy.deepcopy(generation_config)
        generation_config.assistant_early_exit = None
        # how long drafts are it asks the assistant's generation config: show it that of this call, which other threads must not see
        shown = copy.copy(self)
        shown.generation_config = generation_config
        generator = AssistedCandidateGenerator(
            input_ids=input_ids,
            assistant_model=shown,
            generation_config=generation_config,
            model_kwargs={**model_kwargs, "max_steps": steps},
            inputs_tensor=inputs_tensor,
            logits_processor=logits_processor,
        )
        generator.assistant_model = self
        return generator

    def _assisted_decoding(self, *args, **kwargs):
        """transformers' first verification would write to the cache the whole prompt, whatever of it has been written before."""
        return super()._assisted_decoding(*args, **kwargs, **{VERIFYING: True})

    def _get_logits_processor(self, *args, **kwargs):
        """Guidance without the prompt (`guidance_scale`) runs the model by itself: with the steps and tolerance of this call."""
        processors = super()._get_logits_processor(*args, **kwargs)
        given = kwargs.get("model_kwargs") or {}
        asked = {name: given[name] for name in ("max_steps", "tol") if given.get(name) is not None}
        for processor in processors:
            if asked and getattr(processor, "model", None) is self:
                processor.model = functools.partial(self, **asked)
        return processors

    def init_continuous_batching(self, *args, **kwargs):
        """Refused, and with it what transformers builds on it: `continuous_batching_context_manager`, `generate_batch`, `cache_implementation="paged"`.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "continuous batching (generate_batch, init_continuous_batching, continuous_batching_context_manager, cache_implementation='paged') cannot run "
            f"{type(self).__name__}: its paged cache has one slot for each layer, in which the evaluations of a solve would overwrite one another's keys and "
            "values, and wrong tokens would come out. Use generate with left-padded batches"
        )

    @functools.wraps(GenerationMixin.prepare_inputs_for_generation)  # transformers looks at its signature
    def prepare_inputs_for_generation(self, input_ids, next_sequence_length=None, *args, **kwargs):
        if not self.config.is_causal:
            raise ValueError(
                "a model with config.is_causal=False sees the tokens it should predict and cannot generate; train one with is_causal=True"
            )
        if kwargs.pop(VERIFYING, False) and next_sequence_length is None:
            next_sequence_length = input_ids.shape[1] - int((args[0] if args else kwargs[CACHE_NAME]).get_seq_length())
        return super().prepare_inputs_for_generation(input_ids, next_sequence_length, *args, **kwargs)

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args):
        # generate makes its cache from the config: show it the steps of this call, one thread at a time
        steps = model_kwargs.get("max_steps")
        with _LOCK:
            own = self.config
            self.config = with_steps(own, own.max_steps if steps is None else check_steps(steps))
            try:
                return super()._prepare_cache_for_generation(generation_config, model_kwargs, *args)
            finally:
                self.config = own


def with_steps(config: RevDEQConfig, steps: int) -> RevDEQConfig:
    """The config, or a copy of it, with this number of steps."""
    if steps == config.max_steps:
        return config
    config = copy.copy(config)
    config.max_steps = steps
    return config
