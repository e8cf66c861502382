"""Tiny backbones: one small member of each timm family, and transformers built from configs with a word tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crossft.backbones import Timm, Transformer
from crossft.types import ImageSpec

__all__ = ["CHAINS", "TEXTS", "WHOLES", "images", "noised", "text_folder", "tiny_text", "tiny_timm", "tokens"]

_VIT = {"depth": 2, "embed_dim": 32, "num_heads": 2}
_SWIN = {"embed_dim": 16, "depths": (1, 2), "num_heads": (1, 2), "window_size": 4}

CHAINS: dict[str, tuple[int | None, dict[str, Any]]] = {
    "test_efficientnet": (64, {}),
    "mobilenetv3_small_050": (64, {}),
    "test_resnet": (64, {}),
    "regnetx_002": (64, {}),
    "densenet121": (64, {"growth_rate": 8, "block_config": (2, 2, 2, 2)}),
    "vgg11": (32, {"mlp_ratio": 0.005}),
    "test_vit": (32, {}),
    "test_vit2": (32, {}),
    "deit_tiny_distilled_patch16_224": (32, _VIT),
    "swin_tiny_patch4_window7_224": (32, _SWIN),
    "swinv2_tiny_window8_256": (32, _SWIN),
    "test_convnext": (64, {}),
    "poolformer_s12": (32, {}),
    "pvt_v2_b0": (64, {}),
    "mixer_s32_224": (64, {}),
    "test_coatnet": (64, {}),
    "test_maxvit": (64, {}),
    "edgenext_xx_small": (64, {}),
    "inception_next_atto": (64, {}),
    "starnet_s1": (64, {}),
    "repvit_m0_9": (64, {}),
    "resnetv2_50": (64, {"layers": (1, 1, 1, 1), "channels": (16, 32, 32, 32)}),
    "davit_tiny": (32, {}),
    "focalnet_tiny_srf": (32, {}),
    "hgnetv2_b0": (64, {}),
    "efficientvit_b0": (64, {}),
    "convmixer_768_32": (32, {}),
    "test_nfnet": (64, {}),
    "test_byobnet": (64, {}),
    "cspresnet50": (32, {}),
}
"""Families that run stage by stage: name -> input size, arguments that make it small."""

WHOLES: dict[str, tuple[int | None, dict[str, Any]]] = {
    "beit_base_patch16_224": (32, _VIT),
    "eva02_tiny_patch14_224": (28, _VIT),
    "cait_xxs24_224": (32, _VIT),
    "xcit_nano_12_p16_224": (32, {"depth": 2}),
    "test_mambaout": (64, {}),
    "ghostnet_050": (64, {}),
    "crossvit_9_240": (None, {}),
}
"""Families that run as a whole."""


def tiny_timm(name: str, **options: Any) -> Timm:
    """The backbone of a case, with random weights that do not depend on the process."""
    size, arguments = {**CHAINS, **WHOLES}[name]
    torch.manual_seed(0)
    return Timm(name, None, image_size=size, model_args=arguments, **options)


def images(backbone: Any, rows: int = 3, seed: int = 1) -> dict[str, Tensor]:
    """[rows, 3, h, w] noise of the backbone's size."""
    assert isinstance(backbone.input_spec, ImageSpec)
    generator = torch.Generator().manual_seed(seed)
    return {"pixel_values": torch.randn(rows, 3, *backbone.input_spec.size, generator=generator)}


@torch.no_grad()
def noised(backbone: Any) -> Any:
    """Move every parameter a little: zero-initialized branches would hide mistakes."""
    generator = torch.Generator().manual_seed(2)
    for parameter in backbone.parameters():
        parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return backbone


_BERT = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
}
TEXTS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertConfig", _BERT),
    "roberta": ("RobertaConfig", _BERT),
    "distilbert": ("DistilBertConfig", {"vocab_size": 40, "dim": 16, "n_layers": 3, "n_heads": 2, "hidden_dim": 24}),
    "electra": ("ElectraConfig", {**_BERT, "embedding_size": 8}),
    "deberta-v2": (
        "DebertaV2Config",
        {**_BERT, "relative_attention": True, "position_buckets": 8, "norm_rel_ebd": "layer_norm"}
        | {"pos_att_type": ["p2c", "c2p"], "share_att_key": True, "position_biased_input": False, "type_vocab_size": 0},
    ),
    "mpnet": ("MPNetConfig", _BERT),
    "xlm-roberta": ("XLMRobertaConfig", _BERT),
    "camembert": ("CamembertConfig", _BERT),
    "modernbert": (
        "ModernBertConfig",
        {**_BERT, "local_attention": 4, "global_attn_every_n_layers": 2, "attention_dropout": 0.1, "mlp_dropout": 0.1},
    ),
    "albert": ("AlbertConfig", {**_BERT, "embedding_size": 8, "hidden_dropout_prob": 0.1}),
    "t5": ("T5Config", {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}),
}
"""Architectures: model type -> config class, arguments that make it small."""


def text_folder(kind: str, folder: Path) -> Path:
    """A folder as ``save_pretrained`` writes it, without weights: config and a tokenizer of 36 words."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    config, arguments = TEXTS[kind]
    getattr(transformers, config)(**arguments).save_pretrained(folder)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{i}" for i in range(36))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return folder


def tiny_text(kind: str, folder: Path, **options: Any) -> Transformer:
    """The backbone of an architecture, with random weights that do not depend on the process."""
    if not (folder / "config.json").exists():
        text_folder(kind, folder)
    torch.manual_seed(0)
    return Transformer(str(folder), weights=None, max_length=32, **options)


def tokens(rows: int = 3, length: int = 11, seed: int = 1) -> dict[str, Tensor]:
    """[rows, length] ids; each row but the first ends in padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, 40, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        mask[row, length - row - 1 :] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}
