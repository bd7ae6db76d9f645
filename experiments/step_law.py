"""The seven configurations of Tables 4 and 5 in the published runs of Li et al. (2025), GitHub step-law/steplaw."""

import pandas as pd

# Panel of the figure: file, and model size in billions of parameters -> the columns that select the runs.
PANELS: dict[str, tuple[str, dict[str, dict[str, int]]]] = {
    "Dense": (
        "dense_lr_bs_loss.csv",
        {
            "1.07B": dict(h=2048, ffnh=8192, numh=16, numl=16, bs=352, ti=27743),
            "0.54B": dict(h=1280, ffnh=9048, numh=10, numl=13, bs=352, ti=39464),
            "0.43B": dict(h=1280, ffnh=9472, numh=10, numl=10, bs=512, ti=21696),
            "0.21B": dict(h=960, ffnh=9368, numh=15, numl=7, bs=128, ti=76293),
        },
    ),
    "MoE": (
        "moe_lr_bs_loss.csv",
        {
            "2.16B, 8 experts": dict(nume=8, moeh=2888, sed=8664, bs=32, ti=30517),
            "2.15B, 88 experts": dict(nume=88, moeh=352, sed=704, bs=32, ti=30517),
            "2.15B, 89 experts": dict(nume=89, moeh=352, sed=352, bs=32, ti=30517),
        },
    ),
}


def select(runs: pd.DataFrame, configuration: dict[str, int]) -> pd.DataFrame:
    """The runs of one configuration, as `cdl.fit_peak` takes them."""
    these = runs[(runs[list(configuration)] == pd.Series(configuration)).all(axis=1)]
    return pd.DataFrame({"eta": these["lr"], "T": these["ti"], "loss": these["smooth loss"]})
