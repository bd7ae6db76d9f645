"""A vision-language model in Flax NNX, built as nanoVLM (Wiedmann et al., 2025) is: patches of images by SigLIP, packed
and projected into the sequence of token embeddings that Llama reads."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from cdl.compute import Compute
from cdl.errors import UserError, unknown
from cdl.models import llama, siglip
from cdl.models.llama import Llama
from cdl.models.siglip import Siglip
from cdl.models.transformer import check_positive, dense, dtype_of
from cdl.sharding import BATCH, ShardingRule, constrain

__all__ = ["FIELDS", "SHARDING", "SIZES", "VLM", "arguments", "image_tokens", "parts"]

# name: size of the vision model, size of images, factor of the pixel shuffle, size of the language model.
SIZES = {
    "250k": ("100k/8", 64, 2, "120k"),
    "paper": ("base/16", 512, 4, "360M"),  # Appendix B, "Section 5"
}

# part: argument of its model -> argument of ours. Those that data have to fit go by the names of other models.
_SHARED = ("image_size", "patch", "vocab_size", "context", "dtype")
FIELDS = {
    part: {name: name if name in _SHARED else f"{part}_{name}" for name in module.arguments()}
    for part, module in (("vision", siglip), ("text", llama))
}

SHARDING = (
    ShardingRule(r"projector/kernel$", ("tensor", "fsdp")),
    *siglip.SHARDING,
    *llama.SHARDING,
)


def arguments(size: str = "250k", vocab_size: int = 256, context: int = 64, dtype: str = "float32") -> dict[str, Any]:
    """The arguments of `VLM` for a named size. "paper" is siglip2-base-patch16-512 and SmolLM2-360M.

    >>> paper = arguments("paper", vocab_size=49152, context=8192)
    >>> paper["image_size"], paper["vision_d_model"], paper["text_d_model"], image_tokens(paper)
    (512, 768, 960, 64)
    """
    if size not in SIZES:
        raise unknown("size of vlm", size, SIZES)
    vision, image_size, shuffle, text = SIZES[size]
    made = {
        "vision": siglip.arguments(vision, image_size, dtype),
        "text": llama.arguments(text, vocab_size, context, dtype),
    }
    named = {FIELDS[part][name]: value for part in made for name, value in made[part].items()}
    return named | dict(shuffle=shuffle)


def parts(section: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The sections of the vision and the language model in a section with all of ours, by the path of their weights."""
    names = {"vision": "siglip", "text": "llama"}
    return {
        part: dict(name=names[part]) | {own: section[field] for own, field in fields.items()}
        for part, fields in FIELDS.items()
    }


def image_tokens(section: Mapping[str, Any]) -> int:
    """How many positions of a sequence an image takes.

    Raises:
      UserError: a size that is not positive, or its patches cannot be packed.
    """
    image_size, patch, shuffle = (section[name] for name in ("image_size", "patch", "shuffle"))
    check_positive(image_size=image_size, patch=patch, shuffle=shuffle)
    if image_size % (patch * shuffle):
        raise UserError(
            f"model.image_size={image_size} must be a multiple of model.patch={patch} times model.shuffle={shuffle}"
        )
    return (image_size // patch // shuffle) ** 2


class VLM(nnx.Module):
    """Images and tokens -> logits_BxSxV, float32.

    image_BxMxHxWxC: M images of each row, float32, standardised. tokens_BxS: whole numbers below `vocab_size`.
    slot_BxS: which of the row's image tokens stands at a position, from 0 on, image by image; -1 where the token itself
    does.

    A row that is padded has its padding on the right. Attention is causal, so no position before it sees it, and it
    needs no mask; its own logits are for nothing.

    Arguments are those of `arguments`: of `Siglip` with the prefix "vision_", of `Llama` with "text_". Weights lie
    under ``vision``, ``projector`` and ``text``; the projector's are drawn from N(0, 0.02^2), and it has no bias.

    Raises:
      UserError: sizes that do not fit, as of `Siglip` and `Llama`; patches that cannot be packed; an image that is
        longer than the context. When called, images of another size, or more tokens than the context.
    """

    def __init__(self, *, compute: Compute, rngs: nnx.Rngs, **section: Any):
        n = image_tokens(section)
        self.shuffle, self.context = section["shuffle"], section["context"]
        self._check_fits(n, "an image")
        own = {part: {k: v for k, v in s.items() if k != "name"} for part, s in parts(section).items()}
        self.vision = Siglip(**own["vision"], compute=compute, rngs=rngs, prefix="vision_")
        d_in, d_out = section["vision_d_model"] * self.shuffle**2, section["text_d_model"]
        self.projector = dense(d_in, d_out, 0.02, dtype_of(section["dtype"]), rngs, bias=False)
        self.text = Llama(**own["text"], compute=compute, rngs=rngs, prefix="text_")

    def __call__(
        self, image_BxMxHxWxC: jax.Array, tokens_BxS: jax.Array, slot_BxS: jax.Array, train: bool = False
    ) -> jax.Array:
        del train  # nothing differs
        B, M = image_BxMxHxWxC.shape[:2]
        image_NxHxWxC = constrain(image_BxMxHxWxC.reshape(B * M, *image_BxMxHxWxC.shape[2:]), BATCH)
        packed_NxIxP = _packed(self.vision(image_NxHxWxC), self.shuffle)
        projected = self.projector(packed_NxIxP.reshape(-1, packed_NxIxP.shape[-1]))
        image_BxIxD = constrain(projected.reshape(B, -1, projected.shape[-1]), BATCH)
        self._check_fits(image_BxIxD.shape[1], f"{M} images")
        self._check_fits(tokens_BxS.shape[1], "a row")
        return self.text.decode(_placed(self.text.embed(tokens_BxS), image_BxIxD, slot_BxS))

    def _check_fits(self, tokens: int, what: str) -> None:
        if tokens > self.context:
            raise UserError(f"model.context={self.context} is too small for {what} of {tokens} tokens; raise it")


def _packed(x_NxSxD: jax.Array, factor: int) -> jax.Array:
    """Pixel shuffle: the patches of each square of factor x factor as one token, [N, S / factor^2, factor^2 D]; squares
    by rows, and within one its patches by rows."""
    N, S, D = x_NxSxD.shape
    side = round(S**0.5) // factor
    x = x_NxSxD.reshape(N, side, factor, side, factor, D)
    return jnp.moveaxis(x, 3, 2).reshape(N, side * side, factor * factor * D)


def _placed(x_BxSxD: jax.Array, image_BxIxD: jax.Array, slot_BxS: jax.Array) -> jax.Array:
    """x with image tokens where a slot names one, as float32. A slot beyond them reads as NaN."""
    taken_BxSxD = jnp.take_along_axis(image_BxIxD, jnp.maximum(slot_BxS, 0)[..., None], axis=1, mode="fill")
    return constrain(jnp.where(slot_BxS[..., None] >= 0, taken_BxSxD.astype(x_BxSxD.dtype), x_BxSxD), BATCH)
