"""transformers' generate, and PEFT's mixed-adapter batches (`adapter_names` per row), in process.

Static batches of `streams` prompts: transformers has no other way through PEFT. The base alone runs without PEFT's
wrapper. Settings: dtype · attention: "sdpa" or "eager".
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from protocol import TokenIds, Worker, serve
from transformers import AutoModelForCausalLM


class HuggingFace(Worker):
    def __init__(self, settings: dict[str, Any]) -> None:
        torch.set_num_threads(settings["torch_threads"])
        self.model: Any = AutoModelForCausalLM.from_pretrained(
            settings["base"], dtype=getattr(torch, settings["dtype"]), attn_implementation=settings["attention"]
        )
        self.model.generation_config.eos_token_id = None
        self.mixed = bool(settings["adapter_names"])
        for number, name in enumerate(settings["adapter_names"]):
            from peft import PeftModel

            folder = Path(settings["adapters"]) / name
            if number == 0:
                self.model = PeftModel.from_pretrained(self.model, folder, adapter_name=name)
            else:
                self.model.load_adapter(folder, adapter_name=name)
        self.model.eval()

    def generate(
        self, prompts: list[list[int]], adapters: list[str | None], streams: int, new_tokens: int
    ) -> list[list[int]]:
        found: TokenIds = []
        for start in range(0, len(prompts), streams):
            ids = torch.tensor(prompts[start : start + streams])
            names = [name or "__base__" for name in adapters[start : start + streams]]
            extra = {"adapter_names": names} if self.mixed else {}
            with torch.inference_mode():
                output = self.model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    do_sample=False,
                    max_new_tokens=new_tokens,
                    pad_token_id=0,
                    **extra,
                )
            found += output[:, ids.shape[1] :].tolist()
        return found


if __name__ == "__main__":
    serve(HuggingFace, ("transformers", "peft", "torch"))
