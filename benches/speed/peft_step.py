#!/usr/bin/env python3
"""Times optimizer steps of PyTorch + transformers + peft: the same work as `step` of crates/engine-tch, f32 on a CPU.

    peft_step.py CONFIG.json [--rows 4] [--window 256] [--micro 1] [--threads 2] [--steps 3] [--score]

LoRA of rank 8 on the seven projections, gradients clipped to norm 1, AdamW. One step is not timed. With --score each step
is followed by a straight form of LoRAPrune's score, timed apart, which holds its products in full. Prints one JSON object.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from torch_side import (
    BY_COLUMN,
    cpu_seconds,
    forward_backward,
    llama,
    lora_layers,
    median,
    micro_batches,
    product_gflop_per_s,
    raw_sums,
    say,
)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--micro", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--score", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    model, factors, optimizer = llama(json.loads(given.config.read_text()))
    batch = micro_batches(model.config.vocab_size, given.rows, given.window, given.micro)
    products, steps, cpu_steps, scores, loss = [], [], [], [], None
    for step in range(given.steps + 1):
        products.append(product_gflop_per_s())
        started, cpu_started = time.perf_counter(), cpu_seconds()
        loss = forward_backward(model, factors, batch)
        step_s, cpu_s = time.perf_counter() - started, cpu_seconds() - cpu_started
        if given.score:
            started = time.perf_counter()
            for _, name, module in lora_layers(model):
                raw_sums(module, name in BY_COLUMN)
            scores.append(time.perf_counter() - started)
        started, cpu_started = time.perf_counter(), cpu_seconds()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step_s, cpu_s = step_s + time.perf_counter() - started, cpu_s + cpu_seconds() - cpu_started
        if step > 0:
            steps.append(step_s)
            cpu_steps.append(cpu_s)
    say(
        step_s=median(steps),
        step_cpu_s=median(cpu_steps),
        score_s=median(scores[1:]) if given.score else None,
        product_gflop_per_s=median(products),
        loss=loss,
        torch=torch.__version__,
    )


if __name__ == "__main__":
    main()
