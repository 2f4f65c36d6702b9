"""Small tokenizers of the two kinds that Llama-family models have, trained here on a few lines."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

LINES = [
    "the quick brown fox jumps over the lazy dog, and the dog sleeps",
    "Grüße aus Köln; naïve café, Ελλάδα, привет мир, 你好世界, こんにちは",
    "emoji 👩‍👩‍👧 🎉🎊 🇩🇪 and numbers 1234567890",
    "def f(x):\n    return x + 1  # comment\n\n",
]
SPECIAL = ["<|start|>", "<|end|>"]


def byte_level() -> Tokenizer:
    """As SmolLM2, Llama 3 and Qwen have: bytes as characters, no unknown token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(LINES * 3, trainer)
    tokenizer.add_tokens([AddedToken("<plain añadido>", special=False)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|start|> $A", special_tokens=[("<|start|>", tokenizer.token_to_id("<|start|>"))]
    )
    return tokenizer


def sentencepiece() -> Tokenizer:
    """As Llama 2 and Mistral have: ▁ for spaces, bytes as <0xNN>, the first space stripped."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for byte in range(256):
        vocabulary[f"<0x{byte:02X}>"] = len(vocabulary)
    for piece in ["▁", *"abcdefghijklmnopqrstuvwxyz.,!?"]:
        vocabulary[piece] = len(vocabulary)
    merges = []
    for word in ("▁the", "▁dog", "▁over", "ing", "quick"):
        left = word[0]
        for right in word[1:]:
            if left + right not in vocabulary:
                vocabulary[left + right] = len(vocabulary)
                merges.append((left, right))
            left += right
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer
