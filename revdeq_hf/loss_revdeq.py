# Copyright 2026 The revdeq_hf authors. Licensed under the Apache License, Version 2.0.
"""Next-token cross-entropy straight from the last hidden states: the logits of all tokens never exist at the same time.

For tokens `i` with hidden states `h_i`, labels `y_i`, head weights `W` and smoothing `e`, over the tokens whose label is not ignored:

    loss = sum_i [logsumexp(W h_i) - (1 - e) (W h_i)[y_i] - e mean(W h_i)] / count
    d loss / d (W h_i) = softmax(W h_i) - (1 - e) onehot(y_i) - e / vocab_size          (/ count)

A chunk of tokens at a time, the forward pass takes both, and keeps the gradients of `h` and `W` instead of the logits: three matrix products, as
many as the plain loss. They are kept without the factor `1 / count` and the incoming gradient, and W's is summed in float32, so that the loss
scale of float16 training does its work in the backward pass, and chunks do not add up rounding errors in bfloat16.

`torch.nn.functional.linear_cross_entropy` (torch 2.13) goes by chunks, too. It is not used: its loss is rounded to the dtype of the hidden states
(11.625 for 11.6445 in bfloat16), gradients are NaN instead of 0 where all labels are ignored, it has no label smoothing, and a graph that is
kept cannot be gone through twice. This one gives the same bits in all supported versions.
"""

import torch

CHUNK_BYTES = 2**26  # of float32 logits: some thousand rows at small vocabularies, 333 at 50,304


def linear_cross_entropy(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    num_items: torch.Tensor | int | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    chunk_rows: int | None = None,
) -> torch.Tensor:
    """Cross-entropy of `hidden_states @ weight.T` against `labels`, equal to that of `torch.nn.functional.cross_entropy` on float32 logits.

    Args:
        hidden_states: (..., hidden_size) floating.
        weight: (vocab_size, hidden_size), of the same dtype unless autocast is on, under which both are cast as by a linear layer.
        labels: (...) int64, each in [0, vocab_size) or `ignore_index`; not shifted here.
        num_items: what the sum over the tokens is divided by; None: the number of tokens that are not ignored. With none of those the loss is
            NaN (0 / 0) and its gradients are 0, as in torch; with `num_items` the loss is 0.
        label_smoothing: e in [0, 1), the part of the target that is spread evenly over the vocabulary.
        ignore_index: label of tokens that do not count.
        chunk_rows: tokens per chunk; None: so many that the float32 logits of a chunk take 64 MiB.

    Returns:
        0-d float32 tensor.

    Cost: the time of a linear layer and its gradients. Memory between the passes: the gradients of `hidden_states` and of `weight`, where they
    are needed, in float32, instead of tokens x vocab_size logits; at the peak a chunk's logits twice in addition.

    Raises:
        ValueError: shapes, label_smoothing or chunk_rows do not fit.
        IndexError, RuntimeError: a label is outside the vocabulary (from torch).
        RuntimeError: in the backward pass, if a second derivative is asked for.
    """
    if hidden_states.shape[:-1] != labels.shape:
        raise ValueError(
            f"labels must have a label for each hidden state, got shape {tuple(labels.shape)} for hidden states of {tuple(hidden_states.shape)}"
        )
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must lie in [0, 1), got {label_smoothing}")
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"chunk_rows must be at least 1, got {chunk_rows}")
    hidden_states, labels = hidden_states.flatten(0, -2), labels.flatten().to(hidden_states.device)
    if chunk_rows is None:
        chunk_rows = max(1, CHUNK_BYTES // (4 * weight.shape[0]))
    device_type = hidden_states.device.type
    dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
    total = _Summed.apply(hidden_states, weight, labels, label_smoothing, ignore_index, chunk_rows, dtype)
    if num_items is None:
        count = (labels != ignore_index).sum()
        return torch.where(count > 0, total / count.clamp(min=1), torch.nan)
    return total / at_least_one(num_items, total.device)


def at_least_one(num_items: torch.Tensor | int, device: torch.device) -> torch.Tensor | int:
    """The number to divide by: where no label of an update counts the loss and its gradients are 0, not NaN."""
    return num_items.to(device).clamp(min=1) if isinstance(num_items, torch.Tensor) else max(1, num_items)


def share_of_batch(loss: torch.Tensor, labels: torch.Tensor, num_items: torch.Tensor | int | None) -> torch.Tensor:
    """The part that a micro-batch has in the mean over all micro-batches of an update, whose sum is then that mean.

    Trainer counts the labels of an update, `num_items`, and divides nothing by the number of micro-batches where a model's forward takes them. The generic
    heads of transformers and its losses of regressions and of several labels at once do not take them (5.23), so that N micro-batches would give N times the
    gradient.

    Args:
        loss: mean over the labels of the micro-batch that are not -100, 0-d.
        labels: of the micro-batch, of any shape.
        num_items: labels that count in all micro-batches; None: `loss` is returned as it is.

    Returns:
        `loss * count / num_items`; 0 where no label of the micro-batch counts, of which the mean would be NaN.
    """
    if num_items is None:
        return loss
    count = (labels != -100).sum().to(loss.device)  # as Trainer counts
    total = num_items.to(loss.device) if isinstance(num_items, torch.Tensor) else num_items
    return torch.where(count > 0, loss * count / total, 0.0)


class _Summed(torch.autograd.Function):
    """Sum over the tokens in float32; the gradients are made in the forward pass."""

    @staticmethod
    def forward(ctx, hidden_states, weight, labels, smoothing, ignore_index, chunk_rows, dtype):
        with torch.autocast(hidden_states.device.type, enabled=False):
            total, grads = _sum_and_gradients(
                hidden_states if dtype is None else hidden_states.to(dtype),
                weight if dtype is None else weight.to(dtype),
                labels,
                smoothing,
                ignore_index,
                chunk_rows,
                ctx.needs_input_grad[:2],
            )
        ctx.save_for_backward(*grads)
        ctx.dtypes = (hidden_states.dtype, weight.dtype)
        return total

    @staticmethod
    def backward(ctx, grad_total):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the loss without logits has first derivatives only; pass skip_logits=False for second ones (create_graph=True)"
            )
        # not in place: the graph may be gone through again
        grads = [None if grad is None else (grad * grad_total).to(dtype) for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)]
        return *grads, None, None, None, None, None


def _sum_and_gradients(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    smoothing: float,
    ignore_index: int,
    chunk_rows: int,
    wanted: tuple[bool, bool],
) -> tuple[torch.Tensor, tuple[torch.Tensor | None, torch.Tensor | None]]:
    """Sum of the losses of all tokens, and its gradients by `hidden` and `weight` in at least float32, where they are wanted."""
    total = torch.zeros((), dtype=torch.float32, device=hidden.device)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    grad_hidden = torch.empty_like(hidden, dtype=wide) if wanted[0] else None
    grad_weight = torch.zeros_like(weight, dtype=wide) if wanted[1] else None
    for first in range(0, hidden.shape[0], chunk_rows):
        rows = hidden[first : first + chunk_rows]
        targets = labels[first : first + chunk_rows].unsqueeze(1)
        ignored = targets == ignore_index
        targets = targets.masked_fill(ignored, 0)
        logits = torch.mm(rows, weight.T).float()  # (rows, vocab_size); float32 as in the plain loss
        lse = torch.logsumexp(logits, dim=1, keepdim=True)
        losses = lse - (1 - smoothing) * logits.gather(1, targets)
        if smoothing:
            losses = losses - smoothing * logits.mean(dim=1, keepdim=True)
        # not in place: of a result that was written in place a trace by torch.compile loses the gradient in torch 2.11, without a word
        total = total + losses.masked_fill(ignored, 0.0).sum()
        if not any(wanted):
            continue
        grad = logits.sub_(lse).exp_()  # the softmax, in place
        reach = None
        if (
            grad_weight is not None and hidden.dtype == torch.float16
        ):  # the most that entries of a column add up to, the labels' part included
            reach = grad.sum(0).scatter_add_(0, targets.squeeze(1), (~ignored).squeeze(1).float()).amax()
        if smoothing:
            grad.sub_(smoothing / weight.shape[0])
        grad.scatter_add_(1, targets, torch.full_like(lse, smoothing - 1))
        grad = grad.masked_fill_(ignored, 0.0).to(hidden.dtype)
        if grad_hidden is not None:
            grad_hidden[first : first + chunk_rows] = torch.mm(grad, weight)
        if grad_weight is not None:
            if grad_weight.dtype == grad.dtype:
                grad_weight.addmm_(grad.T, rows)
            elif reach is not None:
                # thousands of rows of a common label may add up to more than float16 holds, before any loss scale could help
                scale = (torch.finfo(torch.float16).max / 2 / (rows.abs().amax().float() * reach)).log2().floor().clamp(max=0).exp2()
                grad_weight += torch.mm(grad.T, rows * scale).float() / scale
            else:
                grad_weight += torch.mm(grad.T, rows)
        del logits, grad  # or they would be there while the next ones are made
    return total, (grad_hidden, grad_weight)


__all__ = ["at_least_one", "linear_cross_entropy", "share_of_batch"]
