"""What is measured: batches, mixes of adapters, contexts, numbers of steps."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from gpu.measure import Stage

from lorry.adapters.canonical import page_count
from lorry.server.cache.blocks import BLOCK_SIZE, blocks_for

MODELS = Path(__file__).parents[2] / "examples" / "configs"


@dataclass(frozen=True)
class Mix:
    """The adapters of a batch: `count` of them, dealt round over its rows, with `ranks` in turn; 0: the base alone."""

    count: int
    ranks: tuple[int, ...] = (16,)

    def __str__(self) -> str:
        if not self.count:
            return "no adapter"
        ranks = f"rank {self.ranks[0]}" if len(self.ranks) == 1 else f"ranks {min(self.ranks)} to {max(self.ranks)}"
        return f"{self.count} adapter{'s' * (self.count > 1)} of {ranks}"

    def adapter(self, row: int) -> str | None:
        """The id of a row's adapter, which ends in its rank; equal ids of different mixes are the same adapter."""
        if not self.count:
            return None
        number = row % self.count
        return f"{number:03d}-{self.ranks[number % len(self.ranks)]}"

    def adapters(self) -> list[str]:
        """All ids."""
        return [name for row in range(self.count) if (name := self.adapter(row)) is not None]


def rank_of(adapter: str) -> int:
    return int(adapter.rpartition("-")[2])


@dataclass(frozen=True)
class Sizes:
    """context: tokens of a sequence when its last step is measured; steps: that are run for a figure, `warm` of them
    before it is measured; rounds: medians are over these; checked: tokens of each answer that are compared.

    prefill: prompts. streams, stream_steps, phases: of those who stand by while adapters load. bare: batches whose
    steps are taken apart. peers: batches of others.
    """

    model: Path
    batches: tuple[int, ...]
    mixes: tuple[Mix, ...]
    context: int
    steps: int
    warm: int
    rounds: int
    checked: int
    prefill: tuple[int, ...]
    streams: int
    stream_steps: int
    phases: int
    bare: int
    peers: tuple[int, ...]

    def mixes_of(self, batch: int) -> list[Mix]:
        """Those that have a row for each adapter."""
        return [mix for mix in self.mixes if mix.count <= batch]

    @property
    def adapters(self) -> list[str]:
        """Ids of all mixes, each once."""
        return list(dict.fromkeys(name for mix in self._used() for name in mix.adapters()))

    @property
    def pages(self) -> int:
        """Rank pages of all adapters in one linear."""
        return sum(page_count(rank_of(name)) for name in self.adapters)

    @property
    def text_blocks(self) -> int:
        """Of a prompt that is in the cache."""
        return (self.context - self.steps) // BLOCK_SIZE

    @property
    def blocks(self) -> int:
        """KV blocks: the texts of the largest batch, what its sequences add, what those who stand by add, prompts; and
        two for each sequence, one of which the scheduler keeps free."""
        largest = max(*self.batches, self.streams)
        added = largest * (blocks_for(self.steps) + 2) + self.streams * (blocks_for(self.stream_steps) + 2)
        return largest * self.text_blocks + added + 2 * blocks_for(max(self.prefill)) + 64

    def without_largest(self) -> Sizes:
        """For a smaller GPU."""
        return replace(self, batches=self.batches[:-1])

    def _used(self) -> list[Mix]:
        return [mix for mix in self.mixes if mix.count <= max(self.batches)]


SIXTEENS = (Mix(0), Mix(1), Mix(8), Mix(64))
REAL = Sizes(
    model=MODELS / "llama-3-8b",
    batches=(1, 16, 64, 256),
    mixes=(*SIXTEENS, Mix(64, (8, 16, 32, 64))),
    context=1024,
    steps=128,
    warm=16,
    rounds=3,
    checked=6,
    prefill=(512, 2048, 8191),
    streams=16,
    stream_steps=512,
    phases=4,
    bare=16,
    peers=(1, 16, 64),
)
QUICK = replace(REAL, batches=(1, 16, 64), mixes=SIXTEENS[:3], steps=48, rounds=1, stream_steps=256, phases=2)
TINY = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "vocab_size": 131,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def sizes_of(stage: Stage, model: Path) -> Sizes:
    """model: the folder of TINY, which a dry run takes."""
    if not stage.dry:
        return QUICK if stage.quick else REAL
    return Sizes(
        model=model,
        batches=(1, 3),
        mixes=(Mix(0), Mix(1), Mix(2), Mix(2, (8, 40))),
        context=64,
        steps=6,
        warm=2,
        rounds=1,
        checked=4,
        prefill=(20, 90),
        streams=3,
        stream_steps=20,
        phases=1,
        bare=3,
        peers=(1, 3),
    )
