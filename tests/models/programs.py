"""What tests of models share: quick compilation, and a look at the products of a program."""

from collections.abc import Callable, Iterator
from typing import Any

import jax


def compiled(f: Callable[..., Any]) -> Callable[..., Any]:
    """`jax.jit(f)`, compiled in half the time, for programs that run once."""
    return jax.jit(f, compiler_options={"xla_backend_optimization_level": 0})


def products(jaxpr: Any) -> Iterator[list[Any]]:
    """The dtypes that go into each matrix product and convolution of a program, inner programs included."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("dot_general", "conv_general_dilated"):
            yield [x.aval.dtype for x in equation.invars]
        for value in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from products(inner)
