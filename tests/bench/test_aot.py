"""Steps for devices that are not here: lowered everywhere, compiled with the extra."""

import contextlib
import dataclasses
import json
import re
import shlex
import subprocess
import sys
import types

import jax
import pytest

from tests import runs
from tests.bench import test_compiled
from vitssl import main as trainer
from vitssl.bench import __main__ as bench
from vitssl.bench import aot, compiled, elsewhere
from vitssl.run import chips, experiment

TINY = ("--vit=ti16", "--depth=1", "--image=32", "--batch=16")
SMALL = (
    "--config=configs/hjepa.py:imagenet_vitb",
    "--config.model.depth=2",
    "--config.predictor.depth=1",
    "--batch=64",
)


def _figures(capsys, *argv):
    assert bench.main(["aot", "--json", *argv]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_step_lowered_for_a_gpu_has_its_flops_on_a_device_and_fused_attention(
    capsys,
):
    found = _figures(capsys, "--on=h200:8", *TINY, "--lower")
    tokens, width, rows = 5, 192, 16
    block = 12 * width**2 * tokens
    outside = 4 * 16 * 16 * 3 * width + 1000 * width
    # Of the images no gradient is wanted.
    flop = 2 * rows * (3 * (block + outside) - 4 * 16 * 16 * 3 * width)
    # Padded to six tokens: two products, five in the gradient.
    fused = 7 * 2 * rows * 6 * 6 * width
    assert found["flop"] == (flop + fused) / 8
    assert found["flop_by_kind"]["fused attention"] == fused / 8
    assert (found["fused_share"], found["fused_calls"]) == (1.0, 2)
    assert found["float32_share"] == 0.0 and found["devices"] == 8
    assert found["device"] == "NVIDIA H200 141GB" and "peak_bytes" not in found


def test_a_tpu_has_no_fused_attention_and_the_same_products(capsys):
    found = _figures(capsys, "--on=v5e:4x4", *TINY, "--lower")
    assert (found["fused_share"], found["fused_calls"]) == (0.0, 0)
    assert found["devices"] == 16 and set(found["flop_by_kind"]) <= {"bf16", "tf32"}


def test_without_its_compiler_the_extra_is_named_and_the_step_lowered(
    capsys, monkeypatch
):
    monkeypatch.setattr(elsewhere.importlib.util, "find_spec", lambda name: None)
    assert bench.main(["aot", "--on=h100", *TINY]) == 0
    out, err = capsys.readouterr()
    assert err.splitlines() == [
        "not compiled, only lowered: pip install 'vitssl[aot-cuda]' compiles"
    ]
    assert "compiled for, not run on" not in out
    assert "lowered for, not run on, 1 x NVIDIA H100 80GB SXM" in out
    assert "100 % of attention, 2 calls of a kernel" in out
    assert elsewhere.missing(chips.known()["v5p"]) == "aot-tpu"


@pytest.mark.parametrize(
    "argv, says",
    [
        (["--on=h20", *TINY], "--on=h20: no such kind of device; did you mean h200?"),
        (["--on=v5e:3x3", *TINY], "--on=v5e:3x3: no such slice of TPU v5e"),
        (["--on=h200:12", *TINY], "nearest: 8, 16"),
        (["--on=h200:3", *TINY], "batch_size=16 does not split over 3 devices"),
        (["--on=h200:8", *TINY, "--fsdp=3"], "mesh.fsdp=3 does not divide 8"),
        (["--on=h200", *TINY, "--fsdp=-1"], "argument --fsdp: '-1'"),
        (["--on=h200", *TINY, "--depth=x"], "argument --depth: 'x'"),
        (["--on=h200", "--vit=b"], "--vit=b: "),
        (["--on=h200", "--vit=q16"], "--vit=q16: "),
        (["--on=h200", "--vit=b16", "--image=100"], "--image=100"),
        (["--on=h200", "--vit=b16", "--dtype=int8"], "--dtype"),
        (["--on=h200"], "give --config=FILE or --vit=NAME"),
        ([*TINY], "--on"),
        (["--on=h200", "--config=configs/hjepa.py:evidence"], "is a study"),
        (["--on=h200", "--config=nowhere"], "nowhere"),
        (
            ["--on=h200:8", "--config=configs/hjepa.py:smoke", "--batch=12"],
            "batch_size=12 does not split over 8 devices; nearest that do: 8, 16",
        ),
    ],
)
def test_what_cannot_be_is_one_line(argv, says, capsys):
    assert bench.main(["aot", *argv, "--lower"]) == 2
    out, err = capsys.readouterr()
    assert says in err and err.count("\n") == 1 and err.startswith("UsageError: ")
    assert not out


def test_a_dry_run_on_devices_elsewhere_lowers_the_recipe(capsys, monkeypatch):
    monkeypatch.setattr(elsewhere.importlib.util, "find_spec", lambda name: None)
    argv = ["--config=configs/finetune_vit.py:smoke", "--dry_run", "--on=v6e:2x2"]
    assert trainer.main(argv) == 0
    out = capsys.readouterr().out
    assert "lowered for, not run on, 4 x TPU v6e" in out
    assert trainer.main(argv[::2]) == 2
    assert "--on: needs --dry_run" in capsys.readouterr().err
    assert jax.default_backend() == "cpu" and jax.device_count() == 4


def _compiled(memory, peak, devices=8):
    """Return the figures of the program of `test_compiled` on so many GPUs."""
    kind = dataclasses.replace(chips.known()["h200"], memory=memory)
    there = types.SimpleNamespace(kind=kind, count=devices)
    analysis = types.SimpleNamespace(
        peak_memory_in_bytes=peak,
        argument_size_in_bytes=30,
        temp_size_in_bytes=50,
        output_size_in_bytes=20,
        alias_size_in_bytes=10,
    )
    made = types.SimpleNamespace(
        as_text=lambda: test_compiled.TEXT, memory_analysis=lambda: analysis
    )
    return aot.of_compiled(made, there, {"model_product_seconds": 1.0})


def test_the_time_is_products_and_other_traffic_and_what_crosses_the_links():
    here, far = _compiled(1000, 91), _compiled(1000, 91, devices=16)
    model, traffic = here["model_seconds"], here["traffic_by_kind"]
    rest = here["traffic_bytes"] - traffic["product"]
    assert rest == traffic["move"] + traffic["attention"] + traffic["other"] > 0
    assert (model["products"], model["memory"]) == (1.0, rest / 4.8e12)
    # All-reduce goes round twice; between hosts the links are slower.
    assert model["exchange"] == pytest.approx((2 * 4000 + 400) / 450e9)
    assert far["model_seconds"]["exchange"] == pytest.approx((2 * 4000 + 400) / 50e9)
    assert model["together"] == 1.0 + model["memory"] + model["exchange"]


@pytest.mark.parametrize(
    "memory, peak, needs, fits",
    [(100, 92, 92, True), (100, 93, 93, False), (100, 0, 90, True)],
)
def test_a_step_fits_if_its_peak_leaves_the_allocator_some_room(
    memory, peak, needs, fits
):
    found = _compiled(memory, peak)
    assert (found["peak_bytes"], found["fits"]) == (needs, fits)


def test_products_in_parts_take_as_many_passes():
    kind = chips.known()["h200"]
    assert aot._rate(kind, "bf16") == aot._rate(kind, "fused attention") == 0.8 * 989e12
    assert aot._rate(kind, "f32 as 3 bf16") == 0.8 * 989e12 / 3
    assert aot._rate(kind, "tf32") == 0.8 * 494e12
    assert aot._rate(kind, "f64") == aot._rate(kind, "f32") == 0.8 * 67e12


def test_commands_of_the_document_are_valid():
    text = (runs.ROOT / "docs" / "compiled.md").read_text().replace("\\\n", " ")
    lines = [x[17:] for x in text.splitlines() if x.startswith("vitssl bench aot ")]
    lines += re.findall(r"`(--on=.*?)`", text)
    assert len(lines) > 15
    for line in lines:
        given = dict(w.partition("=")[::2] for w in shlex.split(line))
        assert chips.named(given.pop("--on"))
        if spec := given.pop("--config", ""):
            batch = given.pop("--batch", "")
            keys = {k.removeprefix("--config."): v for k, v in given.items()}
            keys |= {"batch_size": batch} if batch else {}
            overrides = [f"{k}={v}" for k, v in keys.items()]
            experiment.read(experiment.load(str(runs.ROOT / spec), overrides))


@pytest.mark.aot
@pytest.mark.parametrize(
    "argv, traffic, peak",
    [
        (("--vit=b16", "--batch=64", "--depth=2"), 6.999e9, 1.0120e9),
        (SMALL, 55.384e9, 6.013e9),
    ],
)
def test_traffic_and_peak_memory_on_an_h200_are_what_they_were(
    argv, traffic, peak, capsys
):
    found = _figures(capsys, "--on=h200", *argv)
    assert found["traffic_bytes"] == pytest.approx(traffic, rel=0.02)
    assert found["peak_bytes"] == pytest.approx(peak, rel=0.02)
    assert found["fits"] and not found["collectives"]
    assert sum(found["traffic_by_kind"].values()) == found["traffic_bytes"]


@pytest.mark.aot
@pytest.mark.parametrize("devices", (8, 256))
def test_gradients_cross_gpus_once_however_many_there_are(devices, capsys):
    argv = ("--vit=ti16", "--depth=2", f"--batch={8 * devices}")
    found = _figures(capsys, f"--on=h200:{devices}", *argv)
    assert list(found["collectives"]) == ["all-reduce"]
    size = found["collectives"]["all-reduce"][1]
    assert size == pytest.approx(4 * found["parameters"], rel=0.002)
    assert (found["fused_share"], found["fused_calls"]) == (1.0, 4)


@pytest.mark.aot
def test_keys_of_their_own_and_many_sensors_are_split_by_images_too(capsys):
    argv = ("--config=configs/latent_mim.py:nano_ps8_ps1", "--batch=32")
    found = _figures(capsys, "--on=h200:8", *argv)
    assert found["fused_share"] == 1.0
    crossing = {k: size for k, (_, size) in found["collectives"].items()}
    whole = 4 * found["parameters"]
    # The rest is what the losses compare over the batch.
    assert whole < crossing.pop("all-reduce") < 1.1 * whole
    assert sum(crossing.values()) < 0.05 * whole


@pytest.mark.aot
@pytest.mark.parametrize("scan", ((), ("--scan",)), ids=("blocks", "loop"))
def test_split_weights_are_gathered_in_bfloat16_and_their_gradients_in_float32(
    scan, capsys, monkeypatch
):
    texts, of = [], aot.of_compiled

    def keep(executable, *args):
        texts.append(executable.as_text())
        return of(executable, *args)

    monkeypatch.setattr(aot, "of_compiled", keep)
    argv = ("--vit=ti16", "--depth=2", "--batch=512", "--fsdp=8", *scan)
    _figures(capsys, "--on=h200:8", *argv)
    crossing = {"all-gather": "bf16", "reduce-scatter": "f32"}
    kinds = {k: set() for k in crossing}
    for kernel in compiled.kernels(texts[0]):
        if kernel.kind in crossing:
            kinds[kernel.kind] |= set(re.findall(r"(\w+)\[(\d+,\d+)\]", kernel.result))
    for kind, dtype in crossing.items():
        weights = {d for d, n in kinds[kind] if n in ("192,576", "576,192", "192,768")}
        assert weights == {dtype}, kind


@pytest.mark.aot
def test_two_may_compile_for_tpus_at_a_time():
    code = (
        "from vitssl.bench import elsewhere; elsewhere.Elsewhere('v5e:2x2');"
        "print('there', flush=True); input()"
    )
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    command, said = [sys.executable, "-c", code], []
    with contextlib.ExitStack() as stack:
        for _ in range(2):  # The first one still holds its compiler.
            one = subprocess.Popen(command, cwd=runs.ROOT, **pipes)
            stack.enter_context(one)
            stack.callback(one.kill)
            said.append(one.stdout.readline())
    assert said == ["there\n"] * 2
