"""Figure 12: training and test loss against 1/sqrt(T), within an epoch and over many.

    python experiments/fig12_overfitting.py [--scale=laptop|gpu|paper]

`laptop`: a ViT of 30 thousand parameters and a narrow ResNet-18 within one epoch of scikit-learn's digits (1,617
images, 4 an update, mean of three seeds), and a narrow ResNet-50 over up to 60 epochs. `gpu`: the same, wider and
longer. `paper`: ViT-B/16 and ResNet-18 and -50 on ImageNet, ResNet-50 on CIFAR-10 up to 820 epochs (Appendix D.1).
Training loss is the mean over the last 5% of updates. See experiments/paper.py for options.
"""

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from paper import Claim, Lab, Outcome, Sweep, config, main

import cdl.config
from cdl.laws.horizon import fit_line
from cdl.models import resnet, vit
from cdl.plots import finish
from cdl.sweep.grid import product

GOOD = 0.95
DIGITS = 1617  # images to learn from
EPOCHS = {"laptop": [1, 2, 5, 10, 20, 60], "gpu": [1, 3, 10, 30, 100, 300]}


def sweeps(scale: str) -> dict[str, Sweep]:
    """Panel -> runs."""
    if scale == "paper":
        within = {"ViT": "vit.py:imagenet", "ResNet18": "resnet18.py:imagenet", "ResNet50": "resnet50.py:imagenet"}
        made = {name: Sweep(f"{name.lower()}-imagenet", *config(file)) for name, file in within.items()}
        return made | {"many epochs": Sweep("resnet50-cifar10", *config("resnet50.py:cifar10"))}
    laptop = scale == "laptop"
    short = [60, 100, 160, 250, 400]  # an epoch is 404 updates
    grid = product(seed=[0, 1, 2], T=short)
    small = config("vit.py:digits")[0]
    size = "30k/2" if laptop else "100k/2"
    small.model = cdl.config.section("model", "vit", **vit.arguments(size, image_size=8, classes=10, pool="mean"))
    small.schedule.warmup = 0.0
    small.eta_ref, small.data.batch_size, small.eval.times = 0.15, 4, 1
    wide = small.copy_and_resolve_references()
    width = 8 if laptop else 64
    wide.model = cdl.config.section("model", "resnet", **resnet.arguments(18, stem="cifar", classes=10, width=width))
    wide.data.image_size = 8
    deep = config("resnet50.py:digits")[0]
    width = 4 if laptop else 32
    deep.model = cdl.config.section("model", "resnet", **resnet.arguments(50, stem="cifar", classes=10, width=width))
    deep.data.batch_size = 32
    epoch = DIGITS / deep.data.batch_size
    long = [{"T": round(n * epoch)} for n in EPOCHS[scale]]
    return {
        "ViT": Sweep("vit-digits", small, grid),
        "ResNet18": Sweep("resnet18-digits", wide, grid),
        "many epochs": Sweep("resnet50-digits", deep, long),
    }


def experiment(lab: Lab) -> Outcome:
    """Train, fit and draw."""
    figure = Figure(figsize=(4.4 * len(sweeps(lab.scale)), 4.2), layout="constrained")
    panels = sweeps(lab.scale)
    numbers: dict[str, Any] = {}
    lost = 0
    for ax, (name, sweep) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        table = lab.train(sweep).table
        lost += int((table["status"] != "done").sum())
        runs = table[table["status"] == "done"].groupby("T")[["train_loss", "loss"]].mean().reset_index()
        epochs = runs["T"] * table["data.batch_size"].iloc[0] / _epoch(lab.scale, name)
        numbers[name] = dict(T=runs["T"], epochs=epochs)
        for column, label, color in (("train_loss", "training", "tab:blue"), ("loss", "test", "tab:red")):
            T, loss = runs["T"].to_numpy(float), runs[column].to_numpy(float)
            line = fit_line(T, loss)
            numbers[name][label] = dict(loss=loss, L_inf=line.L_inf, Q=line.Q, r2=line.r2)
            x = np.linspace(0, T.min() ** -0.5, 50)
            ax.plot(x, line.L_inf + line.Q * x, "-", lw=1, color=color)
            ax.plot(T**-0.5, loss, "o", ms=5, color=color, label=f"{label}, $R^2$ = {line.r2:.3f}")
        for x, n in zip(runs["T"] ** -0.5, epochs, strict=True):
            ax.annotate(f"{n:.2g}", (x, 0.01), xycoords=("data", "axes fraction"), fontsize=7, color="#666666")
        ax.set(xlabel="$1/\\sqrt{T}$ (grey: epochs)", ylabel="loss" if name == "ViT" else None, xlim=(0, None))
        ax.set_title(name, loc="left", fontsize=10)
        finish(ax)
    within = {name: x for name, x in numbers.items() if name != "many epochs"}
    many = numbers["many epochs"]
    lowest = int(np.argmin(many["test"]["loss"]))
    risen = many["test"]["loss"][-1] / many["test"]["loss"][lowest] - 1
    listed = "; ".join(f"{n}: R2 {x['training']['r2']:.3f} and {x['test']['r2']:.3f}" for n, x in within.items())
    return Outcome(
        figure,
        numbers,
        [
            Claim(
                "Within an epoch, training and test loss are both lines in 1/sqrt(T)",
                f"training and test, {listed}" + (f"; {lost} runs diverged" if lost else ""),
                not lost and all(x[which]["r2"] >= GOOD for x in within.values() for which in ("training", "test")),
            ),
            Claim(
                "Over many epochs the training loss still is a line in 1/sqrt(T)",
                f"R2 {many['training']['r2']:.3f} up to {many['epochs'].iloc[-1]:.0f} epochs",
                many["training"]["r2"] >= GOOD,
            ),
            Claim(
                "Over many epochs the test loss is not: overfitting bends it up",
                f"R2 {many['test']['r2']:.3f}; lowest after {many['epochs'].iloc[lowest]:.0f} epochs, {risen:.1%} "
                f"above that at the end",
                bool(risen > 0.02),
            ),
        ],
    )


def _epoch(scale: str, name: str) -> int:
    if scale != "paper":
        return DIGITS
    return 50_000 if name == "many epochs" else 1_281_167


if __name__ == "__main__":
    main(__file__, __doc__, experiment)
