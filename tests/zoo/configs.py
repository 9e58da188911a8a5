"""Tiny configurations: a config's own defaults, shrunk by the names of their fields, sub-configs included."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

LAYERS = 4
VOCABULARY = 128
FIRST_SPECIAL = 100  # ids from here on are image tokens and their like; ordinary text stays below


def _most(limit: int) -> Callable[[int], int]:
    return lambda value: min(value, limit)


# What becomes of an integer field, by name; the first match holds.
_COUNTS: tuple[tuple[str, Callable[[int], int]], ...] = (
    (r"^(n_group|topk_group|num_expert_group)s?$", lambda _: 1),
    (r"^num_groups$", _most(4)),
    (r"^max_length$|^max_source_positions$", _most(64)),
    (r"attn_chunk_length$", _most(4)),
    (r"attention_window$", _most(8)),
    (r"^(num_frames|frames_per_clip)$", _most(4)),
    (r"^num_queries$|two_stage_num_proposals", _most(8)),
    (r"vocab_size", _most(VOCABULARY)),
    (r"num_kv_shared_layers", lambda _: 0),
    (r"first_k_dense|first_.*_layers", _most(1)),
    (r"max_window_layers", _most(2)),
    (r"^(?!.*dim).*(num_|^n_|^)(encoder_|decoder_|hidden_|text_|conformer_)*(layers?|depth|blocks)$", _most(LAYERS)),
    (r"^(n_layers?|num_.*_layers|.*_depth|.*_layers|resampler_depth)$", _most(LAYERS)),
    (r"index_topk$", _most(16)),
    (r"num_experts_per_tok|top_?k$|moe_k$", _most(2)),
    (r"(num|n)_.*experts$|num_experts$", _most(4)),
)
_WIDTHS: tuple[tuple[str, Callable[[int], int]], ...] = (  # those that must fit together get one value
    (r"num_key_value_heads|num_kv_heads|multi_query_group_num", _most(2)),
    (r"(n|num|attention)_heads?$|^n_head|num_.*_heads$", _most(4)),
    (r"head_dim$|^d_kv$|dim_head|d_head$|rotary_dim", _most(8)),
    (r"moe_.*intermediate_size|expert_.*size", _most(32)),
    (r"intermediate|ffn|^d_ff$|mlp_dim|feedforward|inner_dim|linear_units", _most(64)),
    (r"lora_rank", _most(16)),
    (r"upsample_groups", _most(32)),
    (r"state_size|d_state", _most(8)),
    (r"(hidden|embed|embedding|projection|pooler_output|output|proj)_(size|dim)|hidden_size|project_dim", _most(32)),
    (r"^(d_model|n_embd|dim|hidden_dim|emb_dim|d_embed|embed_dim)$", _most(32)),
    (r"max_.*position|n_positions|max_pos_emb|context_length", _most(128)),
)
_WIDTH = re.compile(r"hidden|dim|size|channels|embd|rank|units|ffn|d_model|d_ff|d_kv|inner|width|filters")
_NO_WIDTH = re.compile(
    r"vocab|image_size|patch|kernel|window|position|batch|chunk|block|codebook|feature_size|^num_|^n_|length|_len$|stride"
    r"|token|bucket|scale|ratio|factor|sampling|rate|theta|grid|mel|frames|seed|steps|base|_id|index|tile|resolution|hop|tubelet"
)
_LEFT_OUT = {"stage_names", "out_features", "_out_features", "_out_indices", "transformers_version"}  # made anew
_FIXED_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}

_EVERYWHERE = {
    "use_cache": False,  # a key-value cache would carry activations between stages
    "apply_spec_augment": False,  # masks drawn by numpy, which no one can draw again for the unsplit model
    "mask_time_prob": 0.0,
    "mask_feature_prob": 0.0,
    "axial_pos_embds": False,  # would fix the length of the sequence
}
_SERIES = {"prediction_length": 4}
_EFFICIENT = {  # its channels are rounded, so that they cannot be divided
    "in_channels": [32, 16, 24, 40, 80, 112, 192],
    "out_channels": [16, 24, 40, 80, 112, 192, 320],
    "width_coefficient": 0.5,
    "depth_coefficient": 0.5,
    "hidden_dim": 640,
    "image_size": 64,
}
_PERCEIVER = {
    "d_latents": 32,
    "d_model": 32,
    "num_latents": 8,
    "num_blocks": 1,
    "num_self_attends_per_block": LAYERS,
    "num_self_attention_heads": 4,
    "num_cross_attention_heads": 4,
    "qk_channels": 32,
    "v_channels": 32,
    "max_position_embeddings": 64,
}
_HYBRID = {"layer_types": ["conv", "full_attention", "conv", "full_attention"]}
_OF_ONE_CONFIG: dict[str, dict[str, Any]] = {  # what its defaults lack
    "AutoformerConfig": _SERIES,
    "InformerConfig": _SERIES,
    "TimeSeriesTransformerConfig": _SERIES,
    "ChameleonConfig": {"vocabulary_map": {"<image>": FIRST_SPECIAL}},
    "DeepseekV2Config": {"num_experts_per_tok": 2},
    "EfficientNetConfig": _EFFICIENT,
    "FalconH1Config": {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16},
    "Lfm2MoeConfig": _HYBRID,
    "NeoMMEConfig": {"head_dim": 16},
    "PerceiverConfig": _PERCEIVER,
    "Wav2Vec2BertConfig": {"vocab_size": VOCABULARY},
    "Wav2Vec2ConformerConfig": {"vocab_size": VOCABULARY},
    "XmodConfig": {"default_language": "en_XX"},
    "BeitConfig": {"out_indices": [1, 2, 3, 4]},
    "Data2VecVisionConfig": {"out_indices": [1, 2, 3, 4]},
    "Blip2Config": {"image_token_index": VOCABULARY - 1},
    "LEDConfig": {"attention_window": 8},
    "LongformerConfig": {"attention_window": 8},
    "EsmConfig": {"vocab_size": VOCABULARY},
    "InstructBlipConfig": {"image_token_index": VOCABULARY - 1},
    "BigBirdConfig": {"attention_type": "original_full"},  # else its first forward exchanges its modules
    "BigBirdPegasusConfig": {"attention_type": "original_full"},
}
_BACKBONE = {  # for those of the timm library
    "model_type": "resnet",
    "embedding_size": 8,
    "hidden_sizes": [8, 16, 16, 32],
    "depths": [1, 1, 1, 1],
    "layer_type": "basic",
    "out_features": ["stage1", "stage2", "stage3", "stage4"],
}


def tiny(config_class: Any, level: int) -> Any:
    """A small config of this class.

    Level 0 gives each width a small value of its kind; level 1 divides all widths by 8, so that odd relations between
    them are kept; level 2 only takes fewer layers and a smaller vocabulary.
    """
    fields = _shrunk(config_class().to_dict(), level, {})
    config = config_class.from_dict(fields | _OF_ONE_CONFIG.get(config_class.__name__, {}))
    _set(config, _EVERYWHERE)
    _complete(config)
    return config


def _complete(config: Any) -> None:
    """Fields that a model needs and its config leaves open."""
    heads, width = (getattr(config, name, None) for name in ("num_attention_heads", "hidden_size"))
    wanted = {"pad_token_id": 0, "decoder_start_token_id": 1, "num_key_value_heads": heads}
    wanted["head_dim"] = width // heads if isinstance(heads, int) and isinstance(width, int) else None
    for name, value in wanted.items():
        if getattr(config, name, 0) is None and value is not None:
            setattr(config, name, value)
    if getattr(config, "is_encoder_decoder", False) and not hasattr(config, "decoder_start_token_id"):
        config.decoder_start_token_id = 0
    for inner in vars(config).values():
        if hasattr(inner, "to_dict"):
            _complete(inner)


def _set(config: Any, wanted: Mapping[str, Any]) -> None:
    """Set these fields wherever they are, in sub-configs too."""
    for name, value in list(vars(config).items()):
        if name in wanted:
            setattr(config, name, wanted[name])
        elif hasattr(value, "to_dict"):
            _set(value, wanted)


def _shrunk(fields: Mapping[str, Any], level: int, specials: dict[str, int]) -> dict[str, Any]:
    lengths = {v for k, v in fields.items() if isinstance(v, int) and re.search(r"layer|depth", k) and v > LAYERS}

    def of(name: str, value: Any) -> Any:
        match value:
            case dict() if value.get("model_type") == "timm_backbone":
                return _BACKBONE
            case dict() if "model_type" in value:
                return _shrunk(value, level, specials)
            case dict() if name.startswith("per_layer"):  # what is said of layers by their number
                return {k: v for k, v in value.items() if int(k) < LAYERS}
            case int() | list() | tuple() if re.search(r"token_(id|index|ids)$", name):
                return _special(name, value, specials)
            case bool():
                return value
            case int():
                return _number(name, value, level)
            case float():
                return _probability(name, value, level)
            case list() | tuple() if value:
                return _sequence(name, list(value), level, lengths)
            case _:
                return value

    shrunk = {name: of(name, value) for name, value in fields.items() if name not in _LEFT_OUT}
    _make_consistent(shrunk, fields, level)
    return shrunk


def _special(name: str, value: Any, specials: dict[str, int]) -> Any:
    """Each special token has an id of its own, the same in all sub-configs."""
    if isinstance(value, list | tuple):
        return [_special(name, value[0], specials)] if value else value
    return _FIXED_IDS[name] if name in _FIXED_IDS else specials.setdefault(name, FIRST_SPECIAL + len(specials))


def _number(name: str, value: int, level: int) -> int:
    for pattern, rule in (*_COUNTS, *(_WIDTHS if level == 0 else ())):
        if re.search(pattern, name):
            return rule(value)
    if level == 2 or not _WIDTH.search(name) or _NO_WIDTH.search(name):
        return value
    if level == 0:
        return min(value, 32)
    return value // 8 if value % 8 == 0 and value >= 64 else value


def _probability(name: str, value: float, level: int) -> float:
    if "layerdrop" in name:
        return 0.0  # layers skipped at random take another path with each microbatch
    return 0.1 if level == 0 and "dropout" in name and value == 0.0 else value


def _sequence(name: str, values: list[Any], level: int, lengths: set[int]) -> list[Any]:
    whole = all(isinstance(v, int) for v in values)
    if name == "backbone_feature_sizes" and level == 0:
        return [[side * 4 // values[-1][0] for side in sides] for sides in values]
    if name == "depths" or re.search(r"num_blocks|numb_of_layers|layers_per|blocks_per|block_repeats", name):
        return [min(v, 2) for v in values] if whole else values
    if whole and re.search(r"ind(ex|ices|exes)|out_layers|feature_layers?$", name):
        return sorted({min(v, LAYERS - 1) if v > 0 else v for v in values}) if max(values) > LAYERS else values
    if len(values) in lengths:  # one for each layer: of every kind at least one
        kinds = list(dict.fromkeys(map(str, values)))
        first = [values[[str(v) for v in values].index(kind)] for kind in kinds][:LAYERS]
        return sorted(values[: LAYERS - len(first)] + first, key=lambda v: kinds.index(str(v)))
    wide = level < 2 and _WIDTH.search(name) and not _NO_WIDTH.search(name)
    if not (wide and whole and all(v <= 4 or (v % 8 == 0 and v >= 16) for v in values)):
        return values
    return [v if v <= 4 else v // 8 for v in values]  # up to 4 are the channels of an image


def _make_consistent(shrunk: dict[str, Any], fields: Mapping[str, Any], level: int) -> None:
    """Fields that depend on others in the original do so here."""
    heads = fields.get("num_attention_heads")
    if heads and fields.get("num_key_value_heads") == heads:
        shrunk["num_key_value_heads"] = shrunk["num_attention_heads"]
    if fields.get("qk_head_dim") and fields.get("qk_rope_head_dim"):
        shrunk["qk_head_dim"] = shrunk["qk_rope_head_dim"] + shrunk["qk_nope_head_dim"]
    expand = fields.get("mamba_expand") or fields.get("expand")
    pairs = ("mamba_n_heads", "mamba_d_head"), ("num_heads", "head_dim"), ("mamba_num_heads", "mamba_head_dim")
    for count, width in pairs:
        if isinstance(expand, int) and fields.get(count) and fields.get(width):
            shrunk[width] = expand * shrunk["hidden_size"] // shrunk[count]
    many, width = shrunk.get("num_heads"), shrunk.get("embed_dim")
    if level == 0 and isinstance(many, list) and isinstance(width, int) and width % many[0]:
        shrunk["embed_dim"] = 8 * many[0]
    rope = shrunk.get("rope_parameters")
    if level < 2 and isinstance(rope, dict) and "rope_type" in rope and shrunk.get("num_attention_heads"):
        head = shrunk.get("head_dim") or shrunk["hidden_size"] // shrunk["num_attention_heads"]
        half = int(head * (rope.get("partial_rotary_factor") or 1)) // 2
        shrunk["rope_parameters"] = {**rope, "mrope_section": [half - half // 3 * 2, half // 3, half // 3]}
    size, patch = fields.get("image_size"), fields.get("patch_size") or fields.get("tubelet_size")
    patch = patch[-1] if isinstance(patch, list | tuple) else patch
    if level == 0 and isinstance(patch, int) and patch > 1:
        small = patch * max(2, 64 // patch)
        if isinstance(size, int) and size > 64:
            shrunk["image_size"] = small
        elif isinstance(size, list | tuple) and min(size) > 64:
            shrunk["image_size"] = [small] * len(size)
