#!/usr/bin/env python3
"""A whole pruning run as a plain PyTorch loop: transformers + peft, LoRAPrune's score, masks that multiply by zero.

    plain_loop.py CONFIG.json --steps N [--every 2] [--warmup 0.1] [--cooldown 0.1] [--sparsity 0.5] [--threads 2] ...

What it does is what `espalier prune --shrink never` does: the same schedule, batches of the same size, groups of a key/value
head with its query heads or of one channel, the same share of each layer's groups removed. Nothing gets smaller: that is the
method as it was published. Prints one JSON object.
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
from torch_side import BY_COLUMN, forward_backward, llama, lora_layers, median, micro_batches, raw_sums, say

DECAY, NORM_EPS = 0.9, 1e-8
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


class Masks:
    """What is alive, multiplied into what the heads and the channels put out."""

    def __init__(self, model):
        config = model.config
        self.per_kv_head = config.num_attention_heads // config.num_key_value_heads
        self.head_dim = model.get_base_model().model.layers[0].self_attn.head_dim
        layers = range(config.num_hidden_layers)
        self.kv_heads = [torch.ones(config.num_key_value_heads) for _ in layers]
        self.channels = [torch.ones(config.intermediate_size) for _ in layers]
        for layer, name, module in lora_layers(model):
            if name in BY_COLUMN:
                module.register_forward_pre_hook(self._multiply(layer, name))

    def _multiply(self, layer, name):
        def hook(_, inputs):
            if name == "down_proj":
                return (inputs[0] * self.channels[layer],)
            return (inputs[0] * self.kv_heads[layer].repeat_interleave(self.per_kv_head * self.head_dim),)

        return hook

    def group_sums(self, name, sums):
        """Sums by key/value head, or by channel."""
        if name not in ATTENTION:
            return sums
        width = self.head_dim * (self.per_kv_head if name in ("q_proj", "o_proj") else 1)
        return sums.view(-1, width).sum(1)


def importances(model, masks):
    """[(attention, mlp)] by layer: each projection's sums over their L2 norm, added."""
    layers = [[0.0, 0.0] for _ in masks.channels]
    for layer, name, module in lora_layers(model):
        sums = masks.group_sums(name, raw_sums(module, name in BY_COLUMN))
        alive = masks.kv_heads[layer] if name in ATTENTION else masks.channels[layer]
        sums = sums * alive
        layers[layer][0 if name in ATTENTION else 1] += sums / (sums.norm() + NORM_EPS)
    return layers


def remove_lowest(average, alive, removed_count):
    """Clears the least of those alive until `removed_count` are gone."""
    missing = removed_count - int((alive == 0).sum())
    if missing > 0:
        ranked = torch.where(alive != 0, average, torch.inf).argsort(stable=True)
        alive[ranked[:missing]] = 0


def sparsity_at(step, given):
    start, end = round(given.warmup * given.steps), given.steps - round(given.cooldown * given.steps)
    if step >= end:
        return given.sparsity
    return given.sparsity * (1 - (1 - (step - start) / (end - start)) ** 3) if step > start else 0.0


def decides_at(step, given):
    start, end = round(given.warmup * given.steps), given.steps - round(given.cooldown * given.steps)
    return step == end or (start < step < end and (step - start) % given.every == 0)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--every", type=int, default=2)
    parser.add_argument("--warmup", type=float, default=0.1)
    parser.add_argument("--cooldown", type=float, default=0.1)
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--micro", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    model, factors, optimizer = llama(json.loads(given.config.read_text()))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, given.steps)
    masks = Masks(model)
    averages = [[torch.zeros_like(masks.kv_heads[0]), torch.zeros_like(masks.channels[0])] for _ in masks.channels]
    batch = micro_batches(model.config.vocab_size, given.rows, given.window, given.micro)
    started, steps, loss = time.perf_counter(), [], None
    for step in range(given.steps):
        step_started = time.perf_counter()
        loss = forward_backward(model, factors, batch)
        for average, importance in zip(averages, importances(model, masks), strict=True):
            for block in (0, 1):
                average[block].mul_(DECAY).add_(importance[block], alpha=1 - DECAY)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        if decides_at(step, given):
            sparsity = sparsity_at(step, given)
            for layer, (attention, mlp) in enumerate(averages):
                for average, alive in ((attention, masks.kv_heads[layer]), (mlp, masks.channels[layer])):
                    remove_lowest(average, alive, min(math.floor(len(alive) * sparsity + 1e-9), len(alive) - 1))
        steps.append(time.perf_counter() - step_started)
    say(
        train_s=time.perf_counter() - started,
        first_step_s=median(steps[1 : max(2, len(steps) // 10 + 1)]),
        last_step_s=median(steps[-max(1, len(steps) // 10) :]),
        step_s=steps,
        kept_channels=sum(int(alive.sum()) for alive in masks.channels),
        loss=loss,
    )


if __name__ == "__main__":
    main()
