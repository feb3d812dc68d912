"""Workdirs written by hand, so that every value in them is known."""

import json
import os
import socket

import numpy as np
from PIL import Image

CONFIG = {
    "method": "hjepa",
    "seed": 0,
    "optim": {"lr": 0.003, "wd": 0.05},
    "data": {"source": "digits", "mean": [0.5]},
    "evals": {"knn_k": [20], "features": "pooled", "probe": "lbfgs"},
}


def run(path, *, lr=0.003, steps=40, knn=0.5, picture=True, **status):
    """Write a workdir of a finished run; its loss is 1 / (1 + step)."""
    path.mkdir(parents=True)
    config = {**CONFIG, "optim": {**CONFIG["optim"], "lr": lr}}
    (path / "config.json").write_text(json.dumps(config))
    lines = [{"step": i, "loss": 1 / (1 + i), "wd": 0.05} for i in range(1, steps + 1)]
    for line in lines:
        line["time/images_per_second"] = 100.0 + line["step"]
    lines.append({"step": steps, "knn/top1": knn})
    lines.append(
        {
            "step": steps,
            "final/trained/knn/top1": knn,
            "final/untrained/knn/top1": 0.25,
            "final/raw_pixels/knn/top1": 0.75,
        }
    )
    (path / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    values = {"state": "finished", "step": steps, "total_steps": steps, "time": 1.0}
    values |= {"pid": os.getpid(), "host": socket.gethostname(), **status}
    (path / "status.json").write_text(json.dumps(values))
    (path / "versions.json").write_text(json.dumps({"jax": "0.10.2"}))
    if picture:
        (path / "pictures").mkdir()
        pixels = np.zeros((8, 8, 3), np.uint8)
        Image.fromarray(pixels).save(path / "pictures" / "neighbours.png")
        Image.fromarray(pixels).save(path / "pictures" / "training.png")
        Image.fromarray(pixels).save(path / "pictures" / "anything_else.png")
    return path
