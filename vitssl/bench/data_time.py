r"""Speed of the input pipeline, beside torchvision's on the same JPEG files.

python -m vitssl.bench data [--images=48] [--repeats=5] [--loader_batches=0]

Both sides decode a file and make H-JEPA's crops (2 x 224 and 6 x 96, bicubic, flip,
colour jitter 0.4); ours also draws the masks of three levels, theirs also turns the
crops into normalised floats, as the original does on the host. One thread each, in
turn (ABAB), in one process; a core's second is a second of processor time, which other
work on the machine does not count into. The same files are read and decoded from a
folder, from tar and ArrayRecord (`vitssl pack`) and from parquet. With --loader_batches
the whole loaders run too, ours with one thread per core, torchvision's with one process
per core.
"""

import functools
import importlib
import os
import pathlib
import platform
import statistics
import sys
import tempfile
import time

import cv2
import numpy as np
from PIL import Image

from vitssl import errors
from vitssl.bench import clock
from vitssl.data import crops, decode, loader, pipeline, sources
from vitssl.data import views as general
from vitssl.data.sources import folder, parquet
from vitssl.methods.hjepa import masks, views
from vitssl.tools import pack

HEIGHT, WIDTH = 375, 500  # A typical photograph of ImageNet.
QUALITY = 92
GRAIN = 9.0  # Standard deviation of the noise: gives files of 56 to 70 kB.
WARM_UP = 2  # Batches per core, before the clock of a loader starts.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def section(interpolation: str, **changes) -> crops.MultiCrop:
    """Return H-JEPA's crops: 2 x 224 and 6 x 96, flip and jitter, nothing else."""
    return crops.MultiCrop(
        num_global_crops=2,
        num_local_crops=6,
        global_crop_size=224,
        local_crop_size=96,
        global_crop_scale=(0.4, 1.0),
        local_crop_scale=(0.05, 0.4),
        **dict(global_color_jitter=0.4, local_color_jitter=0.4) | changes,
        color_jitter_prob=1.0,
        horizontal_flip_prob=0.5,
        interpolation=interpolation,
        colour="host",
    )


MASKS = masks.Masking(
    strategy="cross_crop_prediction",
    sampler="original",
    num_hierarchies=3,
    num_target_masks=4,
    scale_progression="geometric",
    base_scale=(0.05, 0.15),
    aspect_ratio_range=(0.75, 1.5),
    max_attempts=10,
    min_keep=4,
    targets_per_level="constant",
    levels="per_level",
    mode="drop",
)


def picture(rng):
    """Return a synthetic photograph, uint8 [375, 500, 3]: light, edges, noise."""
    small = rng.uniform(0, 255, (6, 8, 3)).astype(np.float32)
    image = cv2.resize(small, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)
    for _ in range(25):
        centre = rng.integers(0, (WIDTH, HEIGHT)).tolist()
        axes = rng.integers(5, 80, 2).tolist()
        turn, colour = rng.uniform(0, 180), rng.uniform(0, 255, 3).tolist()
        cv2.ellipse(image, centre, axes, turn, 0, 360, colour, -1, cv2.LINE_AA)
    image += cv2.GaussianBlur(rng.normal(0, 2 * GRAIN, image.shape), (0, 0), 0.8)
    return image.clip(0, 255).astype(np.uint8)


def write_jpegs(root, count: int, seed: int) -> list[pathlib.Path]:
    """Write synthetic photographs as ROOT/train/any/*.jpg; return their paths."""
    home = pathlib.Path(root) / "train" / "any"
    home.mkdir(parents=True)
    rng, paths = np.random.default_rng(seed), []
    for i in range(count):
        pixels = cv2.cvtColor(picture(rng), cv2.COLOR_RGB2BGR)
        flags = [cv2.IMWRITE_JPEG_QUALITY, QUALITY]
        data = cv2.imencode(".jpg", pixels, flags)[1].tobytes()
        paths.append(home / f"{i:05d}.jpg")
        paths[-1].write_bytes(data)
    return paths


def run(argv=()) -> dict:
    """Parse the options, measure, return the figures.

    Returns:
        `versions`; `samples_per_core_second` of each contender (median of the
        repeats, and all of them); `images_per_core_second` of each source, alike;
        `times_torchvision`, ours over theirs per repeat; `large_photograph_ms`,
        processor time of decoding and one view of 12 megapixels, whole and reduced;
        `parts_ms`, processor time per image of the parts of our transform; `loader`.
    """
    parser = errors.Parser("vitssl bench data", __doc__)
    parser.add_argument("--images", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--loader_batches", type=int, default=0)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    o = parser.parse_args(list(argv))
    cv2.setNumThreads(0)
    theirs = _torchvision()
    with tempfile.TemporaryDirectory() as root:
        paths = write_jpegs(root, o.images, o.seed)
        contenders = {
            f"vitssl_{kind}": functools.partial(
                _ours, views.MultiCropTransform(section(kind), MASKS, 16)
            )
            for kind in ("fast", "bicubic")
        }
        if theirs:
            contenders["torchvision"] = theirs
        rates = _in_turn(contenders, paths, o.repeats)
        kilobytes = statistics.mean(p.stat().st_size for p in paths) / 1000
        out = {
            "benchmark": "data",
            "recipe": "2x224+6x96 bicubic, flip, jitter 0.4",
            "jpeg": f"{o.images} of {WIDTH}x{HEIGHT}, {kilobytes:.0f} kB each",
            "samples_per_core_second": _medians(rates),
            "images_per_core_second": _medians(_sources(root, paths, o.repeats)),
            "times_torchvision": _ratios(rates),
            "large_photograph_ms": _large(o.seed, o.repeats),
            "parts_ms": _parts(paths, o.repeats),
            "loader": _loaders(root, paths, o, theirs) if o.loader_batches else {},
            "versions": _versions(),
        }
    if not theirs:
        out["torchvision"] = "not installed"
    return out


def _medians(rates):
    return {k: {"median": statistics.median(r), "all": r} for k, r in rates.items()}


def _sources(root, paths, repeats):
    """Return images read and decoded per second of processor time, of each source."""
    found, packed = {"folder": folder.open(root, "train")}, f"{root}/packed"
    for form in pack.FORMS:
        pack.run(root, f"{packed}/{form}", form=form, show=lambda line: None)
        found[form] = sources.open(form, f"{packed}/{form}", "train")
    try:
        from pyarrow import Table
        from pyarrow import parquet as files
    except ImportError:  # The extra [parquet].
        pass
    else:
        table = Table.from_pydict({"image": [path.read_bytes() for path in paths]})
        files.write_table(table, f"{packed}/train.parquet", row_group_size=100)
        found["parquet"] = parquet.open(f"{packed}/train.parquet", "train")
    loads = {k: lambda _, i, source=s: source[i] for k, s in found.items()}
    return _in_turn(loads, paths, repeats)


def _large(seed, repeats):
    """Return {view: {"whole", "reduced"}} in milliseconds of a large photograph."""
    coarse = picture(np.random.default_rng(seed))
    pixels = cv2.resize(coarse, (8 * WIDTH, 8 * HEIGHT), interpolation=cv2.INTER_CUBIC)
    pixels = cv2.addWeighted(pixels, 0.6, np.tile(coarse, (8, 8, 1)), 0.4, 0)
    flags = [cv2.IMWRITE_JPEG_QUALITY, QUALITY]
    data = cv2.imencode(".jpg", pixels, flags)[1].tobytes()
    kinds = {"evaluate_224": general.Evaluate(224), "crop_224": general.SingleCrop(224)}
    kinds |= {f"crops_{how}": section(how) for how in ("fast", "bicubic")}

    def one(view, reduction):
        image = decode.decode(data, channels=3, reduction=reduction)
        view({"image": image}, np.random.default_rng(seed))

    found = {}
    for name, view in kinds.items():
        ways = {"whole": None, "reduced": view.reduction}
        passes = {k: functools.partial(one, view, how) for k, how in ways.items()}
        times = clock.in_turns(passes, repeats, 1, clock=time.thread_time)
        found[name] = {
            k: 1000 * statistics.median(t for (t,) in times[k]) for k in ways
        }
    return found


def _ours(transform, path, index):
    """Decode a file and make our crops and masks."""
    rng = np.random.default_rng(index)
    image = decode.read(path, channels=3)
    return transform({"image": image, "label": 0, "index": index}, rng)


def _in_turn(contenders, paths, repeats):
    """Return samples per second of processor time, one list per contender."""
    for load in contenders.values():  # Page cache, lazy imports, tables.
        _pass(load, paths[:8])
    passes = {k: functools.partial(_pass, f, paths) for k, f in contenders.items()}
    times = clock.in_turns(passes, repeats, 1, clock=time.thread_time)
    return {k: [len(paths) / one for (one,) in turns] for k, turns in times.items()}


def _pass(load, paths):
    for i, path in enumerate(paths):
        load(path, i)


def _ratios(rates):
    theirs = rates.get("torchvision", [])
    return {
        name: [a / b for a, b in zip(ours, theirs, strict=True)]
        for name, ours in rates.items()
        if theirs and name != "torchvision"
    }


def _parts(paths, repeats):
    """Return milliseconds of processor time per image of the parts of our transform."""
    images = [decode.read(path, channels=3) for path in paths]
    rng = np.random.default_rng(0)
    off = dict(global_color_jitter=0.0, local_color_jitter=0.0)

    def crop(interpolation, **changes):
        transform = section(interpolation, **changes)
        return lambda i: transform({"image": images[i]}, rng)

    parts = {
        "decode": lambda i: decode.read(paths[i], channels=3),
        "crops_fast": crop("fast", **off),
        "crops_bicubic": crop("bicubic", **off),
        "crops_fast_and_colour": crop("fast"),
        "masks": lambda i: masks.multicrop(rng, MASKS, (14, 14), (6, 6), (2, 6)),
    }
    each = {
        k: functools.partial(_pass, lambda _, i, f=f: f(i), paths)
        for k, f in parts.items()
    }
    times = clock.in_turns(each, repeats, 1, clock=time.thread_time)
    scale = 1000 / len(paths)
    return {k: scale * statistics.median(s for (s,) in t) for k, t in times.items()}


def _loaders(root, paths, o, theirs):
    """Return samples per second of wall-clock time and core of the whole loaders."""
    n = loader.cores()
    rates = {"cores": n, "vitssl": [], "torchvision": []}
    source = folder.open(root, "train")
    transform = views.MultiCropTransform(section("fast"), MASKS, 16)
    for _ in range(min(3, o.repeats)):
        ours = pipeline.train(
            source, transform, batch_size=min(o.batch_size, len(source)),
            seed=o.seed, threads=n, workers=0,
        )  # fmt: skip
        with ours:
            rates["vitssl"].append(_rate(ours, "label", n, o.loader_batches))
        if theirs:
            from torch.utils import data

            # As many more as are in the making when the clock stops, so that they
            # are not faster for running out of work.
            total = o.loader_batches + 2 * WARM_UP * n
            batches = data.DataLoader(
                _Files([str(p) for p in paths], total * o.batch_size),
                batch_size=o.batch_size, shuffle=True, num_workers=n,
                multiprocessing_context="spawn",
            )  # fmt: skip
            batches = iter(batches)
            rates["torchvision"].append(_rate(batches, 1, n, o.loader_batches))
            for _ in batches:  # Workers that are stopped early complain.
                pass
    return rates


def _rate(batches, key, cores, count):
    """Return samples per second and core, after a few batches to warm up."""
    for _ in range(WARM_UP * cores):
        next(batches)
    start = time.perf_counter()
    samples = sum(len(next(batches)[key]) for _ in range(count))
    return samples / (time.perf_counter() - start) / cores


class _Files:
    """The files as a torch data set; a worker process builds its own transform."""

    def __init__(self, paths, length):
        self.paths, self.length = paths, length

    def __len__(self):
        return self.length

    def __getitem__(self, i):
        return _torchvision()(self.paths[i % len(self.paths)], i), 0


@functools.cache
def _torchvision():
    """Return H-JEPA's transform of a file as its authors wrote it, or None.

    A build of torchvision whose compiled operators do not fit the installed torch
    (a CUDA wheel beside a CPU torch) refuses to be imported, because two operators it
    wants to describe are missing. The image transforms are Python on PIL images and
    use none of them, so it is enough to declare the two.
    """
    try:
        import torch
    except ImportError:
        return None
    torch.set_num_threads(1)
    try:
        import torchvision
    except ImportError:
        return None
    except RuntimeError:
        for name in [m for m in sys.modules if m.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor a, Tensor b, float c) -> Tensor")
        import torchvision

        torchvision.declared = library  # It undoes its work when it is deleted.
    one = {
        kind: _their_pipeline(torchvision.transforms, size, scale)
        for kind, size, scale in (
            ("global", 224, (0.4, 1.0)),
            ("local", 96, (0.05, 0.4)),
        )
    }

    def load(path, index):
        del index  # It draws from torch's own generator.
        image = Image.open(path).convert("RGB")
        return [one["global"](image) for _ in range(2)] + [
            one["local"](image) for _ in range(6)
        ]

    return load


def _their_pipeline(t, size, scale):
    """Return torchvision's pipeline for one kind of crop (H-JEPA, strength 0.4)."""
    return t.Compose(
        [
            t.RandomResizedCrop(
                size, scale=scale, interpolation=t.InterpolationMode.BICUBIC
            ),
            t.RandomHorizontalFlip(0.5),
            t.ColorJitter(0.16, 0.16, 0.08, 0.04),
            t.ToTensor(),
            t.Normalize(MEAN, STD),
        ]
    )


def _versions():
    """Return the versions of what was measured, and the processor."""
    out = {"python": platform.python_version(), "cores": os.cpu_count()}
    for name in ("numpy", "cv2", "PIL", "simplejpeg", "grain", "torch", "torchvision"):
        module = sys.modules.get(name)
        if name in ("simplejpeg", "grain"):
            module = importlib.import_module(name)
        out[name] = getattr(module, "__version__", "not installed")
    return out
