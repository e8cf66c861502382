"""A word-level tokenizer and an image spec, both tiny."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from crossft.types import ImageSpec, TextSpec

WORDS = ["bad", "good", "a", "b", "c", "d", "e", "f", "g", "h", "i", "j"]


@pytest.fixture
def image_spec() -> ImageSpec:
    return ImageSpec((8, 8), (0.5,) * 3, (0.5,) * 3, "bilinear")


@pytest.fixture
def text_spec() -> TextSpec:
    vocabulary = {w: i for i, w in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]")
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    return TextSpec(tokenizer, 16)
