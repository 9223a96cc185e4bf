"""The shapes that are measured, and folders of random weights in them. Speed does not ask what weights say."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy

CHUNK_WEIGHTS = 1 << 22
DEVIATION = 0.02


@dataclass(frozen=True)
class Shape:
    name: str
    title: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    channels: int
    vocabulary: int
    tied: bool

    @property
    def widths(self):
        """As the example `step` takes them."""
        parts = (self.hidden, self.layers, self.heads, self.kv_heads, self.channels, self.vocabulary)
        return ",".join(str(part) for part in parts)

    @property
    def head_dim(self):
        return self.hidden // self.heads

    @property
    def weights_in_products(self):
        """Projections and head: what a token is multiplied with."""
        kv_width = self.kv_heads * self.head_dim
        layer = 2 * self.hidden * self.hidden + 2 * kv_width * self.hidden + 3 * self.channels * self.hidden
        return self.layers * layer + self.vocabulary * self.hidden

    def config(self):
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "torch_dtype": "bfloat16",
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "head_dim": self.head_dim,
            "intermediate_size": self.channels,
            "max_position_embeddings": 8192,
            "num_attention_heads": self.heads,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.kv_heads,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "tie_word_embeddings": self.tied,
            "vocab_size": self.vocabulary,
        }

    def tensors(self):
        """Name and shape of each."""
        hidden, kv_width = self.hidden, self.kv_heads * self.head_dim
        yield "model.embed_tokens.weight", (self.vocabulary, hidden)
        yield "model.norm.weight", (hidden,)
        if not self.tied:
            yield "lm_head.weight", (self.vocabulary, hidden)
        for layer in range(self.layers):
            of_layer = {
                "input_layernorm": (hidden,),
                "post_attention_layernorm": (hidden,),
                "self_attn.q_proj": (hidden, hidden),
                "self_attn.k_proj": (kv_width, hidden),
                "self_attn.v_proj": (kv_width, hidden),
                "self_attn.o_proj": (hidden, hidden),
                "mlp.gate_proj": (self.channels, hidden),
                "mlp.up_proj": (self.channels, hidden),
                "mlp.down_proj": (hidden, self.channels),
            }
            for name, shape in of_layer.items():
                yield f"model.layers.{layer}.{name}.weight", shape


LLAMA = Shape("llama-134m", "LLaMA shape", 1024, 8, 16, 16, 2752, 32_000, tied=False)
SMOLLM2 = Shape("smollm2-135m", "SmolLM2-135M", 576, 30, 9, 3, 1536, 49_152, tied=True)
LLAMA_7B = Shape("llama-7b", "LLaMA-7B", 4096, 32, 32, 32, 11_008, 32_000, tied=False)
TINY = Shape("tiny", "tiny", 64, 2, 8, 4, 176, 512, tied=True)


def write_model(shape, folder):
    """A folder in Hugging Face layout, bf16, of one safetensors file; as it is when it is there."""
    weights = folder / "model.safetensors"
    if weights.is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(shape.config(), indent=2) + "\n")
    header, offset = {}, 0
    for name, dimensions in shape.tensors():
        end = offset + 2 * numpy.prod(dimensions, dtype=numpy.int64).item()
        header[name] = {"dtype": "BF16", "shape": list(dimensions), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    random = numpy.random.default_rng(0)
    # One stretch of random weights, entered anywhere: much faster than fresh ones, and no product can tell.
    stretch = random.uniform(-1, 1, CHUNK_WEIGHTS).astype(numpy.float32) * (DEVIATION * 3**0.5)
    stretch = (stretch.view(numpy.uint32) >> 16).astype(numpy.uint16)
    one = numpy.float32(1).view(numpy.uint32) >> 16
    unfinished = folder / "model.safetensors.part"
    with unfinished.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, dimensions in shape.tensors():
            rest = numpy.prod(dimensions, dtype=numpy.int64).item()
            if len(dimensions) == 1:
                file.write(numpy.full(rest, one, numpy.uint16).tobytes())
                continue
            while rest > 0:
                start = random.integers(CHUNK_WEIGHTS // 2)
                part = stretch[start : start + rest]
                file.write(part.tobytes())
                rest -= len(part)
    unfinished.rename(weights)
    return folder


def write_tokens(shape, path, count):
    """Random token ids, two bytes each."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        ids = numpy.random.default_rng(1).integers(0, shape.vocabulary, count).astype(numpy.uint16)
        ids.tofile(path)
    return Path(path)
