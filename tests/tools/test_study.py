"""Studies: arms and seeds, resumed like runs, one table."""

import json

import ml_collections
import pytest

from tests import runs
from vitssl import config, errors
from vitssl.run import experiment
from vitssl.tools import study


def _config(tmp_path, **arms):
    words = runs.arguments(tmp_path, steps=2)
    overrides = [w.removeprefix("--config.") for w in words if "--config." in w]
    c = experiment.load(words[0].removeprefix("--config="), overrides)
    c.evals.final = ("knn",)
    c.study = ml_collections.ConfigDict(
        dict(seeds=(0, 1), arms=arms, columns=("final/trained/knn/top1",))
    )
    return c


def test_every_arm_and_seed_runs_once_and_the_table_has_their_values(tmp_path):
    c = _config(tmp_path, slow=("optim.lr=1e-6",), fast=("optim.lr=1e-2",))
    plan = study.read(c)
    assert set(plan.runs) == {(a, s) for a in ("slow", "fast") for s in (0, 1)}
    assert plan.runs["fast", 1].settings.optim.lr == 1e-2
    assert plan.runs["slow", 1].settings.seed == 1
    found = study.run(plan, tmp_path, name="test")
    assert set(found) == {"slow", "fast"}
    assert len(found["slow"]["final/trained/knn/top1"]) == 2
    stored = json.loads((tmp_path / "study.json").read_text())
    assert stored == found
    before = (tmp_path / "fast" / "seed1" / "final.json").stat().st_mtime_ns
    study.run(plan, tmp_path, name="test")
    assert (tmp_path / "fast" / "seed1" / "final.json").stat().st_mtime_ns == before


def test_what_the_data_says_against_an_arm_is_told_before_the_first_run(tmp_path):
    long = ("optim.warmup_epochs=1.0",)
    plan = study.read(_config(tmp_path, good=(), long=long))
    with pytest.raises(errors.UsageError, match="study.arms.long: .*warmup_epochs=1.0"):
        study.run(plan, tmp_path / "study", name="test")
    assert not (tmp_path / "study" / "good").exists()


def test_faults_of_arms_are_found_before_the_first_run(tmp_path):
    c = _config(tmp_path, a=("optim.lrr=1.0",), b=("model.heads=3",))
    with pytest.raises(errors.UsageError) as caught:
        study.read(c)
    assert "study.arms.a" in str(caught.value) and "did you mean" in str(caught.value)
    assert "study.arms.b" in str(caught.value) and "heads=3" in str(caught.value)


def test_the_table_shows_mean_spread_and_every_seed():
    same = [0.4690934115624351] * 3
    found = {"one": [0.5, 0.7], "two": [None, 0.25], "same": same}
    text = study.table({arm: {"x": v} for arm, v in found.items()}, ("x",))
    rows = [line.strip("|").split("|") for line in text.splitlines()[2:]]
    assert [[cell.strip() for cell in row] for row in rows] == [
        ["one", "0.6 ± 0.14 (0.5, 0.7)"],
        ["two", "0.25 (0.25)"],
        ["same", "0.469 ± 0 (0.469, 0.469, 0.469)"],
    ]


def test_a_first_run_is_made_once_and_arms_start_from_it(tmp_path, monkeypatch):
    base = _config(tmp_path, plain=(), warm=("init.from=@first",))
    with pytest.raises(errors.UsageError, match="study.first: missing"):
        study.read(base)
    alone = experiment.read(config.without(base, "study"))
    monkeypatch.setattr(experiment, "load", lambda spec, overrides: alone.config)
    base.study.first = ("some/config.py:pretrain",)
    plan = study.read(base)
    assert plan.first["first"].settings == alone.settings
    ran = []

    def fake(one, directory, **_):
        directory.mkdir(parents=True)
        start = one.settings.init.from_
        assert one.config.init["from"] == start
        ran.append((directory.relative_to(tmp_path).as_posix(), start))
        return {}

    monkeypatch.setattr("vitssl.run.loop.run", fake)
    study.run(plan, tmp_path, name="test")
    first = str((tmp_path / "first").resolve())
    assert ran[0] == ("first", "")
    assert dict(ran[1:]) == {
        "plain/seed0": "",
        "plain/seed1": "",
        "warm/seed0": first,
        "warm/seed1": first,
    }
    ran.clear()
    study.run(plan, tmp_path, name="test")
    assert not ran


def test_every_seed_has_its_own_first_run_and_shares_make_them(tmp_path, monkeypatch):
    base = _config(tmp_path, plain=(), warm=("init.from=@student",))
    base.study.first_each_seed = True
    base.study.first = ml_collections.ConfigDict(
        dict(
            teacher=("distill:smoke",),
            student=("distill:smoke", "teacher.from=@teacher"),
        )
    )
    plan, ran, waited = study.read(base), {}, []

    def fake(one, directory, **_):
        froms = (one.config.get(k, {}).get("from", "") for k in ("init", "teacher"))
        ran[directory.relative_to(tmp_path).as_posix()] = (one.settings.seed, *froms)
        return {}

    def other(seconds):
        waited.append(seconds)
        study._finish(tmp_path / "teacher/seed1", {})

    monkeypatch.setattr("vitssl.run.loop.run", fake)
    monkeypatch.setattr(study.time, "sleep", other)
    home = tmp_path.resolve()
    # The first share has made two runs of four: teachers of both seeds.
    study._finish(tmp_path / "teacher/seed0", {})
    study.run(plan, tmp_path, name="test", share=(2, 2))
    assert waited == [study.WAIT]  # For the teacher of seed 1.
    assert ran == {
        "student/seed0": (0, "", str(home / "teacher/seed0")),
        "student/seed1": (1, "", str(home / "teacher/seed1")),
        "warm/seed0": (0, str(home / "student/seed0"), ""),
        "warm/seed1": (1, str(home / "student/seed1"), ""),
    }


def test_some_arms_alone_leave_out_claims_about_others(tmp_path):
    base = _config(tmp_path, a=(), b=(), c=())
    column = base.study.columns[0]
    base.study.claims = dict(
        one=(("a", column), ("b", column), 0.1), two=(("a", column), ("c", column), 0.1)
    )
    base.study.gate = (("c", column), ("c", column), 0.1)
    experiment.apply(base, ["study.only=('a', 'b')"])
    plan = study.read(base)
    assert {arm for arm, _ in plan.runs} == {"a", "b"}
    assert list(plan.claims) == ["one"] and plan.gate is None
    experiment.apply(base, ["study.only=c"])
    assert {arm for arm, _ in study.read(base).runs} == {"c"}
    experiment.apply(base, ["study.only=d"])
    with pytest.raises(errors.UsageError, match="study.only='d': no such arm; there"):
        study.read(base)


def test_runs_before_the_arms_have_names_and_use_those_before_them(
    tmp_path, monkeypatch
):
    base = _config(tmp_path, a=("init.from=@student",))
    ran = []
    base.study.first = ml_collections.ConfigDict(
        dict(
            teacher=("distill:smoke",),
            student=("distill:smoke", "teacher.from=@teacher"),
        )
    )
    plan = study.read(base)

    def fake(one, directory, **_):
        directory.mkdir(parents=True)
        froms = (one.config.get(k, {}).get("from", "") for k in ("init", "teacher"))
        ran.append((directory.relative_to(tmp_path).as_posix(), *froms))
        return {}

    monkeypatch.setattr("vitssl.run.loop.run", fake)
    study.run(plan, tmp_path, name="test")
    one, two = (str(tmp_path.resolve() / name) for name in ("teacher", "student"))
    assert ran == [
        ("teacher", "", "untrained"),
        ("student", "", one),
        ("a/seed0", two, ""),
        ("a/seed1", two, ""),
    ]
    base.study.first.teacher = ("distill:smoke", "teacher.from=@student")
    base.study.first.a = ("distill:smoke",)
    with pytest.raises(errors.UsageError) as caught:
        study.read(base)
    assert "study.first.teacher has teacher.from=@student" in str(caught.value)
    assert "study.first.a: an arm has that name" in str(caught.value)


def test_what_the_chosen_arms_do_not_start_from_is_not_run(tmp_path):
    arms = {"a": (), "b": ("init.from=@student",), "c": ("init.from=@other",)}
    base = _config(tmp_path, **arms)
    base.study.first = ml_collections.ConfigDict(
        dict(
            teacher=("distill:smoke",),
            student=("distill:smoke", "teacher.from=@teacher"),
            other=("distill:smoke",),
        )
    )
    for only, needed in (
        (("a",), []),
        (("b",), ["teacher", "student"]),
        (("a", "c"), ["other"]),
    ):
        base.study.only = only
        assert list(study.read(base).first) == needed, only


def test_what_follows_a_run_starts_from_it_with_its_seed(tmp_path, monkeypatch):
    base = _config(tmp_path, a=())
    base.study.then = ("finetune_vit:smoke", "optim.lr=0.5")
    base.study.seeded = ("data.threads",)  # As a world has its "data.options.seed".
    base.study.seeds = (1, 2)
    base.study.columns = ("score", "then/score")
    plan, ran = study.read(base), []

    def fake(one, directory, **_):
        directory.mkdir(parents=True)
        s = one.settings
        place = directory.relative_to(tmp_path).as_posix()
        assert s.data.threads == s.seed
        ran.append((place, s.method, s.seed, s.init.from_, s.optim.lr == 0.5))
        return {"score": len(ran)}

    monkeypatch.setattr("vitssl.run.loop.run", fake)
    found = study.run(plan, tmp_path, name="test")
    home, own = tmp_path.resolve(), plan.runs["a", 1].settings.method
    assert ran == [
        line
        for seed in (1, 2)
        for line in (
            (f"a/seed{seed}", own, seed, "", False),
            (f"a/seed{seed}/then", "classify", seed, f"{home}/a/seed{seed}", True),
        )
    ]
    assert found["a"]["score"] == [1, 3] and found["a"]["then/score"] == [2, 4]
    study.run(plan, tmp_path, name="test")
    assert len(ran) == 4


def test_shares_make_every_run_once_and_the_last_has_the_table(tmp_path, monkeypatch):
    base = _config(tmp_path, a=(), b=(), c=())
    plan, ran = study.read(base), []

    def fake(one, directory, **_):
        ran.append(directory.relative_to(tmp_path).as_posix())
        return {"final/trained/knn/top1": 0.5}

    monkeypatch.setattr("vitssl.run.loop.run", fake)
    found = study.run(plan, tmp_path, name="test", share=(2, 2))
    # All arms of seed 0 come before those of seed 1: this is every other of them.
    assert ran == ["b/seed0", "a/seed1", "c/seed1"]
    assert found["b"]["final/trained/knn/top1"] == [0.5, None]
    found = study.run(plan, tmp_path, name="test", share=(1, 2))
    assert sorted(ran) == [f"{arm}/seed{n}" for arm in "abc" for n in (0, 1)]
    assert found["b"]["final/trained/knn/top1"] == [0.5, 0.5]
    assert not list(tmp_path.rglob("*.part"))


def test_other_shares_wait_for_the_first_run(tmp_path, monkeypatch):
    base = _config(tmp_path, warm=("init.from=@first",))
    alone = experiment.read(config.without(base, "study"))
    monkeypatch.setattr(experiment, "load", lambda spec, overrides: alone.config)
    base.study.first = ("some/config.py:pretrain",)
    plan, told = study.read(base), []

    def look(seconds):
        told.append(seconds)
        (tmp_path / "first").mkdir()
        (tmp_path / "first" / "final.json").write_text("{}")

    monkeypatch.setattr(study.time, "sleep", look)
    monkeypatch.setattr("vitssl.run.loop.run", lambda one, directory, **_: {})
    study.run(plan, tmp_path, name="test", share=(2, 2))
    assert told == [study.WAIT] and (tmp_path / "warm/seed1/final.json").exists()
    assert not (tmp_path / "warm/seed0").exists()


def test_arms_are_names_of_folders_and_not_too_many(tmp_path):
    c = _config(tmp_path, **{"/x": (), "ok": ()})
    with pytest.raises(errors.UsageError, match="an arm called '/x': want a letter"):
        study.read(c)
    c = _config(tmp_path, a=())
    c.study.seeds = tuple(range(10_000))
    with pytest.raises(errors.UsageError, match="10000 runs; at most 1000"):
        study.read(c)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff"])
def test_a_torn_result_counts_as_not_finished(content, tmp_path):
    (tmp_path / "final.json").write_bytes(content)
    assert not study._finished(tmp_path)
