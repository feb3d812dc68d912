r"""How costs grow, each with the line through its logarithms.

python -m vitssl.bench growth [--config=configs/hjepa.py] [--files=20000]

    batch, tokens  a step of a small ViT: processor seconds against images, and tokens
    local_crops    FLOPs of the products of the config's step, per image
    folder         processor seconds to open a folder of so many empty files, once more
    order          those to draw a shuffled batch of 256 from so many images, and bytes

Prints one JSON line. The exponent of a fit is 1 where cost is proportional, 0 where it
does not grow; "at" is what the line says of sizes that nobody waited for.
"""

import pathlib
import tempfile
import time
import tracemalloc

import jax
import numpy as np

from vitssl import errors
from vitssl.bench import case, clock, count, plain
from vitssl.data import orders
from vitssl.data.sources import folder, scan
from vitssl.methods import base
from vitssl.models import vit
from vitssl.run import notes, step

PATCH, WIDTH = 8, 96


def fit(sizes, costs, at=()) -> dict:
    """Return the power law through some costs: least squares of the logarithms.

    Args:
        at: sizes to say the cost of.
    """
    exponent, constant = np.polyfit(np.log(sizes), np.log(costs), 1)
    said = {str(n): float(np.exp(constant) * n**exponent) for n in at}
    own = {"sizes": list(map(int, sizes)), "costs": list(map(float, costs))}
    return own | {"exponent": float(exponent), "at": said}


def run(argv: list[str]) -> dict:
    """Parse the options, measure, return the figures."""
    parser = errors.Parser("vitssl bench growth", __doc__)
    parser.add_argument("--config", default="configs/hjepa.py")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--files", type=int, default=20_000)
    o, overrides = case.words(parser, argv)
    batch = _steps(o, {n: (n, 32) for n in (4, 8, 16)})
    tokens = _steps(o, {(s // PATCH) ** 2: (4, s) for s in (32, 64, 96)})
    return {
        "bench": "growth",
        "batch": batch,
        "tokens": tokens,
        "local_crops": _crops(o.config, overrides),
        "folder": _folder([o.files // 4, o.files // 2, o.files]),
        "order": _order([10**k for k in (7, 8, 9)]),
        "device": jax.devices()[0].device_kind,
        "versions": notes.versions(),
    }


def _steps(o, shapes):
    """Return the fit of {size: (images, side)}, whose steps take turns."""
    ready = {size: _vit(*shape).prepare() for size, shape in shapes.items()}
    spent = clock.in_turns(ready, o.turns, o.steps, 1, clock=time.process_time)
    return fit([*shapes], [float(np.median(spent[size])) for size in shapes])


def _vit(images, side):
    batch = case.random_images(images, side, 0)
    facts = base.Run(100, 10, images, 10, 3, (0.5,) * 3, (0.5,) * 3, "float32")
    net = vit.ViT(width=WIDTH, depth=4, heads=3, patch=PATCH, image_size=side)
    method = plain.Plain(facts, net)
    return case.Case(f"vit {side}", method, case.adamw(method, batch), batch)


def _crops(spec, overrides):
    """Return FLOPs of a step, against the number of local crops: the straight line."""
    crops, flops = (0, 2, 4), []
    for n in crops:
        of = case.of_config(spec, [*overrides, f"multicrop.num_local_crops={n}"], 4)
        phase = of.phase()
        function = step.make(of.method, of.optimizer)
        total = count.products(
            lambda state, batch, f=function, p=phase: f(state, batch, p),
            of.compiled.abstract(phase),
            of.shapes,
        )
        flops.append(total / of.rows)
    each, none = np.polyfit(crops, flops, 1)
    costs = {"sizes": list(crops), "costs": flops}
    return costs | {"each": float(each), "none": float(none)}


def _folder(counts):
    """Return the fit of opening a folder, read and (last) remembered."""
    spent, again = [], []
    for n in counts:
        with tempfile.TemporaryDirectory() as root:
            for i in range(n):
                path = pathlib.Path(root) / "train" / str(i // 1000) / f"{i:08d}.jpg"
                if i % 1000 == 0:
                    path.parent.mkdir(parents=True)
                path.touch()
            time.sleep(scan.SETTLED)
            both = clock.seconds(
                lambda root=root: folder.open(root, "train"), 2, time.process_time
            )
            spent.append(both[0])
            again.append(both[1])
    return fit(counts, spent, at=(10**6,)) | {"again": again}


def _order(counts):
    """Return the fit of drawing one batch, and the most bytes that it takes."""
    spent, most = [], 0
    for n in counts:
        orders.shuffled.cache_clear()
        draws = iter(range(1000))

        def draw(n=n, draws=draws):
            start = 256 * next(draws)
            orders.shuffled(n, 0, 0, start, start + 256)

        spent.append(np.median(clock.seconds(draw, 50, time.process_time)))
        tracemalloc.start()
        draw()
        most = max(most, tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    return fit(counts, spent) | {"bytes": most}
