"""What a run begins from: its own checkpoint, weights of another run, or nothing."""

import logging

from vitssl import errors
from vitssl.run import agreement, build, devices, log, opened, record, warmstart

logger = logging.getLogger(__name__)


def first_state(parts, saves, workdir, name) -> tuple:
    """Return (state, meta, what init.skip left random): resumed, given or fresh."""
    s, skipped = parts.experiment.settings, ()
    found = saves.restore(build.restore_target(parts))
    state, meta = found or (parts.fresh(), {})
    at, total = int(state.step), parts.run.total_steps
    if found:  # Before anything of a saved run is written over.
        way_out = "give another --workdir, or the data it was trained on"
        stored = meta.get("classes")
        warmstart.same_classes(workdir, stored, parts.source.classes, way_out)
        if at < total:
            warmstart.same_order(workdir, meta, len(parts.source), s.data.sampling)
    if devices.is_main():
        log.write_status(
            workdir, state="starting", step=at, total_steps=total, name=name
        )
        if found:
            record.say_changes(workdir / "config.json", parts.experiment.config)
        record.write(workdir, parts.experiment.config)
    if found:
        done = f"already complete ({at} steps); final evaluation only"
        on = f"resuming after step {at} of {total}"
        logger.info("%s", on if at < total else done)
    elif s.init.from_:
        past = past_of(s.init)
        warmstart.check_classes(s.init, past, parts.source.classes, state.params)
        size = parts.experiment.training_size
        agreement.with_checkpoint(s.init, past, s.data, size, state.params)
        params, skipped = warmstart.load(s.init, past, state.params)
        extra = warmstart.statistics(s.init, past, params, state.extra)
        extra = parts.method.adopt(params, extra)
        state = state.replace(params=params, extra=extra)
    elif s.init.wanted:
        logger.warning("init.from is empty: random weights; %s", s.init.wanted)
    return state, meta, skipped


def past_of(init):
    """Return what `init.from` names.

    Raises:
        CheckpointError: nothing that can be read; it says what the recipe wants.
    """
    try:
        past = opened.past(init.from_)
        if past.imported:
            _ = past.weights  # The header is read now.
        return past
    except errors.CheckpointError as e:
        if not init.wanted:
            raise
        told = f"init.from={init.from_}: {e}; {init.wanted}"
        raise errors.CheckpointError(told) from e
