"""Write the tokens of a frozen prefix, so that training need not run it again.

    vitssl store WORKDIR --to=DIR --boundary=N [--views=1] [--seed=0]

WORKDIR is a LocalMIM run. A run that starts from it reads the store:

    python -m vitssl.main --config=configs/localmim.py --config.init.from=WORKDIR
        --config.prefix.boundary=N --config.prefix.store=DIR
        --config.optim.freeze="((PATTERN,0.0),)"

where PATTERN names what lies before the mask, for N=4 in the demo
'encoder/(cls|patch_embed/.*|block_[0-3]/.*)|(norm|decoder)_[01]/.*'.
"""

import dataclasses
import sys

import jax
import jax.numpy as jnp

from vitssl import errors, tree
from vitssl.data.sources import wrappers
from vitssl.methods.localmim import store as feature_store
from vitssl.models import patches
from vitssl.run import opened


def main(argv: list[str]) -> int:
    """Write a store; return 0.

    Raises:
        VitsslError: as `write`.
    """
    parser = errors.Parser("vitssl store", __doc__)
    parser.add_argument("workdir")
    parser.add_argument("--to", required=True)
    parser.add_argument("--boundary", type=int, required=True)
    parser.add_argument("--views", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    o = parser.parse_args(argv)
    store = write(o.workdir, o.to, o.boundary, views=o.views, seed=o.seed)
    print(f"{store.root}: {store.about}")
    return 0


def write(workdir, to, boundary: int, *, views=1, seed=0) -> feature_store.Store:
    """Store the output of the first `boundary` blocks of a run's newest checkpoint.

    Raises:
        UsageError: not a run of LocalMIM, a boundary it does not have, no views.
        CheckpointError: there is no checkpoint.
    """
    past = opened.past(workdir)
    made = past.experiment
    if made.settings.method != "localmim":
        raise errors.UsageError(
            f"{workdir}: method {made.settings.method}, not localmim"
        )
    if views < 1:
        raise errors.UsageError(f"--views={views}: 1 or more")
    method = made.method(made.run())
    section = dataclasses.replace(method.prefix, boundary=boundary, store="")
    method = dataclasses.replace(method, prefix=section)
    problems = [] if boundary > 0 else [f"--boundary={boundary}: 1 or more"]
    if problems := [*problems, *method.check()]:
        raise errors.UsageError("\n".join(problems))
    params = tree.nest(past.params())
    data = made.settings.data
    source = data.open(data.split, made.settings.seed)
    source = wrappers.Tolerant(source, data.on_bad_image, data.bad_share)

    @jax.jit
    def run(image):
        x = patches.normalise(image, data.mean, data.std)
        return method.run_prefix(params, x).astype(jnp.float16)

    about = {
        "weights": feature_store.digest(params, method.prefix.pattern),
        "boundary": boundary,
        "views": views,
        "seed": seed,
        "view": method.view_key,
    }
    return feature_store.write(to, source, method.transform(), run, about=about)


if __name__ == "__main__":
    sys.exit(errors.exit_code(main, sys.argv[1:]))
