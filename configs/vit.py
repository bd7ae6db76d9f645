"""Vision transformers: the paper's Figure 12 on ImageNet, and a small one on digits that are there without a download.

    cdl sweep --config=configs/vit.py --out=runs/digits
    cdl train --config=configs/vit.py:imagenet --dry-run data.path=/data/imagenet

`digits` (default) trains at once on two CPU cores. `imagenet` is ViT-B/16 by the settings of Figure 12; the paper says
"ViT" and no size, so any other of `cdl.models.vit.SIZES` goes the same way: `Ti/16`, `S/16`, `L/16`.

ImageNet is for devices of 80 GB, a run on each; with mesh.data=-1 one run is spread over all of them.
"""

from typing import Any

from ml_collections import ConfigDict

import cdl.config
from cdl.errors import unknown
from cdl.models import vit
from cdl.sweep.grid import product

IMAGENET = {"imagenet": "B/16"} | {size: size for size in vit.SIZES if size.endswith(("/16", "/32"))}


def get_config(arg: str = "digits") -> ConfigDict:
    """One run: `digits`, `imagenet`, or a size for ImageNet."""
    c = cdl.config.base()
    if arg == "digits":
        c.T = 500
        c.eta_ref = 0.1
        c.model = cdl.config.section("model", "vit", **vit.arguments("30k/2", image_size=8, classes=10, pool="mean"))
        c.data = cdl.config.section("data", "images", path="digits", batch_size=64)
        c.optimizer = cdl.config.section("optimizer", "adamw", b2=0.999, weight_decay=0.01)
        c.eval.size = 128
        return c
    if arg not in IMAGENET:
        raise unknown("argument of configs/vit.py", arg, ["digits", *IMAGENET])
    c.T = 10_000  # an epoch is 1,281,167 images
    c.eta_ref = 0.01  # Figure 12: "peak learning rate 0.01/sqrt(T)"
    c.model = cdl.config.section("model", "vit", **vit.arguments(IMAGENET[arg], image_size=224, classes=1000))
    c.data = cdl.config.section("data", "images", path="data/imagenet", image_size=224, augment="inception")
    c.data.batch_size = 128  # Figure 12, as the next lines
    c.optimizer = cdl.config.section("optimizer", "adamw", b1=0.9, b2=0.999, weight_decay=0.01)
    c.schedule = cdl.config.section("schedule", "cosine", warmup=0.0)
    c.eval.size = 10_240
    c.compute.remat = "dots" if c.model.n_layer > 12 else "none"
    return c


def sweep(arg: str = "digits") -> list[dict[str, Any]]:
    """Rates and horizons on digits; on ImageNet horizons within an epoch, at the one rate of Figure 12."""
    if arg == "digits":
        return product(eta_ref=[0.03, 0.1, 0.3], T=[100, 200, 400, 700, 1000])
    return product(T=[625, 1250, 2500, 5000, 10_000])
