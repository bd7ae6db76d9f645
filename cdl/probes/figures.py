"""The figure of a probe. Touches no global state."""

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cdl.plots import GREY, finish, palette

if TYPE_CHECKING:  # what is drawn draws itself by this function
    from cdl.probes.result import Probe

__all__ = ["probe_figure"]


def probe_figure(probe: "Probe") -> Figure:
    """Nine panels: loss and gaps; weak convexity, gradients, distances; eigenvalues, and the loss along lines."""
    figure = Figure(figsize=(13.5, 10.5), layout="constrained")
    axes = figure.subplots(3, 3)
    draw = (_loss, _gaps, _share, _modulus, _gradients, _distances, _curvature, _segments, _rays)
    for ax, panel in zip(axes.ravel(), draw, strict=True):
        panel(ax, probe)
    figure.suptitle(probe.name, fontsize=11)
    return figure


def _loss(ax: Axes, probe: "Probe") -> None:
    ax.plot(probe.step_P, probe.path.loss_P, "o-", ms=3, lw=1.3)
    _mark(ax, probe)
    ax.set(xlabel="step", ylabel="loss (sample of training data)")
    _finish(ax, "Loss at the iterates", legend=probe.convex_from is not None)


def _gaps(ax: Axes, probe: "Probe") -> None:
    """All pairs. Iterates need not be evenly spaced, so the axes count them and are labelled by step."""
    P = len(probe.step_P)
    image = ax.imshow(probe.path.relative_PxP, cmap="RdBu_r", vmin=-1, vmax=1, origin="lower", aspect="auto")
    ticks = np.unique(np.linspace(0, P - 1, min(P, 6)).round().astype(int))
    ax.set(xticks=ticks, yticks=ticks, xlabel="step s", ylabel="step t (tangent)")
    ax.set_xticklabels([f"{probe.step_P[i]}" for i in ticks])
    ax.set_yticklabels([f"{probe.step_P[i]}" for i in ticks])
    ax.figure.colorbar(image, ax=ax, shrink=0.9)
    ax.set_title("Relative gap (blue: convex)", loc="left", fontsize=11)


def _share(ax: Axes, probe: "Probe") -> None:
    path = probe.path
    ax.plot(probe.step_P[:-1], path.star_P()[:-1], "o-", ms=3, lw=1.2, label="towards the last iterate")
    if path.lowest != len(path.loss_P) - 1:
        others = np.arange(len(path.loss_P)) != path.lowest
        star_P = path.star_P(path.lowest)
        ax.plot(probe.step_P[others], star_P[others], ".--", ms=3, lw=1, label="towards the lowest")
    ax.axhline(0, color=GREY, lw=0.8)
    ax.set(xlabel="step", ylabel="gap")
    ax.set_yscale("symlog", linthresh=max(10 * probe.tolerance, 1e-6))
    share = ax.twinx()
    share.plot(probe.step_P, 100 * path.share_P(probe.tolerance), color="tab:green", lw=1.2)
    share.set_ylabel("convex pairs from here on (%)", color="tab:green")
    share.spines["top"].set_visible(False)
    _finish(ax, "Star-convexity gaps (below 0: convex)")


def _modulus(ax: Axes, probe: "Probe") -> None:
    both = ((probe.rho_P, "tangent here, iterates after it"), (probe.rho_both_P, "all pairs from here on"))
    for rho_P, label in both:
        ax.plot(probe.step_P, rho_P, "o-", ms=3, lw=1.2, label=label)
    positive = [rho_P[rho_P > 0] for rho_P, _ in both]
    if any(map(len, positive)):
        ax.set_yscale("symlog", linthresh=float(min(x.min() for x in positive if len(x))))
    ax.set(xlabel="step", ylabel="$\\rho$")
    _finish(ax, "Weak-convexity modulus (0: convex)")


def _gradients(ax: Axes, probe: "Probe") -> None:
    path = probe.path
    ax.plot(probe.step_P, path.mean_square_P**0.5, "o-", ms=3, lw=1.2, label="mini-batches, root mean square")
    ax.plot(probe.step_P, path.norm_P, "o-", ms=3, lw=1.2, label="the whole sample")
    ax.axhline(path.G, color=GREY, lw=0.9, ls="--", label=f"G = {path.G:.3g}")
    ax.set(xlabel="step", ylabel="gradient norm", yscale="log")
    ax.set_ylim(top=4 * path.G)  # for the legend
    _finish(ax, "Gradient norms and the bound G of (2.2)")


def _distances(ax: Axes, probe: "Probe") -> None:
    distance_PxP = probe.path.distance_PxP
    ax.plot(probe.step_P, distance_PxP[0], "o-", ms=3, lw=1.2, label="$|w_0 - w_t|$")
    ax.plot(probe.step_P, distance_PxP[:, -1], "o-", ms=3, lw=1.2, label="$|w_t - w_T|$")
    ax.set(xlabel="step", ylabel="distance")
    _finish(ax, "Distances")


def _curvature(ax: Axes, probe: "Probe") -> None:
    if not probe.bends:
        ax.set_axis_off()
        return
    step = [int(probe.step_P[b.index]) for b in probe.bends]
    for name, color in (("largest", "tab:red"), ("smallest", "tab:blue")):
        value = [getattr(b.spectrum, name) for b in probe.bends]
        error = [getattr(b.spectrum, f"{name}_error") for b in probe.bends]
        ax.errorbar(step, value, yerr=error, fmt="o-", ms=4, lw=1.2, capsize=2, color=color, label=name)
    ax.axhline(0, color=GREY, lw=0.8)
    ax.set(xlabel="step", ylabel="eigenvalue")
    size = max(abs(b.spectrum.largest) for b in probe.bends) or 1.0
    ax.set_yscale("symlog", linthresh=10.0 ** np.floor(np.log10(0.1 * size)))
    stable = ax.twinx()
    stable.plot(step, [x for _, x in probe.sharpness], "s--", ms=4, lw=1, color="tab:green")
    stable.axhline(2, color="tab:green", lw=0.8, ls=":")
    stable.set_ylabel("rate x largest (dots: 2)", color="tab:green")
    stable.set_ylim(0, max(2.4, 1.1 * max(x for _, x in probe.sharpness)))
    stable.spines["top"].set_visible(False)
    _finish(ax, "Ends of the Hessian's spectrum")


def _segments(ax: Axes, probe: "Probe") -> None:
    for a, b, line in probe.segments:
        label = f"step {probe.step_P[a]} to {probe.step_P[b]}"
        ax.plot(line.at_N, line.loss_N, "o-", ms=3, lw=1.2, label=label)
    ax.set(xlabel="share of the way", ylabel="loss")
    _finish(ax, "Loss on the segment to the last iterate")


def _rays(ax: Axes, probe: "Probe") -> None:
    if not probe.bends:
        ax.set_axis_off()
        return
    color = palette([b.index for b in probe.bends], "viridis")
    for b in probe.bends:
        # Lengths and losses differ by factors between iterates; the shape is what counts.
        fall_N = b.slope.loss_N - b.slope.loss_N[0]
        label = f"step {probe.step_P[b.index]}, {b.slope.at_N[-1] * b.slope.length:.2g} long"
        scale = max(np.abs(fall_N).max(), np.finfo(float).tiny)
        ax.plot(b.slope.at_N / b.slope.at_N[-1], fall_N / scale, "o-", ms=2, lw=1.2, color=color[b.index], label=label)
    ax.axhline(0, color=GREY, lw=0.8)
    ax.set(xlabel="share of the line", ylabel="change of the loss, over its largest")
    _finish(ax, "Loss against the gradient's direction")


def _mark(ax: Axes, probe: "Probe") -> None:
    if probe.convex_from is not None:
        ax.axvline(probe.convex_from, color=GREY, lw=0.9, ls="--", label=f"convex from step {probe.convex_from}")


def _finish(ax: Axes, title: str, legend: bool = True) -> None:
    ax.set_title(title, loc="left", fontsize=11)
    finish(ax, legend=legend)
