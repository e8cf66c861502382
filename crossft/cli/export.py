"""``crossft export RUN --to timm|hf FOLDER``."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save_file

from crossft.backbones import Adapted, Timm, Transformer
from crossft.cli.saved import open_run, take_option
from crossft.errors import ConfigError, RunError
from crossft.runs import replacing, write_json

__all__ = ["run"]


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
    backbone = saved.task.backbone
    if isinstance(backbone, Adapted):
        backbone = backbone.merged()
    fits = {"timm": Timm, "hf": Transformer}[form]
    if not isinstance(backbone, fits):
        other = "hf" if form == "timm" else "timm"
        raise ConfigError(f"--to={form}: the run's backbone is a {type(backbone).__name__}; use --to {other}")
    folder.mkdir(parents=True, exist_ok=True)
    backbone.export(folder)
    heads = {
        f"{key}.{name.split('.')[-1]}": value.contiguous()
        for key, head in saved.task.heads.items()
        for name, value in head.state_dict().items()
    }
    with replacing(folder / "heads.safetensors") as temporary:
        save_file(heads, temporary)
    keys = saved.task.head_keys
    write_json(
        folder / "heads.json",
        [{"domain": d.name, "head": keys[d.name], "kind": d.kind, "labels": d.labels} for d in saved.task.domains],
    )
    print(f"exported to {folder}")
    return 0
