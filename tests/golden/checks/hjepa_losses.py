"""H-JEPA's losses against the original's, and against the published forms."""

import jax
import jax.numpy as jnp
import numpy as np

from tests.golden import reading
from vitssl.losses import contrastive, regression, sigreg, vicreg
from vitssl.methods.hjepa import forward, objective

TERMS = ("invariance", "variance", "covariance")


def _levels(case, name):
    """The arrays in/{name}_0, in/{name}_1 ... of a case."""
    count = sum(key.rpartition("_")[0] == name for key in case.inputs)
    return [jnp.asarray(case.inputs[f"{name}_{k}"]) for k in range(count)]


def _vicreg_options(config):
    """Options of `vicreg` that reproduce the original, from its own names."""
    named = {"variance_threshold": "threshold", "eps": "eps"}
    options = {ours: config[name] for name, ours in named.items() if name in config}
    weights = [
        config.get(f"{name}_weight", w)
        for name, w in zip(TERMS, vicreg.WEIGHTS, strict=True)
    ]
    return dict(weights=tuple(weights), covariance="mean", **options)


def _sigreg_options(config, kind):
    """Options of `sigreg` that reproduce the original, from its own names."""
    names = {
        "reference_points": {"num_test_points": "points"},
        "char_function": {
            "char_function_num_quadrature": "points",
            "char_function_t_min": "t_min",
            "char_function_t_max": "t_max",
            "char_function_lambda": "scale",
        },
    }[kind]
    options = {ours: config[name] for name, ours in names.items() if name in config}
    return dict(kind=kind, eps=config.get("eps", 1e-6), **options)


def _hierarchical(predictions, targets, weights, valids=None, **options):
    """Return (weighted sum over levels, the loss of every level)."""
    valids = [None] * len(predictions) if valids is None else valids
    each = [
        regression.level_loss(p, t, v, **options)
        for p, t, v in zip(predictions, targets, valids, strict=True)
    ]
    weights = weights if isinstance(weights, list) else [weights] * len(each)
    return sum(w * x for w, x in zip(weights, each, strict=True)), each


def _close_gradient(case, name, got):
    """Compare a gradient on the scale of its largest entry, which may be tiny."""
    case.close(name, got)
    want = case.out[name]
    atol = case.tolerance * np.abs(want).max()
    np.testing.assert_allclose(got, want, rtol=0, atol=atol, err_msg=name)


def prediction_loss(case):
    """Every kind of distance, with and without normalisation and masks."""
    config = case.config
    assert config.get("reduction", "mean") == "mean", config["reduction"]
    predictions, targets = _levels(case, "prediction"), _levels(case, "target")
    masks = _levels(case, "mask")
    assert len(predictions) == config["num_hierarchies"]

    def run(predictions, kind, normalize, valids=None):
        return _hierarchical(
            predictions,
            targets,
            config["hierarchy_weights"],
            valids,
            kind=kind,
            normalize=normalize,
            delta=config.get("huber_delta", 1.0),
            beta=config.get("smoothl1_beta", 1.0),
            eps=config.get("normalize_eps", 1e-8),
            detach=config.get("detach_targets", True),
        )

    names = {name.rpartition("_")[0] for name in case.out}
    for name in sorted(names):
        masked = name.startswith("masked_")
        kind, _, norm = name.removeprefix("masked_").partition("_norm")
        valids = masks if masked else None
        grad = jax.value_and_grad(run, has_aux=True)
        (loss, each), slope = grad(predictions, kind, bool(int(norm or 0)), valids)
        got = {"loss": loss, "levels": jnp.stack(each)}
        got |= {"unweighted": sum(each) / len(each)}
        got |= {f"grad{k}": g for k, g in enumerate(slope)}
        for field in (key for key in case.out if key.rpartition("_")[0] == name):
            short = field.rpartition("_")[2]
            if short.startswith("grad"):
                _close_gradient(case, field, got[short])
            else:
                case.close(field, got[short])


def vicreg_terms(case):
    """All forms of input of VICReg, the published covariance, adaptive weights."""
    options = _vicreg_options(case.config)
    a, b = jnp.asarray(case.inputs["z_a"]), jnp.asarray(case.inputs["z_b"])
    runs = {
        "patches": vicreg.vicreg(a, b, **options),
        "noflat": vicreg.vicreg(*(z.reshape(len(z), -1) for z in (a, b)), **options),
        "pooled": vicreg.vicreg(forward.pool(a), forward.pool(b), **options),
        "single": vicreg.vicreg(*vicreg.halves(a), **options),
    }
    for name, (loss, parts) in runs.items():
        case.close(f"{name}_loss", loss)
        for term in parts:
            stem, _, view = term.partition("_")
            case.close(f"{name}_{stem}_loss{'_' * bool(view)}{view}", parts[term])
    _, paper = vicreg.vicreg(a, b, **(options | {"covariance": "paper"}))
    case.close("patches_covariance_paper", paper["covariance"])
    _, parts = runs["patches"]
    momentum = case.config.get("weight_momentum", 0.9)
    after = vicreg.adapt(
        options["weights"], parts, momentum=momentum, eps=case.config["eps"]
    )
    case.close("adaptive_weights_after", after)


def sigreg_statistics(case):
    """The two statistics of H-JEPA and LeJEPA's, per direction and in total."""
    config = case.config
    a, b = jnp.asarray(case.inputs["z"]), jnp.asarray(case.inputs["z_b"])
    along = jnp.asarray(case.inputs["slices"])
    assert len(along) == config["num_slices"]
    weights = (config["invariance_weight"], config["sigreg_weight"])
    for kind in ("reference_points", "char_function"):
        options = _sigreg_options(config, kind)
        each = sigreg.per_slice(a, along, **options)
        case.close(f"{kind}_per_slice", each)
        loss, parts = sigreg.two_views(a, b, along=along, weights=weights, **options)
        case.close(f"{kind}_loss", loss)
        case.close(f"{kind}_invariance_loss", parts["invariance"])
        case.close(f"{kind}_sigreg_loss", parts["sigreg"])
        case.close(f"{kind}_sigreg_loss_a", parts["sigreg_a"])
        case.close(f"{kind}_sigreg_loss_b", parts["sigreg_b"])
    case.close(
        "reference_points_reference", sigreg.quantiles(config["num_test_points"])
    )
    char = [config[f"char_function_{k}"] for k in ("t_min", "t_max", "num_quadrature")]
    case.close("char_function_reference", np.linspace(*char))
    options = dict(points=config["lejepa_n_points"], t_max=config["lejepa_t_max"])
    case.close("lejepa_per_slice", sigreg.per_slice(a, along, kind="lejepa", **options))
    case.close("lejepa", sigreg.sigreg(a, along=along, kind="lejepa", **options))


def contrastive_losses(case):
    """NT-Xent by cosine and by dot product, and C-JEPA."""
    config = case.config
    temperature = config["temperature"]
    a, b = jnp.asarray(case.inputs["z_i"]), jnp.asarray(case.inputs["z_j"])

    def run(a, cosine):
        scale = 1.0 if cosine else config["dot_scale"]
        return contrastive.nt_xent(
            scale * a, scale * b, temperature=temperature, cosine=cosine
        )

    for name in ("cosine", "dot"):
        grad = jax.value_and_grad(run, has_aux=True)
        (loss, metrics), slope = grad(a, name == "cosine")
        case.close(f"{name}_loss", loss)
        case.close(f"{name}_accuracy", metrics["accuracy"])
        # The original reports the logit of a pair; ours is the plain similarity.
        logit = metrics["positive_similarity"] / temperature
        case.close(f"{name}_positive_similarity", logit)
        _close_gradient(case, f"{name}_grad_i", slope)
    own = config["cjepa"]
    # The targets, which the original contrasts by default, have no gradient.
    reading.agree(own, contrastive_on_context=True)
    jepa, _ = _hierarchical(
        _levels(case, "prediction"),
        _levels(case, "target"),
        own["hierarchy_weights"],
        kind=own["loss_type"],
        normalize=own["normalize_embeddings"],
    )
    cls = (case.inputs[f"features_{x}"][:, 0] for x in "ij")
    term, found = contrastive.nt_xent(*cls, temperature=own["contrastive_temperature"])
    loss = own["jepa_weight"] * jepa + own["contrastive_weight"] * term
    case.close("cjepa_loss", loss)
    case.close("cjepa_jepa_loss", jepa)
    case.close("cjepa_contrastive_loss", term)
    case.close("cjepa_accuracy", found["accuracy"])


def hybrid(case):
    """VICReg + SIGReg; the original weights the regulariser by sigreg_weight twice."""
    config = case.config
    reading.agree(config, num_slices=len(case.inputs["slices"]))
    loss, parts = objective.hybrid(
        objective.Pair(*(jnp.asarray(case.inputs[z]) for z in ("z_a", "z_b"))),
        vicreg_weight=config["vicreg_weight"],
        sigreg_weight=config["sigreg_weight"],
        inner_sigreg_weight=config["sigreg_weight"],
        settings=_vicreg_options(config),
        along=jnp.asarray(case.inputs["slices"]),
        **_sigreg_options(config, config.get("test_method", "reference_points")),
    )
    case.close("loss", loss)
    case.close("vicreg_loss", parts["vicreg"])
    case.close("sigreg_loss", parts["sigreg"])
    for term in TERMS:
        case.close(f"{term}_loss", parts[term])
    case.close("sigreg_regularization", parts["regulariser"])


def _placements(case, predictions, targets):
    """Term and parts of VICReg in every placement the original has, and on views."""
    config = case.config
    context = jnp.asarray(case.inputs["context_features"])
    view = jnp.asarray(case.inputs["context_features_view2"])
    of_levels = [(*level, None) for level in zip(predictions, targets, strict=True)]
    levels = objective.pairs_of_levels(of_levels)
    chosen = {
        "context": [objective.Pair(*vicreg.halves(context))],
        "levels": levels,
        "lastlevel": levels[-1:],
        "ontargets": objective.pairs_of_levels(of_levels, on_targets=True),
        "hier": levels,
        # Averaged over all tokens, CLS too: so the oracle was made, whatever it says.
        "views": [objective.Pair(*(forward.pool(z) for z in (context, view)))],
    }
    settings = _vicreg_options({"eps": config["eps"], **config["vicreg"]})
    eps = config.get("hier_vicreg_eps", 1e-4)
    own = [_vicreg_options({"eps": eps, **c}) for c in config["hier_vicreg_configs"]]
    for name, pairs in chosen.items():
        weights = config["hier_vicreg_weight" if name == "hier" else "vicreg_weight"]
        term, parts = objective.vicreg_of(
            pairs,
            weights=weights if isinstance(weights, list) else [weights],
            settings=own if name == "hier" else [settings],
        )
        yield name, term, parts


def combined_losses(case):
    """The prediction loss plus a regulariser, in every placement."""
    config = case.config
    predictions, targets = _levels(case, "prediction"), _levels(case, "target")
    reading.agree(config, num_hierarchies=len(predictions))
    jepa, _ = _hierarchical(
        predictions,
        targets,
        config["jepa_hierarchy_weights"],
        kind=config["jepa_loss_type"],
        normalize=config["normalize_embeddings"],
        delta=config.get("huber_delta", 1.0),
        eps=config["eps"],
    )
    for name, term, parts in _placements(case, predictions, targets):
        case.close(f"{name}_loss", jepa + term)
        if f"{name}_jepa" in case.out:
            case.close(f"{name}_jepa", jepa)
        # The original reports these two before weighting, the others after it.
        bare = name in ("lastlevel", "views")
        case.close(f"{name}_vicreg", parts["vicreg"] if bare else term)
    own = config["sigreg"]
    context = jnp.asarray(case.inputs["context_features"])
    term, parts = objective.sigreg_of(
        [objective.Pair(*vicreg.halves(context))],
        along=jnp.asarray(case.inputs["slices"]),
        weight=own["weight"],
        **_sigreg_options(own, own["test_method"]),
    )
    case.close("hjepa_sigreg_loss", jepa + term)
    case.close("hjepa_sigreg_term", parts["sigreg"])


CHECKS = {
    "hierarchical prediction loss": prediction_loss,
    "VICReg": vicreg_terms,
    "SIGReg": sigreg_statistics,
    "NT-Xent and C-JEPA": contrastive_losses,
    "VICReg+SIGReg hybrid": hybrid,
    "combined losses": combined_losses,
}
