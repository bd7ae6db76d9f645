"""Figure 3: ResNet-18 on images with AdamW under four schedules, losses predicted by (3.1).

    python experiments/fig03_resnet_adamw.py [--scale=laptop|gpu|paper]

As Figure 2 but for the optimizer. The narrow network of `laptop` wants a larger rate: there, peak rates are ten times
the paper's. See experiments/paper.py for options.
"""

from four_schedules import four_schedules
from paper import Lab, Outcome, Sweep, at_peak, main
from resnet_runs import SHAPES, one_run

PEAKS = {"linear": 0.0003, "cosine": 0.0003, "cyclic": 0.0003, "wsd": 0.00014}  # Appendix B


def sweeps(scale: str) -> list[Sweep]:
    """Four runs."""
    c = one_run(scale, "adamw")
    factor = 10 if scale == "laptop" else 1
    return [Sweep("resnet18-adamw-schedules", c, [SHAPES[x] | at_peak(factor * PEAKS[x], c.T) for x in PEAKS])]


def experiment(lab: Lab) -> Outcome:
    """Train, fit and draw."""
    return four_schedules(lab, sweeps(lab.scale)[0], list(PEAKS), "ResNet-18 with AdamW", windows=50)


if __name__ == "__main__":
    main(__file__, __doc__, experiment)
