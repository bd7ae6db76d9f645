"""A vision-language model, as the paper finetunes it (section 5.4, Figure 11), and a small one.

    cdl sweep --config=configs/vlm.py --out=runs/vlm                 # needs the package easy-vqa
    cdl train --config=configs/vlm.py:paper --dry-run --devices=8
    cdl sweep --config=configs/vlm.py:paper --out=runs/vlm data.path=data/cauldron

`small` (default) has 250 thousand parameters, drawn from the seed, and learns 38,575 questions on pictures of shapes.
`paper` is siglip2-base-patch16-512 and SmolLM2-360M-Instruct, with the weights of `transformers` in weights/siglip2 and
weights/smollm2, on The Cauldron's Parquet files. All rates are scaled by 1/sqrt(T): eta_ref/sqrt(T) for the two models,
a hundred times that for the projector between them.

The paper packs several examples into a row of 8192 tokens and cuts large images into tiles, as nanoVLM does. Here a row
is one example, and an image is one square: rows are shorter, with as many images.
"""

from typing import Any

from ml_collections import ConfigDict

import cdl.config
from cdl.errors import unknown
from cdl.models import vlm
from cdl.sweep.grid import product


def get_config(arg: str = "small") -> ConfigDict:
    """One run: `small` or `paper`."""
    c = cdl.config.base()
    # Appendix B: "AdamW uses default hyperparameters"; optax and torch have these.
    c.optimizer = cdl.config.section("optimizer", "adamw", b1=0.9, b2=0.999, weight_decay=0.01, rates="projector:100")
    c.schedule = cdl.config.section("schedule", "cosine", warmup=0.03)  # section 5.4
    if arg == "small":
        c.T = 400
        c.eta_ref = 0.03
        c.model = cdl.config.section("model", "vlm", **vlm.arguments("250k", context=80))
        tokens = vlm.image_tokens(c.model)
        c.data = cdl.config.section("data", "vqa", path="easy-vqa", seq_len=80, image_size=64, image_tokens=tokens)
        c.eval.size = 2048
        return c
    if arg != "paper":
        raise unknown("argument of configs/vlm.py", arg, ["small", "paper"])
    c.T = 5000
    c.eta_ref = 5e-3  # Appendix B
    c.init = "weights/siglip2,weights/smollm2"
    c.model = cdl.config.section("model", "vlm", **vlm.arguments("paper", 49152, context=8192, dtype="bfloat16"))
    c.data = cdl.config.section("data", "vqa", path="data/cauldron", tokenizer="weights/smollm2/tokenizer.json")
    c.data.update(batch_size=64, seq_len=1024, image_size=512, images=8, image_tokens=vlm.image_tokens(c.model))
    c.eval.size = 1 << 17
    c.mesh.data = -1
    c.compute.remat = "full"
    return c


def sweep(arg: str = "small") -> list[dict[str, Any]]:
    """Three rates (section 5.4: "three values of eta_ref"), horizons up to the paper's 14.4 thousand."""
    if arg == "small":
        return product(eta_ref=[0.03, 0.1, 0.3], T=[500, 800, 1200, 1800, 2700])
    return product(eta_ref=[1e-3, 5e-3, 2e-2], T=[900, 1600, 2500, 3600, 6400, 10_000, 14_400])
