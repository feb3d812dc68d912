r"""Time exact nearest neighbours, beside torch's chunked matmul and topk.

python -m vitssl.bench knn [--rows=20000] [--queries=2000] [--width=384] [--k=20]

The published protocol on ImageNet is --rows=1281167 --queries=50000 --width=768, on an
accelerator with --max_bytes=8000000000. Ours streams the bank from host memory within
--max_bytes of device memory and compares the candidates again in float64. torch, if it
can be imported, gets the easier task: the normalised bank lies on its device
beforehand, whatever that takes, and only the similarities are cut to --max_bytes.
Prints one JSON line; "ratio" is torch's median time over ours (ABAB order).
"""

import importlib
import statistics

import jax
import numpy as np

from vitssl import errors
from vitssl.bench import clock
from vitssl.evals import knn
from vitssl.run import notes


def run(argv: list[str]) -> dict:
    """Parse the options, measure, return the figures."""
    parser = errors.Parser("vitssl bench knn", __doc__)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--queries", type=int, default=2_000)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--k", type=int, default=20)
    parser.add_argument("--max_bytes", type=int, default=2**28)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    return measure(parser.parse_args(argv))


def measure(o) -> dict:
    """Time both on random features of some clusters; return the figures."""
    rng = np.random.default_rng(o.seed)
    centre = rng.normal(size=(100, o.width)).astype(np.float32)

    def features(count):
        x = rng.normal(size=(count, o.width)).astype(np.float32)
        return x + centre[rng.integers(0, len(centre), count)]

    bank, query = features(o.rows), features(o.queries)

    found = {}
    contenders = {
        "ours": lambda: knn.search(bank, query, o.k, max_bytes=o.max_bytes)[1],
        "peer": _torch(bank, query, o.k, o.max_bytes),
    }

    def keeping(name, search):
        return lambda: found.update({name: search()})

    searches = {k: keeping(k, f) for k, f in contenders.items() if f}
    times = clock.in_turns(searches, o.repeats, 1, warmup=1)  # The first compiles.
    seconds = [one for (one,) in times["ours"]]
    median = statistics.median(seconds)
    figures = {
        "bench": "knn",
        "rows": o.rows,
        "queries": o.queries,
        "width": o.width,
        "k": o.k,
        "max_bytes": o.max_bytes,
        "device": jax.devices()[0].device_kind,
        "seconds": seconds,
        "queries_per_second": o.queries / median,
        "gflop_per_second": 2e-9 * o.rows * o.queries * o.width / median,
        "peak_bytes": _peak(),
        "versions": notes.versions(),
    }
    if "peer" in times:
        figures["torch_seconds"] = [one for (one,) in times["peer"]]
        figures["ratio"] = statistics.median(figures["torch_seconds"]) / median
        # Neighbours may change places where cosines agree to float32.
        pairs = zip(found["ours"], found["peer"], strict=True)
        figures["agreement"] = float(np.mean([len(set(a) & set(b)) for a, b in pairs]))
        figures["agreement"] /= o.k
    return figures


def _peak() -> int:
    """Return the peak of device memory of this process in bytes, 0 if unknown."""
    stats = jax.devices()[0].memory_stats() or {}
    return int(stats.get("peak_bytes_in_use", 0))


def _torch(bank, query, k: int, max_bytes: int):
    """Return torch's search as a function without arguments, or None."""
    try:
        torch = importlib.import_module("torch")
    except ImportError:
        return None
    gpu = jax.default_backend() == "gpu" and torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    unit = torch.nn.functional.normalize
    with torch.inference_mode():
        held = unit(torch.from_numpy(bank).to(device), dim=1).T.contiguous()
    size = max(1, max_bytes // (4 * len(bank)))

    def search():
        found = []
        with torch.inference_mode():
            for start in range(0, len(query), size):
                part = torch.from_numpy(query[start : start + size]).to(device)
                found.append((unit(part, dim=1) @ held).topk(k, dim=1).indices.cpu())
        return torch.cat(found).numpy()

    return search
