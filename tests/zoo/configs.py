"""Tiny configurations: a config's own defaults, shrunk by the names of their fields, sub-configs included."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

LAYERS = 4
VOCABULARY = 128
FIRST_SPECIAL = 100  # ids from here on are image tokens and their like; ordinary text stays below

# Fields by name, first match wins: (pattern, what becomes of an integer). Widths that must fit together get one value.
_TINY: tuple[tuple[str, Callable[[int], int]], ...] = (
    (r"vocab_size", lambda v: min(v, VOCABULARY)),
    (r"^(?!.*dim).*(num_|^n_|^)(encoder_|decoder_|hidden_|text_|conformer_)*(layers?|depth|blocks)$", lambda v: min(v, LAYERS)),
    (r"^(n_layers?|num_.*_layers|.*_depth|.*_layers|resampler_depth)$", lambda v: min(v, LAYERS)),
    (r"first_k_dense|num_kv_shared_layers|first_.*_layers", lambda v: min(v, 1)),
    (r"max_window_layers", lambda v: min(v, 2)),
    (r"num_experts_per_tok|top_?k$|moe_k$|num_experts_per_token", lambda v: min(v, 2)),
    (r"(num|n)_.*experts$|num_experts$|moe_num_experts", lambda v: min(v, 4)),
    (r"^(n_group|topk_group)s?$", lambda v: 1),
    (r"num_key_value_heads|num_kv_heads|multi_query_group_num", lambda v: min(v, 2)),
    (r"(n|num|attention)_heads?$|attention_heads$|^n_head|num_.*_heads$", lambda v: min(v, 4)),
    (r"(qk_|v_|^)head_dim$|^d_kv$|qk_.*head_dim|.*_head_dim$|dim_head|d_head$", lambda v: min(v, 8)),
    (r"rotary_dim", lambda v: min(v, 8)),
    (r"moe_.*intermediate_size|expert_.*size", lambda v: min(v, 32)),
    (r"intermediate|ffn|^d_ff$|mlp_dim|feedforward|inner_dim|linear_units", lambda v: min(v, 64)),
    (r"lora_rank", lambda v: min(v, 16)),
    (r"state_size|d_state", lambda v: min(v, 8)),
    (r"(hidden|embed|embedding|projection|pooler_output|output|proj)_(size|dim)|^(d_model|n_embd|dim|hidden_dim|emb_dim|d_embed|embed_dim|fpn_hidden_size|out_hidden_size|project_dim|projection_size)$", lambda v: min(v, 32)),
    (r"hidden_size", lambda v: min(v, 32)),
    (r"max_.*position|n_positions|max_pos_emb|context_length", lambda v: min(v, 128)),
)
_KEPT = re.compile(
    r"vocab|image_size|patch|kernel|window|position|batch|chunk|block|codebook|feature_size|^num_|^n_|length|_len$|stride"
    r"|token|bucket|scale|ratio|factor|sampling|rate|theta|grid|mel|frames|seed|steps|base|_id|index|tile|resolution|hop"
)
_WIDTH = re.compile(r"hidden|dim|size|channels|embd|rank|units|ffn|d_model|d_ff|d_kv|inner|width|filters")


def tiny(config_class: Any, level: int, **more: Any) -> Any:
    """A small config of this class.

    Level 0 gives each width a small value of its kind; level 1 divides all widths by 8, so that odd relations between
    them are kept; level 2 only takes fewer layers and a smaller vocabulary.
    """
    whole = config_class()
    fields = whole.to_dict()
    shrunk = _shrunk(fields, level, {})
    config = config_class.from_dict({**shrunk, **more})
    _quiet(config)
    return config


def _quiet(config: Any, seen: set[int] | None = None) -> None:
    """No key-value cache, which would carry activations between stages."""
    seen = set() if seen is None else seen
    if id(config) in seen:
        return
    seen.add(id(config))
    for name, value in list(vars(config).items()):
        if name == "use_cache":
            config.use_cache = False
        elif hasattr(value, "to_dict"):
            _quiet(value, seen)


def _shrunk(fields: Mapping[str, Any], level: int, specials: dict[str, int]) -> dict[str, Any]:
    lengths = {v for k, v in fields.items() if isinstance(v, int) and re.search(r"layer|depth", k) and v > LAYERS}
    result: dict[str, Any] = {}
    for name, value in fields.items():
        if name in {"stage_names", "out_features", "_out_features", "_out_indices", "transformers_version"}:
            continue
        if isinstance(value, dict):
            result[name] = _shrunk(value, level, specials) if "rope" not in name else value
        elif re.search(r"token_(id|index|ids)$|_token_id", name) and value is not None:
            result[name] = _special(name, value, specials)
        elif isinstance(value, bool) or value is None:
            result[name] = value
        elif isinstance(value, int):
            result[name] = _number(name, value, level)
        elif isinstance(value, float):
            result[name] = 0.1 if "dropout" in name and value == 0.0 else value
        elif isinstance(value, list | tuple) and value:
            result[name] = _sequence(name, list(value), level, lengths)
        else:
            result[name] = value
    return result


def _special(name: str, value: Any, specials: dict[str, int]) -> Any:
    if isinstance(value, list | tuple):
        return [_special(name, value[0], specials)] if value else value
    fixed = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    if name in fixed:
        return fixed[name]
    return specials.setdefault(name, FIRST_SPECIAL + len(specials))


def _number(name: str, value: int, level: int) -> int:
    few = [(p, f) for i, (p, f) in enumerate(_TINY) if level == 0 or i < 7]
    for pattern, rule in few:
        if re.search(pattern, name):
            return rule(value)
    if level == 1 and _WIDTH.search(name) and not _KEPT.search(name) and value % 8 == 0 and value >= 64:
        return value // 8
    if level == 0 and _WIDTH.search(name) and not _KEPT.search(name) and value > 32:
        return 32
    return value


def _sequence(name: str, values: list[Any], level: int, lengths: set[int]) -> list[Any]:
    if name == "depths" or re.search(r"num_blocks|numb_of_layers|layers_per|blocks_per|block_repeats", name):
        return [min(v, 2) if isinstance(v, int) else v for v in values]
    if re.search(r"ind(ex|ices|exes)|out_layers|feature_layers?$", name) and all(isinstance(v, int) for v in values):
        return sorted({min(v, LAYERS - 1) if v > 0 else v for v in values}) if max(values) > LAYERS else values
    if len(values) in lengths:
        kinds = list(dict.fromkeys(map(str, values)))
        first = [values[[str(v) for v in values].index(kind)] for kind in kinds][:LAYERS]
        rest = values[: LAYERS - len(first)]
        return sorted(rest + first, key=lambda v: kinds.index(str(v)))
    if level < 2 and _WIDTH.search(name) and not _KEPT.search(name):
        if all(isinstance(v, int) and v % 8 == 0 and v >= 16 for v in values):
            return [v // 8 for v in values]
    return values
