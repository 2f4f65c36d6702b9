"""Ask the base and every example adapter its held-out prompts by transformers and PEFT, without a server.

Exits with 1 when an adapter shows its behaviour too rarely or the base too often.

    python examples/check_adapters.py --verbose
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from behaviour import BASE_AT_MOST, EXAMPLES, MAX_NEW_TOKENS, NAMES, SHOWN_AT_LEAST, held_out, shows
from peft import PeftModel
from train_adapter import base_folder, load_base
from transformers import AutoTokenizer

from lorry.server.model.store import DEFAULT_MODEL


def greedy_answers(model: Any, tokenizer: Any, prompts: list[str]) -> list[str]:
    """The model's greedy answers to chat prompts of one user message, as one left-padded batch."""
    texts = [
        tokenizer.apply_chat_template([{"role": "user", "content": p}], add_generation_prompt=True, tokenize=False)
        for p in prompts
    ]
    inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    output = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
    answers: list[str] = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return answers


def main(
    base: Annotated[str, typer.Option(help="The base: a name that Lorry knows, or an NF4 checkpoint.")] = DEFAULT_MODEL,
    adapters: Annotated[Path, typer.Option(help="Folder of adapter folders.")] = EXAMPLES / "adapters",
    names: Annotated[str, typer.Option(help="Which adapters, separated by commas.")] = ",".join(NAMES),
    verbose: Annotated[bool, typer.Option("--verbose", help="Print every answer.")] = False,
) -> None:
    """Check the example adapters' behaviour on held-out prompts."""
    folder = base_folder(base)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    passed = True
    for name in names.split(","):
        model = PeftModel.from_pretrained(load_base(folder, keep_nf4=False), str(adapters / name)).eval()
        cases = held_out(name)
        prompts = [case.prompt for case in cases]
        adapted = greedy_answers(model, tokenizer, prompts)
        with model.disable_adapter():
            plain = greedy_answers(model, tokenizer, prompts)
        shown = sum(shows(answer, case.check) for answer, case in zip(adapted, cases, strict=True))
        base_shown = sum(shows(answer, case.check) for answer, case in zip(plain, cases, strict=True))
        print(f"{name}: adapter {shown}/{len(cases)}, base {base_shown}/{len(cases)}")
        passed &= shown >= SHOWN_AT_LEAST * len(cases) and base_shown <= BASE_AT_MOST * len(cases)
        if verbose:
            for case, answer, other in zip(cases, adapted, plain, strict=True):
                print(f"  {case.prompt}\n    {name}: {answer!r}\n    base: {other!r}")
    raise typer.Exit(0 if passed else 1)


if __name__ == "__main__":
    typer.run(main)
