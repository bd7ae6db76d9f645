"""Figure 4: GPT-2 on text with AdamW under four schedules, losses predicted by (3.1).

    python experiments/fig04_gpt2_adamw.py [--scale=laptop|gpu|paper]

`laptop`: 120 thousand parameters, 2,000 updates, the source of Python's standard library. `gpu`: 29 million. `paper`:
124M on OpenWebText (Appendix B). Peak rate 2e-3 as in the paper. See experiments/paper.py for options.
"""

from four_schedules import four_schedules
from gpt2_runs import FOUR_SCHEDULES, one_run
from paper import Lab, Outcome, Sweep, at_peak, main

PEAK = 2e-3  # Appendix B


def sweeps(scale: str) -> list[Sweep]:
    """Four runs."""
    c = one_run(scale, "adamw")
    T = 2000 if scale == "laptop" else 5000
    c.eval.times = 100
    return [Sweep("gpt2-adamw-schedules", c, [x | at_peak(PEAK, T) for x in FOUR_SCHEDULES.values()])]


def experiment(lab: Lab) -> Outcome:
    """Train, fit and draw."""
    return four_schedules(lab, sweeps(lab.scale)[0], list(FOUR_SCHEDULES), "GPT-2 with AdamW")


if __name__ == "__main__":
    main(__file__, __doc__, experiment)
