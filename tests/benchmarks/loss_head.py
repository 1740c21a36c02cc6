"""Peak memory above the weights and time of a step, by the loss head and with all logits, interleaved in one run.

python tests/benchmarks/loss_head.py [--rounds 5] [--labelled 0.33] [--dtype float32] [--recompute]

A Llama from its configuration, four blocks of width 512 and a vocabulary of 32,000, LoRA on all linear layers, 4 x 256
tokens. Memory is what the CPU's allocator hands out in a step, as torch's profiler sees it. Time is the median of the
processor's, on one thread, so that other work on the machine does not count.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch.profiler import ProfilerActivity, profile

from lora_lightning import inject, plugins
from lora_lightning.models.loss_head import choose, loss_head, set_loss_head
from lora_lightning.models.tasks import find_task
from lora_lightning.training.assembly import enable_checkpointing

SHAPE = {"hidden_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8, "intermediate_size": 1376}


def peak(run):
    """Bytes that `run` holds at its fullest above what is there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run()
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def main():
    from transformers import LlamaConfig, LlamaForCausalLM

    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--labelled", type=float, default=1 / 3)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--recompute", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = LlamaForCausalLM(LlamaConfig(vocab_size=32000, **SHAPE)).to(getattr(torch, args.dtype)).train()
    inject(net, plugins.method("LoRA")(rank=8), seed=0)
    if args.recompute:
        enable_checkpointing(net)
    task = find_task("causal-lm")
    ids = torch.randint(3, 32000, (4, 256))
    labels = ids.clone()
    labels[:, : round(256 * (1 - args.labelled))] = -100
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    set_loss_head(net, choose(net))
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-3)

    ways = {
        "all logits": lambda: task.loss(task.logits(net, batch), batch),
        "loss head": lambda: task.loss_of(net, batch),
    }

    def step(way):
        loss = ways[way]()
        (loss.total / loss.count).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    times, peaks = {way: [] for way in ways}, {}
    for way in ways:
        step(way)
        peaks[way] = peak(lambda way=way: step(way))
    for _ in range(args.rounds):
        for way, taken in times.items():
            began = time.process_time()
            step(way)
            taken.append(time.process_time() - began)
    print(f"loss head: {loss_head(net)}; {args}")
    for way in ways:
        print(f"{way}: peak {peaks[way] / 1e6:.0f} MB, step {statistics.median(times[way]):.3f} s")
    memory = peaks["loss head"] / peaks["all logits"]
    seconds = statistics.median(times["loss head"]) / statistics.median(times["all logits"])
    print(f"ratio: peak {memory:.3f}, step {seconds:.3f}")


if __name__ == "__main__":
    main()
