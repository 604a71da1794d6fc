"""MixupOrCutMix in a real Trainer."""

from __future__ import annotations

from lightning_optkit import MixupOrCutMix
from tests.contracts import assert_resumes, run


def test_resumes(tmp_path):
    def make():
        return MixupOrCutMix(1.0, probability=0.8, seed=1)

    callback = assert_resumes(make, "classifier", tmp_path, at=("mid-epoch",))
    assert callback._counted == (2, 5, 2)


def test_both_ways_are_taken_and_half_precision_trains(tmp_path):
    ways = []

    class Notes(MixupOrCutMix):
        def mix(self, *args, **kwargs):
            mixed = super().mix(*args, **kwargs)
            ways.append(mixed.box is not None)
            return mixed

    run("classifier", [Notes()], tmp_path, precision="bf16-true")
    assert len({*ways}) == 2
    assert len(ways) == 10
    assert (tmp_path / "csv/version_0/optkit-mixing-batch.png").is_file()
