"""Command line: `vitssl pictures WORKDIR [--out=DIR] [--images=N]`.

Reads WORKDIR/config.json and the newest checkpoint and writes the pictures to
WORKDIR/pictures. A run that is still going on is not disturbed.
"""

import pathlib
import sys

from vitssl import errors
from vitssl.pictures import drawing
from vitssl.pictures.gather import gather
from vitssl.run import devices, log, opened


def main(argv):
    """Write the pictures of one run; return 0.

    Raises:
        CheckpointError: there is no run.
    """
    parser = errors.Parser("vitssl pictures", __doc__)
    parser.add_argument("workdir", help="of a run of vitssl.main")
    parser.add_argument("--out", default="", help="folder (default WORKDIR/pictures)")
    parser.add_argument("--images", type=int, default=6, help="images drawn singly")
    parser.add_argument("--points", type=int, default=400, help="images in t-SNE")
    parser.add_argument(
        "--landscape",
        type=int,
        default=0,
        help="batches for the loss landscape, 1 to 10; slow (default 0: none)",
    )
    flags = parser.parse_args(argv)
    if flags.images < 1 or flags.points < 8:
        parser.error("--images must be 1 or more, --points 8 or more")
    log.to_terminal()
    devices.start()
    parts, state = opened.past(flags.workdir).state()
    fresh, settings = parts.fresh(), parts.experiment.settings
    material = gather(
        parts.method,
        (state.params, state.extra),
        settings.data,
        settings.evals,
        seed=settings.seed,
        images=flags.images,
        points=flags.points,
        landscape_batches=flags.landscape,
        untrained=(fresh.params, fresh.extra),
        metrics_path=pathlib.Path(flags.workdir) / "metrics.jsonl",
    )
    out = flags.out or pathlib.Path(flags.workdir) / "pictures"
    for path in drawing.write_all(out, material):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(errors.exit_code(main, sys.argv[1:]))
