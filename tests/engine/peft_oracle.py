"""PEFT over the base that the tests' engines serve."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import torch
from transformers import LlamaForCausalLM

from lorry.kernels.lora import SITES
from lorry.server.engine.local import Answer


def rounded_base(model_folder: Path) -> LlamaForCausalLM:
    """The tiny Llama with the linears of its layers rounded to NF4."""
    model = LlamaForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    with torch.no_grad():
        for name, module in model.named_modules():
            if name.split(".")[-1] in SITES:
                flat, state = bnb.quantize_4bit(module.weight.reshape(-1), quant_type="nf4", compress_statistics=True)
                module.weight.copy_(bnb.dequantize_4bit(flat, state).view(module.weight.shape))
    return model


@functools.cache
def asked(peft: Any, tokens: tuple[int, ...], adapters: tuple[tuple[str, float], ...]) -> tuple[list[int], list[float]]:
    """PEFT's greedy answer; log-probabilities of the prompt's tokens from the second on, then of the answer's four."""
    ids = torch.tensor([tokens])
    options = {"do_sample": False, "max_new_tokens": 4, "min_new_tokens": 4, "eos_token_id": None}
    options |= {"pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    with torch.no_grad():
        if adapters:
            ((name, weight),) = adapters
            peft.set_adapter(name)
            layers = [module for module in peft.modules() if hasattr(module, "lora_A")]
            for layer in layers:
                layer.scale_layer(weight)
            of_prompt, answer = peft(input_ids=ids).logits[0], peft.generate(input_ids=ids, **options)
            for layer in layers:
                layer.unscale_layer()
        else:
            with peft.disable_adapter():
                of_prompt, answer = peft(input_ids=ids).logits[0], peft.generate(input_ids=ids, **options)
    chosen = answer.sequences[0, len(tokens) :].tolist()
    logits = torch.cat([of_prompt[:-1], *answer.logits])
    targets = torch.tensor([*tokens[1:], *chosen])
    return chosen, logits.log_softmax(-1).gather(1, targets[:, None])[:, 0].tolist()


def logprobs_of(answer: Answer) -> list[float]:
    assert answer.prompt_logprobs is not None
    return [each.logprob for each in (*answer.prompt_logprobs, *answer.completions[0].logprobs)]
