import pytest

from wantrim.benchmarks.peers.random_router import millionths
from wantrim.methods.schedule import Schedule, check_window, progress_at, sigma_at, sigma_bin


def test_paper_schedule_in_five_stages():
    # rho 0.3: prune 0.40, 0.35, 0.30, 0.25, 0.20
    schedule = Schedule(0.7)
    kept = [schedule.at(p) for p in (0.0, 0.19, 0.2, 0.39, 0.4, 0.6, 0.8, 0.99, 1.0)]
    assert kept == pytest.approx([0.60, 0.60, 0.65, 0.65, 0.70, 0.75, 0.80, 0.80, 0.80])


def test_keeping_everything_is_never_scheduled_away():
    assert {Schedule(1.0, d).at(p / 10) for d in ("falling", "rising") for p in range(11)} == {1.0}


def test_ratios_stay_in_range():
    schedule = Schedule(0.05)
    assert all(0.0 <= schedule.at(p / 20) <= 1.0 for p in range(21))
    assert Schedule(0.95, "rising").at(0.0) == 1.0


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 8.0])
def test_progress_undoes_the_flow_shift(shift):
    for step in range(31):
        u = 1 - step / 30
        sigma = shift * u / (1 + (shift - 1) * u)
        assert progress_at(sigma, shift) == pytest.approx(step / 30, abs=1e-9)


def test_an_expert_with_a_slice_of_the_sigmas_gets_the_same_ratios():
    # wan2.2: the low-noise expert sees only the last steps, the ratio there must not start over
    sigmas = [1.0, 0.9375, 0.8333, 0.625, 0.0]
    whole = [Schedule(0.7).at(progress_at(s, 5.0)) for s in sigmas[:4]]
    low = [Schedule(0.7).at(progress_at(s, 5.0)) for s in sigmas[2:4]]
    assert whole[2:] == low
    assert whole == pytest.approx([0.60, 0.65, 0.70, 0.75])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"keep_ratio": 0.0}, "keep_ratio.*got 0.0"),
        ({"keep_ratio": -0.1}, "keep_ratio.*got -0.1"),
        ({"keep_ratio": 1.2}, "keep_ratio.*got 1.2"),
        ({"keep_ratio": 0.7, "direction": "down"}, "falling, constant, rising.*'down'"),
    ],
)
def test_bad_values_say_what_was_expected(options, said):
    with pytest.raises(ValueError, match=said):
        Schedule(**options)


def test_the_sigma_of_a_progress_is_where_the_shift_puts_it():
    # by hand: 3 * 0.75 / (1 + 2 * 0.75)
    assert sigma_at(0.25, 3.0) == pytest.approx(0.9)
    assert sigma_at(0.25) == 0.75
    assert [sigma_at(progress_at(s, 5.0), 5.0) for s in (0.1, 0.6)] == pytest.approx([0.1, 0.6])


def test_a_noise_level_has_a_whole_number():
    assert [millionths(s) for s in (0.0, 0.25, 1.5, -1.0)] == [0, 250_000, 1_500_000, 0]
    assert millionths(float("nan")) == 0 and millionths(float("inf")) == 10**12


@pytest.mark.parametrize("window", [(0.0, 0.0), (0.3, 0.3), (0.2, 1.0), (1.0, 1.0)])
def test_a_part_of_a_run_may_be_as_short_as_a_step(window):
    check_window(*window)


@pytest.mark.parametrize("window", [(-0.1, 0.5), (0.5, 1.1), (0.8, 0.2), (1.0, 0.0)])
def test_what_is_no_part_of_a_run_is_refused(window):
    with pytest.raises(ValueError, match=f"got {window[0]} and {window[1]}"):
        check_window(*window)


def test_a_sigma_falls_into_one_of_ten_parts():
    found = [sigma_bin(sigma) for sigma in (-0.5, 0.0, 0.09, 0.1, 0.55, 0.89, 0.91, 1.0, 1.3)]
    assert found == [0, 0, 0, 1, 5, 8, 9, 9, 9]
