from __future__ import annotations

import numpy as np
import pytest

from crossft.data.splits import assign, content_overlap, pick_fraction, pick_shots, sample_ids, units
from crossft.errors import ConfigError

FRACTIONS = (0.7, 0.1, 0.2)


def test_sample_ids_follow_content_not_position():
    content = [50, 7, 50, 9]
    ids = sample_ids(content)
    assert ids[1] == 7
    assert ids[3] == 9
    assert len(set(ids.tolist())) == 4
    assert 50 in ids
    shuffled = sample_ids([9, 50, 50, 7])
    assert sorted(ids.tolist()) == sorted(shuffled.tolist())
    assert (ids >= 0).all()


def test_units_join_equal_content_and_groups_transitively():
    assert units([1, 2, 1, 3]).tolist() == [1, 2, 1, 3]
    joined = units([1, 2, 1, 3, 4], ["a", "b", "b", "c", "a"])
    assert joined.tolist() == [1, 1, 1, 3, 1]


@pytest.mark.parametrize("sizes", [(70, 20, 10), (500, 3, 40)])
def test_every_stratum_is_split_to_within_one_unit(sizes):
    strata = [str(c) for c, n in enumerate(sizes) for _ in range(n)]
    split = assign(range(len(strata)), FRACTIONS, 0, strata)
    for c, n in enumerate(sizes):
        mine = np.bincount(split[[s == str(c) for s in strata]], minlength=3)
        assert np.abs(mine - n * np.array(FRACTIONS)).max() <= 2
    assert np.abs(np.bincount(split, minlength=3) - len(strata) * np.array(FRACTIONS)).max() <= 1


def test_split_depends_on_seed_and_content_alone():
    content = np.random.default_rng(0).integers(0, 2**60, 200)
    split = assign(content.tolist(), FRACTIONS, 0)
    moved = np.random.default_rng(1).permutation(200)
    assert assign(content[moved].tolist(), FRACTIONS, 0).tolist() == split[moved].tolist()
    assert assign(content.tolist(), FRACTIONS, 1).tolist() != split.tolist()


def test_units_never_cross_splits_and_zero_shares_stay_empty():
    unit = np.arange(300) // 3
    split = assign(unit.tolist(), (0.8, 0.0, 0.2), 0)
    assert (split.reshape(-1, 3) == split.reshape(-1, 3)[:, :1]).all()
    assert set(split.tolist()) == {0, 2}


def test_overlap_names_the_earlier_split_as_the_one_to_drop():
    content, split = np.array([5, 6, 5, 6, 7]), np.array([0, 1, 2, 0, 0], np.int8)
    assert sorted(content_overlap(content, split)) == [(0, 2), (3, 1)]


def test_shots_are_exact_nested_and_seeded():
    names = [(str(i % 3),) for i in range(90)]
    ids = np.random.default_rng(0).integers(0, 2**60, 90)
    classes = ("0", "1", "2")
    five, ten = pick_shots(names, ids, 5, 0, "x", classes), pick_shots(names, ids, 10, 0, "x", classes)
    assert np.bincount([int(names[i][0]) for i in five]).tolist() == [5, 5, 5]
    assert set(five) < set(ten)
    assert pick_shots(names, ids, 5, 1, "x", classes) != five
    with pytest.raises(ConfigError, match=r"data\.shots=31 .* x has of class '0' \(30\); lower it to 30"):
        pick_shots(names, ids, 31, 0, "x", classes)
    missing = r"data\.shots=5 asks for more labels than x has of class '3' \(0\)"
    with pytest.raises(ConfigError, match=missing + "; add rows of it"):
        pick_shots(names, ids, 5, 0, "x", (*classes, "3"))
    with pytest.raises(ConfigError, match=missing + r", which data\.labels names; add rows of it"):
        pick_shots(names, ids, 5, 0, "x", (*classes, "3"), listed=True)


def test_fraction_takes_its_share_of_every_class():
    names = [("a",)] * 80 + [("b",)] * 20 + [("c",)] * 2
    picked = pick_fraction(names, np.arange(102), 0.1, 0)
    assert [sum(names[i] == (c,) for i in picked) for c in "abc"] == [8, 2, 1]
