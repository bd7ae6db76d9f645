"""experiments/RESULTS.md: claim by claim, what the paper says and what came out, from what the scripts have written.

    python experiments/results.py runs/paper-laptop [more folders]

Numbers, figures and tables are copied to experiments/results/, in the place of those of the same scripts and scales,
and the page is of all that is there.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from paper import ROOT

VERDICT = {True: "agrees", False: "**disagrees**", None: "not tested"}
RESULTS, PAGE = ROOT / "experiments" / "results", ROOT / "experiments" / "RESULTS.md"

INTRODUCTION = """# What the paper says, and what came out here

`make paper-laptop` runs every script and writes this page (`python experiments/results.py`). Each row is a claim of
the paper, what its script measured, at which scale, and whether the two agree by the threshold in the script. A
disagreement is a result.

"laptop" is models of 30 thousand to a million parameters on data that packages ship, trained on {machines}. It can
refute what is said of all models, and cannot confirm what is said of large ones. Its horizons are shorter than those of
which the paper says that the law holds (T > 2,500 for GPT-2), and its smallest models are still on the plateaus of
early training. "paper" is the paper's own setting: Figures 6 and 7 and Tables 2 and 6 are of published runs there, and
the others train with data and devices at hand. Each section below says on what its runs were trained.

| | claim of the paper | here | scale | |
|---|---|---|---|---|
"""


def main() -> None:
    """Take over what folders have, and write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folders", nargs="*", type=Path, metavar="DIR", help="what scripts wrote to (--out)")
    for folder in parser.parse_args().folders:
        take_over(folder)
    found = [json.loads(file.read_text()) for file in RESULTS.glob("*.json")]
    if not found:
        sys.exit(f"{RESULTS} holds no numbers of a script; run one, such as python experiments/fig01_exam.py")
    found.sort(key=lambda x: (x["script"], x["scale"]))
    trained = [x for x in found if x["machine"] and x["scale"] == "laptop"]
    machines = " and ".join(sorted({x["machine"] for x in trained}))
    versions = trained[-1]["versions"] if trained else {}
    said = ", ".join(f"{name} {versions[name]}" for name in ("jax", "flax", "optax", "python") if name in versions)
    rows = [row(x, claim) for x in found for claim in x["claims"]]
    agree = [claim["agrees"] for x in found for claim in x["claims"]]
    count = f"\n{agree.count(True)} claims agree, {agree.count(False)} disagree, {agree.count(None)} not tested.\n"
    page = INTRODUCTION.format(machines=f"{machines} ({said})") + "\n".join(rows) + "\n" + count
    PAGE.write_text(page + "\n" + "\n".join(map(section, found)))
    print(f"{PAGE}:{count}", end="")


def take_over(folder: Path) -> None:
    """Copy what scripts have written to a folder; of other scripts and scales, what is there stays."""
    files = sorted([*folder.glob("fig*.json"), *folder.glob("tab*.json")])
    if not files:
        sys.exit(f"{folder} holds no numbers of a script; run one, such as python experiments/fig01_exam.py")
    RESULTS.mkdir(exist_ok=True)
    for file in files:
        scale = json.loads(file.read_text())["scale"]
        for kind in (".json", ".png", ".md"):
            written, kept = file.with_suffix(kind), RESULTS / f"{file.stem}-{scale}{kind}"
            if written.is_file():
                shutil.copyfile(written, kept)
            else:
                kept.unlink(missing_ok=True)


def row(x: dict[str, Any], claim: dict[str, Any]) -> str:
    """Of the table: a claim of a script."""
    label, _, _ = x["title"].partition(":")
    cells = [label, claim["paper"], claim["here"], x["scale"], VERDICT[claim["agrees"]]]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def section(x: dict[str, Any]) -> str:
    """What a script has shown."""
    took = f", {x['runs']} runs of {x['run_seconds']:,.0f} s in all on {x['machine']}" if x["runs"] else ""
    part = [f"## {x['title']} ({x['scale']})", "", f"`{x['command']}`{took}.", ""]
    name = f"{x['script']}-{x['scale']}"
    if (RESULTS / f"{name}.png").is_file():
        part += [f"![{x['title']}](results/{name}.png)", ""]
    if (RESULTS / f"{name}.md").is_file():
        part += [(RESULTS / f"{name}.md").read_text().rstrip(), ""]
    return "\n".join(part)


if __name__ == "__main__":
    main()
