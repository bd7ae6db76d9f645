"""ResNet-50: the paper's Figure 12 on ImageNet and CIFAR-10, and a narrow one on digits, which need no download.

    cdl train --config=configs/resnet50.py
    cdl sweep --config=configs/resnet50.py:cifar10 --out=runs/cifar data.path=/data/cifar-10-batches-bin

`digits` (default) trains at once on two CPU cores. `cifar10` goes on for up to 820 epochs, past overfitting, and
`imagenet` up to one, both with the settings of Figure 12 (Appendix D.1).

CIFAR-10 and ImageNet are for devices of 80 GB, a run on each; with mesh.data=-1 one run is spread over all of them.
"""

from typing import Any

from ml_collections import ConfigDict

import cdl.config
from cdl.errors import unknown
from cdl.models import resnet
from cdl.sweep.grid import product

CIFAR10_EPOCH = 50_000 / 128  # updates


def get_config(arg: str = "digits") -> ConfigDict:
    """One run: `digits`, `cifar10` or `imagenet`."""
    c = cdl.config.base()
    c.eta_ref = 0.01  # Figure 12: "peak learning rate 0.01/sqrt(T)"
    c.optimizer = cdl.config.section("optimizer", "adamw", b1=0.9, b2=0.999, weight_decay=0.01)  # Figure 12
    c.schedule = cdl.config.section("schedule", "cosine", warmup=0.0)  # Figure 12
    if arg == "digits":
        c.T = 200
        c.eta_ref = 0.1
        c.model = cdl.config.section("model", "resnet", **resnet.arguments(50, stem="cifar", classes=10, width=4))
        c.data = cdl.config.section("data", "images", path="digits", image_size=8, batch_size=64)
        c.eval.size = 128
        return c
    if arg == "cifar10":
        c.T = round(100 * CIFAR10_EPOCH)
        model = resnet.arguments(50, stem="cifar", classes=10)
        c.data = cdl.config.section("data", "images", path="data/cifar10", image_size=32, augment="crop_flip")
        c.eval.size = 10_000
    elif arg == "imagenet":
        c.T = 10_000  # an epoch is 1,281,167 images
        model = resnet.arguments(50, stem="imagenet", classes=1000)
        c.data = cdl.config.section("data", "images", path="data/imagenet", image_size=224, augment="inception")
        c.eval.size = 10_240
    else:
        raise unknown("argument of configs/resnet50.py", arg, ["digits", "cifar10", "imagenet"])
    c.model = cdl.config.section("model", "resnet", **model)
    c.data.batch_size = 128  # Figure 12
    return c


def sweep(arg: str = "digits") -> list[dict[str, Any]]:
    """Horizons at the one rate of Figure 12: to 820 epochs of CIFAR-10, within one of ImageNet; rates too on digits."""
    if arg == "digits":
        return product(eta_ref=[0.03, 0.1, 0.3], T=[50, 100, 150, 200, 300])
    if arg == "cifar10":
        return product(T=[round(epochs * CIFAR10_EPOCH) for epochs in (1, 3, 10, 30, 100, 300, 820)])
    return product(T=[625, 1250, 2500, 5000, 10_000])
