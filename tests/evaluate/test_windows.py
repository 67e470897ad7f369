import numpy as np
import pytest

from jmt_dist.evaluate.metric import ccc
from jmt_dist.evaluate.predict import UnitPrediction
from jmt_dist.evaluate.smooth import NONE, Filter, filtered
from jmt_dist.evaluate.windows import CANDIDATES, OutOfFold


def run(units, seed, noise=(0.4, 0.4), slow=(12, 12)):
    """Smooth labels and noisy predictions of units {name: rows}; `slow` is how many frames valence and arousal take to change."""
    labels = np.random.default_rng(seed)
    draw = np.random.default_rng(100 + seed)
    found = {}
    for name, rows in units.items():
        va = np.stack([np.sin(np.arange(rows) / slow[k] + labels.uniform(0, 6)) * 0.5 for k in range(2)], axis=1)
        found[name] = UnitPrediction((va + draw.normal(0, noise, va.shape)).astype(np.float32), va.astype(np.float32))
        found[name].labels[:3] = np.nan
    return found


def video(unit):
    return unit.removesuffix("_left").removesuffix("_right")


def by_hand(runs, candidates, leave_out):
    """The best candidate of each target on the frames themselves, all joined: no sums."""
    found = []
    for k in range(2):
        best = []
        for how in candidates:
            x, y = [], []
            for one in runs:
                for name, unit in one.items():
                    if video(name) not in leave_out:
                        x.append(filtered(unit.va[:, k], how))
                        y.append(unit.labels[:, k])
            best.append(ccc(np.concatenate(x), np.concatenate(y)))
        found.append((candidates[int(np.argmax(best))], max(best), best[0]))
    return found


def test_the_choice_is_the_best_on_what_other_folds_held_out():
    folds = {
        "official": [run({"o1": 200, "f1a": 150}, 1, slow=(5, 60))],
        "fold-1": [run({"f1a": 150, "f1b_left": 180}, 2, slow=(5, 60))],
        "fold-2": [run({"f2": 260, "f1b_right": 120}, 3, slow=(5, 60))],
    }
    choice = OutOfFold(folds, video).choose("fold-1")
    expected = by_hand([folds["official"][0], folds["fold-2"][0]], CANDIDATES, {"f1a", "f1b"})
    assert (choice.valence, choice.arousal) == (expected[0][0], expected[1][0])
    assert choice.smoothed == pytest.approx((expected[0][1], expected[1][1]), abs=1e-10)
    assert choice.raw == pytest.approx((expected[0][2], expected[1][2]), abs=1e-10)
    assert choice.folds == ("official", "fold-2") and choice.videos == 2 and choice.smooths
    assert choice.arousal.window > choice.valence.window  # the slow target takes the longer window


def test_labels_that_are_scored_have_no_say():
    """Other labels for every unit of the fold itself, and for its videos in other folds, change nothing."""
    folds = {"fold-1": [run({"a": 200, "b": 90}, 1)], "fold-2": [run({"c": 200, "a_left": 90}, 2)]}
    before = OutOfFold(folds, video).choose("fold-1")
    for unit in (*folds["fold-1"][0].values(), folds["fold-2"][0]["a_left"]):
        unit.labels[3:] = np.random.default_rng(9).uniform(-1, 1, unit.labels[3:].shape)
    assert OutOfFold(folds, video).choose("fold-1") == before
    folds["fold-2"][0]["c"].labels[3:] *= -1
    assert OutOfFold(folds, video).choose("fold-1") != before


def test_seeds_are_averaged_and_test_units_use_all_folds():
    folds = {"fold-1": [run({"a": 200}, 1), run({"a": 200}, 1, noise=(0.1, 0.9))], "fold-2": [run({"b": 200}, 2), run({"b": 200}, 2)]}
    choice = OutOfFold(folds, video).choose("test", ())
    assert choice.folds == ("fold-1", "fold-2") and choice.videos == 2
    each = [by_hand([folds["fold-1"][seed], folds["fold-2"][seed]], [choice.valence], ())[0][1] for seed in range(2)]
    assert choice.smoothed[0] == pytest.approx(np.mean(each), abs=1e-10)


def test_predictions_that_are_smooth_already_are_left_alone():
    folds = {"fold-1": [run({"a": 300}, 1, noise=(0, 0))], "fold-2": [run({"b": 300}, 2, noise=(0, 0))]}
    assert OutOfFold(folds, video).choose("fold-1").valence == NONE
    assert not OutOfFold(folds, video, [NONE, Filter("box", 25)]).choose("fold-1").smooths


def test_nothing_to_choose_on():
    only = {"fold-1": [run({"a": 100}, 1)]}
    assert OutOfFold(only, video).choose("fold-1") is None
    same = {**only, "official": [run({"a_right": 100}, 2)]}  # the same video only
    assert OutOfFold(same, video).choose("fold-1") is None
