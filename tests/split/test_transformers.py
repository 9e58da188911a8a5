"""Models of the transformers library, untouched, cut at their layers: outputs, gradients and names."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pipework.split.trees import held
from tests.split.equality import before, check

transformers = pytest.importorskip("transformers")

SIZES = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24}
IDS = torch.arange(12).view(2, 6) + 3
MASK = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])


def llama() -> tuple[Any, dict[str, Any], list[str]]:
    config = transformers.LlamaConfig(
        **SIZES, num_key_value_heads=1, max_position_embeddings=16, tie_word_embeddings=True
    )
    return (
        transformers.LlamaForCausalLM(config),
        {"labels": IDS, "use_cache": False},
        ["model.layers.1", "model.layers.2"],
    )


def bert() -> tuple[Any, dict[str, Any], list[str]]:
    config = transformers.BertConfig(**SIZES, max_position_embeddings=16)
    return transformers.BertForMaskedLM(config), {"labels": IDS}, ["bert.encoder.layer.1", "bert.encoder.layer.2"]


def bart() -> tuple[Any, dict[str, Any], list[str]]:
    sizes = {
        f"{side}_{name}": size for side in ("encoder", "decoder") for name, size in (("layers", 2), ("ffn_dim", 24))
    }
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = transformers.BartConfig(vocab_size=64, d_model=16, max_position_embeddings=16, **sizes, **heads)
    model = transformers.BartForConditionalGeneration(config)
    return model, {"labels": IDS, "use_cache": False}, ["model.encoder.layers.1", "model.decoder.layers.0"]


@pytest.mark.parametrize("make", [llama, bert, bart])
def test_cut_at_the_layers(make: Any) -> None:
    torch.manual_seed(0)
    model, kwargs, names = make()
    check(model.train(), (), {"input_ids": IDS, "attention_mask": MASK, **kwargs}, spec=before(*names), want=3, calls=1)


@pytest.mark.parametrize("make", [llama, bart])
def test_key_value_cache_is_made_and_returned(make: Any) -> None:
    torch.manual_seed(0)
    model, kwargs, names = make()
    del kwargs["use_cache"]
    pipe = check(model.train(), (), {"input_ids": IDS, **kwargs}, spec=before(*names), want=3, calls=2)
    assert len(list(held(pipe(input_ids=IDS, **kwargs)))) > 2  # the loss and the logits
