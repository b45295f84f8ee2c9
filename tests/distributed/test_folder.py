"""One run, one folder: rank 0 takes it, and the others see that it is the same one."""

from pathlib import Path

from distributed.conftest import SHORT


def test_processes_that_do_not_see_one_folder_refuse_at_once_and_name_the_place(launch, tmp_path):
    """A name below the working directory, as on two hosts without a common file system."""
    before = {}
    for rank in (0, 1):
        (tmp_path / str(rank)).mkdir()
        before[rank] = f"import os; os.chdir({str(tmp_path / str(rank))!r})"
    texts = launch(2, "train", *SHORT, "run.dir=run", "mesh.timeout_s=20", before=before).wait(2)
    for text in texts:
        (said,) = [line for line in text.splitlines() if "run.dir='run': expected" in line]
        assert said.endswith(f":{tmp_path / '1' / 'run'} is not the lead's"), said
    assert not (tmp_path / "0" / "run" / "metrics.jsonl").exists(), "nothing was begun"


def test_without_a_name_all_processes_find_the_folder_that_rank_0_takes(launch, tmp_path):
    here = f"import os; os.chdir({str(tmp_path)!r})"
    launch(2, "train", *SHORT, "train.tokens=320", before=here).wait(0)
    (run,) = (tmp_path / "runs").iterdir()
    assert {path.name for path in run.iterdir()} >= {"run.json", "metrics.jsonl", "report.html", "saes"}
    assert len(list((run / "saes").iterdir())) == 4, "those of both processes"
    assert [Path(path).name for path in (run / "checkpoints").glob("step-*/MANIFEST.json")]
