import math

import numpy as np
import pytest
from scipy import stats

from crossft.reports.stats import compare_paired, hedges_correction, holm, interval, permutation_p, smallest_p


def test_interval_equals_scipy() -> None:
    values = [0.81, 0.79, 0.84, 0.80]
    found = interval([*values, math.nan])
    low, high = stats.t.interval(0.95, 3, loc=np.mean(values), scale=stats.sem(values))
    assert found.mean - found.half == pytest.approx(low)
    assert found.mean + found.half == pytest.approx(high)
    assert found.sd == pytest.approx(np.std(values, ddof=1))
    assert found.n == 4


def test_interval_of_few() -> None:
    one = interval([0.5])
    assert (one.mean, one.n) == (0.5, 1)
    assert math.isnan(one.half)
    none = interval([math.nan])
    assert none.n == 0
    assert math.isnan(none.mean)
    assert interval([0.5, 0.5]).half == 0


@pytest.mark.parametrize("n", [1, 3, 7, 12])
def test_permutation_equals_scipy(n: int) -> None:
    differences = np.random.default_rng(n).normal(0.3, 1, n)
    expected = 1.0
    if n > 1:
        test = stats.permutation_test(
            (differences,), np.mean, permutation_type="samples", n_resamples=np.inf, alternative="two-sided"
        )
        expected = test.pvalue
    assert permutation_p(differences) == pytest.approx(expected)


def test_permutation_of_many_is_sampled_and_repeats() -> None:
    differences = np.random.default_rng(0).normal(0.35, 1, 30)
    found = permutation_p(differences)
    assert found == permutation_p(differences)
    assert found == pytest.approx(stats.ttest_1samp(differences, 0).pvalue, rel=0.25)


def test_permutation_by_hand() -> None:
    assert permutation_p([1, 2, 3]) == 2 / 8  # only +++ and --- reach 6
    assert permutation_p([1, -1]) == 1
    assert permutation_p([0.1, 0.1, 0.1]) == 2 / 8  # ties within rounding count
    assert permutation_p([0, 0]) == 1
    assert math.isnan(permutation_p([]))
    assert smallest_p(3) == permutation_p([1, 1, 1])


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == pytest.approx([1, 1])
    with_gap = holm([0.01, math.nan, 0.04])
    assert with_gap[0] == pytest.approx(0.02)
    assert math.isnan(with_gap[1])
    assert holm([]) == []


@pytest.mark.parametrize(("degrees", "factor"), [(2, 0.5642), (4, 0.7979), (10, 0.9228), (50, 0.9849)])
def test_hedges_correction_equals_the_published_table(degrees: int, factor: float) -> None:
    assert hedges_correction(degrees) == pytest.approx(factor, abs=1e-4)


def test_paired_comparison() -> None:
    arm, base = {0: 0.8, 1: 0.9, 2: 0.7, 3: 0.6}, {0: 0.7, 1: 0.6, 2: 0.5, 9: 0.1}
    found = compare_paired(arm, base)
    assert found is not None
    differences = [0.1, 0.3, 0.2]
    assert found.difference.mean == pytest.approx(0.2)
    assert found.difference.n == 3
    assert found.d_z == pytest.approx(np.mean(differences) / np.std(differences, ddof=1))
    assert found.g == pytest.approx(found.d_z * hedges_correction(2))
    assert found.p == 0.25
    assert compare_paired(arm, {7: 0.1}) is None
    assert compare_paired({0: math.nan}, {0: 0.1}) is None
    flat = compare_paired({0: 0.5, 1: 0.5}, {0: 0.25, 1: 0.25})
    assert flat is not None
    assert math.isnan(flat.d_z)


def test_noise_of_32_bits_is_no_effect_and_breaks_no_tie() -> None:
    """2 more of 60 rows right is not quite the same difference at every accuracy in 32 bits, and must be a tie."""
    base = {seed: float(np.float32(value)) for seed, value in enumerate((5 / 60, 14 / 60, 29 / 60, 50 / 60))}
    arm = {seed: float(np.float32(value)) for seed, value in enumerate((7 / 60, 16 / 60, 31 / 60, 52 / 60))}
    found = compare_paired(arm, base)
    assert found is not None
    assert 0 < found.difference.sd < 1e-6
    assert math.isnan(found.d_z)
    assert found.p == 2 / 16
    mixed = compare_paired({**arm, 4: base[0], 5: arm[1]}, {**base, 4: arm[0], 5: base[1]})
    exact = permutation_p([2, 2, 2, 2, -2, 2])
    assert mixed is not None
    assert mixed.p == exact


@pytest.mark.parametrize("n", [2, 3, 5])
def test_interval_covers_the_mean_as_often_as_it_says(n: int) -> None:
    draws = np.random.default_rng(n).normal(0.7, 0.02, size=(2000, n))
    found = [interval(values) for values in draws.tolist()]
    covered = np.mean([abs(v.mean - 0.7) <= v.half for v in found])
    assert covered == pytest.approx(0.95, abs=0.015)


def test_marks_without_a_difference_are_as_rare_as_holm_says() -> None:
    source = np.random.default_rng(0)
    wrong = 0
    for _ in range(400):
        baseline = source.normal(size=8)
        arms = source.normal(size=(3, 8))
        adjusted = holm([permutation_p((arm - baseline).tolist()) for arm in arms])
        wrong += min(adjusted) < 0.05
    assert wrong / 400 < 0.05 + 2 * (0.05 * 0.95 / 400) ** 0.5
    assert wrong > 0
