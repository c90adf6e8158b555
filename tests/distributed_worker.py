"""Run by test_distributed.py under torchrun: two ranks, each with half of the batch, against one rank with all of it."""

import copy
import os
import sys

import torch
import torch.distributed as dist
from conftest import awake
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from revdeq_hf import RevDEQConfig, RevDEQForCausalLM


def main() -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(0)
    settings = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_attention_heads=4, max_steps=3, drift_policy="raise")
    model = awake(RevDEQForCausalLM(RevDEQConfig(**settings)))
    ids = torch.randint(0, 64, (4, 16))
    mine = ids[2 * rank : 2 * rank + 2]
    alone = copy.deepcopy(model)
    alone(ids, labels=ids).loss.backward()
    expected = {name: parameter.grad for name, parameter in alone.named_parameters()}
    if sys.argv[1] == "ddp":
        wrapped = DistributedDataParallel(model)
        with wrapped.no_sync():
            wrapped(input_ids=mine, labels=mine).loss.backward()
        model.zero_grad()
    else:
        for name in model._no_split_modules:
            for module in model.modules():
                if type(module).__name__ == name:
                    fully_shard(module)
        wrapped = fully_shard(model)
    wrapped(input_ids=mine, labels=mine).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{name} got no gradient"
        gradient = parameter.grad.full_tensor() if sys.argv[1] == "fsdp2" else parameter.grad
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-6)
    assert model.model.solve.drift == 0
    dist.barrier()
    print(f"rank {rank} agrees", flush=True)
    os._exit(0)  # gloo's threads race with the end of the interpreter: now and then it hangs or aborts after all is done


if __name__ == "__main__":
    main()
