"""What hybrid patch sizes cost: every mode on every case, by formula and measured.

    python -m vitssl.bench hybrid [--cases=s2,rgb] [--modes=mixed_k,all_q] [--batch=2]

A row is a training step of two views: tokens, FLOPs of a sample by the formula and as
traced (matrix products), XLA's count of everything, how many times less than all_q the
whole step and its encoder cost. Steps of at most --most GFLOP are run, too, --steps of
each in --turns turns: median time, compiled peak of memory, and, if all_q is of them,
how many times faster it is, as a share of what its FLOPs promise ("realised"). Modes:

    all_p        everything at p: an ordinary step with large patches
    processing   the same step; its features are upsampled when they are used
    mixed_k      encoder and keys at p, K sampled queries and targets at q
    mixed        the same with all queries
    output       upsampled to q before the predictor
    all_q        everything at q: an ordinary step with small patches
"""

import dataclasses
import json
import sys

import jax
import numpy as np

from vitssl import errors, tree
from vitssl.bench import case as cases
from vitssl.bench import clock, count, hybrid_flops
from vitssl.data import modalities, states
from vitssl.losses import contrastive
from vitssl.methods.latent_mim import hybrid, network, objective, target, tokens
from vitssl.methods.latent_mim.objective import Pair
from vitssl.run import notes

MODES = ("all_p", "processing", "mixed_k", "mixed", "output", "all_q")


@dataclasses.dataclass(frozen=True)
class Case:
    """Fields of one kind: their modalities, size in pixels and patches."""

    names: tuple[str, ...]
    pixels: int
    times: int
    p: int
    q: int
    size: str = "nano"

    @property
    def modalities(self):
        """What a field consists of."""
        return tuple(modalities.find(name) for name in self.names)

    def shapes(self, batch: int) -> dict:
        """Return the arrays of a batch without masks, as shapes."""
        found = {"timestamps": jax.ShapeDtypeStruct((batch, self.times, 3), "int32")}
        for m in self.modalities:
            shape = (batch, *m.shape(self.pixels, self.times))
            found[m.name] = jax.ShapeDtypeStruct(shape, "float32")
        return found


CASES = {
    "s2": Case(("sentinel2_l2a",), 64, 1, 8, 1),
    "s2s1": Case(("sentinel2_l2a", "sentinel1"), 32, 4, 8, 1),
    "rgb": Case(("rgb",), 224, 1, 16, 4),
}


@dataclasses.dataclass(frozen=True)
class Step(cases.Bare):
    """The method to measure: half of the tokens are seen, half are predicted."""

    case: Case
    module: hybrid.HybridMIM

    @property
    def slots(self) -> int:
        """Tokens of a sample that the encoder sees."""
        return sum(self.bounds.values())

    @property
    def bounds(self) -> dict:
        """Tokens of a sample and modality that are predicted, at p."""
        shapes = tokens.shapes(self.case.shapes(1), self.case.modalities, self.module.p)
        return {k: int(np.prod(v)) // 2 for k, v in shapes.items()}

    def shapes(self, batch: int) -> dict:
        """Return the arrays of a batch with the masks of two views, as shapes."""
        found = self.case.shapes(batch)
        shapes = tokens.shapes(found, self.case.modalities, self.module.p)
        for m in self.case.modalities:
            shape = (batch, 2, *shapes[m.name])
            found[m.mask_key] = jax.ShapeDtypeStruct(shape, "int8")
        return found

    def batch(self, rows: int, seed: int = 0) -> dict:
        """Return random values and masks."""
        rng, found = np.random.default_rng(seed), {}
        for key, s in self.shapes(rows).items():
            if key == "timestamps":
                found[key] = rng.integers(0, 12, s.shape)
            elif key.endswith("_mask"):
                n = int(np.prod(s.shape[2:]))
                state = np.full(n, states.DECODER)
                state[: n // 2] = states.ONLINE
                state = [rng.permutation(state) for _ in range(2 * rows)]
                found[key] = np.array(state).reshape(s.shape)
            else:
                found[key] = rng.normal(size=s.shape)
            found[key] = found[key].astype(s.dtype)
        return found

    def view(self, batch, i):
        """Return view i of a batch."""
        keys = {m.mask_key for m in self.case.modalities}
        return {k: v[:, i] if k in keys else v for k, v in batch.items()}

    def init(self, rng, batch):
        """Return the parameters and, as what is not trained, those of the target."""
        rngs = {"params": rng, "tokens": rng}
        params = self.module.init(rngs, self.view(batch, 0), **self._static)["params"]
        return params, {"target": tree.copy(params["encoder"]["patch_embed"])}

    @property
    def _static(self):
        return {"slots": self.slots, "bounds": self.bounds}

    def loss(self, params, extra, batch, rng, *, step=0, phase=None):
        """Return (loss [], (extra, {}))."""
        projection, frozen = target.projection(self.module.encoder), extra["target"]
        total, pooled = 0.0, []
        for i in range(2):
            fields, key = self.view(batch, i), jax.random.fold_in(rng, i)
            seen = self.module.apply(
                {"params": params},
                fields,
                **self._static,
                train=True,
                rngs={"tokens": key, "drop_path": key},
            )
            goal = target.projected(
                projection, frozen, fields, seen.asked, self.module.target_patch
            )
            pairs = {
                k: Pair(v.prediction, goal[k], v.valid) for k, v in seen.asked.items()
            }
            total += objective.patch_discrimination(pairs)[0] / 2
            pooled.append(seen.pooled)
        return total + 0.1 * contrastive.infonce_one_way(*pooled), (extra, {})

    def grad(self, *state):
        """Return loss and gradients of (params, extra, batch, rng)."""
        return jax.value_and_grad(self.loss, has_aux=True)(*state)

    def ready(self, rows: int) -> cases.Ready:
        """Return the trainer's step of it, compiled, on a random batch."""
        batch, dtype = self.batch(rows), self.module.encoder.dtype
        optimizer = cases.adamw(self, batch)
        return cases.Case("hybrid", self, optimizer, batch, dtype).prepare()


def step(case: Case, mode: str, loss_tokens: int = 1024) -> Step:
    """Return the step of a mode on a case.

    Args:
        case: what it runs on.
        mode: one of `MODES`.
        loss_tokens: K of "mixed_k".

    Raises:
        UsageError: unknown mode.
    """
    if mode not in MODES:
        raise errors.UsageError(f"mode={mode!r}: one of {', '.join(MODES)}")
    p, q = case.p, case.q
    p, q = {"all_p": (p, p), "all_q": (q, q)}.get(mode, (p, q))
    decoder = {"output": "output", "processing": "processing"}.get(mode, "mixed")
    width, heads, depth, short = network.SIZES[case.size]
    encoder = network.Encoder(case.modalities, width, depth, heads, base=case.p)
    predictor = network.Predictor(case.modalities, width, width, short, heads)
    module = hybrid.HybridMIM(
        encoder,
        predictor,
        p,
        q,
        decoder=decoder,
        loss_tokens=loss_tokens if mode == "mixed_k" else 0,
        max_output_tokens=1 << 20,
    )
    return Step(case, module)


def facts(one: Step) -> dict:
    """Return tokens and FLOPs of a step, of one sample; nothing is compiled."""
    shapes = one.shapes(1)
    key = jax.eval_shape(lambda: jax.random.key(0))
    state = jax.eval_shape(one.init, key, shapes)
    traced = count.products(one.grad, *state, shapes, key)
    lowered = jax.jit(one.grad).lower(*state, shapes, key)
    seen = jax.eval_shape(
        lambda s, k: one.module.apply(
            {"params": s}, one.view(one.batch(1), 0), **one._static, rngs={"tokens": k}
        ),
        state[0],
        key,
    )
    fine = one.module.decoder == "output"
    return {
        "p": one.module.p,
        "q": one.module.target_patch,
        "tokens_encoder": one.slots,
        "tokens_keys": one.slots * (one.module.factor**2 if fine else 1),
        "tokens_queries": sum(a.valid.shape[1] for a in seen.asked.values()),
        "formula_gflop": formula(one) / 1e9,
        "product_gflop": traced / 1e9,
        "xla_gflop": (lowered.cost_analysis() or {}).get("flops", 0.0) / 1e9,
        "encoder_gflop": encoder(one) / 1e9,
    }


def cost(one: Step) -> hybrid_flops.Cost:
    """Return the formula's cost of one view of one sample."""
    return hybrid_flops.of(one.module, one.shapes(1), one.slots, one.bounds)


def formula(one: Step) -> float:
    """Return the formula's FLOPs of a step, of one sample: two views and InfoNCE."""
    return 2 * cost(one).training + 3 * 2 * one.module.encoder.width


def encoder(one: Step) -> float:
    """Return those of the embedding and the blocks of the encoder alone."""
    part = cost(one)
    return 2 * (2 * part.embed + 3 * part.encoder)


def measure(timed: dict, steps: int, turns: int) -> dict:
    """Run the steps of a case in turns.

    Args:
        timed: {mode: `case.Ready`}.
        steps: that count, of each.
        turns: in how many turns they are run.

    Returns:
        {mode: {"ms_per_step": median of all, "peak_bytes", "loss"}}; where "all_q" is
        among them also "times_faster" than it, the median over the turns, and each.
    """
    spent, found = clock.in_turns(timed, turns, -(-steps // turns), warmup=3), {}
    for mode, one in timed.items():
        found[mode] = {
            "ms_per_step": 1e3 * float(np.median(np.concatenate(spent[mode]))),
            "peak_bytes": one.figures["needed_bytes"],
            "loss": float(one.metrics["loss"]),
        }
        if "all_q" in timed:
            each = clock.times_faster(spent[mode], spent["all_q"])
            found[mode] |= {"times_faster": float(np.median(each)), "turns": each}
    return found


def run(argv: list[str]) -> dict:
    """Parse the options, measure every mode of every case, return the rows."""
    parser = errors.Parser("vitssl bench hybrid", __doc__)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--loss-tokens", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--most", type=float, default=200.0, help="GFLOP of a step")
    o = parser.parse_args(argv)
    rows = []
    for name in o.cases.split(","):
        if name not in CASES:
            raise errors.UsageError(f"case={name!r}: one of {', '.join(CASES)}")
        fine, timed, own = step(CASES[name], "all_q"), {}, {}
        for mode in o.modes.split(","):
            one = step(CASES[name], mode, o.loss_tokens)
            row = own[mode] = {"case": name, "mode": mode} | facts(one)
            row["times_less"] = formula(fine) / formula(one)
            row["times_less_encoder"] = encoder(fine) / encoder(one)
            if row["formula_gflop"] * o.batch <= o.most:
                timed[mode] = one.ready(o.batch)
        for mode, figures in measure(timed, o.steps, o.turns).items():
            own[mode] |= figures
            if "times_faster" in figures:
                share = figures["times_faster"] / own[mode]["times_less"]
                own[mode]["realised"] = share
        for row in own.values():
            rows.append(row)
            print(json.dumps(row), file=sys.stderr, flush=True)
    return {
        "bench": "hybrid",
        "batch": o.batch,
        "device": jax.devices()[0].device_kind,
        "versions": notes.versions(),
        "rows": rows,
    }
