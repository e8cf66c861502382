from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from crossft.data.dataset import seeded
from crossft.data.images import eval_transform, open_image, to_rgb, train_transform
from crossft.types import ImageSpec


def pixel(image) -> tuple[int, int, int]:
    assert image.mode == "RGB"
    return image.getpixel((0, 0))


def test_sixteen_bit_is_scaled_not_clipped(tmp_path):
    values = np.array([[0, 257, 32768, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    image = open_image(tmp_path / "deep.png")
    assert np.asarray(image)[0, :, 0].tolist() == [0, 1, 128, 255]
    assert np.asarray(open_image(values))[0, :, 1].tolist() == [0, 1, 128, 255]
    dark = np.array([[0, 100, 200]], np.uint16)
    assert np.asarray(open_image(dark))[0, :, 0].tolist() == [0, 0, 1], "a dark 16-bit image is still 16 bits deep"


@pytest.mark.parametrize(
    ("mode", "value", "expected"),
    [
        ("L", 90, (90, 90, 90)),
        ("1", 1, (255, 255, 255)),
        ("CMYK", (0, 255, 255, 0), (255, 0, 0)),
        ("RGBA", (10, 20, 30, 255), (10, 20, 30)),
        ("RGBA", (10, 20, 30, 0), (255, 255, 255)),
        ("LA", (10, 0), (255, 255, 255)),
        ("F", 0.5, (128, 128, 128)),
        ("I", 65535, (255, 255, 255)),
    ],
)
def test_modes(mode, value, expected):
    assert pixel(to_rgb(Image.new(mode, (2, 2), value))) == expected


def test_palette_and_palette_transparency():
    image = Image.new("P", (1, 1), 1)
    image.putpalette([0, 0, 0, 200, 100, 50])
    assert pixel(to_rgb(image)) == (200, 100, 50)
    image.info["transparency"] = 1
    assert pixel(to_rgb(image)) == (255, 255, 255)


def test_exif_rotation_is_applied(tmp_path):
    image = Image.new("RGB", (2, 4))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.png", exif=exif)
    assert open_image(tmp_path / "turned.png").size == (4, 2)


def test_arrays_and_tensors():
    gray, colour = np.full((3, 4), 7, np.uint8), np.full((3, 4, 3), 9, np.uint8)
    assert open_image(gray).size == (4, 3)
    assert pixel(open_image(gray[..., None])) == (7, 7, 7)
    assert pixel(open_image(colour)) == (9, 9, 9)
    assert pixel(open_image(torch.from_numpy(colour).permute(2, 0, 1))) == (9, 9, 9)
    ready = torch.rand(3, 4, 4)
    assert open_image(ready) is ready
    assert pixel(open_image(np.full((3, 4, 3), 128 * 257, np.uint16))) == (128, 128, 128)
    assert pixel(open_image(np.full((3, 4, 3), 0.5, np.float32))) == (128, 128, 128)
    assert pixel(open_image(np.full((3, 4, 3), 40.0))) == (40, 40, 40)
    assert pixel(open_image(torch.full((3, 2, 2), 77, dtype=torch.int64))) == (77, 77, 77)
    for wrong, message in ((np.zeros((2, 2, 5)), r"shape \[2, 2, 5\]"), (np.full((2, 2), np.nan), "not finite")):
        with pytest.raises(ValueError, match=message):
            open_image(wrong)


def test_a_cmyk_jpeg_file(tmp_path):
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "print.jpg", quality=95)
    with Image.open(tmp_path / "print.jpg") as file:
        assert file.mode == "CMYK"
    red, green, blue = pixel(open_image(tmp_path / "print.jpg"))
    assert red > 250
    assert max(green, blue) < 5


def test_evaluation_resizes_crops_and_normalizes():
    spec = ImageSpec((8, 8), (0.5, 0.25, 0.0), (0.5, 0.5, 0.25), "bilinear", crop_pct=0.5)
    image = Image.new("RGB", (32, 64), (255, 0, 51))
    out = eval_transform(spec)(image)
    assert out.shape == (3, 8, 8)
    assert out.dtype == torch.float32
    assert torch.allclose(out[:, 0, 0], torch.tensor([1.0, -0.5, 0.8]))
    edges = np.zeros((16, 16, 3), np.uint8)
    edges[4:12, 4:12] = 255
    assert eval_transform(spec)(Image.fromarray(edges)).amin(dim=(1, 2)).tolist() == [1.0, 1.5, 4.0], "the center half"
    assert eval_transform(ImageSpec((8, 8), (0.5,), (0.5,), channels=1))(image).shape == (1, 8, 8)


def test_augmentation_levels():
    spec = ImageSpec((8, 8), (0.0,) * 3, (1.0,) * 3, "bilinear")
    ramp = Image.fromarray(np.tile(np.arange(0, 256, 16, dtype=np.uint8)[None, :, None], (16, 1, 3)))
    assert torch.equal(train_transform(spec, "none")(ramp), eval_transform(spec)(ramp))
    torch.manual_seed(0)
    light = [train_transform(spec, "light")(ramp)[0] for _ in range(20)]
    assert all((v[:, 0] < v[:, -1]).all() for v in light), "never flipped"
    assert len({v.sum().item() for v in light}) > 3
    flips = [train_transform(spec, "flip")(ramp)[0] for _ in range(20)]
    assert 4 < sum(bool(v[0, 0] > v[0, -1]) for v in flips) < 16
    for policy in ("randaugment", "trivialaugment", "timm"):
        transform, drawn = train_transform(spec, policy), []
        for seed in (1, 1, 2, 3, 4):
            with seeded(seed):
                drawn.append(transform(ramp))
        assert drawn[0].shape == (3, 8, 8)
        assert torch.equal(drawn[0], drawn[1]), "a function of the seed"
        assert not all(torch.equal(drawn[0], other) for other in drawn[2:])
