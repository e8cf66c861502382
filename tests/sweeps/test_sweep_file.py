"""The sweep file: W&B's words, arms, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from crossft.errors import ConfigError
from crossft.sweeps.arms import arguments, expand
from crossft.sweeps.file import SweepFile, flags_of, flat, read_sweep
from crossft.sweeps.parameters import read_parameters

BASE = {
    "methods": {
        "ewc": {"class_path": "crossft.callbacks.retention.EWC", "init_args": {"weight": 1.0}},
        "dann": {"class_path": "crossft.callbacks.adaptation.DANN"},
        "off": None,
    }
}


def written(folder: Path, *flags: str, base: Any = BASE, **keys: Any) -> SweepFile:
    (folder / "base.yaml").write_text(yaml.safe_dump(base, sort_keys=False))
    file = folder / "study.yaml"
    file.write_text(yaml.safe_dump({"config": "base.yaml", **keys}, sort_keys=False))
    return read_sweep(file, flags)


def names(sweep: SweepFile) -> list[str]:
    return [arm.name for arm in expand(sweep)]


def test_defaults(tmp_path: Path) -> None:
    sweep = written(tmp_path)
    assert (sweep.experiment, sweep.method, sweep.seeds, sweep.baseline) == ("study", "grid", (0,), None)
    assert sweep.config == tmp_path / "base.yaml"
    assert sweep.methods == ("ewc", "dann")
    assert [(arm.name, dict(arm.overrides)) for arm in expand(sweep)] == [("base", {})]


def test_grid_is_the_product_of_values_in_order(tmp_path: Path) -> None:
    parameters = {"a.lr": {"values": [0.1, 1e-05]}, "b": {"values": ["x", None]}, "c": {"value": 3}}
    sweep = written(tmp_path, parameters=parameters)
    assert names(sweep) == ["lr=0.1,b=x", "lr=0.1,b=null", "lr=1e-05,b=x", "lr=1e-05,b=null"]
    assert [dict(arm.overrides) for arm in expand(sweep)][3] == {"a.lr": 1e-05, "b": None, "c": 3}


def test_short_names_grow_until_they_differ(tmp_path: Path) -> None:
    keys = {"methods.ewc.weight": {"values": [1, 2]}, "methods.dann.weight": {"values": [3]}}
    assert names(written(tmp_path, parameters=keys)) == ["ewc.weight=1,dann.weight=3", "ewc.weight=2,dann.weight=3"]


def test_domains_are_no_part_of_an_arms_name(tmp_path: Path) -> None:
    parameters = {"data.target": {"values": ["sketch", "cartoon"]}, "lr": {"values": [1, 2]}}
    arms = expand(written(tmp_path, "--data.source=photo", parameters=parameters))
    assert [arm.name for arm in arms] == ["lr=1", "lr=2", "lr=1", "lr=2"]
    assert arms[3].label == "lr=2 (cartoon)"


def test_arms_times_parameters(tmp_path: Path) -> None:
    arms = {"plain": {}, "ewc": {"methods": {"ewc": {"class_path": "E", "init_args": {"start": 2}}}}}
    parameters = {"lr": {"values": [1, 2]}, "methods.ewc.weight": {"values": [5, 6], "arms": ["ewc"]}}
    sweep = written(tmp_path, arms=arms, parameters=parameters, base={})
    assert names(sweep) == ["plain,lr=1", "plain,lr=2"] + [f"ewc,lr={a},weight={b}" for a in (1, 2) for b in (5, 6)]
    assert dict(expand(sweep)[-1].overrides) == {
        "methods.ewc": "E", "methods.ewc.start": 2, "methods.ewc.weight": 6, "lr": 2,
    }  # fmt: skip


def test_leave_one_out_and_add_one_in_name_every_method_once(tmp_path: Path) -> None:
    three = {"methods.l2sp": {"value": "L2SP"}, "methods.l2sp.weight": {"value": 0.5}}
    sweep = written(tmp_path, leave_one_out="methods", add_one_in="methods", parameters=three)
    assert sweep.methods == ("ewc", "dann", "l2sp")
    assert names(sweep) == [
        "all", "no-ewc", "no-dann", "no-l2sp", "none", "only-ewc", "only-dann", "only-l2sp",
    ]  # fmt: skip
    found = {arm.name: dict(arm.overrides) for arm in expand(sweep)}
    on = {"methods.l2sp": "L2SP", "methods.l2sp.weight": 0.5}
    assert found["all"] == on
    assert found["no-ewc"] == {"methods.ewc": None, **on}
    assert found["no-l2sp"] == {}, "what no config switches on need not be switched off"
    assert found["only-l2sp"] == {"methods.ewc": None, "methods.dann": None, **on}
    assert found["none"] == {"methods.ewc": None, "methods.dann": None}


def test_equal_made_arms_are_run_once(tmp_path: Path) -> None:
    one = {"methods": {"ewc": {"class_path": "E"}}}
    assert names(written(tmp_path, leave_one_out="methods", add_one_in="methods", base=one)) == ["all", "no-ewc"]


def test_parameter_of_a_method_that_an_arm_switches_off_makes_no_arms(tmp_path: Path) -> None:
    grid = {"methods.ewc.weight": {"values": [1, 2, 3]}}
    found = names(written(tmp_path, leave_one_out="methods", parameters=grid))
    assert found == ["all,weight=1", "all,weight=2", "all,weight=3", "no-ewc"] + [
        f"no-dann,weight={w}" for w in (1, 2, 3)
    ]


def test_random_draws_are_computed_and_more_draws_keep_the_former(tmp_path: Path) -> None:
    parameters = {"lr": {"distribution": "log_uniform_values", "min": 0.0001, "max": 0.1}, "b": {"values": [1, 2, 3]}}
    few = expand(written(tmp_path, method="random", run_cap=5, parameters=parameters))
    many = expand(written(tmp_path, method="random", run_cap=200, parameters=parameters))
    assert [dict(a.overrides) for a in many[:5]] == [dict(a.overrides) for a in few]
    logs = [math.log10(arm.overrides["lr"]) for arm in many]
    assert -4 <= min(logs) < -3.8
    assert -1.2 < max(logs) <= -1
    assert sum(logs) / len(logs) == pytest.approx(-2.5, abs=0.2)
    assert {arm.overrides["b"] for arm in many} == {1, 2, 3}


@pytest.mark.parametrize(
    ("words", "low", "high", "mean"),
    [
        ({"min": 1, "max": 4}, 1, 4, 2.5),
        ({"min": 1.0, "max": 4.0}, 1, 4, 2.5),
        ({"distribution": "q_uniform", "min": 0, "max": 10, "q": 5}, 0, 10, 5),
        ({"distribution": "log_uniform", "min": 0, "max": 1}, 1, math.e, math.e - 1),
        ({"distribution": "q_log_uniform_values", "min": 1, "max": 100, "q": 1}, 1, 100, 99 / math.log(100)),
        ({"distribution": "normal", "mu": 3, "sigma": 0.5}, 1, 5, 3),
        ({"distribution": "q_normal", "mu": 3, "sigma": 0.5}, 1, 5, 3),
        ({"distribution": "log_normal", "mu": 0, "sigma": 0.25}, 0.3, 3, math.exp(0.25**2 / 2)),
        ({"values": [0, 1], "probabilities": [0.2, 0.8]}, 0, 1, 0.8),
    ],
)
def test_distributions_have_wandbs_mean(words: dict[str, Any], low: float, high: float, mean: float) -> None:
    (parameter,) = read_parameters({"p": words}, "parameters")
    drawn = [parameter.draw(i) for i in range(2000)]
    assert low <= min(drawn)
    assert max(drawn) <= high
    assert sum(drawn) / len(drawn) == pytest.approx(mean, rel=0.08)


def test_quantized_values_are_multiples(tmp_path: Path) -> None:
    (p,) = read_parameters({"p": {"distribution": "q_uniform", "min": 0, "max": 10, "q": 5}}, "parameters")
    assert {p.draw(i) for i in range(100)} == {0, 5, 10}
    (p,) = read_parameters({"p": {"min": 1, "max": 4}}, "parameters")
    assert {p.draw(i) for i in range(100)} == {1, 2, 3, 4}


def test_nested_parameters_become_dotted_keys() -> None:
    given = {"methods": {"parameters": {"ewc": {"parameters": {"weight": {"values": [1, 2]}}}}}}
    assert [p.key for p in read_parameters(given, "parameters")] == ["methods.ewc.weight"]


def test_flags_win_over_fixed_values_and_end_a_variation(tmp_path: Path) -> None:
    parameters = {"a": {"value": 1}, "b": {"values": [1, 2]}}
    sweep = written(tmp_path, "--a=2", "--b", "7", "--c=null", parameters=parameters)
    assert sweep.fixed == {"a": "2", "b": "7", "c": None}
    assert names(sweep) == ["base"]
    assert flags_of(["--x.y=a=b", "--z="]) == {"x.y": "a=b", "z": ""}


def test_arguments_name_a_class_before_its_arguments() -> None:
    overrides = flat(
        {"methods": {"ewc": {"class_path": "E", "init_args": {"weight": 1e-05}}}, "a": None, "b": [1, "x"]}
    )
    overrides |= {"c": True, "d": "no"}
    words = ["--a=null", '--b=[1, "x"]', "--c=true", "--d=no", "--methods.ewc=E", "--methods.ewc.weight=1e-05"]
    assert arguments(overrides) == words


def test_config_is_looked_for_beside_the_file_then_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "other").mkdir()
    file = tmp_path / "other" / "study.yaml"
    file.write_text("config: base.yaml\n")
    (tmp_path / "base.yaml").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert read_sweep(file).config == Path("base.yaml")
    (tmp_path / "other" / "base.yaml").write_text("{}")
    assert read_sweep(file).config == tmp_path / "other" / "base.yaml"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"sedes": 3}, "sedes: is no key of a sweep file; it may have config, experiment"),
        ({"config": "nowhere.yaml"}, "config='nowhere.yaml' is a file neither beside"),
        ({"config": None}, "config=None must name the base config"),
        ({"method": "genetic"}, "method='genetic' must be grid, random or bayes"),
        ({"method": "random"}, "run_cap=None must be the number of draws"),
        ({"run_cap": 3}, "run_cap=3 is the number of draws of `method: random`, or of trials of `method: bayes`"),
        ({"metric": {"name": "a/val/b", "oracle": True}}, "metric.oracle is for `method: bayes`"),
        ({"early_terminate": {"type": "median"}}, "early_terminate is for `method: bayes`"),
        ({"parameters": {"methods.l2sp.weight": {"values": [1]}}}, "no arm, and no parameter above this one, switches"),
        ({"parameters": {"a": {"values": [1], "when": {"b": 1}}}}, "when: 'b' is set by no arm"),
        ({"parameters": {"a": {"values": [1], "when": 3}}}, "when=3 must map keys"),
        ({"seeds": 0}, "seeds=0 must be"),
        ({"seeds": [1, 1]}, "seeds=\\[1, 1\\] must be"),
        ({"seeds": True}, "seeds=True must be"),
        ({"metric": "accuracy"}, "metric='accuracy' must be"),
        ({"metric": {"name": "target/test/mse", "goal": "maximize"}}, "the goal of target/test/mse is minimize"),
        ({"arms": ["a"]}, "arms=\\['a'\\] must be a mapping"),
        ({"arms": {"a": 3}}, "arms.a=3 must be a mapping"),
        ({"arms": {"a": {"seed_everything": 3}}}, "seed_everything is set by the sweep itself"),
        ({"parameters": {"run.dir": {"value": 3}}}, "run.dir is set by the sweep itself"),
        ({"arms": {"a": {}, "b": {}}}, "arms.b equals an arm before it"),
        ({"arms": {"a": {}}, "baseline": "b"}, "baseline='b' is no arm; they are a"),
        ({"arms": {"all": {}}, "leave_one_out": "methods"}, "arms.all: this name is made by"),
        ({"leave_one_out": True}, "leave_one_out=True must be `methods`"),
        ({"parameters": [1]}, "parameters=\\[1\\] must map config keys"),
        ({"parameters": {"a": 3}}, "parameters.a=3: write `a: {value: 3}`"),
        ({"parameters": {"a": {}}}, "parameters.a has none of value, values"),
        ({"parameters": {"a": {"values": []}}}, "parameters.a.values=\\[\\] must be a list that is not empty"),
        ({"parameters": {"a": {"values": [1], "q": 1}}}, "parameters.a.q: categorical takes values, probabilities"),
        ({"parameters": {"a": {"distribution": "beta"}}}, "distribution='beta' is none of"),
        ({"parameters": {"a": {"min": 0.1, "max": 1.0}}}, "a grid needs value or values; to draw from uniform"),
        ({"parameters": {"a": {"min": 2, "max": 1}}}, "min=2 is above max=1"),
        ({"parameters": {"a": {"min": "1e-3", "max": 1.0}}}, "min='1e-3': uniform needs a number"),
        ({"parameters": {"a": {"values": [1], "arms": ["x"]}}}, "parameters.a.arms: 'x' is no arm; they are base"),
        ({"parameters": {"a": {"values": [1], "arms": "x"}}}, "arms='x' must be a list"),
        ({"parameters": {"a": {"values": [1, 2], "probabilities": [1]}}}, "probabilities=\\[1\\] must be one number"),
        ({"parameters": {"a": {"values": [1, 2], "probabilities": ["a", "b"]}}}, "must be one number, 0 or more"),
        ({"parameters": {"a": {"values": [1, 2], "probabilities": [0, 0]}}}, "not all 0"),
        ({"parameters": {"a": {"parameters": 3}}}, "parameters.a.parameters=3 must map config keys"),
        ({"parameters": {"a": {"distribution": ["x"], "min": 0, "max": 1}}}, "distribution=\\['x'\\] is none of"),
        ({"parameters": {"a": {"min": math.nan, "max": 1.0}}}, "a.min=nan: uniform needs a number"),
        ({"parameters": {"a": {"distribution": "log_uniform", "min": 0.0, "max": 1000.0}}}, "log_uniform_values takes"),
        ({"arms": {"a": {"lr": 1}, "b": {}}, "parameters": {"lr": {"values": [1, 2]}}}, "arm 'a' sets this key itself"),
    ],
)
def test_what_cannot_be_is_refused_by_name(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        expand(written(tmp_path, **keys))


BAYES: dict[str, Any] = {"method": "bayes", "run_cap": 9, "metric": {"name": "target/val/accuracy"}}
RATE = {"lr": {"distribution": "log_uniform_values", "min": 0.001, "max": 0.1}}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"run_cap": None}, "run_cap=None must be the number of trials"),
        ({"metric": None}, "method: bayes needs `metric`"),
        ({"baseline": "base"}, "baseline='base': in a search every trial is an arm"),
        ({"parameters": {}}, "method: bayes has nothing to search"),
        ({"parameters": {"data.target": {"values": ["a", "b"]}}}, "method: bayes has nothing to search"),
        ({"metric": {"name": "target/test/accuracy"}}, "reads the labels of the test split"),
        ({"metric": {"name": "source/retention"}}, "reads the labels of the test split"),
        ({"metric": {"name": "target/gain"}}, "reads the labels of the test split"),
        ({"metric": {"name": "target/val/accuracy", "oracle": True}}, "reads no test label; remove it"),
        ({"metric": {"name": "target/gain", "oracle": "yes"}}, "metric.oracle='yes' must be true or false"),
        (
            {"metric": {"name": "target/gain", "oracle": True}, "early_terminate": {"type": "median"}},
            "early_terminate reads the metric at every validation",
        ),
        ({"early_terminate": {"type": ["a"]}}, "early_terminate={'type': \\['a'\\]} must be"),
        ({"parameters": {"lr": {"distribution": "normal"}}}, "normal is for `method: random`"),
        ({"parameters": {"lr": {"values": [1, 2], "probabilities": [1, 1]}}}, "probabilities is for `method: random`"),
        ({"early_terminate": {"type": "asha"}}, "must be {type: hyperband, min_iter: N}"),
        ({"early_terminate": {"type": "hyperband"}}, "hyperband needs min_iter, or max_iter and s"),
        ({"early_terminate": {"type": "hyperband", "min_iter": 1, "max_iter": 9, "s": 2}}, "and not both"),
        ({"early_terminate": {"type": "hyperband", "min_iter": 0}}, "min_iter=0 must be a whole number, 1 or more"),
        ({"early_terminate": {"type": "median", "eta": 2}}, "eta: median takes min_iter, min_trials"),
    ],
)
def test_searches_that_cannot_be_are_refused(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        written(tmp_path, **{"parameters": RATE, **BAYES, **keys})


def test_search_reads_test_labels_only_when_the_file_says_so(tmp_path: Path) -> None:
    assert not written(tmp_path, parameters=RATE, **BAYES).oracle
    asked = {**BAYES, "metric": {"name": "target/test/accuracy", "oracle": True}}
    assert written(tmp_path, parameters=RATE, **asked).oracle


def test_hyperband_in_wandbs_words(tmp_path: Path) -> None:
    for words, first in (({"min_iter": 2}, 2), ({"max_iter": 27, "s": 2}, 3), ({"max_iter": 4, "s": 2, "eta": 2}, 1)):
        rule = {"type": "hyperband", **words}
        early = written(tmp_path, parameters=RATE, **BAYES, early_terminate=rule).early_terminate
        assert early is not None
        assert (early.type, early.min_iter, early.eta) == ("hyperband", first, words.get("eta", 3))


def test_conditional_parameters_apply_where_their_condition_holds(tmp_path: Path) -> None:
    parameters = {
        "opt": {"values": ["adam", "sgd"]},
        "momentum": {"values": [0.5, 0.9], "when": {"opt": "sgd"}},
        "nesterov": {"values": [True, False], "when": {"opt": ["sgd", "x"], "momentum": 0.9}},
        "last": {"values": [1, 2]},
        "warmup": {"value": 5, "when": {"opt": "adam"}},
    }
    assert {n.endswith(",warmup=5") for n in names(written(tmp_path, parameters=parameters)) if "adam" in n} == {True}
    del parameters["warmup"]
    assert names(written(tmp_path, parameters=parameters)) == [
        "opt=adam,last=1", "opt=adam,last=2", "opt=sgd,momentum=0.5,last=1", "opt=sgd,momentum=0.5,last=2",
    ] + [f"opt=sgd,momentum=0.9,nesterov={n},last={i}" for n in ("true", "false") for i in (1, 2)]  # fmt: skip
    drawn = expand(written(tmp_path, method="random", run_cap=40, parameters=parameters))
    assert {("momentum" in arm.overrides) == (arm.overrides["opt"] == "sgd") for arm in drawn} == {True}
    assert {arm.overrides["opt"] for arm in drawn} == {"adam", "sgd"}


def test_parameter_of_a_method_applies_where_that_is_on(tmp_path: Path) -> None:
    arms = {"plain": {}, "pulled": {"methods.l2sp": "L2SP"}}
    weights = {"methods.l2sp.weight": {"values": [1, 2]}}
    sweep = written(tmp_path, arms=arms, parameters=weights, base={})
    assert names(sweep) == ["plain", "pulled,weight=1", "pulled,weight=2"]
    switch = {"methods.l2sp": {"values": [None, "L2SP"]}, "methods.l2sp.alpha": {"value": 3}, **weights}
    found = expand(written(tmp_path, parameters=switch, base={}))
    assert [dict(arm.overrides) for arm in found] == [
        {}, *({"methods.l2sp": "L2SP", "methods.l2sp.alpha": 3, "methods.l2sp.weight": w} for w in (1, 2)),
    ]  # fmt: skip
    assert [arm.name for arm in found] == ["base", "l2sp=L2SP,weight=1", "l2sp=L2SP,weight=2"]
    own = {"arms": {"typo": {"methods.l2sp.weight": 3}}}
    assert dict(expand(written(tmp_path, base={}, **own))[0].overrides) == {"methods.l2sp.weight": 3}


def test_methods_are_needed_to_leave_one_out(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="leave_one_out and add_one_in need methods"):
        expand(written(tmp_path, leave_one_out="methods", base={}))


@pytest.mark.parametrize("text", ["- a", "a: [", ""])
def test_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"study\.yaml: "):
        read_sweep(file)


@pytest.mark.parametrize("words", [["DIR"], ["--a"], ["-x=1"]])
def test_flags_that_are_none_are_refused(words: list[str]) -> None:
    with pytest.raises(ConfigError):
        flags_of(words)


def test_a_grid_over_sources_and_targets_has_no_run_from_a_domain_to_itself(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("methods: {}\n")
    values = "{values: [books, dvd, kitchen]}"
    text = f"config: base.yaml\nparameters: {{data.source: {values}, data.target: {values}}}\narms: {{plain: {{}}}}\n"
    (tmp_path / "s.yaml").write_text(text)
    pairs = [(a.overrides["data.source"], a.overrides["data.target"]) for a in expand(read_sweep(tmp_path / "s.yaml"))]
    assert len(pairs) == 6
    assert all(source != target for source, target in pairs)
