"""Every kind of bad data or setting: which error, naming what, with which remedy, before training."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from tiny import image_domains, text_domains

from crossft.data import DomainData, TableFile
from crossft.errors import ConfigError, CrossftError, DataError, LabelError, SplitError
from crossft.types import ImageSpec

T, I = "books", "photo"  # noqa: E741 - the text and the image domain


@pytest.fixture
def root(tmp_path) -> Path:
    image_domains(tmp_path, classes=("cat", "dog", "owl"), each=20)
    text_domains(tmp_path, each=20)
    return tmp_path


def rows(root: Path, edit: Callable[[list[str]], None], name: str = T) -> None:
    """Edit the lines of a CSV (line 0 is the header)."""
    lines = (root / f"{name}.csv").read_text().splitlines()
    edit(lines)
    (root / f"{name}.csv").write_text("\n".join(lines) + "\n")


def replace(row: int, line: str) -> Callable[[Path], None]:
    return lambda root: rows(root, lambda lines: lines.__setitem__(row, line))


def write(name: str, text: str) -> Callable[[Path], object]:
    return lambda root: (root / name).write_text(text)


def given(root: Path, twin: bool = False, drop: str | None = None) -> None:
    def edit(lines: list[str]) -> None:
        lines[0] += ",split"
        for i in range(1, len(lines)):
            lines[i] += "," + ("train", "val", "test")[(i // 2) % 3]
        if twin:
            lines.append(lines[1].rsplit(",", 1)[0] + ",test")
        if drop:
            lines[1:] = [line for line in lines[1:] if not line.endswith(drop)]

    rows(root, edit)


def truncate(root: Path) -> None:
    file = root / "photo/dog/003.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(file)
    file.write_bytes(file.read_bytes()[:5000])


def one_class(root: Path) -> None:
    rows(root, lambda lines: lines.__setitem__(slice(1, None), [v.replace("positive", "negative") for v in lines[1:]]))


def stray(root: Path) -> None:
    shutil.copy(root / "photo/cat/000.png", root / "photo/stray.png")


def prepare(data: DomainData) -> object:
    return data.prepared


def include(role: str) -> Callable[[DomainData], object]:
    return lambda data: data.include(role)  # type: ignore[arg-type]


def bind(data: DomainData) -> object:
    data.bind(ImageSpec((8, 8), (0.5,) * 3, (0.5,) * 3))
    return data.dataset


def nothing(root: Path) -> None:
    """Leave the data as it is."""


def pools(data: DomainData) -> object:
    return data.pools()


def split_loader(data: DomainData) -> object:
    data.trainer = SimpleNamespace(
        world_size=2, global_rank=0, _accelerator_connector=SimpleNamespace(use_distributed_sampler=True)
    )
    return data.val_dataloader()


BOTH = {"source": I, "target": "sketch", "train_on": ["source", "target"]}


def split_column(value: Callable[[int], str]) -> Callable[[Path], None]:
    """Add a split column whose value depends on the row."""

    def edit(lines: list[str]) -> None:
        lines[:] = [f"{lines[0]},split", *(f"{line},{value(i)}" for i, line in enumerate(lines[1:]))]

    return lambda root: rows(root, edit)


Case = tuple[Callable[[Path], object], dict[str, object], Callable[[DomainData], object], type[CrossftError], str]

CASES: dict[str, Case] = {
    # files and rows
    "truncated image": (
        truncate,
        {"target": I},
        prepare,
        DataError,
        r"photo/dog/003\.png: unreadable image: .*on_error=quarantine",
    ),
    "not an image": (
        write("photo/cat/001.png", "text"),
        {"target": I},
        prepare,
        DataError,
        r"cat/001\.png: unreadable image",
    ),
    "empty image file": (
        write("photo/cat/001.png", ""),
        {"target": I},
        prepare,
        DataError,
        r"cat/001\.png: unreadable",
    ),
    "image outside a class": (
        stray,
        {"target": I},
        prepare,
        DataError,
        r"stray\.png: an image outside any class folder",
    ),
    "missing image of a table": (
        write("list.csv", "image,label\n" + "\n".join(f"photo/cat/{i:03d}.png,{i % 2}" for i in range(25))),
        {"target": "list"},
        prepare,
        DataError,
        r"list\.csv: row 21: no readable file: No such file.*4 more bad rows",
    ),
    "empty text": (replace(3, '" ",negative'), {"target": T}, prepare, DataError, r"books\.csv: row 3: empty text"),
    "missing text": (replace(3, ",negative"), {"target": T}, prepare, DataError, r"books\.csv: row 3: empty text"),
    "text that is a number": (
        write("n.jsonl", "\n".join(json.dumps({"text": 5 if i == 2 else f"a {i}", "label": i % 2}) for i in range(9))),
        {"target": "n"},
        prepare,
        DataError,
        r"n\.jsonl: row 3: text 5 is a int, not a string",
    ),
    "missing label": (replace(4, "hello,"), {"target": T}, prepare, LabelError, r"books\.csv: row 4: no label"),
    "NaN label": (replace(4, "hello,nan"), {"target": T}, prepare, LabelError, r"books\.csv: row 4: no label"),
    "label outside the named space": (
        replace(5, "hello,maybe"),
        {"target": T, "labels": ["negative", "positive"]},
        prepare,
        LabelError,
        r"row 5: label 'maybe' is outside the label space \{negative, positive\}; correct it, or extend data\.labels",
    ),
    "label outside the trained space": (
        lambda root: rows(root, lambda v: v.__setitem__(5, "hello,maybe"), "kitchen"),
        {"source": T, "eval": "kitchen", "train_on": "source"},
        prepare,
        LabelError,
        r"kitchen\.csv: row \d+: label 'maybe' is outside .* so it needs a trained label space",
    ),
    "several labels in a multiclass row": (
        replace(5, "hello,a|b"),
        {"target": T, "kind": "multiclass"},
        prepare,
        LabelError,
        r"row 5: label 'a\|b' names several classes; set data\.kind",
    ),
    "word among numbers": (
        write("s.csv", "text,score\n" + "\n".join(f"a {i},{'high' if i == 7 else i / 7}" for i in range(40))),
        {"target": "s", "kind": "regression"},
        prepare,
        LabelError,
        r"s\.csv: row 8: label 'high' is not a finite number",
    ),
    "missing column": (
        nothing,
        {"target": T, "label_column": "stars"},
        prepare,
        DataError,
        r"books\.csv: no column 'stars' \(data\.label_column\); columns present: text, label",
    ),
    "missing group column": (
        nothing,
        {"target": T, "group": "who"},
        prepare,
        DataError,
        r"no column 'who' \(data\.group\); columns present",
    ),
    "no text column": (
        write("w.csv", "words,label\na,b\n"),
        {"target": "w"},
        prepare,
        DataError,
        r"no text or image column; columns present: words, label; name one with data\.text_column",
    ),
    "no label column": (
        write("w.csv", "text\na\nb\n"),
        {"target": "w"},
        prepare,
        LabelError,
        r"domain 'w' has no labels.*data\.label_column, or set data\.target_labels=none",
    ),
    "empty file": (write("w.csv", ""), {"target": "w"}, prepare, DataError, r"w\.csv: no rows"),
    "header alone": (write("w.csv", "text,label\n"), {"target": "w"}, prepare, DataError, r"w\.csv: no rows"),
    "a row with too many fields": (
        replace(7, "well, hello,negative"),
        {"target": T},
        prepare,
        DataError,
        r"books\.csv: line 8 has more fields than there are columns; put a text that holds the separator in quotes",
    ),
    "rows with too many fields": (
        write("w.csv", "text,label\na,b,x\nc,d,y\n"),
        {"target": "w"},
        prepare,
        DataError,
        r"w\.csv: line 2 has more fields than there are columns",
    ),
    "a quote that is never closed": (
        replace(7, '"well,negative'),
        {"target": T},
        prepare,
        DataError,
        r"books\.csv: cannot be read as csv: .*inside string starting at row 7",
    ),
    "broken JSON": (
        write("w.jsonl", '{"text": "a", "label": 1}\n{"text": '),
        {"target": "w"},
        prepare,
        DataError,
        r"w\.jsonl: row 2 is not JSON",
    ),
    "JSON that is no row": (
        write("w.jsonl", "[1, 2]\n"),
        {"target": "w"},
        prepare,
        DataError,
        r"w\.jsonl: row 1 is not a JSON object",
    ),
    "broken parquet": (
        write("w.parquet", "PAR1 no"),
        {"target": "w"},
        prepare,
        DataError,
        r"w\.parquet: cannot be read as parquet",
    ),
    "not UTF-8": (
        lambda root: (root / "w.csv").write_bytes(b"text,label\n\xff\xfe,1\n"),
        {"target": "w"},
        prepare,
        DataError,
        r"w\.csv: cannot be read as csv",
    ),
    "too many bad rows": (
        lambda root: [replace(i, ",x")(root) for i in (3, 4)],
        {"target": T, "on_error": "quarantine"},
        prepare,
        DataError,
        r"'books': 2 of 40 rows are bad, more than data\.max_bad=0\.01 allows; the first is .*row 3: empty text",
    ),
    # splits
    "overlap of given splits": (
        lambda root: given(root, twin=True),
        {"target": T},
        prepare,
        SplitError,
        r"row 1 \(train\) has the content of .*row 41 \(test\), 1 such rows in domain 'books'; .*on_error=quarantine",
    ),
    "unknown split": (
        split_column(lambda i: "fold1"),
        {"target": T},
        prepare,
        DataError,
        r"books\.csv: row \d+: unknown split 'fold1', allowed: train.*data\.split=stratified.*\(and 39 more bad rows\)",
    ),
    "no train among given splits": (
        lambda root: given(root, drop="train"),
        {"target": T},
        prepare,
        SplitError,
        r"its given splits have no train",
    ),
    "a row without a split": (
        split_column(lambda i: "train" if i else ""),
        {"target": T},
        prepare,
        DataError,
        r"books\.csv: row 1: names no split; data\.split=stratified does not read it; repair or remove it",
    ),
    "given without splits": (
        nothing,
        {"target": T, "split": "given"},
        prepare,
        ConfigError,
        r"data\.split=given, but domain 'books' names no splits",
    ),
    **{
        f"{name} of an image folder": (
            nothing,
            {"target": I, name: "who"},
            DomainData.prepare,
            ConfigError,
            rf"data\.{name}='who'.*folders of images have no columns; drop the argument",
        )
        for name in ("group", "label_column", "split_column", "id_column")
    },
    "no evaluation batch": (
        nothing,
        {"target": T, "eval_batch_size": 0},
        DomainData.prepare,
        ConfigError,
        r"data\.eval_batch_size=0 must be at least 1",
    ),
    "group without a column": (
        nothing,
        {"target": T, "split": "group"},
        prepare,
        ConfigError,
        r"data\.split=group needs a column: set data\.group",
    ),
    "single class": (
        one_class,
        {"target": T},
        prepare,
        SplitError,
        r"the train split of domain 'books' holds the single class 'negative'",
    ),
    "empty split": (
        write("w.csv", "text,label\na,x\nb,y\n"),
        {"target": "w"},
        prepare,
        SplitError,
        r"split of domain 'w' is empty \(2 rows in all\)",
    ),
    # settings
    "root that is no folder": (
        nothing,
        {"root": "nowhere", "target": T},
        prepare,
        DataError,
        r"data\.root=nowhere is not a folder",
    ),
    "unknown domain": (
        nothing,
        {"target": "bokks"},
        prepare,
        ConfigError,
        r"data\.target: no domain 'bokks' under .*; found: books, kitchen, photo, sketch",
    ),
    "domain in two roles": (
        nothing,
        {"source": T, "target": T},
        prepare,
        ConfigError,
        r"domain 'books' is named twice, as source and as target",
    ),
    "no domain": (nothing, {}, prepare, ConfigError, r"no domain named; set data\.source"),
    "role without a domain": (
        nothing,
        {"source": T},
        prepare,
        ConfigError,
        r"data\.train_on=\['target'\] needs a target domain; set data\.target",
    ),
    "role that does not train": (
        nothing,
        {"target": T, "train_on": "eval"},
        prepare,
        ConfigError,
        r"'eval' does not train; allowed: source, target",
    ),
    "images and texts": (
        nothing,
        {"source": I, "target": T},
        prepare,
        ConfigError,
        r"mix images \('photo'\) and texts \('books'\)",
    ),
    "text for a vision backbone": (
        nothing,
        {"target": T},
        bind,
        ConfigError,
        r"the backbone takes image input, and domain 'books' holds text rows",
    ),
    "no backbone yet": (
        nothing,
        {"target": T},
        lambda data: data.train_dataloader(),
        ConfigError,
        r"call bind\(backbone\.input_spec\)",
    ),
    "too many shots": (
        nothing,
        {"target": I, "shots": 15},
        prepare,
        ConfigError,
        r"data\.shots=15 asks for more .* the train split of 'photo' has of class 'cat' \(14\); lower it to 14",
    ),
    "shots and fraction": (
        nothing,
        {"target": I, "shots": 5, "fraction": 0.1},
        prepare,
        ConfigError,
        r"two label budgets; set one",
    ),
    "bad fraction": (
        nothing,
        {"target": I, "fraction": 1.5},
        prepare,
        ConfigError,
        r"data\.fraction=1\.5 must be above 0 and at most 1",
    ),
    "shots without labels": (
        nothing,
        {"target": I, "shots": 5, "target_labels": "none"},
        prepare,
        ConfigError,
        r"target_labels=none leaves no labels for data\.shots",
    ),
    "shots without a target": (
        nothing,
        {"source": I, "shots": 5, "train_on": "source"},
        prepare,
        ConfigError,
        r"budget the labels of a target; set data\.target",
    ),
    "one shot to divide": (
        nothing,
        {"target": I, "shots": 1, "validation_from_labels": True},
        prepare,
        ConfigError,
        r"data\.shots=1 cannot be divided",
    ),
    "no budget to divide": (
        nothing,
        {"target": I, "validation_from_labels": True},
        prepare,
        ConfigError,
        r"divides the budget of data\.shots or data\.fraction",
    ),
    "shots of numbers": (
        nothing,
        {"target": I, "shots": 1, "kind": "regression"},
        prepare,
        ConfigError,
        r"data\.kind is regression; use data\.fraction",
    ),
    "bad splits": (
        nothing,
        {"target": I, "splits": (0.7, 0.7, 0.2)},
        prepare,
        ConfigError,
        r"data\.splits=\[0\.7, 0\.7, 0\.2\] must be three shares",
    ),
    "bad batch size": (
        nothing,
        {"target": I, "batch_size": 0},
        prepare,
        ConfigError,
        r"data\.batch_size=0 must be at least 1",
    ),
    "bad max_bad": (
        nothing,
        {"target": I, "max_bad": 1.0},
        prepare,
        ConfigError,
        r"data\.max_bad=1\.0 must be a share",
    ),
    "bad limit": (nothing, {"target": I, "limit": 0}, prepare, ConfigError, r"data\.limit=0 must be at least 1"),
    "bad workers": (
        nothing,
        {"target": I, "num_workers": -1},
        prepare,
        ConfigError,
        r"data\.num_workers=-1 must be 0 or more",
    ),
    "label named twice": (nothing, {"target": I, "labels": ["a", "a"]}, prepare, ConfigError, r"names a label twice"),
    "bad epoch": (
        nothing,
        {"target": I, "epoch": "first"},
        prepare,
        ConfigError,
        r"data\.epoch='first' must be longest, shortest or a domain \(photo\)",
    ),
    "epoch of a domain that does not train": (
        nothing,
        {"source": "sketch", "target": I, "epoch": "sketch"},
        lambda d: d.order(),
        ConfigError,
        r"data\.epoch='sketch' is not in the training mix; allowed: longest, shortest, photo",
    ),
    "batch too small for the mix": (
        nothing,
        {**BOTH, "batch_size": 1},
        pools,
        ConfigError,
        r"data\.batch_size=1 leaves no row for the labeled rows of domain 'sketch'",
    ),
    "mix of an unknown domain": (
        nothing,
        {"target": I, "mix": {"cartoon": 1.0}},
        pools,
        ConfigError,
        r"data\.mix names 'cartoon', which is not in the training mix; allowed: target, photo",
    ),
    "mix without a domain": (
        nothing,
        {**BOTH, "mix": {"source": 1.0}},
        pools,
        ConfigError,
        r"has no share for domain 'sketch' \(target\)",
    ),
    "mix with a zero": (
        nothing,
        {"target": I, "mix": {"target": 0.0}},
        pools,
        ConfigError,
        r"the share of 'target' is 0\.0; it must be above 0",
    ),
    "nothing labeled in the mix": (
        nothing,
        {"target": I, "target_labels": "none"},
        pools,
        ConfigError,
        r"\('photo'\) holds no labeled row",
    ),
    "method without its role": (
        nothing,
        {"target": I},
        include("source"),
        ConfigError,
        r"a method needs source rows.*set data\.source",
    ),
    "Lightning's own sampler": (
        nothing,
        {"target": I},
        split_loader,
        ConfigError,
        r"trainer\.use_distributed_sampler=true would replace",
    ),
    "no inputs": (nothing, {"target": I}, lambda d: d.predicted, ConfigError, r"nothing to predict: set data\.inputs"),
    "missing input": (
        nothing,
        {"target": I, "inputs": "gone.png"},
        lambda d: d.predicted,
        DataError,
        r"data\.inputs: no file gone\.png",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_named_before_training(case, root):
    spoil, settings, act, error, message = CASES[case]
    spoil(root)
    with pytest.raises(error, match=message) as caught:
        act(DomainData(**{"root": root, **settings}))
    assert type(caught.value) is error


def test_a_table_file_needs_one_file(root):
    (root / "books.tsv").write_text("text\tlabel\na\tb\n")
    with pytest.raises(DataError, match=r"found books\.csv, books\.tsv"):
        TableFile().file(root, T)
