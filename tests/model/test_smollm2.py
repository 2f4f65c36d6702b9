"""The default model, as its GGUF file becomes an NF4 checkpoint, against transformers and its own tokenizer."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from lorry.kernels.nf4 import quantize
from lorry.server.config import MIB, EngineConfig
from lorry.server.engine.local import LocalEngine
from lorry.server.engine.messages import AdapterRef, Generate, SamplingParams, StoppingParams
from lorry.server.model.decoder import Decoder
from lorry.server.model.load import load_model, open_checkpoint
from lorry.server.model.readers.gguf import GGUFCheckpoint
from lorry.server.model.store import default_gguf
from lorry.server.model.weights import read_layer
from lorry.server.params import BeamSearch, ContrastiveSearch, EarlyStopping, Search

PROSE = (Path(__file__).parent / "prose.txt").read_text(encoding="utf-8")
PIRATE = Path(__file__).parents[2] / "examples" / "adapters" / "pirate"
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "<empty_output>")


@pytest.fixture(scope="module")
def decoder(smollm2_folder: Path) -> Decoder:
    return load_model(str(smollm2_folder))


@pytest.fixture(scope="module")
def tokenizer(smollm2_folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(smollm2_folder / "tokenizer.json"))


def dequantized(folder: Path) -> LlamaForCausalLM:
    """transformers' model in float32 whose linears are what bitsandbytes dequantizes from the folder's tensors."""
    raw = json.loads((folder / "config.json").read_text())
    config = LlamaConfig(**{key: raw[key] for key in raw if key != "quantization_config"})
    tensors = load_file(folder / "model.safetensors")
    state: dict[str, Tensor] = {}
    for name in [name for name in tensors if name.endswith(".weight")]:
        parts = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
        if parts:
            quant_state = bnb.QuantState.from_dict(parts, device=torch.device("cpu"))
            state[name] = bnb.dequantize_4bit(tensors[name], quant_state)
        else:
            state[name] = tensors[name].float()
    model: LlamaForCausalLM = LlamaForCausalLM.from_pretrained(
        None, config=config, state_dict=state, dtype=torch.float32
    )
    return model.eval()


def test_teacher_forced_agreement(decoder: Decoder, tokenizer: Tokenizer, smollm2_folder: Path, tools: Any) -> None:
    """As it is served (int16 products, bfloat16 cache), two sequences in chunks of one batch; then a part of it with a
    float32 cache, in int16 products and in float32 ones, which leave nothing to rounding."""
    ids = tokenizer.encode(PROSE).ids
    assert len(ids) >= 1000
    halves = [ids[: len(ids) // 2], ids[len(ids) // 2 :]]
    chunks = [[100] * 8, [37, *[150] * 8]]
    expected = tools.reference_logits(dequantized(smollm2_folder), halves)
    int16 = load_model(str(smollm2_folder), products="int16")
    served = tools.paged_logits(int16, halves, chunks=chunks, kv_dtype=torch.bfloat16)
    agree = sum(int((a.argmax(-1) == e.argmax(-1)).sum()) for a, e in zip(served, expected, strict=True))
    assert agree >= 0.99 * len(ids)
    assert tools.relative_rms(served[0][:133], expected[0][:133]) < 2e-2
    for model, limit in ((int16, 5e-4), (decoder, 1e-5)):
        wide = tools.paged_logits(model, [halves[0][:133]], chunks=[[29, 101]])[0]
        assert tools.relative_rms(wide, expected[0][:133]) < limit


def test_an_activated_lora_equals_peft(
    decoder: Decoder, tokenizer: Tokenizer, smollm2_folder: Path, tmp_path: Path, tools: Any
) -> None:
    """An example adapter that the assistant's turn invokes; what stands before it is the base's to the last bit."""
    invoked = tokenizer.encode("<|im_start|>assistant\n").ids
    ids = tokenizer.encode(f"<|im_start|>user\n{PROSE[:300]}<|im_end|>\n<|im_start|>assistant\nArr, matey!").ids
    (start,) = (at for at in range(len(ids)) if ids[at : at + len(invoked)] == invoked)
    shutil.copytree(PIRATE, tmp_path / "pirate")
    fields = json.loads((PIRATE / "adapter_config.json").read_text()) | {"alora_invocation_tokens": invoked}
    (tmp_path / "pirate" / "adapter_config.json").write_text(json.dumps(fields))
    peft = PeftModel.from_pretrained(dequantized(smollm2_folder), str(tmp_path / "pirate"))
    expected = tools.reference_logits(peft, [ids])[0].log_softmax(-1)[:-1].gather(1, torch.tensor(ids)[1:, None])[:, 0]

    config = EngineConfig(
        kv_dtype="float32", adapter_dtype="float32", kv_memory=32 * MIB, token_budget=37, adapters_dir=str(tmp_path)
    )
    engine = LocalEngine(decoder, config)
    greedy, scored = SamplingParams(temperature=0.0), {"logprobs": 0, "prompt_logprobs_from": 1}
    asked = [
        Generate(str(number), ids, greedy, StoppingParams(0), adapters, **scored)
        for number, adapters in enumerate([(), (AdapterRef("pirate"),)])
    ]
    base, actual = (
        torch.tensor([each.logprob for each in answer.prompt_logprobs or ()]) for answer in engine.generate(*asked)
    )
    engine.close()
    assert tools.relative_rms(actual, expected) < 1e-4
    assert torch.equal(actual[:start], base[:start]) and not torch.isclose(actual[start:], base[start:]).all()


def test_gains_and_shifts_equal_peft(
    decoder: Decoder, tokenizer: Tokenizer, smollm2_folder: Path, tmp_path: Path, tools: Any
) -> None:
    """DoRA, rsLoRA with biases of B, and the base in one batch, over the quantized base itself."""
    ids = tokenizer.encode(PROSE[:300]).ids
    configs = {
        "dora": {"r": 8, "use_dora": True, "target_modules": ["q_proj", "o_proj", "up_proj", "down_proj"]},
        "lora_bias": {
            "r": 5,
            "use_rslora": True,
            "lora_bias": True,
            "target_modules": ["k_proj", "v_proj", "gate_proj"],
        },
    }
    model, generator = dequantized(smollm2_folder), torch.Generator().manual_seed(3)
    expected = [tools.reference_logits(model, [ids])[0]]
    for name, config in configs.items():
        peft = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **config)).eval()
        for parameter in (parameter for parameter in peft.parameters() if parameter.requires_grad):
            noise = torch.randn(parameter.shape, generator=generator)
            is_magnitude = parameter.dim() == 1 and name == "dora"
            parameter.data = parameter.data * (1 + 0.1 * noise) if is_magnitude else 0.03 * noise
        peft.save_pretrained(str(tmp_path / name))
        expected.append(tools.reference_logits(peft, [ids])[0])
        model = peft.unload()

    config = EngineConfig(kv_dtype="float32", adapter_dtype="float32", kv_memory=32 * MIB, adapters_dir=str(tmp_path))
    engine = LocalEngine(decoder, config)
    greedy, scored = SamplingParams(temperature=0.0), {"logprobs": 0, "prompt_logprobs_from": 1}
    asked = [
        Generate(str(number), ids, greedy, StoppingParams(0), adapters, **scored)
        for number, adapters in enumerate([(), *((AdapterRef(name),) for name in configs)])
    ]
    answers = engine.generate(*asked)
    engine.close()
    for answer, logits in zip(answers, expected, strict=True):
        actual = torch.tensor([each.logprob for each in answer.prompt_logprobs or ()])
        theirs = logits.log_softmax(-1)[:-1].gather(1, torch.tensor(ids)[1:, None])[:, 0]
        assert tools.relative_rms(actual, theirs) < 1e-4
    assert tools.relative_rms(expected[1], expected[0]) > 0.02 and tools.relative_rms(expected[2], expected[0]) > 0.02


def test_searches_equal_transformers_and_the_paper(
    decoder: Decoder, tokenizer: Tokenizer, smollm2_folder: Path
) -> None:
    """Beams by transformers' generate, tokens and scores; contrastive search by its equation."""
    model, ids = dequantized(smollm2_folder), tokenizer.encode("The lighthouse keeper opened the door and").ids
    beams = [(BeamSearch(4), 2, False), (BeamSearch(3, 0.0, EarlyStopping.NEVER), 1, "never")]
    contrastive, count = ContrastiveSearch(4, 0.6), 6
    searches: list[tuple[Search, int]] = [*((search, n) for search, n, _ in beams), (contrastive, 1)]
    asked = [
        Generate(str(number), ids, SamplingParams(n=n, search=search), StoppingParams(count))
        for number, (search, n) in enumerate(searches)
    ]
    engine = LocalEngine(decoder, EngineConfig(kv_dtype="float32", kv_memory=32 * MIB))
    answers = engine.generate(*asked)
    engine.close()
    for (search, n, early_stopping), answer in zip(beams, answers, strict=False):
        wanted: Any = model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
            num_beams=search.width,
            num_return_sequences=n,
            length_penalty=search.length_penalty,
            early_stopping=early_stopping,
            max_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_scores=True,
        )
        assert [answer.tokens(index) for index in range(n)] == wanted.sequences[:, len(ids) :].tolist()
        scores = [answer.completions[index].score for index in range(n)]
        assert scores == pytest.approx(wanted.sequences_scores.tolist(), rel=1e-4)
    text = list(ids)
    with torch.no_grad():
        for _ in range(count):
            states = model.model(torch.tensor([text])).last_hidden_state[0]
            p = model.lm_head(states[-1]).softmax(-1)
            best = p.topk(contrastive.top_k).indices.tolist()
            behind = model.model(torch.tensor([[*text, token_id] for token_id in best])).last_hidden_state[:, -1]
            similar = torch.cosine_similarity(behind[:, None], states[None], dim=-1).amax(dim=1)
            text.append(best[int((0.4 * p[best] - 0.6 * similar).argmax())])
    assert answers[-1].tokens() == text[len(ids) :]


def test_it_knows_its_capitals(decoder: Decoder, tokenizer: Tokenizer, tools: Any) -> None:
    """A wrong permutation of q and k, or a wrong token id, would not."""
    ids = tokenizer.encode("The capital of France is").ids
    logits = tools.paged_logits(decoder, [ids], chunks=[[len(ids)]])[0]
    assert tokenizer.id_to_token(int(logits[-1].argmax())) == "ĠParis"


def test_double_quantization_stays_compressed(decoder: Decoder) -> None:
    assert 4.12 < decoder.bits_per_linear_weight <= 4.13
    assert decoder.parameters == 134_515_008
    assert decoder.weight_bytes < 112_000_000
    assert decoder.config.eos_token_ids == (2,)


def test_the_cached_checkpoint_is_what_the_file_says(smollm2_folder: Path) -> None:
    """The kept conversion is not older than the code: one layer read from both is the same, bit for bit."""
    source = GGUFCheckpoint(default_gguf())
    expected = read_layer(source, 7)
    actual = read_layer(open_checkpoint(smollm2_folder), 7)
    assert torch.equal(actual.input_norm, expected.input_norm)
    for site, weight in actual.linears.items():
        float_weight = expected.linears[site]
        assert isinstance(float_weight, Tensor) and not isinstance(weight, Tensor)
        again = quantize(float_weight, tables_in=torch.float64)
        assert torch.equal(weight.packed, again.packed)
        assert torch.equal(weight.absmax, again.absmax)


def test_loading_imports_no_training_library(smollm2_folder: Path) -> None:
    """What a start pays for is torch and safetensors."""
    program = (
        "import sys\n"
        "from lorry.server.model.load import load_model\n"
        "load_model(sys.argv[1])\n"
        "heavy = {'transformers', 'bitsandbytes', 'gguf', 'tokenizers', 'peft', 'huggingface_hub'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(smollm2_folder)], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "text",
    [
        PROSE,
        "naïve café, Ångström, 日本語のテキスト, русский, עברית, 😀👩‍👩‍👧",
        "  leading\n\n\ttabs and   spaces \r\n trailing  ",
        "x = {'a': [1, 2.50, -3e10]}; # 12,345",
        "it's we'll they'd I'M",
        "",
    ],
    ids=["prose", "scripts", "space", "code", "contractions", "empty"],
)
def test_text_survives_the_tokenizer(text: str, tokenizer: Tokenizer, smollm2_folder: Path) -> None:
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert AutoTokenizer.from_pretrained(smollm2_folder)(text).input_ids == ids


def test_digits_stand_alone(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("year 2024, 3.14").tokens == [
        *("year", "Ġ", "2", "0", "2", "4", ",", "Ġ", "3", ".", "1", "4"),
    ]


def test_special_tokens_are_single_ids(tokenizer: Tokenizer) -> None:
    for token in SPECIALS:
        ids = tokenizer.encode(f"a{token}b").ids
        assert len(ids) == 3
        assert ids[1] == tokenizer.token_to_id(token)
        assert ids[1] < 17
    assert tokenizer.decode(tokenizer.encode("a<|im_end|>b").ids) == "ab"


def test_chat_template(smollm2_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder)
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello.<|im_end|>\n<|im_start|>assistant\n"
    )
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
    assert tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"][0] == 1
