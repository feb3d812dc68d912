"""The config of a whole method, as far as the weights of one tell it.

With it an import has features like a run: `vitssl.load`, `vitssl extract`. What no
tensor tells (noise, masking, what training was) has the default of its section, or the
value of the released code, which is said in the import's notes.
"""

from collections.abc import Mapping

import numpy as np

from vitssl import errors
from vitssl.convert import cnn_names, family, huggingface, timm_names
from vitssl.data import modalities
from vitssl.methods.latent_mim import names, network

Pixels = tuple[float, ...]  # Of every channel.


def _config(method: str, image_size: int, mean, std, **sections) -> dict:
    """Return a config of a method, with what every config must have."""
    pixels = dict(channels=len(mean), mean=tuple(mean), std=tuple(std))
    splits = dict(split="train", bank_split="train", test_split="test")
    return dict(
        method=method,
        seed=0,
        batch_size=1,
        epochs=1.0,
        data=dict(source="folder", root="", options={}) | splits | pixels,
        optim=dict(
            name="adamw",
            lr=1e-6,
            schedule="constant",
            warmup_epochs=0.0,
            min_lr=0.0,
            wd=0.0,
            clip_norm=0.0,
        ),
        evals=dict(
            image_size=image_size,
            batch_size=32,
            every_epochs=0.0,
            online_samples_train=0,
            online_samples_test=0,
            final=(),
            knn_k=(20,),
            knn_temperature=(0.07,),
            probe="lbfgs",
            probe_epochs=1,
        ),
        log=dict(every_steps=1),
        checkpoint=dict(every_epochs=1.0),
        **sections,
    )


def parts(
    state: Mapping, options: family.Options, mean: Pixels, std: Pixels, notes: list
) -> dict:
    """Return the config of part discovery of a state dict, after its `prepare`."""
    two = any(key.startswith("stage_2.") for key in state)
    cut = "stage_1." if two else ""
    first = {k.removeprefix(cut): v for k, v in state.items() if k.startswith(cut)}
    one = _backbone(first)
    model = {"name": one.kind} | one.model(one.prepare(first, []), options)
    size = model.get("image_size", 0) or options.image_size or 224
    if one.kind != "vit":
        notes.append(f"output_stride={model.setdefault('output_stride', 32)} guessed")
    head = dict(
        count=len(first["fc_landmarks.weight"]) - 1,
        kind="two_stage" if two else "single_stage",
        modulation=_modulation(first),
        classifier="linear"
        if "fc_class_landmarks.weight" in first
        else "independent_mlp",
        modulated_orthogonality=two,
    )
    if two:
        notes.append("parts.masks=hard guessed, the published kind")
    sections = dict(model=model, parts=head, augment=dict(size=size))
    return _config("parts", size, mean, std, **sections)


def _backbone(state) -> family.Family:
    """Return the family of a backbone that may have a head beside it."""
    kinds = (huggingface.DINOV2, cnn_names.RESNET, *cnn_names.FAMILIES, timm_names.TIMM)
    for one in kinds:
        if one.fits(state):
            return one
    raise errors.CheckpointError(
        "a head of part discovery on a backbone of no known kind: ViT, ResNet, ConvNeXt"
    )


def _modulation(state) -> str:
    """Return the kind of modulation, `heads.Modulation`."""
    if "modulation.weight" in state:
        return "layer_norm"
    if "modulation" in state:
        return "original"
    first = "modulation.feature_layers.0.fc_0"
    if f"{first}.weight" not in state:
        return "none"
    # Whether a GELU follows leaves no trace: the original's first kind has one.
    return "parallel_mlp" + "_no_bias" * (f"{first}.bias" not in state)


def parts_classes(state: Mapping) -> int:
    """Return the classes that the parts are scored for."""
    for key, value in state.items():
        if "fc_class_landmarks." in key and np.ndim(value) == 2:
            return len(value)
    return 0


def olmoearth(
    state: Mapping, options: family.Options, mean: Pixels, std: Pixels, notes: list
) -> dict:
    """Return the config of latent masked modelling of a state dict."""
    del mean, std  # Every sensor has a table of its own.
    sensors = names.sensors(state)
    kernel = next(v for k, v in state.items() if _KERNEL in k and np.ndim(v) == 4)
    width, _, base, _ = np.shape(kernel)
    block = "encoder.blocks.0."
    known = {w: heads for w, heads, _, _ in network.SIZES.values()}
    heads = options.heads or known.get(width, 0)
    if not heads:
        raise errors.UsageError(
            f"a width of {width} is none of the published ones; say --heads=N"
        )
    built = dict(
        size="",
        width=int(width),
        heads=heads,
        depth=family.depth(state, "encoder.blocks.{i}."),
        decoder_depth=max(1, family.depth(state, "decoder.blocks.{i}.")),
        mlp_ratio=len(state[f"{block}mlp.fc1.weight"]) / width,
        base_patch=int(base),
        registers=len(state.get("encoder.register_tokens", ())),
        qk_norm=f"{block}attn.q_norm.weight" in state,
        projections=sum(
            ".project_and_aggregate." in k and k.endswith("weight") for k in state
        ),
        patch_resize="input",
        frequencies="legacy",
        anchor="corner",
    )
    notes.append("read at patches of 4 pixels, all sensors that are no maps")
    sections = dict(
        inputs=dict(modalities=tuple(s.name for s in sensors), groups=_groups(state)),
        network=built,
        hybrid=dict(processing_patch_size=(), output_patch_size=0),
        objective=dict(same_target_modalities=()),
        readout=dict(p=4, times=modalities.TIMES, pool="mean"),
        mask=dict(decode_only=modalities.MAPS),
    )
    return _config("latent_mim", options.image_size or 64, (0.0,), (1.0,), **sections)


_KERNEL = "patch_embeddings.per_modality_embeddings."


def _groups(state) -> tuple:
    """Return `inputs.groups`: one set of all bands where the weights have no other.

    Raises:
        CheckpointError: sets of bands that are neither the table's nor one of all.
    """
    found = []
    for sensor in names.sensors(state):
        kind = modalities.find(sensor.name)
        sets = [
            value.shape[1]
            for key, value in state.items()
            if f"{_KERNEL}{sensor.name}." in key and key.startswith("encoder.")
            if key.endswith("weight")
        ]
        if sorted(sets) == sorted(map(len, kind.bandsets)):
            continue
        if sets != [len(kind.bands)]:
            raise errors.CheckpointError(
                f"{sensor.name}: bandsets of {sets} bands; this version has "
                f"{[len(s) for s in kind.bandsets]}, or one of all {len(kind.bands)}"
            )
        found.append((sensor.name, (kind.bands,)))
    return tuple(found)
