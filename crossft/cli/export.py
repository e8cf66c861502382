"""``crossft export RUN --to timm|hf FOLDER``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from crossft.backbones import Adapted, Timm, Transformer
from crossft.cli.saved import open_run, take_option
from crossft.errors import ConfigError, RunError
from crossft.runs import replacing, write_json
from crossft.tasks import Regression, Task

__all__ = ["run"]

_OUTPUTS = {"multilabel": "sigmoid", "regression": "none"}
"""What turns a head's values into predictions; every other kind of labels takes a softmax."""


def run(command: str, arguments: list[str]) -> int:
    """Write the backbone and the heads."""
    rest, form = take_option(arguments, "to")
    places = [word for word in rest if not word.startswith("--")]
    if form not in ("timm", "hf") or len(places) != 2:
        raise ConfigError(
            f"--to={form} {places[1:] or 'without a folder'}: usage: crossft export RUN --to timm|hf FOLDER"
        )
    folder = Path(places[1])
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RunError(f"{folder} exists and is not empty; export into a new folder")
    saved = open_run("export", [word for word in rest if word != places[1]])
    task, backbone = saved.task, saved.task.backbone
    if isinstance(backbone, Adapted):
        backbone = backbone.merged()
    fits = {"timm": Timm, "hf": Transformer}[form]
    if not isinstance(backbone, fits):
        other = "hf" if form == "timm" else "timm"
        raise ConfigError(f"--to={form}: the run's backbone is a {type(backbone).__name__}; use --to {other}")
    folder.mkdir(parents=True, exist_ok=True)
    backbone.export(folder)
    with replacing(folder / "heads.safetensors") as temporary:
        save_file(_heads(task), temporary)
    write_json(folder / "heads.json", _described(task, _reading(backbone, saved.settings.config.data)))
    print(f"exported to {folder}")
    return 0


@torch.no_grad()
def _heads(task: Task) -> dict[str, Tensor]:
    """HEAD.weight [k, d] and HEAD.bias [k]; those of a regression give values in the label's own units."""
    heads = {
        f"{key}.{name.split('.')[-1]}": value.contiguous()
        for key, head in task.heads.items()
        for name, value in head.state_dict().items()
    }
    if not isinstance(task, Regression):
        return heads
    scaled = {name: value * task.label_scale for name, value in heads.items()}
    return {name: v + task.label_mean if name.endswith(".bias") else v for name, v in scaled.items()}


def _reading(backbone: Timm | Transformer, data: Any) -> dict[str, Any]:
    """How inputs become features: what the plain model's own files do not say."""
    pooling = backbone.pooling or "model"
    if isinstance(backbone, Transformer):
        return {"pooling": pooling, "max_length": data.get("max_length") or backbone.input_spec.max_length}
    side = data.get("image_size")
    size = [side, side] if side else list(backbone.input_spec.size)
    return {"pooling": pooling, "prefix_tokens": backbone.prefix_tokens, "image_size": size}


def _described(task: Task, reading: dict[str, Any]) -> list[dict[str, Any]]:
    """For each domain: which head, over which features, and what its values mean."""
    return [
        {
            "domain": domain.name,
            "head": task.head_keys[domain.name],
            "kind": domain.kind,
            "labels": domain.labels,
            "output": _OUTPUTS.get(domain.kind, "softmax"),
            **reading,
        }
        for domain in task.domains
    ]
