import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jmt_dist.data.geometry import CLIPS, OFFSETS, clip_end, samples_of
from jmt_dist.errors import UserError
from jmt_dist.evaluate.predict import UnitRows, dense, read_predictions, write_predictions

ALL = list(range(OFFSETS))


def truth(unit, frame):
    """A value that names its unit and frame, so that any misplacement shows."""
    return (frame + 0.25 * unit, -2.0 * frame + unit)


def model_output(rows, offsets, seed=0):
    """Clip by clip, with geometry.clip_end as the only source of frames; samples shuffled as shards are."""
    ids = [(u, m, p, 0) for u, n in rows.items() for m, p in samples_of(n)]
    np.random.default_rng(seed).shuffle(ids)
    va = np.empty((len(ids), len(offsets), CLIPS, 2), np.float32)
    for s, (u, m, p, _) in enumerate(ids):
        for o, q in enumerate(offsets):
            for j in range(CLIPS):
                va[s, o, j] = truth(u, clip_end(m, p, q, j))
    return va, np.array(ids, np.int32)


def units(rows):
    return [UnitRows(u, f"unit{u}", n) for u, n in rows.items()]


@pytest.mark.parametrize("rows", [{4: 1}, {0: 5}, {0: 256}, {7: 257, 2: 300, 9: 799}, {1: 4097}])
def test_every_frame_once_with_all_offsets(rows):
    got = dense(*model_output(rows, ALL), ALL, units(rows))
    assert list(got) == [f"unit{u}" for u in rows]
    for u, n in rows.items():
        expected = np.array([truth(u, f) for f in range(1, n + 1)], np.float32)
        np.testing.assert_array_equal(got[f"unit{u}"], expected)
        assert got[f"unit{u}"].dtype == np.float32


@pytest.mark.parametrize("offsets", [[0], [3], [0, 4], [7, 1, 2]])
def test_interpolated_between_and_nearest_at_the_ends(offsets):
    rows = {3: 733}
    got = dense(*model_output(rows, offsets), offsets, units(rows))["unit3"]
    known = sorted({e for m, p in samples_of(733) for q in offsets for j in range(CLIPS) if (e := clip_end(m, p, q, j)) <= 733})
    assert len(known) == pytest.approx(733 * len(offsets) / 8, abs=33)
    for frame in range(1, 734):
        expected = truth(3, min(max(frame, known[0]), known[-1]))  # linear truth: interpolation inside is exact
        np.testing.assert_allclose(got[frame - 1], expected, rtol=1e-6)


def test_short_unit_whose_only_offset_ends_beyond_it():
    rows = {0: 3}
    va, ids = model_output(rows, [5])
    with pytest.raises(UserError, match="unit0 has no prediction"):
        dense(va, ids, [5], units(rows))
    assert dense(*model_output(rows, [0]), [0], units(rows))["unit0"].shape == (3, 2)


def test_refusals():
    rows = {0: 300, 1: 40}
    va, ids = model_output(rows, ALL)
    with pytest.raises(UserError, match="ghost has no prediction"):
        dense(va, ids, ALL, [*units(rows), UnitRows(2, "ghost", 10)])
    with pytest.raises(UserError, match="name unit 1, which is not asked for"):
        dense(va, ids, ALL, units({0: 300}))
    with pytest.raises(UserError, match="predicted twice"):
        dense(np.concatenate([va, va[:1]]), np.concatenate([ids, ids[:1]]), ALL, units(rows))
    broken = va.copy()
    broken[np.flatnonzero(ids[:, 0] == 0)[0], 0, 0, 1] = np.nan
    with pytest.raises(UserError, match="unit0 are not numbers"):
        dense(broken, ids, ALL, units(rows))
    with pytest.raises(ValueError, match="8 offsets"):
        dense(va[:, :7], ids, ALL, units(rows))


def test_a_nan_past_the_end_of_the_unit_is_no_error():
    rows = {0: 5}
    va, ids = model_output(rows, ALL)
    va[va[..., 0] > 5] = np.nan
    np.testing.assert_array_equal(dense(va, ids, ALL, units(rows))["unit0"][:, 0], [1, 2, 3, 4, 5])


def test_files_hold_what_was_written(tmp_path):
    rng = np.random.default_rng(0)
    lengths = {"video2": 70, "10-60-1280x720_right": 3, "a": 1}
    predictions = {name: rng.uniform(-1, 1, (n, 2)).astype(np.float32) for name, n in lengths.items()}
    labels = {"video2": rng.uniform(-1, 1, (70, 2)).astype(np.float32), "a": None}
    labels["video2"][4:9] = np.nan
    path = tmp_path / "new" / "predictions.parquet"
    write_predictions(path, predictions, labels)
    got = read_predictions(path)
    assert list(got) == list(predictions)
    for name, values in predictions.items():
        np.testing.assert_array_equal(got[name].va, values)
    np.testing.assert_array_equal(got["video2"].labels, labels["video2"])
    assert np.isnan(got["a"].labels).all() and np.isnan(got["10-60-1280x720_right"].labels).all()
    frame = pq.read_table(path).to_pandas()
    assert list(frame.columns) == ["unit", "frame", "valence", "arousal", "valence_label", "arousal_label"]
    assert frame.frame.dtype == np.int32 and frame.valence_label.dtype == np.float32
    assert frame.frame[:70].tolist() == list(range(1, 71)) and set(frame.unit) == set(predictions)
    assert [p.name for p in path.parent.iterdir()] == ["predictions.parquet"]  # no scratch file is left
    with pytest.raises(ValueError, match="69 labels for 70"):
        write_predictions(path, predictions, {"video2": labels["video2"][1:]})
    assert list(read_predictions(path)) == list(predictions)
    write_predictions(path, {}, {})
    assert read_predictions(path) == {}


def test_bad_files_are_named(tmp_path):
    with pytest.raises(UserError, match=r"there are no predictions .*gone\.parquet"):
        read_predictions(tmp_path / "gone.parquet")
    torn = tmp_path / "torn.parquet"
    torn.write_bytes(b"PAR1 nonsense")
    with pytest.raises(UserError, match="not a predictions file"):
        read_predictions(torn)
    gap = tmp_path / "gap.parquet"
    columns = {c: [0.0, 0.0] for c in ("valence", "arousal", "valence_label", "arousal_label")}
    pq.write_table(pa.table({"unit": ["a", "a"], "frame": [1, 3], **columns}), gap)
    with pytest.raises(UserError, match="unit a are not 1, 2, 3"):
        read_predictions(gap)
