from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from tiny import image_domains
from torch.utils.data import Dataset

from crossft.data import Columns, DomainData, HuggingFace, ImageFolder, Table, TableFile, TorchDatasets
from crossft.data.readers import Auto, Reader
from crossft.errors import DataError

ROWS = [
    {"text": f"a b {i}", "label": ("no", "yes")[i % 2], "split": ("train", "train", "dev")[i % 3]} for i in range(30)
]


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet"])
def test_every_table_format_gives_the_same_rows(tmp_path, suffix):
    frame, path = pd.DataFrame(ROWS), tmp_path / f"d.{suffix}"
    match suffix:
        case "csv":
            frame.to_csv(path, index=False)
        case "tsv":
            frame.to_csv(path, index=False, sep="\t")
        case "jsonl":
            frame.to_json(path, orient="records", lines=True)
        case _:
            frame.to_parquet(path)
    assert Auto().domains(tmp_path) == ["d"]
    table = Auto().read(tmp_path, "d", Columns())
    assert table.inputs == [r["text"] for r in ROWS]
    assert table.labels == [r["label"] for r in ROWS]
    assert table.splits == [("val" if r["split"] == "dev" else "train") for r in ROWS]
    assert table.where[0] == f"{path}: row 1"
    described = DomainData(tmp_path, target="d").describe()[0]
    assert described["split"] == "given; test carved from train"
    assert (described["train"], described["val"], described["test"]) == (14, 10, 6)


def test_odd_texts_survive(tmp_path):
    texts = ["007", "NA", "null", "1.50", 'say "hi", you', "line\nbreak", "ünïcode ☃"]
    pd.DataFrame({"text": texts, "label": list("abababa")}).to_csv(tmp_path / "d.csv", index=False)
    assert TableFile().read(tmp_path, "d", Columns()).inputs == texts
    pd.DataFrame({"text": texts, "label": list("abababa")}).to_json(tmp_path / "e.jsonl", orient="records", lines=True)
    assert TableFile().read(tmp_path, "e", Columns()).inputs == texts


def test_a_file_without_header(tmp_path):
    (tmp_path / "yelp_labelled.txt").write_text('Good "food\t1\nBad, bad\t0\n')
    reader = TableFile("_labelled.txt", "\t", ["text", "label"], quoting=False)
    assert reader.domains(tmp_path) == ["yelp"]
    table = reader.read(tmp_path, "yelp", Columns())
    assert (table.inputs, table.labels) == (['Good "food', "Bad, bad"], ["1", "0"])


def test_named_columns_ids_and_groups(tmp_path):
    pd.DataFrame({"a": ["x", "y"], "b": ["p", "q"], "y": [1, 2], "who": ["u", "v"], "key": ["k1", "k2"]}).to_csv(
        tmp_path / "d.csv", index=False
    )
    columns = Columns(text="a", pair="b", label="y", id="key", group="who")
    table = TableFile().read(tmp_path, "d", columns)
    assert table.inputs == [("x", "p"), ("y", "q")]
    assert table.groups == ["u", "v"]
    assert table.where[1].endswith("row k2")


def test_groups_stay_in_one_split(tmp_path):
    rows = [{"text": f"a {i}", "label": i % 2, "who": f"p{i // 6}"} for i in range(120)]
    pd.DataFrame(rows).to_csv(tmp_path / "d.csv", index=False)
    data = DomainData(tmp_path, target="d", group="who")
    split = data.prepared[0]
    group = [int(w.rsplit(" ", 1)[1]) - 1 for w in split.where]
    seen: dict[int, set[int]] = {}
    for row, part in zip(group, split.split):
        seen.setdefault(row // 6, set()).add(int(part))
    assert all(len(parts) == 1 for parts in seen.values())
    assert data.describe()[0]["split"] == "group"
    assert data.describe()[0]["train"] == pytest.approx(84, abs=6)


def test_image_paths_in_a_table(tmp_path):
    image_domains(tmp_path / "files", domains=("x",), each=12)
    files = sorted((tmp_path / "files").rglob("*.png"))
    rows = [{"path": str(f.relative_to(tmp_path)), "label": f.parent.name} for f in files]
    pd.DataFrame(rows).to_csv(tmp_path / "d.csv", index=False)
    data = DomainData(tmp_path, target="d")
    assert data.prepared[0].modality == "image"
    assert {Path(v) for v in data.prepared[0].inputs} == set(files)
    folder = DomainData(tmp_path / "files", target="x")
    assert folder.prepared[0].ids.tolist() == data.prepared[0].ids.tolist(), "an id is the content, not the path"


def test_given_folders(tmp_path):
    for split in ("train", "valid", "test"):
        image_domains(tmp_path / "stage", domains=(split,), each=6)
    rng = np.random.default_rng(5)
    for f in (tmp_path / "stage").rglob("*.png"):
        Image.fromarray(rng.integers(0, 255, (8, 8, 3), np.uint8)).save(f)
    (tmp_path / "root").mkdir()
    (tmp_path / "stage").rename(tmp_path / "root" / "photo")
    (tmp_path / "root/photo/train/cat/notes.txt").write_text("not an image")
    (tmp_path / "root/photo/train/cat/.hidden.png").write_text("")
    data = DomainData(tmp_path / "root", target="photo")
    row = data.describe()[0]
    assert (row["train"], row["val"], row["test"], row["split"]) == (12, 12, 12, "given")
    split = data.prepared[0]
    names = ["train", "valid", "test"]
    assert all(Path(w).parts[-3] == names[s] for w, s in zip(split.where, split.split))
    assert ImageFolder().domains(tmp_path / "root") == ["photo"]


def test_an_unlabeled_folder_needs_no_class_folders(tmp_path):
    image_domains(tmp_path, domains=("photo",), each=12)
    rng = np.random.default_rng(9)
    (tmp_path / "wild").mkdir()
    for i in range(20):
        Image.fromarray(rng.integers(0, 255, (8, 8, 3), np.uint8)).save(tmp_path / f"wild/{i}.png")
    data = DomainData(tmp_path, "photo", "wild", target_labels="none", train_on=["source", "target"])
    row = data.describe()[1]
    assert (row["train_labels"], row["test_labels"], row["split"]) == (0, 0, "random")
    assert data.domains[1].labels == ("cat", "dog")


def test_hugging_face_folders(tmp_path):
    datasets = pytest.importorskip("datasets")
    rng = np.random.default_rng(0)
    names = datasets.ClassLabel(names=["no", "yes"])
    frame = {"text": [r["text"] for r in ROWS], "label": [i % 2 for i in range(30)]}
    text = datasets.Dataset.from_dict(
        frame, features=datasets.Features({"text": datasets.Value("string"), "label": names})
    )
    datasets.DatasetDict(train=text.select(range(20)), test=text.select(range(20, 30))).save_to_disk(tmp_path / "t")
    raw = datasets.Image(decode=False)
    pixels = [Image.fromarray(rng.integers(0, 255, (4, 4, 3), np.uint8)) for _ in range(30)]
    features = datasets.Features({"image": datasets.Image(), "label": names})
    images = datasets.Dataset.from_dict({"image": pixels, "label": [i % 2 for i in range(30)]}, features=features)
    images.save_to_disk(tmp_path / "i")
    assert HuggingFace().domains(tmp_path) == ["i", "t"]
    data = DomainData(tmp_path, target="t")
    assert data.domains[0].labels == ("no", "yes")
    assert data.describe()[0]["split"] == "given; val carved from train"
    assert data.describe()[0]["test"] == 10
    seen = DomainData(tmp_path, target="i").prepared[0]
    assert seen.modality == "image"
    assert sorted(np.asarray(seen.inputs[i]).sum() for i in range(30)) == sorted(np.asarray(p).sum() for p in pixels)
    coded = [image if image["bytes"] is None else {**image} for image in images.cast_column("image", raw)["image"]]
    coded[4]["bytes"] = coded[4]["bytes"][:40]
    damaged = datasets.Dataset.from_dict({"image": coded, "label": [i % 2 for i in range(30)]}, features=features)
    damaged.save_to_disk(tmp_path / "j")
    with pytest.raises(DataError, match=r"j/rows: row 5: unreadable image: .*on_error=quarantine"):
        DomainData(tmp_path, target="j").prepare()
    kept = DomainData(tmp_path, target="j", on_error="quarantine", max_bad=0.1)
    assert len(kept.prepared[0].ids) == 29
    assert [r["where"].rsplit(": ", 1)[1] for r in kept.quarantined] == ["row 5"]


def test_hugging_face_hub_names(tmp_path, monkeypatch):
    """A configuration a domain, or one data set with a column that names the domain."""
    datasets = pytest.importorskip("datasets")
    kinds = datasets.ClassLabel(names=["kitchen", "books"])
    features = datasets.Features({k: datasets.Value("string") for k in ("text", "label")} | {"shop": kinds})
    rows = {"text": [f"a {i}" for i in range(60)], "label": ["no", "yes"] * 30, "shop": [i // 2 % 2 for i in range(60)]}
    whole = datasets.Dataset.from_dict(rows, features=features)
    asked = []

    def load(path: str, name: str | None = None):
        asked.append((path, name))
        mine = whole if name is None else whole.filter(lambda row: row["shop"] == kinds.str2int(name))
        cut = len(mine) * 2 // 3
        return datasets.DatasetDict(train=mine.select(range(cut)), test=mine.select(range(cut, len(mine))))

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(datasets, "get_dataset_config_names", lambda path: ["books", "kitchen"])
    reader = HuggingFace("someone/shops")
    data = DomainData(tmp_path, target="books", reader=reader)
    assert reader.domains(tmp_path) == ["books", "kitchen"]
    assert (data.describe()[0]["split"], data.describe()[0]["test"]) == ("given; val carved from train", 10)
    assert set(asked) == {("someone/shops", "books")}
    asked.clear()
    column = HuggingFace("someone/shops", domain_column="shop")
    assert column.domains(tmp_path) == ["books", "kitchen"]
    again = DomainData(tmp_path, target="books", reader=column)
    assert again.prepared[0].ids.tolist() == data.prepared[0].ids.tolist()
    assert set(asked) == {("someone/shops", None)}
    datasets.DatasetDict(train=whole).save_to_disk(tmp_path / "saved")
    saved = DomainData(tmp_path / "saved", target="kitchen", reader=HuggingFace(domain_column="shop"))
    assert set(saved.prepared[0].inputs) == {f"a {i}" for i in range(60) if i // 2 % 2 == 0}
    with pytest.raises(DataError, match=r"domain_column='store' is not a column; columns present: text, label, shop"):
        HuggingFace("someone/shops", "store").domains(tmp_path)


class Squares(Dataset):
    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        value = torch.zeros(3, 8, 8, dtype=torch.uint8)
        value[index % 2, 0, index % 8], value[2, 0, 0] = 200, index
        return value, index % 2


def test_any_torch_dataset(tmp_path, image_spec):
    data = DomainData(
        tmp_path, target="squares", reader=TorchDatasets({"squares": Squares()}), augment="none", batch_size=28
    )
    data.bind(image_spec)
    batch = next(iter(data.train_dataloader()))
    assert data.domains[0].labels == ("0", "1")
    bright = batch.inputs["pixel_values"].amax(dim=(2, 3))
    assert all(bright[i, t] == pytest.approx(2 * 200 / 255 - 1, abs=1e-5) for i, t in enumerate(batch.targets))


class Broken(Squares):
    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if index == 3:
            raise OSError("image file is truncated")
        return super().__getitem__(index)


class Notes(Dataset):
    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[str, int]:
        return (f"a {index}", index % 2) if index else ("alone",)


@pytest.mark.parametrize(("items", "row"), [(Broken(), 3), (Notes(40), 0)])
def test_an_item_that_cannot_be_read_is_a_bad_row(tmp_path, items, row):
    reader = TorchDatasets({"d": items})
    with pytest.raises(DataError, match=rf"'d': item {row}: unreadable: (OSError: image file|ValueError: not enough)"):
        DomainData(tmp_path, target="d", reader=reader).prepare()
    data = DomainData(tmp_path, target="d", reader=reader, on_error="quarantine", max_bad=0.1)
    assert len(data.prepared[0].ids) == 39
    assert [r["where"] for r in data.quarantined] == [f"{type(items).__name__} 'd': item {row}"]


def test_an_empty_torch_dataset_is_named(tmp_path):
    with pytest.raises(DataError, match=r"domain 'd' .*has no rows"):
        DomainData(tmp_path, target="d", reader=TorchDatasets({"d": Notes(0)})).prepare()


class Lines(Reader):
    """A layout of a user's own."""

    def domains(self, root: Path) -> list[str]:
        return ["lines"]

    def read(self, root: Path, name: str, columns: Columns) -> Table:
        return Table(
            "text", [f"a {i}" for i in range(30)], [i % 2 for i in range(30)], [f"line {i}" for i in range(30)]
        )


def test_a_reader_of_ones_own(tmp_path):
    assert DomainData(tmp_path, target="lines", reader=Lines()).describe()[0]["train"] == 21


def test_a_domain_that_is_both_folder_and_file_is_refused(tmp_path):
    image_domains(tmp_path, domains=("photo",))
    (tmp_path / "photo.csv").write_text("text,label\na,b\n")
    with pytest.raises(ValueError, match="both a folder and a file"):
        Auto().read(tmp_path, "photo", Columns())
    with pytest.raises(DataError, match="no domain 'x'"):
        Auto().read(tmp_path, "x", Columns())
