"""Figure 2: ResNet-18 on images with SGD under four schedules, losses predicted by (3.1).

    python experiments/fig02_resnet_sgd.py [--scale=laptop|gpu|paper]

`laptop`: a ResNet-18 of width 8 on scikit-learn's digits, shifted and mirrored at random, 1,000 updates of 32 images.
`gpu`: width 64, 5,000 updates of 256. `paper`: ImageNet in data/imagenet, 5,000 updates of 256. Peak rates are the
paper's (Appendix B). See experiments/paper.py for options.
"""

from four_schedules import four_schedules
from paper import Lab, Outcome, Sweep, at_peak, main
from resnet_runs import SHAPES, one_run

PEAKS = {"linear": 0.225, "cosine": 0.225, "cyclic": 0.056, "wsd": 0.113}  # Appendix B


def sweeps(scale: str) -> list[Sweep]:
    """Four runs."""
    c = one_run(scale, "sgd")
    return [Sweep("resnet18-sgd-schedules", c, [SHAPES[x] | at_peak(PEAKS[x], c.T) for x in PEAKS])]


def experiment(lab: Lab) -> Outcome:
    """Train, fit and draw."""
    return four_schedules(lab, sweeps(lab.scale)[0], list(PEAKS), "ResNet-18 with SGD", windows=50)


if __name__ == "__main__":
    main(__file__, __doc__, experiment)
