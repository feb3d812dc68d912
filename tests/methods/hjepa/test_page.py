"""The five parts of docs/multicrop.md are real."""

import re

import pytest

from tests import runs


@pytest.mark.slow
def test_the_five_parts_of_the_page_run(tmp_path, monkeypatch):
    text = (runs.ROOT / "docs" / "multicrop.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
    small = code.replace('"steps=20"', '"steps=2", *SMALL')
    assert small != code and small.count("# ") == 5
    monkeypatch.chdir(tmp_path)
    small = small.replace("configs/hjepa.py", str(runs.ROOT / "configs/hjepa.py"))
    words = ("width=16", "depth=1", "heads=2")
    given = [f"model.{word}" for word in words]
    given += ["batch_size=8", "optim.warmup_epochs=0.0", "log.pictures=False"]
    given += ["evals.final_samples_train=40", "evals.final_samples_test=20"]
    given += ["evals.every_epochs=0.0", "evals.scales=()", "data.workers=0"]
    exec(compile(small, "docs/multicrop.md", "exec"), {"SMALL": given})  # noqa: S102
    assert (tmp_path / "runs" / "multicrop" / "metrics.jsonl").exists()
