"""Figure 11: final loss of a vision-language model against 1/sqrt(T), for three reference rates.

    python experiments/fig11_vlm.py [--scale=laptop|gpu|paper]

`laptop`: 250 thousand parameters drawn at random, on pictures and questions of the package easy-vqa. `gpu`: the same
data and horizons of up to 16,000 updates. `paper`: siglip2-base-patch16-512 and SmolLM2-360M-Instruct on The Cauldron
(section 5.4; configs/vlm.py says what has to be there). The projector's rate is a hundred times that of the other
parts. See experiments/paper.py for options.
"""

from horizons import horizons
from paper import Lab, Outcome, Sweep, config, main

from cdl.sweep.grid import product

GPU_GRID = product(eta_ref=[0.03, 0.1, 0.3], T=[500, 1000, 2000, 4000, 8000, 16_000])


def sweeps(scale: str) -> list[Sweep]:
    """One grid."""
    c, grid = config(f"vlm.py:{'paper' if scale == 'paper' else 'small'}")
    return [Sweep("vlm", c, GPU_GRID if scale == "gpu" else grid)]


def experiment(lab: Lab) -> Outcome:
    """Train, fit and draw."""
    paper = dict(best="which of three is best is not said", reach="no factor is said for these models")
    return horizons(lab, sweeps(lab.scale)[0], paper)


if __name__ == "__main__":
    main(__file__, __doc__, experiment)
