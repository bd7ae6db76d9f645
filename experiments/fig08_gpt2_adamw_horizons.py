"""Figure 8: final loss of GPT-2 with AdamW against 1/sqrt(T), for several reference rates.

    python experiments/fig08_gpt2_adamw_horizons.py [--scale=laptop|gpu|paper]

`laptop`: 120 thousand parameters, horizons of 500 to 4,000 updates. `gpu`: 29 million, 500 to 16,000. `paper`: 124M on
OpenWebText, 100 to 500,000 (section 5.2). See experiments/paper.py for options.
"""

from gpt2_runs import one_run
from horizons import horizons
from paper import Lab, Outcome, Sweep, config, main

from cdl.sweep.grid import product

GRIDS = {
    "laptop": product(eta_ref=[0.1, 0.2, 0.4], T=[500, 1000, 1600, 2500, 4000]),
    "gpu": product(eta_ref=[0.03, 0.1, 0.3, 1.0], T=[500, 1000, 2000, 4000, 8000, 16_000]),
}


def sweeps(scale: str) -> list[Sweep]:
    """One grid."""
    grid = GRIDS.get(scale) or config("gpt2.py:0.1b-adamw")[1]
    return [Sweep("gpt2-adamw-120k" if scale == "laptop" else "gpt2-adamw", one_run(scale, "adamw"), grid)]


def experiment(lab: Lab) -> Outcome:
    """Train, fit and draw."""
    paper = dict(best="0.3 for 0.1B with AdamW", reach="80 times across horizons")
    return horizons(lab, sweeps(lab.scale)[0], paper)


if __name__ == "__main__":
    main(__file__, __doc__, experiment)
