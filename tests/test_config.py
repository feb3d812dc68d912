"""Mistakes in configs and on the command line: all named at once, exit code 2."""

import pathlib
import subprocess
import sys

import ml_collections
import pytest

from vitssl import config, errors, main
from vitssl.run import experiment, loop

ROOT = pathlib.Path(__file__).parents[1]
HJEPA = f"{ROOT}/configs/hjepa.py:digits"

# What is typed -> what the one message must say: key, value, what is allowed, the fix.
MISTAKES = {
    "optm.lr=1e-3": ["optm", "did you mean 'optim'"],
    "optim.lrr=1e-3": ["optim.lrr", "did you mean 'lr'"],
    "optim.lr=fast": ["optim.lr=fast", "float"],
    "optim.lr=-1.0": ["optim.lr=-1.0", "above 0"],
    "optim.lr=(1e-3,)": ["optim.lr", "float"],
    "optim.name=adamW": ["optim.name='adamW'", "adamw, adam, sgd, lars"],
    "optim.schedule=step": ["optim.schedule='step'", "cosine, linear, constant"],
    "optim.warmup_epochs=400.0": ["warmup_epochs=400.0", "epochs="],
    "optim.wd=-0.1": ["optim.wd=-0.1", "0 or more"],
    "optim.b1=1.0": ["optim.b1=1.0", "[0, 1)"],
    "optim.clip_norm=-3.0": ["optim.clip_norm=-3.0"],
    "optim=3": ["optim", "section", "lr"],
    "epochs=0.0": ["epochs=0", "needs init.from", "steps"],
    "steps=-1": ["steps=-1"],
    "seed=-1": ["seed=-1: 0 or more, below 2^63"],
    f"seed={2**63}": [f"seed={2**63}: 0 or more, below 2^63"],
    "multicrop.global_crop_scale=0.5": [
        "multicrop.global_crop_scale=0.5: want a tuple (float in (0, 1], float in"
    ],
    "evals.knn_k=x": ["evals.knn_k='x': want a tuple of int"],
    "batch_size=0": ["batch_size=0", "1 or more"],
    "batch_size=64.5": ["batch_size=64.5", "int"],
    "accumulate=7": ["accumulate=7", "does not divide", "32"],
    "method=hjeppa": ["method='hjeppa'", "did you mean 'hjepa'"],
    "model.name=vitt": ["model.name='vitt'", "did you mean 'vit'"],
    "model.heads=5": ["model.", "heads=5", "width=64"],
    "model.patch=5": ["patch=5", "24"],
    "model.depth=two": ["model.depth=two", "int"],
    "data.source=digitz": ["data.source='digitz'", "did you mean 'digits'"],
    "data.channels=3": ["data.mean has 1 values for channels=3"],
    "data.std=(0.0,)": ["data.std", "in (0, 1]"],
    "data.mean=(127.5,)": ["data.mean", "in [0, 1]", "0..255: divide by 255"],
    "data.std=(58.0,)": ["data.std", "in (0, 1]", "0..255: divide by 255"],
    "data.bad_share=1.5": ["data.bad_share", "in [0, 1]"],
    "data.on_bad_image=ignore": ["data.on_bad_image='ignore'", "skip, raise"],
    "multicrop.global_crop_size=30": ["30", "patch"],
    "multicrop.global_crop_scale=(1.0,0.5)": ["global_crop_scale", "largest"],
    "masking.strategy=globals": ["masking.strategy='globals'", "global_only"],
    "masking.num_hierarchies=7": ["num_hierarchies=7", "in [1, 4]"],
    "objective.weights=(1.0,0.5)": ["weights", "3"],
    "objective.type=mae": ["objective.type='mae'", "mse"],
    "predictor.heads=7": ["predictor", "heads", "7"],
    "ema.start=1.5": ["ema.start=1.5", "[0, 1]"],
    "log.every_steps=0": ["log.every_steps=0", "1 or more"],
    "checkpoint.keep_last=1": ["checkpoint.keep_last=1", "2 or more"],
    "mesh.fsdp=0": ["mesh"],
    "precision=float16": ["precision='float16'", "float32, bfloat16"],
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_message_and_exit_code_2(
    mistake, capsys, tmp_path, monkeypatch
):
    # A mistake that is not found must fail here, not train for minutes.
    monkeypatch.setattr(loop, "run", lambda *a, **k: pytest.fail("it would train"))
    argv = [f"--config={HJEPA}", f"--workdir={tmp_path / 'w'}", f"--config.{mistake}"]
    assert main.main(argv) == 2
    said = capsys.readouterr().err
    for part in MISTAKES[mistake]:
        assert part in said, said
    assert "Traceback" not in said and not (tmp_path / "w").exists()


def test_all_mistakes_are_listed_at_once():
    bad = ["optim.lr=-1.0", "ema.start=1.5", "model.heads=5"]
    with pytest.raises(errors.UsageError) as caught:
        experiment.read(experiment.load(HJEPA, bad))
    assert all(s in str(caught.value) for s in ("lr=-1.0", "start=1.5", "heads=5"))
    bad = ["optm.lr=1", "mdoel.depth=3", "seed=x"]
    with pytest.raises(errors.UsageError) as caught:
        experiment.load(HJEPA, bad)
    assert all(s in str(caught.value) for s in ("optm", "mdoel", "seed=x"))


def test_unknown_and_missing_keys_inside_the_file_are_found():
    c = experiment.load(HJEPA)
    c.optim.learning_rate = 0.1
    c.maskin = ml_collections.ConfigDict()
    del c.ema.end
    del c.multicrop
    with pytest.raises(errors.UsageError) as caught:
        experiment.read(c)
    for part in (
        "optim.learning_rate: no such key",
        "maskin: no such key; did you mean 'masking'?",
        "ema.end: missing; want float",
        "multicrop: missing",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    "argv, says",
    [
        ([], "--config=NAME is missing"),
        (["--config=configs/hjepq.py"], "no such file"),
        ([f"--config={ROOT}/configs/hjepa.py:demo2"], "no recipe 'demo2'; there is:"),
        ([f"--config={HJEPA}", "--wrkdir=x"], "did you mean --workdir?"),
        ([f"--config={HJEPA}", "extra"], "extra: not a flag"),
        ([f"--config={HJEPA}", "--share=3/2"], "--share=3/2: want K/N"),
        ([f"--config={HJEPA}", "--share=1/2"], "--share: of a study"),
        ([f"--config={HJEPA}", "--workdir"], "needs a value"),
    ],
)
def test_command_line_mistakes(argv, says, capsys):
    assert main.main(argv) == 2
    assert says in capsys.readouterr().err


def test_a_config_that_does_not_parse_is_one_line(tmp_path, capsys):
    path = tmp_path / "c.py"
    path.write_text("def get_config(:\n")
    assert main.main([f"--config={path}"]) == 2
    assert "line 1" in capsys.readouterr().err
    path.write_text("x = 1\n")
    assert main.main([f"--config={path}"]) == 2
    assert "get_config" in capsys.readouterr().err


def test_overrides_keep_types_and_accept_both_forms(capsys):
    c = experiment.load(HJEPA, ["optim.lr=2", "data.root=a b/ü", "data.mean=(0.1,)"])
    assert c.optim.lr == 2.0 and isinstance(c.optim.lr, float)
    assert c.data.root == "a b/ü" and c.data.mean == (0.1,)
    flags = main.parse(["--config", HJEPA, "--config.seed", "3", "--dry_run"])
    assert flags["overrides"] == ["seed=3"] and flags["dry_run"]


def test_one_value_stands_for_a_tuple_of_any_length():
    latent = str(ROOT / "configs" / "latent_mim.py")
    key = "hybrid.processing_patch_size"
    for value, want in (("4", (4,)), ("(4,8)", (4, 8))):
        checked = experiment.read(experiment.load(latent, [f"{key}={value}"]))
        assert checked.sections["hybrid"].processing_patch_size == want
        assert checked.config.hybrid.processing_patch_size == want
    # A tuple again, over a value of a file that is none.
    c = experiment.load(HJEPA)
    with c.ignore_type():
        c.evals.knn_k, c.evals.final = 5, "knn"
    assert experiment.read(c).settings.evals.knn_k == (5,)
    problems = config.Problems()
    config.override(c, ["evals.knn_k=(5,6)", "evals.final=linear"], problems)
    found = experiment.read(c).settings.evals
    assert found.knn_k == (5, 6) and found.final == ("linear",) and not problems
    with c.ignore_type():
        c.multicrop.global_crop_scale = 0.5
    want = r"global_crop_scale=0.5: want a tuple \(float in .0, 1., float in .0, 1.\)$"
    with pytest.raises(errors.UsageError, match=want):
        experiment.read(c)


@pytest.mark.parametrize("path", config.files(ROOT / "configs"), ids=str)
def test_every_recipe_is_valid(path):
    module = config.module(str(path))
    for name in module.RECIPES:
        # Recipes that only evaluate, or distill, need weights; nobody opens them here.
        c = config.recipe(f"{path}:{name}")
        needs = ["teacher.from=DIR"] if c.method == "distill" else []
        experiment.apply(c, ["init.from=DIR", *needs])
        if "study" in c:
            from vitssl.tools import study

            assert study.read(c).runs
        else:
            assert experiment.read(c).settings.method == c.method


def test_json_round_trip_is_the_same_experiment():
    c = experiment.load(HJEPA, ["optim.lr=0.5"])
    again = config.from_json(config.to_json(c))
    assert list(config.differences(c, again)) == []
    assert experiment.read(again).settings == experiment.read(c).settings
    other = experiment.load(HJEPA, ["optim.lr=0.25"])
    assert list(config.differences(c, other)) == ["optim.lr: 0.5 -> 0.25"]


def test_nothing_of_a_bad_config_touches_devices_or_data_or_needs_slow_imports():
    code = (
        "import sys; from vitssl import main\n"
        f"code = main.main(['--config={HJEPA}', '--config.seed=-1'])\n"
        "from jax._src import xla_bridge as b\n"
        "heavy = {'sklearn', 'matplotlib', 'scipy.optimize', 'orbax', 'grain'}\n"
        "print(code, b.backends_are_initialized(), *(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT
    )
    assert done.stdout.split() == ["2", "False"], done


@pytest.mark.parametrize(
    "override, says",
    [
        ("optim.lr=1e999", "optim.lr=1e999: want a finite number"),
        ("optim.lr=-1e999", "optim.lr=-1e999: want a finite number"),
        ("optim.lr=1e39", "optim.lr=1e39: want a number that float32 holds"),
        ("optim.lr=1" + "0" * 400, "want a number below 2^64"),
        ("optim.lr=1" + "0" * 5000, "want float, like"),
        ("optim.lr=nan", "optim.lr=nan: want float"),
        ("optim.lr=" + "(" * 10_000, "want float, like"),
        ("data.mean=(0.5, 1e999)", "want a finite number"),
        ("data.options={'every': 1e999}", "want a finite number"),
        ("data.options={'a': ({'b': -1e999},)}", "want a finite number"),
        ("epochs=1e999", "epochs=1e999: want a finite number"),
        ("steps=3000000000", "steps=3000000000: below 2^31"),
        ("log.stall_seconds=1e999", "want a finite number"),
    ],
)
def test_a_number_that_cannot_be_computed_with_is_one_line(override, says):
    with pytest.raises(errors.UsageError) as caught:
        experiment.read(experiment.load("configs/hjepa.py:smoke", [override]))
    head, *lines = str(caught.value).splitlines()
    assert head == "config:" and len(lines) == 1
    assert says in lines[0] and len(lines[0]) < 300


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e39])
def test_a_file_of_such_numbers_is_one_line_each(value):
    c = experiment.load("configs/hjepa.py:smoke")
    c.optim.lr = value
    c.data.options = dict(table=(1.0, value))
    with pytest.raises(errors.UsageError) as caught:
        experiment.read(c)
    _, *lines = str(caught.value).splitlines()
    assert [line.strip().partition("=")[0] for line in lines] == [
        *("data.options.table", "optim.lr")
    ] or len(lines) == 2


@pytest.mark.parametrize("name", ["a", "lr=1e-3-seed=0", "größe_2", "x.y z+1"])
def test_names_of_folders(name):
    assert not config.folder_fault(name)


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../x", "/etc/x", "a/b", "a\\b", "-x", "a\0", "a\n", "ä" * 120],
)
def test_names_that_leave_their_folder_or_are_none(name):
    assert config.folder_fault(name)
