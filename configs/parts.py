r"""Part discovery: find the parts of a thing, then classify from them alone (iFAM).

    python -m vitssl.main --config=configs/parts.py

Arguments (`--config=configs/parts.py:NAME`, or `NAME,OPTION,OPTION=VALUE`):
    (none)          demo: drawn birds whose background misleads, minutes on two cores
    smoke           two steps, seconds
    pretrain        the self-supervised checkpoint that `evidence` starts from
    evidence        hard and soft masks against the same ViT without masks, three seeds
    cub_k8, cub_k4  CUB-200-2011, ViT-B/14 at 518 px, 8 x 16 images a step
    waterbirds      Waterbirds, K=8; waterbirds_k4
    siim_acr_rad_dino
                    chest X-rays with RAD-DINO's layout of DINOv2
    metashift       cats and dogs at 224 px, K=2; metashift_k1, metashift_k8
    pdiscoformer_cub
                    the single-stage predecessor, K=8
    pdisconet_cub   the same head on a ResNet-101 at 448 px
    baseline_waterbirds, late_mask, given_mask
                    one ViT without parts; with masks of the data set
Options, joined by commas: soft_masks, straight_through, no_gumbel, as_coded (evaluation
noise and orthogonality over channels as released), train_backbone, freeze_tokens_1,
freeze_second_stage, freeze_tokens_2, and the rates scratch=1e4, modulation=1e4,
finer=1e3, second=1.0.

All published recipes need --config.data.root=DIR and pretrained weights
(--config.init.from=FILE); lr = 1e-6 sqrt(batch / 16), decay = 0.05 sqrt(1 / steps).

Published results (third-party table of arXiv:2506.08915): Waterbirds 99.0 average,
CUB-trained on Waterbirds 86.2, MetaShift 88.7; PDiscoFormer CUB 89.1.
"""


RGB = dict(channels=3, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))

FLAGS = {  # option: (section, key, value)
    "soft_masks": ("parts", "masks", "soft"),
    "straight_through": ("parts", "masks", "straight_through"),
    "no_gumbel": ("parts", "gumbel", False),
}
FREEZES = ("freeze_tokens_1", "freeze_second_stage", "freeze_tokens_2")
RATES = ("scratch", "modulation", "finer", "second")

_TOKENS = "backbone/(cls|registers|pos_embed)"
_BODY = "backbone/(patch_embed|block_[0-9]+|norm)/.*"


def groups(
    kind="two_stage",
    *,
    modulation_type="layer_norm",
    scratch=1e4,
    modulation=1e4,
    finer=1e3,
    second=1.0,
    freeze_backbone=True,
    freeze_tokens_1=False,
    freeze_second_stage=False,
    freeze_tokens_2=False,
):
    """Return the optimizer's lr_rules, wd_rules and freeze of the paper's groups.

    Layers that start from nothing learn `scratch` times as fast as the pretrained ones,
    the modulation `modulation` times, the prototypes `finer` times, all of the second
    stage's backbone `second` times. Prototypes, modulation, tokens, positions and
    vectors do not decay.
    """
    one, two = kind in ("two_stage", "single_stage"), kind != "single_stage"
    lr, wd, freeze = [], [], []
    if one:
        lr += [("stage_1/head/classifier/.*", scratch)]
        wd += [("stage_1/head/prototypes", 0.0)]
        lr += [("stage_1/head/prototypes", finer)]
        if modulation_type != "none":
            lr += [("stage_1/head/modulation/.*", modulation)]
            wd += [("stage_1/head/modulation/.*", 0.0)]
        freeze += [(f"stage_1/{_BODY}", 0.0)] * freeze_backbone
        freeze += [(f"stage_1/{_TOKENS}", 0.0)] * freeze_tokens_1
    if two:
        lr += [("stage_2/(head|fc_norm|pool)/.*", scratch)]
        lr += [("stage_2/.*", second)] if one else []
        freeze += [(f"stage_2/{_BODY}", 0.0)] * freeze_second_stage
        freeze += [(f"stage_2/{_TOKENS}", 0.0)] * freeze_tokens_2
    # Learned queries of a pooling and vectors do not decay either; in the original's
    # baselines tokens and positions do.
    names = "bias|scale|ls1|ls2|query|gamma" + "|cls|registers|pos_embed" * one
    wd += [(f".*/({names})", 0.0), (".*", 1.0)]
    lr += [(".*", 1.0)]
    return dict(lr_rules=tuple(lr), wd_rules=tuple(wd), freeze=tuple(freeze))
