"""The whole method, sections and all, is the original's training step."""

import json

import jax
import jax.numpy as jnp
import numpy as np

from tests import runs
from tests.golden.checks import hybrid_model as parts
from vitssl.methods import base
from vitssl.methods.latent_mim import hybrid, masks, network, objective, shapes
from vitssl.methods.latent_mim import method as latent_mim
from vitssl.run import step

CASES = runs.ROOT / "tests" / "golden" / "cases" / "hybrid"


def method(c):
    p, q = c["processing_patch_size"], c["output_patch_size"]
    return latent_mim.LatentMIM(
        run=base.Run(10, 2, 3, 0, 1, (0.0,), (1.0,)),
        inputs=latent_mim.Inputs(modalities=tuple(c["modalities"])),
        network=network.Network(
            size="",
            width=c["embedding_size"],
            heads=c["num_heads"],
            depth=c["encoder_depth"],
            decoder_depth=c["decoder_depth"],
            base_patch=c["base_patch_size"],
            drop_path=c["drop_path"],
            patch_resize="input",
            frequencies="legacy",
            anchor="corner",
        ),
        hybrid=hybrid.Hybrid(
            processing_patch_size=(p,),
            output_patch_size=q,
            decoder=c["mode"],
            loss_tokens_per_modality=10**6,
            pool_at=c["pool_at"],
        ),
        # Its masks are given, and may have more tokens than random ones.
        mask=masks.Strategy(type="space"),
        objective=objective.Objective(
            type=c["loss"],
            tau=c["tau"],
            contrast_tau=c["infonce_tau"],
            contrast_weight=c["infonce_weight"],
        ),
    )


def test_loss_and_gradient_are_those_of_the_original_step(name="hybrid_step_mixed"):
    c = json.loads((CASES / f"{name}.json").read_text())["config"]
    with np.load(CASES / f"{name}.npz") as file:
        arrays = {k: file[k] for k in file.files}
    data = {k[8:]: v for k, v in arrays.items() if k.startswith("in/data/")}
    other = {k[10:]: v for k, v in arrays.items() if k.startswith("in/mask_b/")}
    batch = {"timestamps": data.pop("timestamps")}
    for key, x in data.items():
        batch[f"view/{key}"] = np.stack([x, other.get(key, x)], axis=1)
    m = method(c)
    module = m.module(m.kinds, c["processing_patch_size"], c["output_patch_size"])
    like = {
        "encoder": parts.encoder_like(module.encoder),
        "predictor": parts.predictor_like(module.predictor, c["embedding_size"]),
    }
    like["target"] = like["encoder"]["patch_embed"]
    given = {k[6:]: v for k, v in arrays.items() if k.startswith("param/")}
    params = parts.load(given, like, m.kinds)
    extra = {"target": params.pop("target")}
    shape = shapes.Shape(module.p, module.q, 2, 2)
    phase = step.Phase(frozenset(), shape)

    def loss(params):
        return m.loss(params, extra, batch, jax.random.key(0), phase=phase)

    run = parts.quick(jax.value_and_grad(loss, has_aux=True))
    (total, (_, metrics)), grads = run(params)
    want = {k[4:]: v for k, v in arrays.items() if k.startswith("out/")}
    np.testing.assert_allclose(total, want["total"], rtol=2e-4)
    mean = (want["a/loss"] + want["b/loss"]) / 2
    np.testing.assert_allclose(metrics["loss_tokens"], mean, rtol=2e-4)
    pull = metrics["loss_contrast"]
    np.testing.assert_allclose(pull, want["infonce_weighted"], rtol=2e-4)
    norm = jnp.sqrt(sum(jnp.square(g).sum() for g in jax.tree.leaves(grads)))
    np.testing.assert_allclose(norm, want["grad_norm_all"], rtol=2e-4)
