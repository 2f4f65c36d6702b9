"""Wire → domain: the strategy of a GenerationSpec, and what goes with it."""

from __future__ import annotations

from typing import Literal

from lorry.server.errors import InvalidField
from lorry.server.frontend.request import BestOf, Ranking
from lorry.server.params import BeamSearch, ContrastiveSearch, DoLa, EarlyStopping, Guidance, Search
from lorry.server.rpc import fields
from lorry.server.rpc.fields import refuse
from lorry.v1 import generation_pb2

MAX_WIDTH = 16
MAX_CANDIDATES = 16
MAX_CONTRASTIVE = 64
MAX_SCALE = 20
MAX_LAYERS = 64
BUCKETS: dict[int, Literal["low", "high"]] = {
    generation_pb2.LAYER_BUCKET_LOW: "low",
    generation_pb2.LAYER_BUCKET_HIGH: "high",
}
SHAPING = {  # fields of SamplingParams that searches honour; the others say how a token is drawn
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "dry",
    "no_repeat_ngram_size",
    "bad_words",
    "allowed_token_ids",
    "n",
}


def search(spec: generation_pb2.GenerationSpec) -> Search | None:
    """The search of a spec whose sampling is in its ranges; None: tokens are drawn."""
    match spec.WhichOneof("strategy"):
        case "beam":
            _refuse_drawing(spec, "beam search")
            if spec.stopping.stop:
                raise refuse(
                    "spec.stopping.stop", list(spec.stopping.stop), "none with beam search, which ends at tokens only"
                )
            return _beam("spec.beam", spec.beam, _n(spec))
        case "contrastive":
            _refuse_drawing(spec, "contrastive search")
            if _n(spec) > 1:
                raise refuse("spec.sampling.n", _n(spec), "1 with contrastive search, which has one answer")
            return _contrastive("spec.contrastive", spec.contrastive)
        case "guidance":
            if _n(spec) > 1:
                raise refuse("spec.sampling.n", _n(spec), "1 with guidance, which has one answer")
            return _guidance("spec.guidance", spec.guidance, len(spec.adapters))
        case _:
            return None


def best_of(spec: generation_pb2.GenerationSpec) -> BestOf | None:
    """Of a spec whose sampling is in its ranges."""
    if spec.WhichOneof("strategy") != "best_of":
        return None
    path, message = "spec.best_of", spec.best_of
    candidates = _required(f"{path}.candidates", message, "candidates")
    fields.integer(f"{path}.candidates", candidates, max(2, _n(spec)), MAX_CANDIDATES)
    if spec.sampling.HasField("temperature") and spec.sampling.temperature == 0:
        raise refuse("spec.sampling.temperature", 0.0, "above 0 with best of n: greedy sequences are equal")
    if message.ranking not in generation_pb2.BestOfRanking.values():
        raise refuse(f"{path}.ranking", message.ranking, "a BestOfRanking")
    return BestOf(candidates, Ranking(message.ranking or Ranking.MEAN))


def dola(spec: generation_pb2.GenerationSpec) -> DoLa | None:
    """Its layers have been counted by nobody yet: that takes the model."""
    if not spec.HasField("dola"):
        return None
    path, message = "spec.dola", spec.dola
    if (beside := spec.WhichOneof("strategy")) not in (None, "best_of"):
        raise InvalidField(f"{path} is set; accepted: unset with {beside}", field=path)
    if bool(message.bucket) == bool(message.layers):
        given = "both" if message.bucket else "neither"
        raise InvalidField(f"{path} has {given} of bucket and layers; accepted: one of them", field=path)
    if message.bucket:
        if message.bucket not in BUCKETS:
            raise refuse(f"{path}.bucket", message.bucket, "a LayerBucket")
        return DoLa(bucket=BUCKETS[message.bucket])
    if len(message.layers) > MAX_LAYERS:
        raise refuse(f"{path}.layers", list(message.layers), f"at most {MAX_LAYERS} layers")
    fields.unique(f"{path}.layers", message.layers)
    return DoLa(tuple(sorted(message.layers)))


def _beam(path: str, message: generation_pb2.BeamSearch, n: int) -> BeamSearch:
    width = _required(f"{path}.width", message, "width")
    fields.integer(f"{path}.width", width, 2, MAX_WIDTH)
    if n > width:
        raise refuse("spec.sampling.n", n, f"1 to {width}, which is spec.beam.width")
    groups = message.groups if message.HasField("groups") else 1
    fields.integer(f"{path}.groups", groups, 1, width)
    if width % groups:
        raise refuse(f"{path}.groups", groups, f"a divisor of width, which is {width}")
    penalty = fields.number(f"{path}.diversity_penalty", message.diversity_penalty, 0, 100)
    if penalty and groups == 1:
        raise refuse(f"{path}.diversity_penalty", penalty, "0 with one group")
    if message.early_stopping not in generation_pb2.EarlyStopping.values():
        raise refuse(f"{path}.early_stopping", message.early_stopping, "an EarlyStopping")
    length_penalty = message.length_penalty if message.HasField("length_penalty") else 1.0
    return BeamSearch(
        width,
        fields.number(f"{path}.length_penalty", length_penalty, -5, 5),
        EarlyStopping(message.early_stopping or EarlyStopping.HEURISTIC),
        groups,
        penalty,
    )


def _contrastive(path: str, message: generation_pb2.ContrastiveSearch) -> ContrastiveSearch:
    top_k = _required(f"{path}.top_k", message, "top_k")
    fields.integer(f"{path}.top_k", top_k, 2, MAX_CONTRASTIVE)
    if not message.HasField("penalty_alpha"):
        raise InvalidField(f"{path}.penalty_alpha is not set; accepted: 0 to 1", field=f"{path}.penalty_alpha")
    return ContrastiveSearch(top_k, fields.number(f"{path}.penalty_alpha", message.penalty_alpha, 0, 1))


def _guidance(path: str, message: generation_pb2.Guidance, adapters: int) -> Guidance:
    """A negative prompt has no tokens here yet."""
    negative = message.WhichOneof("negative")
    if negative is None:
        raise InvalidField(f"{path} has nothing negative; accepted: text, token_ids, chat or base", field=path)
    if not message.HasField("scale"):
        raise InvalidField(f"{path}.scale is not set; accepted: 0 to 20", field=f"{path}.scale")
    scale = fields.number(f"{path}.scale", message.scale, 0, MAX_SCALE)
    if negative != "base":
        return Guidance(scale, ())
    if not message.base or not adapters:
        raise refuse(f"{path}.base", message.base, "true, with adapters to be moved away from the base")
    return Guidance(scale)


def _required(
    path: str,
    message: generation_pb2.BeamSearch | generation_pb2.ContrastiveSearch | generation_pb2.BestOf,
    name: str,
) -> int:
    if not message.HasField(name):
        raise InvalidField(f"{path} is not set; it is required", field=path)
    return int(getattr(message, name))


def _refuse_drawing(spec: generation_pb2.GenerationSpec, what: str) -> None:
    for field, _ in spec.sampling.ListFields():
        if field.name not in SHAPING:
            path = f"spec.sampling.{field.name}"
            raise InvalidField(f"{path} is set; accepted: unset with {what}, which draws no token", field=path)


def _n(spec: generation_pb2.GenerationSpec) -> int:
    return spec.sampling.n if spec.sampling.HasField("n") else 1
