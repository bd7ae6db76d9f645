"""Figure 9: final loss of GPT-2 with Muon-NSGD against 1/sqrt(T), for several reference rates.

    python experiments/fig09_gpt2_muon_horizons.py [--scale=laptop|gpu|paper]

`laptop`: 120 thousand parameters, horizons of 100 to 1,600 updates. `gpu`: 29 million, 500 to 16,000. `paper`: 124M on
OpenWebText, 100 to 500,000 (section 5.2). See experiments/paper.py for options.
"""

from gpt2_runs import GRIDS, one_run
from horizons import horizons
from paper import Lab, Outcome, Sweep, config, main


def sweeps(scale: str) -> list[Sweep]:
    """One grid."""
    if scale == "paper":
        return [Sweep("gpt2-muon_nsgd", one_run(scale, "muon_nsgd"), config("gpt2.py:0.1b-muon")[1])]
    size, grid = next(iter(GRIDS[scale].items()))
    return [Sweep(f"gpt2-muon_nsgd-{size}", one_run(scale, "muon_nsgd", size), grid)]


def experiment(lab: Lab) -> Outcome:
    """Train, fit and draw."""
    paper = dict(best="10 for 0.1B with Muon-NSGD", reach="80 times across horizons")
    return horizons(lab, sweeps(lab.scale)[0], paper)


if __name__ == "__main__":
    main(__file__, __doc__, experiment)
