"""Which linears an adapter changes, and how, by its config: by factors A and B, by a matrix of its own, or by rows of
tokens.

    target_modules           y0 + s B A x                          also of the embedding and the head
    modules_to_save          W' x in place of W0 x
    trainable_token_indices  E'[t] = Δ_j for the j-th token t
    ensure_weight_tying      what becomes of the embedding becomes of the head of a base where both are one matrix, if
                             a name ends with theirs or an expression matches theirs alone, without the path;
                             of rows of tokens that is so without it

What modules_to_save has is no target.

Source: `set_additional_trainable_modules` of peft/utils/other.py, `_check_tied_modules` of peft/tuners/tuners_utils.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from lorry.adapters.errors import MalformedAdapter, UnsupportedField, WrongBase
from lorry.adapters.layout import ENDS, Linear, ModelLayout
from lorry.adapters.reading.spec import AdapterSpec

EMBEDDING: Linear = (ENDS, "embed_tokens")
HEAD: Linear = (ENDS, "lm_head")

_OTHERS = ("model", "model.norm", "model.layers", "model.rotary_emb")  # modules that no adapter may change here
_OTHERS_OF_A_LAYER = (
    *("", ".self_attn", ".mlp", ".input_layernorm", ".post_attention_layernorm", ".mlp.act_fn"),
    *(".self_attn.q_norm", ".self_attn.k_norm"),
)
_SERVED = "this server takes embed_tokens, lm_head and the linears of the layers"


@dataclass(frozen=True)
class Targets:
    """factors, own: linears; rows: token ids of each end whose rows are replaced.

    tied: the head follows the embedding: it has the same factors, swapped, the same matrix, or the same rows.
    """

    factors: tuple[Linear, ...]
    own: frozenset[Linear] = frozenset()
    rows: Mapping[Linear, tuple[int, ...]] | None = None
    tied: bool = False

    def owner(self, linear: Linear) -> Linear:
        """The linear whose factors it has, and so whose rank; its scale is its own."""
        return EMBEDDING if self.tied and linear == HEAD and EMBEDDING in self.factors else linear


def targets_of(spec: AdapterSpec, layout: ModelLayout) -> Targets:
    """Raises UnsupportedField for modules that cannot be changed here and for what PEFT does not combine."""
    for path in (*_OTHERS, *(f"model.layers.0{end}" for end in _OTHERS_OF_A_LAYER)):
        if spec.adapts(path):
            raise UnsupportedField(f"target_modules means {path}, {_SERVED}", "target_modules")
    own = frozenset(_own(spec, layout))
    rows = _rows(spec, layout)
    factors = spec.adapted_linears(layout)
    tied = False
    if layout.tied and spec.ensure_weight_tying:
        if spec.names_an_end(spec.modules_to_save):
            own, tied = own | {EMBEDDING, HEAD}, True
        elif spec.names_an_end(spec.target_modules) and (EMBEDDING in factors or HEAD in factors):
            factors = [linear for linear in factors if linear[0] != ENDS] + [EMBEDDING, HEAD]
            tied = True
    if layout.tied and EMBEDDING in rows and rows.setdefault(HEAD, rows[EMBEDDING]) == rows[EMBEDDING]:
        tied = True
    elif rows and spec.ensure_weight_tying and layout.tied and len(rows) == 2:
        raise UnsupportedField(
            "trainable_token_indices gives the embedding and the head different tokens, ensure_weight_tying the same",
            "trainable_token_indices",
        )
    for linear in factors:
        if linear in own or linear in rows:
            name = "modules_to_save" if linear in own else "trainable_token_indices"
            path = layout.module_path(*linear)
            raise UnsupportedField(f"{name} and target_modules both mean {path}, one of them is served", name)
    for linear in own & rows.keys():
        path = layout.module_path(*linear)
        raise UnsupportedField(
            f"modules_to_save and trainable_token_indices both mean {path}", "trainable_token_indices"
        )
    _check_factors(spec, factors, tied)
    return Targets(tuple(factors), own, rows, tied)


def _check_factors(spec: AdapterSpec, factors: list[Linear], tied: bool) -> None:
    """What PEFT has no form of at the ends, or trains on an end that it has changed and then loads over the base's."""
    at_ends = [site for layer, site in factors if layer == ENDS]
    refused = {
        "alora_invocation_tokens": bool(spec.invocation_tokens) and "embed_tokens" in at_ends,
        "lora_bias": spec.lora_bias and "embed_tokens" in at_ends,
        "init_lora_weights": (spec.loftq and bool(at_ends)) or (bool(spec.init) and "lm_head" in at_ends),
        "ensure_weight_tying": tied and bool(at_ends) and spec.use_dora,
    }
    for name, is_refused in refused.items():
        if is_refused:
            raise UnsupportedField(f"{name} is not served with {' and '.join(at_ends)} among target_modules", name)


def _own(spec: AdapterSpec, layout: ModelLayout) -> Iterator[Linear]:
    """Linears that modules_to_save names, as PEFT does: by the ends of their paths."""
    others = [f"model.layers.{layer}{end}" for layer in range(layout.layers) for end in _OTHERS_OF_A_LAYER]
    for path in (*_OTHERS, *others):
        for name in spec.modules_to_save:
            if path.endswith(name):
                raise UnsupportedField(f"modules_to_save means {path}, {_SERVED}", "modules_to_save")
    for linear in (*layout.linears(), *((ENDS, site) for site in layout.ends)):
        if layout.module_path(*linear).endswith(tuple(spec.modules_to_save)):
            yield linear


def _rows(spec: AdapterSpec, layout: ModelLayout) -> dict[Linear, tuple[int, ...]]:
    """Token ids of the ends that trainable_token_indices names."""
    rows: dict[Linear, tuple[int, ...]] = {}
    for name, ids in spec.token_indices:
        found = [(ENDS, site) for site in layout.ends if layout.module_path(ENDS, site).endswith(name)]
        if len(found) != 1:
            raise UnsupportedField(
                f"trainable_token_indices names {name[:80]!r}, this server takes embed_tokens and lm_head",
                "trainable_token_indices",
            )
        (linear,) = found
        if linear in rows:
            path = layout.module_path(*linear)
            raise UnsupportedField(f"trainable_token_indices names {path} twice", "trainable_token_indices")
        vocabulary = layout.ends["embed_tokens"][0]
        for token in ids:
            if token >= vocabulary:
                raise WrongBase(
                    f"trainable_token_indices has token {token}, this base has {vocabulary}", "trainable_token_indices"
                )
        if len(set(ids)) < len(ids):
            raise MalformedAdapter("trainable_token_indices has a token twice", "trainable_token_indices")
        rows[linear] = ids
    return rows
