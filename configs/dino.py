"""DINO: python -m vitssl.main --config=configs/dino.py.

Arguments (`--config=configs/dino.py:NAME`):
    (none)          demo: drawn leaves in seven conditions, minutes on two cores
    smoke           two steps, seconds
"""

from vitssl import config

base = config.beside(__file__, "base")


def _demo():
    c = base.run("dino", batch_size=64, epochs=25.0)
    c.data = base.data("leaves", **base.LEAVES)
    c.model = base.vit(width=64, depth=4, heads=4, patch=6, positions="sincos")
    c.multicrop = base.crops(48, 24, num_local_crops=4, global_crop_scale=(0.3, 1.0))
    c.head = dict(outputs=256, hidden=128, bottleneck=64)
    c.optim = base.adamw(1e-3, 3.0, thaw=(("head/last", 1.0),))
    c.evals = base.evals(5.0, final=("knn", "linear"))
    c.log, c.checkpoint = dict(every_steps=50), dict(every_epochs=5.0)
    return c


RECIPES = {"": _demo, "smoke": lambda: base.smoke(_demo(), 16)}
get_config = base.recipes(RECIPES)
