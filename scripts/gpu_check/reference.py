#!/usr/bin/env python3
"""Times the steps of PyTorch + transformers + peft on random weights: the same work as `gpu_check step`. Prints JSON.

LoRA of rank 8 on the seven projections, bf16 (f32 on a CPU), gradients clipped, fused AdamW. `--storage int8` needs
bitsandbytes. One step is not timed.
"""

import argparse
import json
import time

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def base_model(shape, device, storage):
    hidden, layers, heads, kv_heads, ffn, vocabulary = shape
    config = LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=ffn,
        vocab_size=vocabulary,
        max_position_embeddings=4096,
        use_cache=False,
    )
    kind = torch.float32 if storage == "f32" else torch.bfloat16
    torch.set_default_dtype(kind)
    with torch.device(device):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    if storage == "int8":
        quantise(model)
    return model.to(device), config


def quantise(model):
    """Every projection as a layer of bitsandbytes."""
    import bitsandbytes

    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and name.split(".")[-1] in TARGETS:
            narrow = bitsandbytes.nn.Linear8bitLt(
                module.in_features, module.out_features, bias=False, has_fp16_weights=False
            )
            narrow.weight = bitsandbytes.nn.Int8Params(
                module.weight.data.to("cpu", torch.float16), requires_grad=False, has_fp16_weights=False
            )
            parent = model.get_submodule(name.rsplit(".", 1)[0])
            setattr(parent, name.rsplit(".", 1)[1], narrow)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", required=True)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--storage", choices=["f32", "bf16", "int8"], default="bf16")
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--micro", type=int, default=1)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--peak-tflop-per-s", type=float, default=989.0)
    given = parser.parse_args()
    on_gpu = given.device != "cpu"
    shape = [int(number) for number in given.shape.split(",")]
    torch.manual_seed(0)
    model, config = base_model(shape, given.device, given.storage)
    lora = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules=TARGETS)
    # As our engine does, and QLoRA: factors and moments in f32.
    model = get_peft_model(model, lora, autocast_adapter_dtype=True)
    factors = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(factors, lr=1e-4, fused=on_gpu)
    windows = torch.randint(0, config.vocab_size, (given.micro, 1, given.window), device=given.device)

    def wait():
        if on_gpu:
            torch.cuda.synchronize()

    def step():
        for window in windows:
            with torch.autocast(given.device.split(":")[0], torch.bfloat16, enabled=given.storage != "f32"):
                loss = model(input_ids=window, labels=window).loss / given.micro
            loss.backward()
        torch.nn.utils.clip_grad_norm_(factors, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    wait()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(given.steps):
        started = time.perf_counter()
        step()
        wait()
        seconds.append(time.perf_counter() - started)
    step_s = sorted(seconds)[len(seconds) // 2]
    hidden, layers, heads, kv_heads, ffn, vocabulary = shape
    kv_width = hidden // heads * kv_heads
    weights = layers * (2 * hidden * hidden + 2 * hidden * kv_width + 3 * hidden * ffn) + vocabulary * hidden
    tokens = given.micro * given.window
    flop_per_s = 4.0 * weights * tokens / step_s
    print(
        json.dumps(
            {
                "storage": given.storage,
                "step_s": step_s,
                "tokens_per_s": tokens / step_s,
                "tflop_per_s": flop_per_s / 1e12,
                "mfu": flop_per_s / 1e12 / given.peak_tflop_per_s,
                "peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else 0,
                "torch": torch.__version__,
            }
        )
    )


if __name__ == "__main__":
    main()
