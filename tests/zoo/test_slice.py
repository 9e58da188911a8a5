"""Twenty models of the zoo, of every kind; `make zoo` runs all."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")

from tests.zoo.catalogue import Entry
from tests.zoo.trial import tried

MODELS = [
    "AlbertForMaskedLM",
    "BartForConditionalGeneration",
    "BertForMaskedLM",
    "BloomForQuestionAnswering",
    "CLIPModel",
    "DeepseekV3ForCausalLM",
    "GPT2LMHeadModel",
    "JambaForCausalLM",
    "LlamaForCausalLM",
    "LlavaForConditionalGeneration",
    "MambaForCausalLM",
    "MixtralForCausalLM",
    "Qwen2VLForConditionalGeneration",
    "ResNetForImageClassification",
    "SegformerForSemanticSegmentation",
    "T5ForConditionalGeneration",
    "TimesformerForVideoClassification",
    "ViTForImageClassification",
    "WhisperForConditionalGeneration",
    "YolosForObjectDetection",
]


@pytest.mark.filterwarnings("ignore")  # the library's own
@pytest.mark.parametrize("name", MODELS)
def test_model(name: str) -> None:
    *_, result = tried(Entry(name, kind="", model_type=""))
    assert (result.own, result.pipe, result.train) == ("right", "right", "right"), result.line()
