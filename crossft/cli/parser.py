"""The configuration: LightningCLI's parser with our own top-level keys; it parses, and builds nothing."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

from crossft.cli.checks import check_run, set_sequence
from crossft.cli.options import (
    CheckpointOptions,
    RunOptions,
    SelectOptions,
    TrialOptions,
    WandbOptions,
    WatchOptions,
)
from crossft.cli.safety import check_values, deny_by_default, take_allowed
from crossft.cli.source_leg import laid_over, take_source_leg
from crossft.data import DomainData
from crossft.errors import ConfigError, CrossftError, UnsafeConfigError
from crossft.tasks import Task
from crossft.types import Domain

__all__ = ["Settings", "configs_first", "set_null", "take_nulls", "translated"]

TRAINER_DEFAULTS = {
    "use_distributed_sampler": False,  # the batch sampler cuts the global order over the ranks itself
    "num_sanity_val_steps": 0,
    "log_every_n_steps": 10,
    "max_epochs": 3,
    "logger": True,  # true: metrics.csv and W&B
}


class _Parser(LightningArgumentParser):
    """The parser behind one command: a wrong argument is our error, not an exit of the process."""

    def error(self, message: str, ex: Exception | None = None) -> None:  # type: ignore[override]
        """Raise instead of printing the usage."""
        raise translated(message) from None


def translated(message: str) -> ConfigError:
    """Our error for one of the parser's messages: the key, the value, and what was wrong with it."""
    if path := re.search(r"Importing '([^']+)' is not allowed", message):
        return UnsafeConfigError(
            f"{path.group(1)!r} lies outside the packages a config may name (crossft, torch, lightning, torchmetrics, "
            f"timm, transformers, peft); if you trust it, add --allow {path.group(1).split('.')[0]} to the command line"
        )
    if nested := re.search(r"'[^']+' lies outside the packages.* to the command line", message):
        return UnsafeConfigError(nested.group())
    key = ".".join(re.findall(r'Parser key "([^"]+)"', message)) or "configuration"
    given = re.search(r"Given value: (.+)", message)
    wrong = [line.strip(" -") for line in message.splitlines()]
    wrong = [line for line in dict.fromkeys(wrong) if line and not _BOILERPLATE.match(line)]
    value = f"={given.group(1)}" if given and "NestedArg" not in given.group(1) else ""
    text = "; ".join(wrong) or " ".join(message.split()) or "cannot be read"
    for pattern, plain in _WORDS:
        text = re.sub(pattern, plain, text)
    return ConfigError(f"{key}{value}: {text}"[:1500])


_WORDS = (
    (r"<class '(?:\w+\.)*(\w+)'>", r"\1"),
    (r"typing\.Literal\[([^\]]*)\]", r"value among \1"),
    (r"\bconfiguration: ", ""),
)


_BOILERPLATE = re.compile(
    r"^(Parser key \"|Does not validate against any|Subtypes: |Errors:$|Expected a <class 'NoneType'>|Given value|"
    r"Expected a path but .* not accessible)"
)


class Settings(LightningCLI):
    """One parsed configuration. ``config`` holds the values; nothing is built until it is asked for.

    A flag on the command line always wins: over every ``--config`` wherever it stands, and over a checkpoint, from
    which no setting is ever read.

    Args:
        arguments: command line arguments (list), or a whole config as plain values (dict).
        command: name shown in the help text.
        allowed: packages from ``--allow``, where the arguments are a dict.

    Raises:
        ConfigError: a value that does not parse, an unknown key, or a null for a method that is not there.
        UnsafeConfigError: a value that names code outside the allowed packages, or a function.
    """

    def __init__(
        self, arguments: Sequence[str] | dict[str, Any], command: str = "fit", allowed: Sequence[str] = ()
    ) -> None:
        self.allowed = list(allowed)
        args: ArgsType
        if isinstance(arguments, dict):
            args = arguments
        else:
            arguments, more = take_allowed(arguments)
            self.allowed += more
            args = [_SELECT.sub("--select.metric", word) for word in configs_first(arguments)]
        deny_by_default(self.allowed)
        super().__init__(
            Task,
            DomainData,
            save_config_callback=None,
            trainer_class=Trainer,
            trainer_defaults=dict(TRAINER_DEFAULTS),
            seed_everything_default=0,
            parser_kwargs={"prog": f"crossft {command}", "description": DESCRIPTION, "default_env": False},
            parser_class=_Parser,
            subclass_mode_model=True,
            args=args,
            run=False,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    # -- what LightningCLI asks a subclass for ------------------------------------------------------------------

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the keys of a run."""
        parser.add_argument("--experiment", type=str, default="default", help="The comparison this run belongs to.")
        parser.add_argument("--arm", type=str, default="default", help="Which arm of the comparison this run is.")
        parser.add_argument(
            "--methods", type=dict[str, Callback | None], default={}, help="Named switches; null switches one off."
        )
        parser.add_argument(
            "--init", type=str | None, default=None, help="Run folder or checkpoint whose model this run starts from."
        )
        parser.add_argument(
            "--sequence",
            type=list[str] | str | None,
            default=None,
            help="Ordered domains to fine-tune through, one leg each (A,B,C): sets data.source and data.target.",
        )
        parser.add_argument(
            "--source_leg",
            type=dict[str, Any] | None,
            default=None,
            help="Overrides for the run that fits the source first; null: no such run.",
        )
        parser.add_argument(
            "--before", type=bool, default=True, help="Measure the starting model on the test splits first."
        )
        parser.add_argument(
            "--diagnose",
            type=bool,
            default=True,
            help="Split what a source lost into the parts of BatchNorm's statistics, where they moved, and of weights.",
        )
        parser.link_arguments("seed_everything", "data.seed")
        parser.add_class_arguments(RunOptions, "run")
        parser.add_class_arguments(SelectOptions, "select")
        parser.add_class_arguments(CheckpointOptions, "checkpoints")
        parser.add_class_arguments(WatchOptions, "watch")
        parser.add_class_arguments(WandbOptions, "wandb")
        parser.add_class_arguments(TrialOptions, "trial")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse, turning every failure into one of our errors."""
        try:
            if isinstance(args, dict):
                self.config = parser.parse_object(args)
            else:
                words, first = take_source_leg(list(args or []))
                words, nulls = take_nulls(words)
                self.config = parser.parse_args(words)
                for key in nulls:
                    set_null(self.config, key)
                if nulls or first:
                    plain = self.plain()
                    if first:
                        plain["source_leg"] = laid_over(plain["source_leg"] or {}, first)
                    self.config = parser.parse_object(plain)
        except CrossftError:
            raise
        except (TypeError, ValueError, KeyError, AttributeError, OSError, yaml.YAMLError) as error:
            raise translated(str(error)) from error
        set_sequence(self.config)
        check_values(self.config, self.allowed)
        check_run(self.config)
        self._check_methods([] if isinstance(args, dict) else list(args or []))

    def _parse_ckpt_path(self) -> None:
        """Read nothing from a checkpoint: flags win, and a checkpoint names no class."""

    def _set_seed(self) -> None:
        """Seed nothing while parsing: a leg seeds before it builds its task."""

    def instantiate_classes(self) -> None:
        """Build nothing while parsing."""

    # -- our own ------------------------------------------------------------------------------------------------

    def _check_methods(self, arguments: list[str]) -> None:
        """Refuse a null for a name that no config and no flag gives a class, then drop the nulls."""
        methods: dict[str, Any] = self.config.methods or {}
        known = {name for name, value in methods.items() if value is not None} | _names_in(arguments)
        for name, value in methods.items():
            if value is None and name not in known:
                raise ConfigError(
                    f"methods.{name}=null switches off a method that is not there; "
                    f"the methods of this config are {', '.join(sorted(known)) or 'none'}"
                )
        self.config.methods = {name: value for name, value in methods.items() if value is not None}

    def text(self) -> str:
        """The whole configuration as YAML: what ``config.yaml`` holds, and what runs it again."""
        options = {"skip_link_targets": True, "skip_unset": False, "skip_validation": True}  # it was when it was parsed
        return str(self.parser.dump(self.config, format="yaml", **options))

    def plain(self) -> dict[str, Any]:
        """The whole configuration as plain values."""
        return dict(yaml.safe_load(self.text()))

    def set_domains(self, domains: Sequence[Domain]) -> None:
        """Write the label spaces into the model's arguments, as plain values."""
        self.config.model.init_args.domains = [
            Namespace(name=d.name, role=d.role, kind=d.kind, labels=d.labels) for d in domains
        ]

    def build(self, *keys: str) -> Namespace:
        """Build the objects under these top-level keys (``data``, ``model``, ``trainer``, ``methods``).

        Raises:
            CrossftError: an argument that the class itself refuses.
        """
        part = Namespace()
        for key in keys:
            part[key] = self.config[key]
        try:
            found: Namespace = self.parser.instantiate(part, instantiate_groups="data" in keys)
            return found
        except ValueError as error:
            cause: BaseException = error
            while cause.__cause__ is not None and not isinstance(cause, CrossftError):
                cause = cause.__cause__
            if cause is error:
                raise
            raise cause from None


DESCRIPTION = "Config keys and their defaults; --config FILE reads them from YAML, every flag wins over the files."
_SELECT = re.compile(r"^--select(?=$|=)")
_CONFIG = re.compile(r"^(--config|-c)(=.*)?$")
_METHOD = re.compile(r"^--methods\.([^.=]+)(?:=(.*))?$")


def configs_first(arguments: Sequence[str]) -> list[str]:
    """Move every ``--config FILE`` to the front, in order, so that flags win wherever they stand."""
    configs: list[str] = []
    flags: list[str] = []
    words = iter(arguments)
    for word in words:
        if match := _CONFIG.match(word):
            configs += [word] if match.group(2) else [word, *([following] if (following := next(words, "")) else [])]
        else:
            flags.append(word)
    return configs + flags


def take_nulls(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split flags such as ``--model.backbone.weights=null`` off the command line.

    jsonargparse (4.53) hands a null to the third level of nested classes as the text "None", so these are set after
    the parse.

    Returns:
        The other arguments, and the keys to set to null.
    """
    rest: list[str] = []
    nulls: dict[str, None] = {}
    words = list(arguments)
    while words:
        word = words.pop(0)
        match = _DEEP.match(word)
        value = match and (match.group(2)[1:] if match.group(2) else (words[0] if words else ""))
        if match and value == "null":
            nulls[match.group(1)] = None
            if not match.group(2):
                words.pop(0)
        else:
            if match:
                nulls.pop(match.group(1), None)
            rest.append(word)
    return rest, list(nulls)


_DEEP = re.compile(r"^--((?:\w+\.){2,}\w+)(=.*)?$")


def set_null(config: Namespace, key: str) -> None:
    """Set a key to null; the ``init_args`` on its way may be left out.

    Raises:
        ConfigError: there is no such key.
    """
    place: Any = config
    *parents, last = key.split(".")
    for name in [*parents, last]:
        inner = getattr(place, "init_args", None) if isinstance(place, Namespace) else None
        if name not in place and inner is not None and name in inner:
            place = inner
        if not isinstance(place, (Namespace, dict)) or name not in place:
            raise ConfigError(f"--{key}=null: the config has no {name!r} there; check the name")
        if name is last:
            place[name] = None
        else:
            place = place[name]


def _names_in(arguments: Sequence[str]) -> set[str]:
    """Method names with a class, in the config files and flags of a command line."""
    names: set[str] = set()
    for index, word in enumerate(arguments):
        following = arguments[index + 1] if index + 1 < len(arguments) else ""
        if match := _CONFIG.match(word):
            names |= _names_in_file(Path((match.group(2) or "")[1:] or following))
        elif (match := _METHOD.match(word)) and (match.group(2) or following) not in ("null", "None", ""):
            names.add(match.group(1))
    return names


def _names_in_file(path: Path) -> set[str]:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return set()
    methods = found.get("methods") if isinstance(found, dict) else None
    return {name for name, value in methods.items() if value is not None} if isinstance(methods, dict) else set()
