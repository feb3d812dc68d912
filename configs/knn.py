r"""k-NN of a pre-trained ViT: nothing is trained.

    python -m vitssl.main --config=configs/knn.py --config.init.from=WORKDIR

Class token through the last stage's norm, cosine similarity, votes exp(sim / 0.07), k
of 10, 20, 100 and 200. Features stay beside their labels and every image counts once,
so the batch size does not matter.

Arguments (`--config=configs/knn.py:NAME`):
    (none)          for a checkpoint of the demo of configs/localmim.py
    smoke           two steps on random weights, then k-NN
    knn_vitb        ViT-B/16 on ImageNet, of a run of
                    configs/localmim.py:localmim_vitb_100_8gpu

One override away:
    --config.evals.features=gap

Published: 0.10 to 0.14 %, which is chance: the original compares features with the
labels of other images.
"""

from vitssl import config

base = config.beside(__file__, "base")
finetune_vit = config.beside(__file__, "finetune_vit")


def _knn(name=""):
    """Turn a fine-tuning config into one that only evaluates features."""
    c = finetune_vit.get_config(name)
    c.epochs, c.optim.warmup_epochs = 0.0, 0.0
    c.evals.update(
        final=("knn",), features="cls", knn_k=(10, 20, 100, 200), every_epochs=0.0
    )
    c.checkpoint.best = "knn/top1"
    return c


def _imagenet():
    c = _knn("ft_vitb_from100_1gpu")
    c.evals.batch_size = 128
    return c


RECIPES = {
    "": _knn,
    "smoke": lambda: _knn("smoke"),
    "knn_vitb": _imagenet,
}
get_config = base.recipes(RECIPES)
