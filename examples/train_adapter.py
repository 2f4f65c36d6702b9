"""QLoRA on the CPU: trains a LoRA adapter with PEFT on the very NF4 base that Lorry serves.

For a frozen base W = NF4(W₀) the adapter of each target linear minimizes the cross entropy of the assistant's
answers under y = W·x + s·B(A·x); A and B start as PEFT starts them (B = 0) and are the only trained tensors.

The data are JSON lines `{"messages": [{"role": …, "content": …}, …]}` whose last message is the assistant's. Only
the tokens of that last message, its end-of-turn token included, count in the loss.

The NF4 weights are dequantized once, into float32 linears that hold exactly the values of the 4-bit base: a step of
four examples on the default model then takes 2.0 s of one core instead of 3.8 s. `--keep-nf4` leaves the base in 4 bits
instead, for bases whose float32 form does not fit into memory.

    python examples/train_adapter.py --data examples/data/pirate.jsonl --out my-adapters/pirate
"""

from __future__ import annotations

import dataclasses
import enum
import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import bitsandbytes as bnb
import torch
import typer
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorry.adapters.reading.identity import FINGERPRINT_KEY
from lorry.server.model.load import base_fingerprint
from lorry.server.model.store import DEFAULT_MODEL, resolve_model

IGNORED = -100


class StoredDtype(enum.StrEnum):
    """The 16-bit formats in which an adapter can be stored."""

    BF16 = "bf16"
    FP16 = "fp16"

    @property
    def torch_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self is StoredDtype.BF16 else torch.float16


def base_folder(base: str) -> Path:
    """The folder of the NF4 checkpoint in the bitsandbytes format that Lorry serves under the name `base`."""
    return resolve_model(base)


@dataclasses.dataclass(frozen=True)
class Example:
    """One conversation as token ids: the rendered prompt, then the answer with its end-of-turn token."""

    prompt: list[int]
    answer: list[int]


def read_examples(path: Path, tokenizer: Any) -> list[Example]:
    """Render every line's messages by the model's own chat template; `ValueError` names a line that does not fit."""
    examples = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        messages = json.loads(line)["messages"]
        if len(messages) < 2 or messages[-1]["role"] != "assistant":
            raise ValueError(f"{path}:{number}: the last of at least two messages must be the assistant's")
        text = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, tokenize=False)
        prompt = tokenizer.encode(text, add_special_tokens=False)
        answer = tokenizer.encode(messages[-1]["content"], add_special_tokens=False) + [tokenizer.eos_token_id]
        examples.append(Example(prompt, answer))
    if not examples:
        raise ValueError(f"{path}: no examples")
    return examples


def collate(examples: list[Example], pad: int) -> tuple[Tensor, Tensor, Tensor]:
    """Right-padded `input_ids`, `attention_mask` and `labels`, each int64 `[B, T]`; prompts and padding are IGNORED."""
    longest = max(len(e.prompt) + len(e.answer) for e in examples)
    input_ids = torch.full((len(examples), longest), pad)
    attention_mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, IGNORED)
    for row, example in enumerate(examples):
        end = len(example.prompt) + len(example.answer)
        input_ids[row, :end] = torch.tensor(example.prompt + example.answer)
        attention_mask[row, :end] = 1
        labels[row, len(example.prompt) : end] = torch.tensor(example.answer)
    return input_ids, attention_mask, labels


def dequantize_linears(model: nn.Module) -> None:
    """Replace every 4-bit linear by a frozen float32 linear that holds exactly its dequantized values, in place."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if not isinstance(child, bnb.nn.Linear4bit):
                continue
            linear = nn.Linear(child.in_features, child.out_features, bias=False, device="meta")
            weight = bnb.functional.dequantize_4bit(child.weight.data, child.weight.quant_state)
            linear.weight = nn.Parameter(weight.reshape(child.out_features, child.in_features), requires_grad=False)
            if child.bias is not None:
                linear.bias = nn.Parameter(child.bias.data.float(), requires_grad=False)
            setattr(parent, name, linear)


def load_base(folder: Path, keep_nf4: bool) -> Any:
    """The frozen base in float32 computation, its linears in NF4 or dequantized from it."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    # A checkpoint's own 16-bit type must neither round the dequantized weights nor stay with the embedding.
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.weight.quant_state.dtype = torch.float32
    if not keep_nf4:
        dequantize_linears(model)
        # PEFT picks its layer class by these marks.
        for mark in ("quantization_config", "_pre_quantization_dtype"):
            if hasattr(model.config, mark):
                delattr(model.config, mark)
        model.is_loaded_in_4bit = False
        model.is_quantized = False
    return model.requires_grad_(False)


def answer_loss(model: PeftModel, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Mean cross entropy over the answers' tokens; the output head runs on the positions that predict them only."""
    input_ids, attention_mask, labels = batch
    causal = model.get_base_model()
    hidden = causal.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
    targets = labels[:, 1:]
    wanted = targets != IGNORED
    return nn.functional.cross_entropy(causal.lm_head(hidden[:, :-1][wanted]), targets[wanted])


def batches(examples: list[Example], size: int, steps: int, rng: random.Random) -> Iterator[list[Example]]:
    """`steps` batches; every pass over the examples is a new permutation."""
    queue: list[Example] = []
    for _ in range(steps):
        while len(queue) < size:
            queue += rng.sample(examples, len(examples))
        yield queue[:size]
        del queue[:size]


def fingerprint_metadata(folder: Path) -> dict[str, str]:
    """What lets a server refuse the adapter on another quantized base; nothing for a base that is not quantized."""
    quantized = "quantization_config" in json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return {FINGERPRINT_KEY: base_fingerprint(folder)} if quantized else {}


def save_adapter(
    model: PeftModel, out: Path, base_name: str, dtype: torch.dtype, metadata: dict[str, str] | None = None
) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors`, the folder that PEFT and Lorry read."""
    config = model.peft_config["default"]
    config.base_model_name_or_path = base_name
    config.inference_mode = True
    config.target_modules = sorted(config.target_modules)
    out.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(out))
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    tensors = {name: tensor.detach().to(dtype).contiguous() for name, tensor in state.items()}
    save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt", **(metadata or {})})


def main(
    data: Annotated[Path, typer.Option(help="JSON lines of chat messages; the last of each line is the answer.")],
    out: Annotated[Path, typer.Option(help="Folder that receives the adapter.")],
    base: Annotated[str, typer.Option(help="The base: a name that Lorry knows, or an NF4 checkpoint.")] = DEFAULT_MODEL,
    base_name: Annotated[str, typer.Option(help="The base's name in adapter_config.json.")] = "",
    rank: Annotated[int, typer.Option(min=1, max=256)] = 8,
    alpha: Annotated[float, typer.Option(help="Scaling is alpha / rank (alpha / √rank with --rslora).")] = 16,
    targets: Annotated[str, typer.Option(help="Linears to adapt, separated by commas.")] = "q_proj,v_proj",
    rslora: Annotated[bool, typer.Option("--rslora", help="Rank-stabilized scaling.")] = False,
    epochs: Annotated[float, typer.Option(help="Passes over the data, unless --steps is given.")] = 4,
    steps: Annotated[int, typer.Option(help="Optimizer steps; 0: by --epochs.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1)] = 4,
    lr: Annotated[float, typer.Option(help="Peak learning rate; warms up over 5%, then falls as a cosine.")] = 1e-3,
    seed: Annotated[int, typer.Option(help="Of A's initial values and of the order of the examples.")] = 0,
    dtype: Annotated[StoredDtype, typer.Option(help="How the adapter is stored.")] = StoredDtype.BF16,
    keep_nf4: Annotated[bool, typer.Option("--keep-nf4", help="Keep the base in 4 bits while training.")] = False,
) -> None:
    """Train a LoRA adapter on the NF4 base that Lorry serves."""
    torch.manual_seed(seed)
    folder = base_folder(base)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    examples = read_examples(data, tokenizer)
    config = LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=targets.split(","), use_rslora=rslora, task_type="CAUSAL_LM"
    )
    model = get_peft_model(load_base(folder, keep_nf4), config)
    trained = [p for p in model.parameters() if p.requires_grad]
    print(f"{len(examples)} examples, {sum(p.numel() for p in trained):,} trained parameters")

    steps = steps or math.ceil(epochs * len(examples) / batch_size)
    warmup = max(1, steps // 20)
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / steps)))
    )
    model.train()
    columns = (
        TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]:.3f}"),
        TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns) as progress:
        task = progress.add_task("training", total=steps, loss=math.nan)
        for chosen in batches(examples, batch_size, steps, random.Random(seed)):
            loss = answer_loss(model, collate(chosen, tokenizer.eos_token_id))
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            progress.update(task, advance=1, loss=loss.item())
    save_adapter(model, out, base_name or base, dtype.torch_dtype, fingerprint_metadata(folder))
    size = (out / "adapter_model.safetensors").stat().st_size
    print(f"saved {out} ({size:,} bytes)")


if __name__ == "__main__":
    typer.run(main)
