"""Every shipped config and fragment is parsed and built, with the weights that ship in packages."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from lightning.pytorch.strategies import DDPStrategy

from crossft.callbacks.base import MethodCallback
from crossft.callbacks.freezing.course import check_reach
from crossft.cli.ahead import planned_course
from crossft.cli.leg import build_trainer
from crossft.cli.legs import source_settings
from crossft.cli.parser import Settings
from crossft.cli.resolve import resolve
from crossft.errors import ConfigError
from crossft.sweeps.arms import arguments, expand
from crossft.sweeps.file import read_sweep
from crossft.tasks import FSDP2
from crossft.types import Domain

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
BASES = sorted(p for p in CONFIGS.glob("*/*.yaml") if p.parent.name not in ("methods", "sweeps", "trainer"))
FRAGMENTS = sorted((CONFIGS / "methods").glob("*.yaml"))
TRAINERS = sorted((CONFIGS / "trainer").glob("*.yaml"))
SWEEPS = sorted((CONFIGS / "sweeps").glob("*.yaml"))
EXPERIMENTS = CONFIGS.parent / "experiments"
DATA = ["--data.root=.", "--data.source=a", "--data.target=b"]


def name(path: Path) -> str:
    return "/".join(path.parts[-2:])


def test_every_config_is_seen() -> None:
    assert {name(p) for p in BASES} >= {
        "vision/domains.yaml",
        "vision/adapt.yaml",
        "text/domains.yaml",
        "text/adapt.yaml",
    }
    assert {*BASES, *FRAGMENTS, *TRAINERS, *SWEEPS} == set(CONFIGS.rglob("*.yaml"))


@pytest.mark.parametrize("path", [*BASES, *FRAGMENTS, *TRAINERS], ids=name)
def test_comment_says_what_it_is_for_and_how_to_run_it(path: Path) -> None:
    comment = re.match(r"(?:# ?.*\n)+", path.read_text())
    assert comment, path
    assert f"--config configs/{name(path)}" in comment.group()


@pytest.mark.parametrize("path", BASES, ids=name)
def test_config_builds_everything_it_names(path: Path) -> None:
    settings = Settings([f"--config={path}", *DATA])
    space = ("multiclass", ("no", "yes"))
    settings.set_domains([Domain("a", "source", *space), Domain("b", "target", *space)])
    task = settings.build("model").model
    assert task.backbone.pretrained
    data = settings.build("data").data
    assert data.roles["target"] == ["b"]
    build_trainer(settings, logger=False)
    for key, method in settings.build("methods").methods.items():
        assert isinstance(method, MethodCallback), key


@pytest.mark.parametrize("fragment", FRAGMENTS, ids=name)
def test_fragment_goes_over_images_and_text_with_and_without_a_source_leg(fragment: Path) -> None:
    for base in (CONFIGS / "vision" / "adapt.yaml", CONFIGS / "text" / "domains.yaml"):
        settings = Settings([f"--config={base}", f"--config={fragment}", *DATA])
        assert settings.config.arm in (fragment.stem, "plain")
        built = settings.build("methods").methods
        assert set(built) == set(settings.config.methods)


SIZES = {"vision": (3, 86), "text": (81,)}
"""Micro-batches of an epoch: sketches with ten labels a class and with all of them, kitchen reviews."""


@pytest.mark.parametrize("base", SIZES)
@pytest.mark.parametrize("fragment", ["gradual", "gradual-gap", "lp-ft", "ulmfit"])
def test_shipped_phases_reach_the_last_one_over_shipped_bases(base: str, fragment: str) -> None:
    """Within half of the steps where validation decides, so that it may decide late. ULMFiT's own recipe is by epoch,
    and one epoch of text is too short for it: its comment says so."""
    files = [CONFIGS / base / "domains.yaml", CONFIGS / "methods" / f"{fragment}.yaml"]
    settings = Settings([*(f"--config={path}" for path in files), *DATA])
    space = ("multiclass", ("no", "yes"))
    settings.set_domains([Domain("a", "source", *space), Domain("b", "target", *space)])
    plan = settings.build("methods").methods["unfreeze"].plan_for(settings.build("model").model)
    for batches in SIZES[base]:
        course = planned_course(settings.config.trainer, batches, validates=True)
        assert course is not None
        if (fragment, base) == ("ulmfit", "text"):
            with pytest.raises(ConfigError, match="never entered"):
                check_reach(plan, course, "unfreeze")
            continue
        starts = check_reach(plan, course, "unfreeze")
        assert fragment == "ulmfit" or starts[-1] <= course.total / 2
    assert source_settings(settings).config.trainer.val_check_interval == 1.0  # one source model for all arms


@pytest.mark.parametrize("fragment", TRAINERS, ids=name)
def test_trainer_fragment_goes_over_a_base(fragment: Path) -> None:
    base = CONFIGS / "vision" / "domains.yaml"
    settings = Settings([f"--config={base}", f"--config={fragment}", *DATA])
    trainer = build_trainer(settings, logger=False, accelerator="cpu")
    assert isinstance(trainer.strategy, DDPStrategy | FSDP2)
    assert trainer.world_size == settings.config.trainer.devices * settings.config.trainer.num_nodes > 1
    assert f"max_epochs: {trainer.max_epochs}\n" in base.read_text(), "the fragment replaced the base's trainer"
    assert not settings.config.trainer.use_distributed_sampler


@pytest.mark.parametrize("path", SWEEPS, ids=name)
def test_every_arm_of_a_sweep_is_a_config(path: Path) -> None:
    arms = expand(read_sweep(path, DATA))
    assert len({arm.label for arm in arms}) == len(arms) > 3
    seen = {}
    for arm in arms:
        found = resolve([f"--config={CONFIGS / 'vision' / 'domains.yaml'}", *arguments(arm.overrides)], [])
        assert "error" not in found, (arm.label, found)
        seen.setdefault(found["hash"], arm.label)
    assert len(seen) == len(arms)
    comment = re.match(r"(?:# ?.*\n)+", path.read_text())
    assert comment
    for command in ("plan", "run "):
        assert f"crossft sweep {command} configs/{name(path)} " in comment.group()


def test_only_domains_configs_fit_the_source_first() -> None:
    for base in BASES:
        settings = Settings([f"--config={base}", *DATA])
        if base.stem == "domains":
            source = source_settings(settings)
            assert source.config.data.train_on == "source"
            assert source.config.data.target is None
        else:
            assert settings.config.source_leg is None
            assert settings.config.data.target_labels == "none"


@pytest.mark.parametrize("name", ["pacs-shots", "pacs-most", "amazon", "full/amazon"])
def test_an_experiments_arms_are_configs_and_start_from_one_source_model(name: str) -> None:
    path = EXPERIMENTS / "freezing" / f"{name}.yaml"
    sweep = read_sweep(path, ["--data.root=."])
    found = [resolve([f"--config={sweep.config}", *arguments(arm.overrides)], []) for arm in expand(sweep)]
    assert [f["error"] for f in found if "error" in f] == []
    assert len({f["hash"] for f in found}) == 9
    assert len({f["source"] for f in found}) == 1


@pytest.mark.parametrize(("name", "arms"), [("pacs", 38), ("pacs-few", 14), ("amazon", 12)])
def test_arms_of_retention_start_from_one_source_model_but_si(name: str, arms: int) -> None:
    """SI records in the source leg, which is therefore its own."""
    sweep = read_sweep(EXPERIMENTS / "retention" / f"{name}.yaml", ["--data.root=."])
    found = {arm.name: resolve([f"--config={sweep.config}", *arguments(arm.overrides)], []) for arm in expand(sweep)}
    assert [f["error"] for f in found.values() if "error" in f] == []
    assert len({f["hash"] for f in found.values()}) == arms
    assert len({f["source"] for arm, f in found.items() if not arm.startswith("si")}) == 1


def test_a_source_leg_may_name_an_optimizer_by_its_class(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(
        "source_leg: {model: {init_args: {optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.5}}}}}"
    )
    for class_path, lr in (("torch.optim.SGD", 0.1), ("torch.optim.AdamW", 0.1)):
        flags = [f"--config={BASES[-1]}", f"--config={path}", *DATA, f"--model.optimizer={class_path}"]
        source = source_settings(Settings([*flags, f"--model.optimizer.lr={lr}"]))
        assert source.config.model.init_args.optimizer.class_path == "torch.optim.SGD"
        assert source.config.model.init_args.optimizer.init_args.lr == 0.5
