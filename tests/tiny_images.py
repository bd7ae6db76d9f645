"""A run of seconds on images: a vision transformer of a thousand parameters on the embedded digits."""

from ml_collections import ConfigDict

import cdl.config
from cdl.models import vit


def get_config() -> ConfigDict:
    c = cdl.config.base()
    c.model = cdl.config.section("model", "vit", **vit.arguments("1k/2", image_size=8, classes=10, pool="mean"))
    c.data = cdl.config.section("data", "images", batch_size=16, augment="crop_flip")
    c.eval.times = 2
    c.eval.size = 64
    return c
