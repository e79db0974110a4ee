"""The `evaluate.Metric` classes: offline, with the examples of their documentation, against published runs."""

import doctest
import math

import evaluate
import pytest

from rlhf_trl.errors import metrics
from rlhf_trl.errors.metrics import PairAccuracy, PairCalibration


def test_the_examples_of_the_documentation_hold():
    found = doctest.testmod(metrics)
    assert (found.failed, found.attempted) == (0, 4)


@pytest.mark.parametrize("metric", [PairAccuracy, PairCalibration])
def test_what_cannot_be_measured_is_an_error(metric):
    with pytest.raises(ValueError, match="at least one row"):
        metric().compute(chosen=[], rejected=[])
    with pytest.raises(ValueError, match="1 rows hold a score that is not finite"):
        metric().compute(chosen=[1.0, float("nan")], rejected=[0.0, 0.0])


def test_two_of_a_kind_work_side_by_side_in_batches(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    first, second = PairAccuracy(), PairAccuracy()
    for score in (1.0, 2.0, -1.0):
        first.add_batch(chosen=[score], rejected=[0.0])
        second.add(chosen=-score, rejected=0.0)
    assert first.compute()["accuracy"]["mean"] == pytest.approx(2 / 3)
    assert second.compute()["accuracy"]["mean"] == pytest.approx(1 / 3)
    assert list(tmp_path.iterdir()) == []
    both = evaluate.combine({"accuracy": PairAccuracy(), "calibration": PairCalibration()}, force_prefix=True)
    found = both.compute(chosen=[1.0, 2.0], rejected=[0.0, 3.0])
    assert found["accuracy_accuracy"]["mean"] == 0.5
    assert found["calibration_nll"]["mean"] == pytest.approx((math.log1p(math.exp(-1)) + math.log1p(math.exp(1))) / 2)
