"""ResNet-18: the paper's Figures 2, 3 and 12 on ImageNet, and a narrow one on digits, which need no download.

    cdl train --config=configs/resnet18.py
    cdl sweep --config=configs/resnet18.py:imagenet-sgd --out=runs/schedules data.path=/data/imagenet

`digits` (default) trains at once on two CPU cores with SGD. `imagenet-sgd` (Figure 2) and `imagenet-adamw` (Figure 3)
compare four schedules, by losses along the run (`cdl fit curve`); `imagenet` (Figure 12) has horizons up to one epoch.

ImageNet is for devices of 80 GB, a run on each; with mesh.data=-1 one run is spread over all of them.
"""

from typing import Any

from ml_collections import ConfigDict

import cdl.config
from cdl.errors import unknown
from cdl.models import resnet
from cdl.sweep.grid import product

# Appendix B, "Figure 2" and "Figure 3": peak rates of the schedules. T is not said; 5000 updates are an epoch.
T = 5000
PEAKS = {
    "imagenet-sgd": {"linear": 0.225, "cosine": 0.225, "cyclic": 0.056, "wsd": 0.113},
    "imagenet-adamw": {"linear": 0.0003, "cosine": 0.0003, "cyclic": 0.0003, "wsd": 0.00014},
}
SHAPES = {
    "linear": {"schedule.warmup": 0.0},
    "cosine": {"schedule.warmup": 0.0},
    "cyclic": {"schedule.warmup": 0.0, "schedule.cycles": 5},  # "5 triangular cycles"
    "wsd": {"schedule.warmup": 0.1, "schedule.decay": 0.1},  # "10% warmup and 10% decay"
}


def get_config(arg: str = "digits") -> ConfigDict:
    """One run: `digits`, `imagenet-sgd`, `imagenet-adamw` or `imagenet`."""
    c = cdl.config.base()
    c.optimizer = cdl.config.section("optimizer", "sgd", momentum=0.0, weight_decay=0.0)  # Appendix B, "Figure 2"
    c.schedule = cdl.config.section("schedule", "cosine", warmup=0.0)
    if arg == "digits":
        c.T = 200
        c.eta_ref = 1.0
        c.model = cdl.config.section("model", "resnet", **resnet.arguments(18, stem="cifar", classes=10, width=8))
        c.data = cdl.config.section("data", "images", path="digits", image_size=8, batch_size=64)
        c.eval.size = 128
        return c
    if arg not in (*PEAKS, "imagenet"):
        raise unknown("argument of configs/resnet18.py", arg, ["digits", *PEAKS, "imagenet"])
    c.model = cdl.config.section("model", "resnet", **resnet.arguments(18, stem="imagenet", classes=1000))
    c.data = cdl.config.section("data", "images", path="data/imagenet", image_size=224, augment="inception")
    c.eval.size = 10_240
    if arg in PEAKS:
        c.T = T
        c.eta_ref = PEAKS[arg]["cosine"] * T**0.5
        c.data.batch_size = 256  # Appendix B, "Figure 2" and "Figure 3"
    else:
        c.T = 10_000  # an epoch is 1,281,167 images
        c.eta_ref = 0.01  # Figure 12: "peak learning rate 0.01/sqrt(T)"
        c.data.batch_size = 128  # Figure 12
    if arg != "imagenet-sgd":
        c.optimizer = cdl.config.section("optimizer", "adamw", b1=0.9, b2=0.999, weight_decay=0.01)  # Figures 3 and 12
    return c


def sweep(arg: str = "digits") -> list[dict[str, Any]]:
    """Rates and horizons on digits; the four schedules of Figures 2 and 3; horizons of Figure 12, within an epoch."""
    if arg == "digits":
        return product(eta_ref=[0.3, 1.0, 3.0], T=[50, 100, 150, 200, 300])
    if arg == "imagenet":
        return product(T=[625, 1250, 2500, 5000, 10_000])
    return [{"schedule.name": name, "eta_ref": PEAKS[arg][name] * T**0.5} | SHAPES[name] for name in SHAPES]
