"""Example inputs for a model, made from its forward's signature, its config and the kind of its head."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

import torch

from tests.zoo.configs import FIRST_SPECIAL, VOCABULARY

LENGTH = 8  # of a sequence; some models want a multiple of 4
LONGER = 12
SAMPLES = 1600  # of a waveform
FRAMES = 64  # of a spectrogram
Inputs = dict[str, Any]


def candidates(model: Any) -> Iterator[tuple[str, Any]]:
    """Ways to call this model, the fullest first: a name, and a function of batch size and sequence length."""
    named = model.main_input_name
    main = [named] if isinstance(named, str) else list(named)
    names = set(inspect.signature(model.forward).parameters)
    senses = [s for s in _SENSES if s in names]
    text = [t for t in ("input_ids",) if t in names]
    label = ["labels"] if "labels" in names else []
    plans: list[tuple[str, list[str]]] = []
    if senses and text:
        plans += [("text and " + s, [*text, s, *label]) for s in senses]
        plans += [("text and " + s, [*text, s]) for s in senses]
    if text:
        plans += [("text", [*text, *label]), ("text", [*text])]
    for s in senses:
        plans += [(s, [s, *label]), (s, [s])]
    if "hidden_states" in names and "grid_thw" in names:
        plans.append(("pixel_values", ["hidden_states"]))
    if set(main) <= names and not (len(main) == 1 and main[0] in {*senses, *text}):
        plans.append((" and ".join(main), main))
    for name, wanted in plans:
        sound = {"input_values", "input_features"} & set(wanted)
        shapes = ["image", "video", "patches"] if "pixel_values" in wanted else _SOUNDS if sound else ["plain"]
        shapes = ["patches"] if "hidden_states" in wanted else shapes
        for shape in shapes:
            yield f"{name} ({shape})" if shape not in {"plain", "image"} else name, _maker(model, names, wanted, shape)


_SENSES = "pixel_values", "pixel_values_videos", "flattened_patches", "input_values", "input_features"
_BINS = (
    "num_mel_bins",
    "input_feat_per_channel",
    "mel_dim",
    "n_mels",
    "feature_size",
    "input_dim",
    "feature_projection_input_dim",
)
_SOUNDS = ["plain", "turned", "plain with channel", "turned with channel"]


def _maker(model: Any, names: set[str], wanted: list[str], shape: str) -> Any:
    def make(batch: int, length: int, images: int = 0, seed: int = 0) -> Inputs:
        return _Builder(model, names, wanted, shape, batch, length, images, seed).build()

    return make


class _Builder:
    """One example, field by field."""

    def __init__(
        self,
        model: Any,
        names: set[str],
        wanted: list[str],
        shape: str,
        batch: int,
        length: int,
        images: int,
        seed: int,
    ) -> None:
        self.model, self.config, self.names, self.wanted, self.shape = model, model.config, names, wanted, shape
        self.batch, self.length, self.images = batch, length, images
        self.generator = torch.Generator().manual_seed(seed)

    def build(self) -> Inputs:
        inputs: Inputs = {}
        for name in self.wanted:
            if name != "labels":
                inputs[name] = self.field(name)
        if "input_ids" in inputs and "attention_mask" in self.names:
            mask = torch.ones(inputs["input_ids"].shape, dtype=torch.long)
            mask[::5, ..., -2:] = (
                0  # some microbatches are padded and some are not, which are two paths through a model
            )
            inputs["attention_mask"] = mask
        if "mm_token_type_ids" in self.names and "input_ids" in inputs:
            inputs["mm_token_type_ids"] = (inputs["input_ids"] == self.image_token()).long()
        if "qformer_input_ids" in self.names and "input_ids" in inputs:
            inputs["qformer_input_ids"] = self.ids(self.length)
        if "input_features_mask" in self.names and "input_features" in inputs:
            frames = inputs["input_features"].shape[1 if "turned" in self.shape else -1]
            inputs["input_features_mask"] = torch.ones(self.batch, frames, dtype=torch.long)
        if "bbox" in self.names and "input_ids" in inputs:
            inputs["bbox"] = torch.zeros(*inputs["input_ids"].shape, 4, dtype=torch.long)
        if (
            "decoder_input_ids" in self.names
            and not self.is_classifier()
            and ("labels" not in self.wanted or "input_ids" not in self.wanted)
        ):
            inputs["decoder_input_ids"] = self.ids(self.length - 2)
        inputs |= self.more(inputs)
        if "labels" in self.wanted:
            inputs.update(self.labels(inputs))
        grid = next((name for name in ("image_grid_thw", "grid_thw") if name in self.names), "")
        if grid and self.shape == "patches":
            inputs[grid] = torch.tensor([[1, 4, 4]] * self.batch)
        if "return_loss" in self.names and len(self.wanted) > 1:
            inputs["return_loss"] = True
        if "use_cache" in self.names or "past_key_values" in self.names:
            inputs["use_cache"] = False
        return inputs

    def field(self, name: str) -> torch.Tensor:
        if name == "input_ids":
            ids = self.ids(self.length)
            if self.images:
                ids = torch.cat([torch.full((self.batch, self.images), self.image_token()), ids], 1)
            return ids
        if name in {"pixel_values", "hidden_states"}:
            return self.pixels(self.shape)
        if name == "pixel_values_videos":
            return self.pixels("video")
        if name == "flattened_patches":
            places = torch.arange(1, self.length + 1).float().view(1, -1, 1).expand(self.batch, -1, 2)
            return torch.cat([places, self.normal(self.length, _find(self.config, "patch_embed_hidden_size"))], -1)
        if name == "past_values":
            return self.normal(*self.series())
        if name == "task_inputs":
            return self.ids(_find(self.config, "task_seq_len"))
        if name == "input_values":
            wave = not _find(self.config, "num_mel_bins", "max_length")
            sound = self.normal(SAMPLES + 80 * self.length) if wave else self.spectrogram()
            return sound.unsqueeze(1) if "channel" in self.shape else sound
        if name == "input_features":
            return self.spectrogram().unsqueeze(1) if "channel" in self.shape else self.spectrogram()
        return self.normal(
            self.length,
            _find(self.config, *(["state_dim"] if name == "states" else []), "hidden_size", "d_model") or 32,
        )

    def is_classifier(self) -> bool:
        return (
            re.search(r"Classif|MultipleChoice|NextSentence|QuestionAnswering", type(self.model).__name__) is not None
        )

    def ids(self, length: int) -> torch.Tensor:
        shape = (self.batch, 2, length) if "MultipleChoice" in type(self.model).__name__ else (self.batch, length)
        top = min(FIRST_SPECIAL, *(v for v in _all(self.config, "vocab_size") if v > 8), FIRST_SPECIAL)
        ids = torch.randint(4, top, shape, generator=self.generator)
        end = getattr(self.config, "eos_token_id", None)
        if isinstance(end, int) and end >= 0:
            ids[..., -1] = min(end, VOCABULARY - 1)  # some heads read the position of the end
        question = getattr(self.config, "question_token_id", None)
        if question is not None:
            ids[..., 1] = question
        return ids

    def series(self) -> tuple[int, ...]:
        """The shape of a time series: as far back as the model looks, and as many channels as it has."""
        length = _find(self.config, "context_length")
        lags = getattr(self.config, "lags_sequence", None)
        if lags:
            return (
                (length + max(lags),) if self.config.input_size == 1 else (length + max(lags), self.config.input_size)
            )
        return length, _find(self.config, "num_input_channels")

    def more(self, inputs: Inputs) -> Inputs:
        """What else a forward wants that gets this."""
        found: Inputs = {}
        if "past_time_features" in self.names:
            past, future, features = self.series()[0], self.config.prediction_length, self.config.num_time_features
            found["past_time_features"] = self.normal(past, features)
            found["past_observed_mask"] = torch.ones_like(inputs["past_values"])
            found["future_values"] = self.normal(future, *self.series()[1:])
            found["future_time_features"] = self.normal(future, features)
        if "returns_to_go" in self.names:
            found["actions"] = self.normal(self.length, self.config.act_dim)
            found["rewards"], found["returns_to_go"] = self.normal(self.length, 1), self.normal(self.length, 1)
            found["timesteps"] = torch.arange(self.length).expand(self.batch, -1)
            found["attention_mask"] = torch.ones(self.batch, self.length, dtype=torch.long)
        if "merge_sizes" in self.names:
            found["merge_sizes"] = torch.full((self.batch,), 2)
        if "prompt_pixel_values" in self.names:
            found["prompt_pixel_values"], found["prompt_masks"] = self.pixels(self.shape), self.pixels(self.shape)
        if "spatial_shapes" in self.names:
            found["spatial_shapes"] = torch.tensor([[4, 4]] * self.batch)
            found["pixel_attention_mask"] = torch.ones(self.batch, 16, dtype=torch.long)
        return found

    def pixels(self, shape: str) -> torch.Tensor:
        size = _find(self.config, "image_size", "crop_size", "img_size", "input_size", "pretrain_image_size") or 64
        if isinstance(size, dict):
            size = [size["height"], size["width"]]
        height, width = (size, size) if isinstance(size, int) else (size[-2], size[-1])
        channels = _find(self.config, "num_channels", "in_channels", "in_chans", "num_input_channels")
        channels = channels if isinstance(channels, int) else 3
        if shape == "patches":
            patch = _find(self.config, "patch_size") or 14
            per = channels * patch * patch * (_find(self.config, "temporal_patch_size") or 1)
            return self.normal(16, per) if "spatial_shapes" in self.names else self.normal(16, per).flatten(0, 1)
        if "prompt_pixel_values" in self.names:
            height //= 2  # below each image comes the prompt's
        if shape == "video":
            return self.normal(_find(self.config, "num_frames", "frames_per_clip") or 1, channels, height, width)
        return self.normal(channels, height, width)

    def spectrogram(self) -> torch.Tensor:
        bins = _find(self.config, *_BINS) or 80
        positions = _find(self.config, "max_source_positions")
        fitting = 2 * positions if isinstance(positions, int) and positions <= 256 else FRAMES + 8 * self.length
        frames = _find(self.config, "max_length", "spec_size") or fitting
        return self.normal(bins, frames) if "plain" in self.shape else self.normal(frames, bins)

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(self.batch, *shape, generator=self.generator)

    def image_token(self) -> int:
        token = _find(self.config, "image_token_id", "image_token_index", "media_placeholder_token_id")
        return token if isinstance(token, int) else -1

    def labels(self, inputs: Inputs) -> Inputs:
        """What the head is trained on; none where that is no tensor split by examples."""
        name = type(self.model).__name__
        classes = getattr(self.config, "num_labels", 2)
        if "input_ids" in inputs and not self.is_classifier():
            return {"labels": inputs["input_ids"].masked_fill(inputs["input_ids"] >= FIRST_SPECIAL, -100)}
        if "TokenClassif" in name:
            return {"labels": torch.randint(0, classes, inputs["input_ids"].shape, generator=self.generator)}
        if re.search(r"Segmentation|DepthEst", name) and "pixel_values" in inputs:
            shape = inputs["pixel_values"].shape
            return {"labels": torch.randint(0, classes, (shape[0], *shape[-2:]), generator=self.generator)}
        if re.search(r"CTC|Conditional|Seq2Seq", name):
            return {"labels": self.ids(6)}
        return {"labels": torch.randint(0, 2 if "Choice" in name else classes, (self.batch,), generator=self.generator)}


def _find(config: Any, *names: str) -> Any:
    """The first of these fields that is set in a config or, failing that, in its sub-configs."""
    for name in names:
        found = _all(config, name)
        if found:
            return found[0]
    return None


def _all(config: Any, name: str, seen: set[int] | None = None) -> list[Any]:
    seen = set() if seen is None else seen
    if id(config) in seen:
        return []
    seen.add(id(config))
    own = getattr(config, name, None)
    below = [v for v in vars(config).values() if hasattr(v, "to_dict")]
    return [*([own] if own else []), *(found for sub in below for found in _all(sub, name, seen))]
