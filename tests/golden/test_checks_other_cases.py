"""The golden checks on cases with other options, whose truth needs no original."""

import copy
import json
import pathlib
import re

import numpy as np
import pytest

from tests.golden import conftest, test_golden

CASES = pathlib.Path(__file__).parent / "cases"


class Other(conftest.Case):
    """A stored case, or a new one, with another config and other arrays."""

    def __init__(self, name, change):
        """Read the case and let `change(meta, case)` alter it."""
        super().__init__(CASES / f"{name}.json")
        meta = copy.deepcopy(self.meta)
        change(meta, self)
        self.meta = meta
        self.config = conftest.reading.recorded(meta["config"])


def check(name, change):
    test_golden.test_case_matches_the_original(Other(name, change))


def fails(name, change):
    with pytest.raises(AssertionError):
        check(name, change)


@pytest.mark.parametrize("kind", ["random", "space", "time", "modality"])
def test_masks_of_other_ratios_are_measured_against_those_ratios(kind):
    names, side, times = ["sentinel1", "landsat", "worldcover"], 4, 5
    encode, decode = 0.3, 0.45
    tokens = {"sentinel1": 80, "landsat": 160, "worldcover": 16}
    units = {  # (how many are shared out, the least of each kind)
        "random": lambda name: (tokens[name], 0),
        "space": lambda name: (side**2, 0),
        # What has no time is masked at random.
        "time": lambda name: (16, 0) if name == "worldcover" else (times, 1),
        "modality": lambda name: (len(names), 1),
    }[kind]

    def measured(name):
        n, least = units(name)
        e, d = (max(least, int(n * ratio)) / n for ratio in (encode, decode))
        mean = [e, 1 - e - d, d, 0.0]
        if kind != "modality":
            row = dict(mean=mean, std=[0.0] * 4, min=mean, max=mean)
        else:  # Whole modalities: each is all one thing or another.
            std = [(p * (1 - p)) ** 0.5 for p in mean]
            some = [float(p > 0) for p in mean]
            row = dict(mean=mean, std=std, min=[0.0] * 4, max=some)
        return row | dict(tokens_per_sample=tokens[name], constant_within_patch=True)

    def change(meta, case, ratio=encode):
        del case
        strategy = dict(type=kind, encode_ratio=ratio, decode_ratio=decode)
        rows = {name: measured(name) for name in names}
        one = dict(modalities=names, B=200, hw_p=side, patch_size=2, T=times)
        key = "fractions_[ONLINE,TARGET_ONLY,DECODER,MISSING]"
        meta["config"] = [one | {"strategy": strategy, key: rows}]

    check("hybrid/masking_statistics", change)
    fails("hybrid/masking_statistics", lambda m, c: change(m, c, ratio=0.7))


def test_a_batch_whose_masks_are_all_of_one_kind_is_recognised():
    def change(meta, case):
        del case
        one = next(o for o in meta["config"] if o["strategy"]["type"] == "time")
        one["strategy"]["type"] = "space_time"
        meta["config"] = [one]

    check("hybrid/masking_statistics", change)


def test_stage_weights_are_those_of_as_many_stages_as_the_case_has(n=12):
    each = np.arange(1.0, n + 1, dtype=np.float32)

    def change(meta, case):
        meta["config"] = {"stages": n, "weightings": {"uniform": "1"}}
        case.inputs, case.out, k = {"per_stage": each}, {}, np.arange(n)
        for drop in range(n):
            rest, places = each[drop:], k[: n - drop]
            for name, weights in {
                "uniform": np.ones(n - drop),
                "n_minus_k_original": n - drop - places,
                "one_over_k_original": 1 / (places + 1),
                "n_minus_k_fixed": n - k[drop:],
                "one_over_k_fixed": 1 / (k[drop:] + 1),
                "seed_intent_1_over_n_minus_k": 1 / (n - k[drop:]),
            }.items():
                case.out[f"drop{drop}/{name}"] = np.float32((weights * rest).sum())

    check("vitfreeze/stage_loss_weights", change)


def test_groups_of_a_shallower_model_with_a_stage_at_every_block(depth=9):
    def shallower(groups, stages):
        for group in groups:
            where = re.match(r"(blocks|norm|decoder)\.(\d+)\.", group["name"])
            kind, i = (where[1], int(where[2])) if where else ("", -1)
            if i >= (depth if kind == "blocks" else len(stages)):
                continue
            if kind in ("norm", "decoder"):
                group["layer_index"] = 1 + stages[i]
            yield group

    def change(meta, case):
        del case
        meta["config"] |= dict(depth=depth, variants=["default", "all_stages"])
        blocks = dict(default=(1, 3, depth - 3, depth - 1), all_stages=range(depth))
        for variant, stages in blocks.items():
            one = meta["groups"][variant]
            one["num_layers"] = depth
            one["groups"] = list(shallower(one["groups"], stages))

    check("vitfreeze/param_groups_pretrain_d12", change)


def test_what_fills_no_patch_is_left_out_as_by_a_convolution():
    def change(meta, case):
        meta["config"]["sizes"] = [n for n in meta["config"]["sizes"] if n > 1]
        kept = meta["config"]["sizes"]
        case.out = {k: v for k, v in case.out.items() if int(k.strip("wemb")) in kept}
        case.inputs["x"] = np.pad(case.inputs["x"], [(0, 0)] * 2 + [(0, 1)] * 2)

    check("hybrid/patch_embed_pi_resize", change)


STAGE_TOKENS = r"{}\.(cls_token|pos_embed|reg_token)"


@pytest.mark.parametrize(
    "flag, stage, tokens",
    [
        ("freeze_backbone", "stage_1", False),
        ("freeze_params_stage_1", "stage_1", True),
        ("freeze_second_stage", "stage_2", False),
        ("freeze_params_stage_2", "stage_2", True),
    ],
)
def test_each_freeze_flag_freezes_its_own_parameters(flag, stage, tokens):
    path = CASES / "ifam" / "param_groups_timm_all_frozen.json"
    every = json.loads(path.read_text())["expected"]["frozen"]
    of = [name for name in every if name.startswith(f"{stage}.")]
    pattern = STAGE_TOKENS.format(stage)
    own = [n for n in of if bool(re.fullmatch(pattern, n)) == tokens]

    def change(meta, case, given=True):
        del case
        meta["config"]["flags"] = {flag: given}
        meta["expected"]["frozen"] = own

    assert own
    check("ifam/param_groups_timm_none_frozen", change)
    fails("ifam/param_groups_timm_none_frozen", lambda m, c: change(m, c, given=False))


def test_a_target_that_moves_goes_on_beyond_the_last_step():
    def change(meta, case):
        meta["config"]["ema"] = [0.9, 1.0]
        along = case.inputs["steps"] / meta["config"]["total_steps"]
        case.out["ema"] = np.float32(0.9 + 0.1 * along)

    check("hybrid/schedules", change)


def test_keys_that_a_config_leaves_out_have_the_values_of_the_original():
    def change(meta, case):
        del case
        for key in ("mlp_ratio", "qkv_bias", "use_dfca"):
            del meta["config"]["hvt_params"][key]

    check("hvit/param_groups", change)


def test_a_key_that_no_check_reads_fails_the_case():
    def change(meta, case):
        del case
        meta["config"]["labels"] = {"smoothing": 0.1}

    with pytest.raises(AssertionError, match="never read: .'labels.smoothing'"):
        check("hjepa/metrics_fewshot", change)
