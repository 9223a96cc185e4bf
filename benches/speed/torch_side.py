"""What the PyTorch sides share: the model with peft's LoRA on seven projections, a step, the score, a plain product."""

import json
import resource
import statistics
import time
import warnings

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# Their groups are columns, not rows.
BY_COLUMN = ("o_proj", "down_proj")
LORA_RANK, LORA_ALPHA, MAX_GRAD_NORM = 8, 16.0, 1.0
PRODUCT_SIZE = 2048


def llama(config):
    """A LLaMA in f32 with random weights, LoRA of rank 8 on the seven projections, and AdamW over the factors."""
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    torch.manual_seed(0)
    # transformers keeps attention in PyTorch's own fused form unless told otherwise.
    model = LlamaForCausalLM(LlamaConfig(**config, use_cache=False)).float()
    lora = LoraConfig(r=LORA_RANK, lora_alpha=LORA_ALPHA, lora_dropout=0.0, bias="none", target_modules=list(PROJECTIONS))
    model = get_peft_model(model, lora)
    model.train()
    factors = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(factors, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    return model, factors, optimizer


def lora_layers(model):
    """(layer, projection, module) of every projection with factors."""
    for layer, block in enumerate(model.get_base_model().model.layers):
        for name in PROJECTIONS:
            yield layer, name, getattr(block.self_attn if name in ("q_proj", "k_proj", "v_proj", "o_proj") else block.mlp, name)


def forward_backward(model, factors, micro_batches):
    """Gradients of the mean loss, clipped. Micro-batches of [rows, tokens] are summed."""
    total = 0.0
    for input_ids in micro_batches:
        loss = model(input_ids=input_ids, labels=input_ids).loss / len(micro_batches)
        loss.backward()
        total += loss.item()
    torch.nn.utils.clip_grad_norm_(factors, MAX_GRAD_NORM)
    return total


@torch.no_grad()
def raw_sums(module, by_column):
    """Row sums (column sums of o and down) of |(dB A + B dA - dB dA) * (W + s B A)|, written as the formula reads."""
    a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
    guided = b.grad @ a + b @ a.grad - b.grad @ a.grad
    effective = module.base_layer.weight + module.scaling["default"] * (b @ a)
    return (guided * effective).abs().sum(0 if by_column else 1)


def product_gflop_per_s():
    factor = torch.ones(PRODUCT_SIZE, PRODUCT_SIZE)
    factor @ factor
    started = time.perf_counter()
    factor @ factor
    return 2 * PRODUCT_SIZE**3 / (time.perf_counter() - started) / 1e9


def micro_batches(vocabulary, rows, window, count):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, vocabulary, (rows, window), generator=generator) for _ in range(count)]


def peak_resident_bytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def cpu_seconds():
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


IDLE_RESIDENT_BYTES = peak_resident_bytes()
"""With the libraries loaded and nothing made yet."""


def say(**figures):
    """The last line of a script: one JSON object."""
    print(json.dumps(figures | {"peak_resident_bytes": peak_resident_bytes(), "idle_resident_bytes": IDLE_RESIDENT_BYTES}))


median = statistics.median
