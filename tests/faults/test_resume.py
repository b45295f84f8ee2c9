"""A run that is interrupted, however and however often, ends with the bits of one that is not."""

import signal

from faults.tools import differences, final_state, read_rows


def test_two_uninterrupted_runs_end_with_the_same_bits(zygote, tiny, tmp_path):
    for name in ("a", "b"):
        zygote.run("train", *tiny, f"run.dir={tmp_path / name}", rows=tmp_path / f"{name}.rows")
    assert differences(final_state(tmp_path / "a"), final_state(tmp_path / "b")) == []
    rows = read_rows(tmp_path / "a.rows")
    assert len(rows) == 200 and rows == read_rows(tmp_path / "b.rows")


def test_sigterm_loses_no_step(zygote, tiny, tmp_path):
    run = tmp_path / "run"
    process = zygote.start("train", *tiny, "train.tokens=64000", f"run.dir={run}")
    process.wait_for_step(run, 60)
    process.send(signal.SIGTERM)
    assert process.wait() == 75, process.text()
    assert "Traceback" not in process.text()
