"""ResNet-18 at the three scales, as Figures 2 and 3 train it."""

from typing import Any

from ml_collections import ConfigDict
from paper import config

import cdl.config
from cdl.models import resnet

# Appendix B: linear, cosine; "5 triangular cycles"; "WSD uses 10% warmup and 10% decay".
SHAPES: dict[str, dict[str, Any]] = {
    "linear": {"schedule.name": "linear", "schedule.warmup": 0.0},
    "cosine": {"schedule.name": "cosine", "schedule.warmup": 0.0},
    "cyclic": {"schedule.name": "cyclic", "schedule.warmup": 0.0, "schedule.cycles": 5},
    "wsd": {"schedule.name": "wsd", "schedule.warmup": 0.1, "schedule.decay": 0.1},
}


def one_run(scale: str, optimizer: str) -> ConfigDict:
    """A config. Digits are shifted and mirrored at random, or the network would know all of them by heart."""
    if scale == "paper":
        c = config(f"resnet18.py:imagenet-{optimizer}")[0]
    else:
        c = config("resnet18.py:digits")[0]
        width = 8 if scale == "laptop" else 64
        c.model = cdl.config.section("model", "resnet", **resnet.arguments(18, stem="cifar", classes=10, width=width))
        c.data.augment = "crop_flip"
        c.T, c.data.batch_size = (1000, 32) if scale == "laptop" else (5000, 256)
        if optimizer == "adamw":
            c.optimizer = cdl.config.section("optimizer", "adamw", b1=0.9, b2=0.999, weight_decay=0.01)  # Appendix B
    c.eval.times = 5
    return c
