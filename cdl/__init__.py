"""Convex dominance in deep learning: bounds, laws and sweeps of loss and learning rate.

The names below load what they need when they are first used, so that a notebook that wants one pays for one.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cdl.cli_sweep import run_sweep
    from cdl.errors import UserError
    from cdl.laws.curve import fit_curve
    from cdl.laws.horizon import fit_horizon
    from cdl.laws.peak import fit_peak
    from cdl.laws.records import read_runs
    from cdl.laws.scaling import fit_scaling
    from cdl.planning import plan
    from cdl.probing import probe
    from cdl.report import write_report
    from cdl.schedules import optax_schedule, schedule
    from cdl.sweep.store import sweep_table
    from cdl.theory.bounds import average_bound, bound, bound_curve
    from cdl.theory.exam import exam
    from cdl.theory.optimal import best_peak

__all__ = [
    "UserError",
    "average_bound",
    "best_peak",
    "bound",
    "bound_curve",
    "exam",
    "fit_curve",
    "fit_horizon",
    "fit_peak",
    "fit_scaling",
    "optax_schedule",
    "plan",
    "probe",
    "read_runs",
    "run_sweep",
    "schedule",
    "sweep_table",
    "write_report",
]

_HOME = {
    "UserError": "cdl.errors",
    "average_bound": "cdl.theory.bounds",
    "best_peak": "cdl.theory.optimal",
    "bound": "cdl.theory.bounds",
    "bound_curve": "cdl.theory.bounds",
    "exam": "cdl.theory.exam",
    "fit_curve": "cdl.laws.curve",
    "fit_horizon": "cdl.laws.horizon",
    "fit_peak": "cdl.laws.peak",
    "fit_scaling": "cdl.laws.scaling",
    "optax_schedule": "cdl.schedules",
    "plan": "cdl.planning",
    "probe": "cdl.probing",
    "read_runs": "cdl.laws.records",
    "run_sweep": "cdl.cli_sweep",
    "schedule": "cdl.schedules",
    "sweep_table": "cdl.sweep.store",
    "write_report": "cdl.report",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'cdl' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
