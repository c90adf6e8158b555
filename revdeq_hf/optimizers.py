"""Muon for the matrices of a model, AdamW for the rest, as one optimizer like any other for Trainer, schedules and checkpoints. Stays off the Hub."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers.pytorch_utils import Conv1D  # GPT-2's linear layer, its weight transposed


class MuonAdamW(torch.optim.Optimizer):
    """torch's Muon for the matrices of the model's body, torch's AdamW for embeddings, heads, norms, biases and all else.

    Matrices are the weights of linear layers and those of convolutions, a row for each filter. A convolution in groups has many small ones and is
    AdamW's, as is what parametrised weights (weight norm, spectral norm) are made of. A weight-tied block is used many times in one pass, so the gradients
    of its matrices are sums of many and dominated by few directions; Muon's orthogonalised updates give all directions the same size. What that is worth on
    the word problem of S5, on mazes and on images: docs/results.md, docs/think_longer.md. Under FSDP2 the ranks orthogonalise whole matrices, which costs a
    few exchanges of each in an update; checkpoints of either kind can be resumed.

    Args:
        model: a transformers model, also within DDP or with adapters of peft. Its body is its `base_model`, so a task's head is not among the matrices.
        lr: learning rate of AdamW, > 0.
        muon_lr: learning rate of Muon, > 0; updates are scaled to the root mean square of AdamW's (`adjust_lr_fn="match_rms_adamw"`), so a good one is
            near AdamW's or a few times that.
        weight_decay: of matrices and embeddings; vectors (norms, biases) are not decayed.
        betas, eps: of AdamW.
        momentum: of Muon.

    Memory: one tensor of each matrix's size for Muon, two of each other parameter's for AdamW.

    Raises:
        ValueError: the body has no matrix that is trained.

    Source: Jordan et al., Muon (2024); Liu et al., arXiv 2502.16982, for the scale of the updates.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float,
        muon_lr: float,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        momentum: float = 0.95,
    ) -> None:
        whole: Any = model.module if isinstance(model, DistributedDataParallel) else model
        whole = whole.get_base_model() if hasattr(whole, "get_base_model") else whole  # within adapters of peft
        body = getattr(whole, "base_model", whole)
        layers = (nn.Linear, Conv1D, nn.Conv1d, nn.Conv2d, nn.Conv3d)
        of_layers = (module for module in body.modules() if isinstance(module, layers) and getattr(module, "groups", 1) == 1)
        # a parametrised weight is computed from others, which are AdamW's
        self._matrices = {module.weight: None for module in of_layers if isinstance(module.weight, nn.Parameter)}
        matrices = [weight for weight in self._matrices if weight.requires_grad]
        if not matrices:
            raise ValueError("Muon needs linear layers or convolutions (of one group) to train, the model's body has none; use AdamW")
        others = [parameter for parameter in model.parameters() if parameter.requires_grad and parameter not in self._matrices]
        groups = [
            {"params": [parameter for parameter in others if parameter.dim() > 1], "weight_decay": weight_decay},
            {"params": [parameter for parameter in others if parameter.dim() <= 1], "weight_decay": 0.0},
        ]
        shapes = [weight.detach().flatten(1) for weight in matrices]
        self.muon = torch.optim.Muon(shapes, lr=muon_lr, weight_decay=weight_decay, momentum=momentum, adjust_lr_fn="match_rms_adamw")
        self.muon.param_groups[0]["params"] = matrices
        filled = [group for group in groups if group["params"]] or [{"params": [torch.zeros(0)]}]  # torch wants something to make it of
        self.adamw = torch.optim.AdamW(filled, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        super().__init__([*self.muon.param_groups, *(self.adamw.param_groups if others else [])], {})
        self.defaults = {"lr": lr}  # schedules that end at a rate of their own ask for it; not before, or every group would have it

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group of parameters, such as layers that were frozen at first.

        Matrices of the body go to Muon, others, and a group that sets `betas`, to AdamW. What the group does not set is as it was given to
        the constructor.

        Raises:
            ValueError: it holds both kinds and no `betas`; or what torch raises.
        """
        defaults, self.defaults = self.defaults, {}  # of which optimizer is seen below
        try:
            super().add_param_group(param_group)
        finally:
            self.defaults = defaults
        group = self.param_groups[-1]
        kinds = {"betas" not in group and parameter in self._matrices for parameter in group["params"]}
        if len(kinds) > 1:
            self.param_groups.pop()
            raise ValueError("a group must hold matrices of the body, for Muon, or none of them, for AdamW; add two groups")
        if True not in kinds and all(parameter.dim() <= 1 for parameter in group["params"]):
            group.setdefault("weight_decay", 0.0)
        for name, value in (self.muon if True in kinds else self.adamw).defaults.items():
            group.setdefault(name, value)
        self._share()

    def _share(self) -> None:
        """The two optimizers work on this one's groups and state, so that schedules and checkpoints need to know of this one alone."""
        self.muon.param_groups = [group for group in self.param_groups if "betas" not in group]
        self.adamw.param_groups = [group for group in self.param_groups if "betas" in group]
        self.muon.state = self.adamw.state = self.state

    def __getstate__(self) -> dict[str, Any]:  # of copies; torch's has nothing but the groups and their state
        return {**super().__getstate__(), "muon": self.muon, "adamw": self.adamw, "_matrices": self._matrices}

    def __setstate__(self, state: dict[str, Any]) -> None:  # of copies, and within load_state_dict
        super().__setstate__(state)
        self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._step_muon()
        self.adamw.step()
        return loss

    def _step_muon(self) -> None:
        """torch's Muon takes nothing but matrices: it works on views of the weights, with the weights' state."""
        weights = {}
        groups = []
        for group in self.muon.param_groups:
            views = {weight.detach().flatten(1): weight for weight in group["params"] if weight.grad is not None}
            for view, weight in views.items():
                view.grad = weight.grad.flatten(1)
            weights.update(views)
            groups.append({**group, "params": list(views)})
        self.muon.param_groups = groups
        self.muon.state = defaultdict(dict, {view: self.state[weight] for view, weight in weights.items()})
        try:
            self.muon.step()
        finally:
            self._share()
        for view, weight in weights.items():
            if not weight.is_contiguous():  # flattening has made a copy, as of channels_last
                weight.copy_(view.view_as(weight))


def muon_adamw(args: Any) -> tuple[Callable[[], type[MuonAdamW]], dict[str, Any]] | None:
    """`Trainer(optimizer_cls_and_kwargs=...)` of training arguments with a field `muon_learning_rate`; None, `args.optim`, where that is None or 0."""
    if not args.muon_learning_rate:
        return None
    settings = dict(lr=args.learning_rate, muon_lr=args.muon_learning_rate, weight_decay=args.weight_decay)
    # Trainer calls what is no class, and then the result with the model; a class it would call with groups of parameters
    return lambda: MuonAdamW, dict(settings, betas=(args.adam_beta1, args.adam_beta2), eps=args.adam_epsilon)
