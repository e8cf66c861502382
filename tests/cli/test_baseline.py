"""``crossft baseline``: on the run's own rows and labels, written into its summary, beside the run in a comparison."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from lightning.pytorch import seed_everything
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from tiny import text_domains

from crossft.cli import main
from crossft.cli.baseline import _opened
from crossft.data.passes import batch_of
from crossft.data.prepare import first_rows
from crossft.runs import RunFolder


def test_frozen_features_of_the_runs_own_rows(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """5 shots a class of the target train: the probe is fitted to those ten rows, no more."""
    settings, data = _opened(RunFolder(finished), [])
    assert data.training_domains == ("sketch",)
    target = next(p for p in data.prepared if p.domain.name == "sketch")
    assert len(target.known("train")) == 10
    assert main(["baseline", str(finished)]) == 0
    printed = capsys.readouterr().out
    assert "frozen" in printed
    found = {k: v for k, v in RunFolder(finished).summary()["metrics"].items() if k.startswith("baseline/")}
    assert set(found) == {"baseline/frozen/target/test/accuracy", "baseline/frozen/source/test/accuracy"}
    seed_everything(0, verbose=False)  # the test backbone has no weights: it is drawn from the run's seed
    settings.set_domains(data.domains)
    task = settings.build("model").model.eval()
    rows = {s: target.rows(s)[target.labeled[target.rows(s)]] for s in ("train", "test")}
    data.bind(task.backbone.input_spec)
    number = data.prepared.index(target)
    start = first_rows(data.prepared)[number]
    x = {}
    for split, own in rows.items():
        batch = batch_of(data, start + own, number)
        x[split] = task.backbone(batch.inputs).features.detach().numpy()
    scaler = StandardScaler().fit(x["train"])
    model = LogisticRegression(C=0.1, max_iter=1000).fit(scaler.transform(x["train"]), target.targets[rows["train"]])
    expected = model.score(scaler.transform(x["test"]), target.targets[rows["test"]])
    assert found["baseline/frozen/target/test/accuracy"] == pytest.approx(expected)


def test_texts_have_both_baselines_and_a_comparison_shows_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text_domains(tmp_path / "data", each=30)
    config = {
        "experiment": "texts",
        "model": {"class_path": "crossft.tasks.Classification", "init_args": {"backbone": {
            "class_path": "crossft.backbones.Transformer",
            "init_args": {"name": "packaged:minilm", "max_length": 16}}}},
        "data": {"train_on": "source", "target_labels": "none", "batch_size": 8},
        "trainer": {"max_steps": 1, "accelerator": "cpu"},
        "wandb": {"mode": "disabled"},
        "before": False,
    }  # fmt: skip
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    words = [f"--data.root={tmp_path / 'data'}", "--data.source=books", "--data.target=kitchen"]
    assert main(["fit", f"--config={tmp_path / 'c.yaml'}", *words, f"--run.root={tmp_path}"]) == 0
    assert main(["baseline", str(tmp_path / "texts")]) == 0
    (run,) = (tmp_path / "texts").glob("default-*")
    metrics = RunFolder(run).summary()["metrics"]
    assert metrics["baseline/tfidf/target/test/accuracy"] > 0.9, "good and bad decide"
    assert "baseline/frozen/target/test/accuracy" in metrics
    capsys.readouterr()
    assert main(["compare", str(tmp_path / "texts")]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    shown = f"source accuracy {metrics['baseline/tfidf/source/test/accuracy']:.3f}"
    assert f"TF-IDF with logistic regression: {shown}" in printed


def test_an_unfinished_run_and_wrong_words_are_named(finished: Path, tmp_path: Path, capsys) -> None:
    assert main(["baseline"]) == 2
    assert "usage: crossft baseline RUN" in capsys.readouterr().err
    folder = RunFolder.create(tmp_path / "run", experiment="x")
    assert main(["baseline", str(folder.path)]) == 0
    assert "not finished" in capsys.readouterr().out
