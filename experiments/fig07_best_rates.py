"""Figure 7: final loss against training tokens at the best peak rate, and the lines' constants against model size.

    python experiments/fig07_best_rates.py [--scale=laptop|gpu]
    python experiments/fig07_best_rates.py --scale=paper --data=svg_extracted_data.csv

See experiments/best_rates.py for what is trained or read, and experiments/paper.py for options.
"""

import numpy as np
from best_rates import lines_at_best_rates, size
from paper import Claim, Lab, Outcome, main
from scipy import stats

from cdl.laws.figures import sizes_figure

SHOWN = 2.007e9  # the 2B model of Figure 7


def experiment(lab: Lab) -> Outcome:
    """Train or read, fit and draw."""
    lines = lines_at_best_rates(lab)
    shown = min(lines, key=lambda N: abs(N - SHOWN)) if lab.scale == "paper" else sorted(lines)[len(lines) // 2]
    line, N = lines[shown], np.array(list(lines))
    worst = float(np.max(np.abs(np.array([line.at(t) for t in line.T]) / line.loss - 1)))
    L_inf, Q = (np.array([getattr(lines[n], name) for n in N]) for name in ("L_inf", "Q"))
    falls = stats.spearmanr(N, L_inf).statistic
    straight = stats.linregress(np.log(N), L_inf).rvalue ** 2
    rises = stats.spearmanr(N, Q).statistic
    enough = len(N) > 3
    return Outcome(
        sizes_figure(lines, shown),
        {"shown": shown, "lines": {size(n): vars(lines[n]) for n in N}},
        [
            Claim(
                "The 2B model fits the line precisely, all losses within 1% of it",
                f"{size(shown)}: R2 {line.r2:.4f}, the worst run {worst:.2%} off, {len(line.T)} horizons",
                worst <= 0.01 if lab.scale == "paper" else None,
            ),
            Claim(
                "As the model grows, L_inf decreases linearly in log N",
                f"rank correlation {falls:+.2f}, R2 of the straight line {straight:.3f} over {len(N)} sizes"
                + ("" if enough else ": too few to tell"),
                bool(falls < 0 and straight > 0.9) if enough else None,
            ),
            Claim(
                "As the model grows, the slope 2 q1 q2 roughly increases",
                f"rank correlation {rises:+.2f} over {len(N)} sizes" + ("" if enough else ": too few to tell"),
                bool(rises > 0) if enough else None,
            ),
        ],
    )


if __name__ == "__main__":
    main(__file__, __doc__, experiment, of_published=True)
