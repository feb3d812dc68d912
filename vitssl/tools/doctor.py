"""`vitssl doctor`: what works here, what is missing, and the command that gets it."""

import dataclasses
import functools
import importlib.metadata
import importlib.util
import io
import os
import pathlib
import platform
import shutil
import subprocess
import tempfile
import time

import filelock

from vitssl import config

GOOD, NOTE, BAD = "ok", "note", "FAIL"
# Extras: the module that shows that one is installed, and what it is for.
EXTRAS = {
    "dicom": ("pydicom", "radiographs, .dcm files"),
    "geo": ("imagecodecs", "compressed TIFF files"),
    "notebook": ("ipykernel", "colabs/*.ipynb, outside of Colab"),
    "olmoearth": ("hdf5plugin", "the published HDF5 samples, data.source=olmoearth"),
    "onnx": ("onnx", "convert export --to=FILE.onnx"),
    "parquet": ("pyarrow", "data.source=parquet, tables of labels and features"),
    "tfds": ("tensorflow_datasets", "data.source=tfds"),
    "torch": ("torch", "side-by-side benchmarks (vitssl.bench step --torch=...)"),
    "wandb": ("wandb", "logging to Weights & Biases (log.wandb)"),
}


def install(extra: str = "") -> str:
    """Return the command that installs vitssl, or adds an extra to it, as it is here.

    A wheel has its recipes inside; of a clone they lie beside the package.
    """
    wanted = f"[{extra}]" if extra else ""
    if config.home().parent == pathlib.Path(config.__file__).parent:
        return f"pip install 'vitssl{wanted}'"
    clone = config.home().parent
    launch = f"VITSSL_EXTRAS={extra} " if extra else ""
    launch += f"{clone / 'launch' / 'local.sh'} ..."
    return f"{launch}, or pip install -e '{clone}{wanted}'"


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        level: GOOD, NOTE (works, could be better) or BAD (runs will fail).
        what: the subject.
        text: what was found.
        fix: what to do about it; "" for nothing.
    """

    level: str
    what: str
    text: str
    fix: str = ""


def main(workdir) -> int:
    """Print all findings; return 0, or 2 if a run would fail."""
    worst = 0
    for check in (packages, recipes, devices, attention, images, machine, extras):
        worst = max(worst, _show(_guarded(check)))
    worst = max(worst, _show(_guarded(lambda: writing(workdir), "workdir")))
    print(
        "\nrunning should work" if not worst else "\nsomething needs fixing, see FAIL"
    )
    return worst


def _guarded(check, name="") -> list[Finding]:
    """Return what a check found; one that raises is a finding itself."""
    try:
        return check()
    except Exception as e:  # noqa: BLE001 - a doctor must not fall ill.
        what = name or check.__name__
        return [Finding(BAD, what, f"{type(e).__name__}: {e}".splitlines()[0])]


def _show(findings) -> int:
    for f in findings:
        print(f"{f.level:>4}  {f.what:<19} {f.text}", flush=True)
        if f.fix:
            print(f"{'':>4}  {'':<19} -> {f.fix}", flush=True)
    return 2 if any(f.level == BAD for f in findings) else 0


def packages() -> list[Finding]:
    """Check Python and the version of every package that vitssl needs."""
    found = [
        Finding(GOOD, "python", f"{platform.python_version()} on {platform.platform()}")
    ]
    try:
        needs = importlib.metadata.requires("vitssl") or []
    except importlib.metadata.PackageNotFoundError:
        text = "vitssl is not installed, so nothing says what it needs"
        return [*found, Finding(NOTE, "packages", text, install())]
    from packaging.requirements import Requirement

    seen = []
    for need in map(Requirement, needs):
        if need.marker and not need.marker.evaluate({"extra": ""}):
            continue
        fix = f"pip install '{need}'"
        try:
            version = importlib.metadata.version(need.name)
        except importlib.metadata.PackageNotFoundError:
            found.append(Finding(BAD, need.name, "not installed", fix))
            continue
        if not need.specifier.contains(version, prereleases=True):
            text = f"{version} is outside {need.specifier}"
            found.append(Finding(NOTE, need.name, text, fix))
        seen.append(f"{need.name} {version}")
    main_ones = ("jax", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    shown = [s for s in seen if s.split()[0] in main_ones]
    return [*found, Finding(GOOD, "packages", f"{len(seen)}: {', '.join(shown)}, ...")]


def recipes() -> list[Finding]:
    """Check that the published configs came along."""
    found = [path.stem for path in config.files(config.home())]
    if not found:
        text = f"no config in {config.home()}"
        return [Finding(BAD, "recipes", text, "install vitssl again")]
    return [Finding(GOOD, "recipes", f"{', '.join(found)} in {config.home()}")]


def devices() -> list[Finding]:
    """Check that JAX sees the accelerator of the machine and computes on it."""
    import jax
    import jax.numpy as jnp

    start = time.perf_counter()
    every = jax.devices()
    total = float(jnp.ones((256, 256)).dot(jnp.ones((256, 256))).sum())
    if total != 256**3:
        return [Finding(BAD, "devices", f"a matrix product is wrong: {total}")]
    kind = every[0].device_kind
    text = f"{len(every)} x {kind} ({jax.default_backend()})"
    found = [Finding(GOOD, "devices", f"{text}, {time.perf_counter() - start:.1f} s")]
    stats = every[0].memory_stats() or {}
    if "bytes_limit" in stats:
        free = stats["bytes_limit"] - stats.get("bytes_in_use", 0)
        found.append(
            Finding(GOOD, "memory", f"{free / 2**30:.1f} GiB per device for JAX")
        )
    if jax.default_backend() == "cpu" and (driver := nvidia_driver()):
        extra = "cuda" if int(driver.split(".")[0]) >= 580 else "cuda12"
        text = f"an NVIDIA GPU is here (driver {driver}), but JAX does not use it"
        fix = install(extra)
        if os.environ.get("JAX_PLATFORMS") == "cpu":
            fix = "unset JAX_PLATFORMS"
        found.append(Finding(NOTE, "gpu", text, fix))
    return found


def nvidia_driver() -> str:
    """Return the version of the NVIDIA driver, or "" without one."""
    try:
        said = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
    first = said.strip().splitlines()[:1]
    return first[0] if first and first[0][:1].isdigit() else ""


def attention() -> list[Finding]:
    """Compare the attention that runs take with the formula, forward and backward.

    Of 197 tokens, as a ViT has at 224 pixels: kernels refuse odd numbers first. And
    recomputed in the backward pass, where a refusal comes too late to be caught.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    from vitssl.models import layers
    from vitssl.ops import accelerator

    fused = accelerator.capability() >= accelerator.AMPERE
    name, dtype = ("cudnn", "bfloat16") if fused else ("xla", "float32")
    rng = np.random.default_rng(0)
    qkv = [jnp.asarray(rng.normal(size=(2, 197, 4, 64)), dtype) for _ in range(3)]

    def formula(q, k, v):
        q, k, v = (x.astype(jnp.float32) for x in (q, k, v))  # [B, T, H, D]
        scores = jnp.einsum("bthd,bshd->bhts", q, k) / q.shape[-1] ** 0.5
        return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores), v)

    def total(attend):
        def f(q, k, v):
            return (attend(q, k, v).astype(jnp.float32) ** 2).sum()

        return jax.jit(jax.value_and_grad(jax.checkpoint(f)))(*qkv)

    try:
        value, grad = total(functools.partial(layers.attend, implementation=name))
    except Exception as e:  # noqa: BLE001 - whatever cuDNN says.
        text = f"{name} does not run here: {str(e).splitlines()[0][:120]}"
        return [Finding(BAD, "attention", text, "set --config.model.attention=xla")]
    want, want_grad = total(formula)
    error = float(jnp.abs(grad.astype(jnp.float32) - want_grad).max())
    error /= float(jnp.abs(want_grad.astype(jnp.float32)).max())
    tolerance = 0.03 if fused else 1e-4
    if not abs(value / want - 1) <= tolerance or not error <= tolerance:
        text = f"{name} gives {value}, the formula {want}; gradients differ by {error}"
        return [Finding(BAD, "attention", text)]
    return [
        Finding(
            GOOD,
            "attention",
            f"{name} in {dtype}, 197 tokens, forward and recomputed backward",
        )
    ]


def images() -> list[Finding]:
    """Decode a JPEG that was just encoded."""
    import numpy as np
    from PIL import Image

    from vitssl.data import decode

    side = np.arange(64, dtype=np.uint8)
    picture = np.stack([np.add.outer(side, side)] * 3, -1)
    raw = io.BytesIO()
    Image.fromarray(picture).save(raw, "JPEG", quality=95)
    back = decode.decode(raw.getvalue(), channels=3)
    error = float(np.abs(back.astype(int) - picture).mean())
    if error > 4:
        return [
            Finding(BAD, "images", f"a JPEG comes back wrong by {error:.1f} of 255")
        ]
    return [Finding(GOOD, "images", "JPEG decoding")]


def machine() -> list[Finding]:
    """Check cores, memory and shared memory."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    found = [Finding(GOOD, "cores", str(cores or os.cpu_count()))]
    shared = pathlib.Path("/dev/shm")
    if shared.is_dir():
        free = shutil.disk_usage(shared).free / 2**30
        if free < 0.5:
            text = f"/dev/shm has {free:.2f} GiB; data workers pass batches through it"
            fix = "docker run --shm-size=8g ..., or --config.data.workers=0"
            found.append(Finding(NOTE, "shared", text, fix))
        else:
            found.append(Finding(GOOD, "shared", f"/dev/shm has {free:.1f} GiB free"))
    return found


def extras() -> list[Finding]:
    """List optional parts that are not there."""
    found = []
    viewer = "tensorboard", "reading the TensorBoard events", "pip install tensorboard"
    known = [(module, use, install(e)) for e, (module, use) in EXTRAS.items()]
    for module, use, fix in (*known, viewer):
        if importlib.util.find_spec(module) is None:
            found.append(Finding(NOTE, module, f"not installed; for {use}", fix))
        else:
            found.append(Finding(GOOD, module, f"for {use}"))
    return found


def writing(workdir) -> list[Finding]:
    """Write, lock and rename a file where runs would write."""
    folder = pathlib.Path(workdir).absolute()
    while not folder.is_dir():
        folder = folder.parent
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".doctor-") as scratch:
            path = pathlib.Path(scratch) / "file"
            start = time.perf_counter()
            with path.open("wb") as f:
                f.write(os.urandom(2**20) * 32)
                f.flush()
                os.fsync(f.fileno())
            seconds = time.perf_counter() - start
            os.replace(path, path.with_suffix(".renamed"))
            locks = _locks(path)
    except OSError as e:
        text = f"{folder} cannot be written: {e.strerror}"
        return [Finding(BAD, "workdir", text, "give --workdir=DIR on another disk")]
    free = shutil.disk_usage(folder).free / 2**30
    text = f"{folder}: {32 / max(seconds, 1e-6):.0f} MiB/s, {free:.1f} GiB free"
    found = [Finding(GOOD if free > 5 else NOTE, "workdir", text)]
    if not locks:
        text = "no file locks here: two runs on one workdir would not notice each other"
        found.append(Finding(NOTE, "locks", text))
    return found


def _locks(path) -> bool:
    with path.open("w") as f:
        try:
            return filelock.lock_descriptor(f.fileno(), blocking=False)
        except OSError:
            return False
