"""Others at the same decode steps, on the same shape with random weights.

bf16 products              the products of a step alone, by cuBLAS: what no server in bf16 can be faster than
transformers               its forward pass with its own cache, greedy, without `generate` around it
transformers + PEFT        the same with an adapter named for each row
… bitsandbytes             the linears in NF4 with double quantization
"""

from __future__ import annotations

import gc
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from gpu.measure import Figure, Stage, elapsed
from steps.sizes import Mix, Sizes

from lorry.kernels.lora import SITES

STEPS = 16  # that are timed
WARM = 4


@dataclass(frozen=True)
class Rivals:
    """figures: ours, which get the peers' seconds beside their own."""

    stage: Stage
    sizes: Sizes
    figures: Sequence[Figure]

    def steps(self, adapters: bool, most: int = 8) -> Iterator[tuple[int, Mix]]:
        """Rows and mixes, all of rank 16, with at most so many adapters."""
        for rows in self.sizes.peers:
            for mix in self.sizes.mixes_of(rows):
                if len(mix.ranks) == 1 and bool(mix.count) == adapters and mix.count <= most:
                    yield rows, mix

    def figure(self, name: str, rows: int, mix: Mix, seconds: float | None) -> Figure:
        for ours in self.figures:
            if (ours.op, ours.rows, ours.shape) == ("decode", rows, str(mix)):
                ours.peers[name] = seconds
        return Figure(f"peer: {name}", str(mix), rows, seconds, 0.0)


def products(rivals: Rivals) -> Iterator[Figure]:
    """All linears and the head in bf16; two layers' weights in turn, which no cache holds."""
    stage, config = rivals.stage, json.loads((rivals.sizes.model / "config.json").read_text())
    hidden, middle = config["hidden_size"], config["intermediate_size"]
    width = config.get("head_dim") or hidden // config["num_attention_heads"]
    queries, keys = config["num_attention_heads"] * width, config["num_key_value_heads"] * width
    shapes = ((queries + 2 * keys, hidden), (hidden, queries), (2 * middle, hidden), (hidden, middle))
    layers = [[stage.randn(*shape, scale=0.01) for shape in shapes] for _ in range(2)]
    head = [stage.randn(config["vocab_size"], hidden, scale=0.01)]
    for rows, mix in rivals.steps(adapters=False):
        inputs = {size: stage.randn(rows, size) for size in {hidden, queries, middle}}

        def run(weights: Sequence[torch.Tensor], inputs: dict[int, torch.Tensor] = inputs) -> None:
            for weight in weights:
                F.linear(inputs[weight.shape[1]], weight)

        each = stage.time([partial(run, weights) for weights in layers])
        last = stage.time([partial(run, head)])
        total = None if each is None or last is None else config["num_hidden_layers"] * each + last
        yield rivals.figure("bf16 products", rows, mix, total)


@torch.inference_mode()
def hugging_face(rivals: Rivals, four_bit: bool, adapters: bool) -> Iterator[Figure]:
    """Without adapters the base has no PEFT around it."""
    steps, model = list(rivals.steps(adapters)), build(rivals, four_bit)
    if adapters:
        model = with_adapters(model, max(mix.count for _, mix in steps))
    name = f"transformers{' + PEFT' * adapters}, {'bitsandbytes NF4' if four_bit else 'bf16'}"
    try:
        for rows, mix in steps:
            seconds = step_seconds(rivals.stage, model, rows, rivals.sizes.context, mix)
            yield rivals.figure(name, rows, mix, seconds)
    finally:
        del model
        gc.collect()


def build(rivals: Rivals, four_bit: bool) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(rivals.sizes.model)
    with torch.device(rivals.stage.device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa").eval()
    if four_bit:
        import bitsandbytes

        for block in model.model.layers:
            for parent in (block.self_attn, block.mlp):
                for name, linear in list(parent.named_children()):
                    if isinstance(linear, torch.nn.Linear):
                        setattr(parent, name, _four_bit(bitsandbytes, linear, rivals.stage.device))
    return model


def _four_bit(bitsandbytes: Any, linear: torch.nn.Linear, device: str) -> torch.nn.Module:
    """bitsandbytes quantizes a weight that it moves to the device."""
    module: torch.nn.Module = bitsandbytes.nn.Linear4bit(
        linear.in_features, linear.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4",
        compress_statistics=True, device="meta",
    )  # fmt: skip
    weight = bitsandbytes.nn.Params4bit(
        linear.weight.data.cpu(), requires_grad=False, quant_type="nf4", compress_statistics=True, module=module
    )
    module.weight = weight
    return module.to(device)


def with_adapters(model: Any, count: int) -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=16, lora_alpha=32, target_modules=list(SITES), init_lora_weights=False)
    wrapped = get_peft_model(model, config, adapter_name="0")
    for number in range(1, count):
        wrapped.add_adapter(str(number), config)
    return wrapped.to(torch.bfloat16).eval()


def step_seconds(stage: Stage, model: Any, rows: int, context: int, mix: Mix) -> float | None:
    """Median seconds of a greedy step whose cache begins with random keys and values of `context` tokens."""
    from transformers import DynamicCache

    config, device = model.config, stage.device
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cache = DynamicCache()
    for layer in range(config.num_hidden_layers):
        keys, values = (stage.randn(rows, config.num_key_value_heads, context, width) for _ in range(2))
        cache.update(keys, values, layer)
    names = {"adapter_names": [str(row % mix.count) for row in range(rows)]} if mix.count else {}
    tokens = torch.zeros(rows, 1, dtype=torch.int64, device=device)

    def step() -> None:
        position = cache.get_seq_length()
        answer = model(
            input_ids=tokens, past_key_values=cache, use_cache=True,
            position_ids=torch.full((rows, 1), position, device=device), **names,
        )  # fmt: skip
        tokens.copy_(answer.logits[:, -1:].argmax(-1))

    for _ in range(1 if stage.dry else WARM):
        step()
    if stage.dry:
        return None
    return statistics.median(elapsed(step) for _ in range(STEPS))


CASES: dict[str, Callable[[Rivals], Iterator[Figure]]] = {
    "peer bf16 products": products,
    "peer transformers, bf16": partial(hugging_face, four_bit=False, adapters=False),
    "peer transformers + PEFT, bf16": partial(hugging_face, four_bit=False, adapters=True),
    "peer transformers, bitsandbytes NF4": partial(hugging_face, four_bit=True, adapters=False),
    "peer transformers + PEFT, bitsandbytes NF4": partial(hugging_face, four_bit=True, adapters=True),
}
