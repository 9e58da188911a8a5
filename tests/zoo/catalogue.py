"""Which model classes are in the zoo: for each architecture of transformers its main class, and one with a head."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

KINDS = (  # auto-mapping -> what we call it; an architecture's main class is of the first kind that it has
    ("SEQ_TO_SEQ_CAUSAL_LM", "encoder-decoder"),
    ("SPEECH_SEQ_2_SEQ", "speech to text"),
    ("MASKED_LM", "masked LM"),
    ("CAUSAL_LM", "causal LM"),
    ("IMAGE_TEXT_TO_TEXT", "multimodal"),
    ("MULTIMODAL_LM", "multimodal"),
    ("CTC", "audio"),
    ("OBJECT_DETECTION", "detection"),
    ("ZERO_SHOT_OBJECT_DETECTION", "detection"),
    ("UNIVERSAL_SEGMENTATION", "segmentation"),
    ("SEMANTIC_SEGMENTATION", "segmentation"),
    ("INSTANCE_SEGMENTATION", "segmentation"),
    ("MASK_GENERATION", "segmentation"),
    ("DEPTH_ESTIMATION", "depth"),
    ("VIDEO_CLASSIFICATION", "video"),
    ("ZERO_SHOT_IMAGE_CLASSIFICATION", "image and text"),
    ("IMAGE_CLASSIFICATION", "vision"),
    ("AUDIO_CLASSIFICATION", "audio"),
    ("VISUAL_QUESTION_ANSWERING", "image and text"),
    ("TEXT_TO_SPECTROGRAM", "speech"),
    ("TEXT_TO_WAVEFORM", "speech"),
    ("TIME_SERIES_PREDICTION", "time series"),
    ("PRETRAINING", "pretraining"),
    ("", "base model"),
)
HEADS = (
    ("SEQUENCE_CLASSIFICATION", "classification head"),
    ("TOKEN_CLASSIFICATION", "classification head"),
    ("QUESTION_ANSWERING", "classification head"),
    ("MULTIPLE_CHOICE", "classification head"),
)


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """One model class of the zoo."""

    name: str
    kind: str
    model_type: str


def catalogue() -> list[Entry]:
    """All entries, main classes first; heads go round, so that each kind of head comes with a quarter of the models."""
    import transformers

    mains: dict[str, Entry] = {}
    heads: dict[str, Entry] = {}
    for model_type in _types():
        main = next(_offered(model_type, KINDS), None)
        if main is None:
            continue
        mains.setdefault(main.name, main)
        turn = len(heads) % len(HEADS)
        head = next(_offered(model_type, HEADS[turn:] + HEADS[:turn]), None)
        if head is not None:
            heads.setdefault(head.name, head)
    entries = [*mains.values(), *(e for e in heads.values() if e.name not in mains)]
    return [e for e in entries if hasattr(transformers, e.name)]  # one is listed that cannot be imported


def _offered(model_type: str, kinds: tuple[tuple[str, str], ...]) -> Iterator[Entry]:
    from transformers.models.auto import modeling_auto

    for key, kind in kinds:
        table: Any = getattr(modeling_auto, f"MODEL_FOR_{key}_MAPPING_NAMES" if key else "MODEL_MAPPING_NAMES", None)
        table = table or getattr(modeling_auto, f"MODEL_FOR_{key}_MAPPING_NAMES", None)
        found = (table or {}).get(model_type)
        if found:
            yield Entry(found if isinstance(found, str) else found[0], kind, model_type)


def _types() -> list[str]:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return sorted(CONFIG_MAPPING_NAMES)
