"""experiments/RESULTS.md: claim by claim, what the paper says and what came out, from what the scripts have written.

    python experiments/results.py runs/paper-laptop [more folders]

Takes the numbers as they are in the folders; figures are copied to experiments/results/.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from paper import ROOT

VERDICT = {True: "agrees", False: "**disagrees**", None: "not tested"}
HERE = ROOT / "experiments"

INTRODUCTION = """# What the paper says, and what came out here

`make paper-laptop` runs every script and writes this page (`python experiments/results.py`). Each row is a claim of
the paper, what its script measured, at which scale, and whether the two agree by the threshold in the script. A
disagreement is a result.

"laptop" is models of 30 thousand to a million parameters on data that packages ship, trained on {machines}. It can
refute what is said of all models, and cannot confirm what is said of large ones. Its horizons are shorter than those of
which the paper says that the law holds (T > 2,500 for GPT-2), and its smallest models are still on the plateaus of
early training. "paper" is the paper's own setting, here on published runs alone; with data and devices at hand
`--scale=paper` trains the others.

| | claim of the paper | here | scale | |
|---|---|---|---|---|
"""


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folders", nargs="+", metavar="DIR", help="what scripts wrote to (--out)")
    folders = [Path(folder) for folder in parser.parse_args().folders]
    found: list[tuple[dict[str, Any], Path]] = []
    for folder in folders:
        files = sorted([*folder.glob("fig*.json"), *folder.glob("tab*.json")])
        if not files:
            sys.exit(f"{folder} holds no numbers of a script; run one, such as python experiments/fig01_exam.py")
        found += [(json.loads(file.read_text()), folder) for file in files]
    found.sort(key=lambda x: (x[0]["script"], x[0]["scale"]))
    trained = [x for x, _ in found if x["machine"]]
    machines = " and ".join(sorted({x["machine"] for x in trained}))
    versions = trained[-1]["versions"] if trained else {}
    said = ", ".join(f"{name} {versions[name]}" for name in ("jax", "flax", "optax", "python") if name in versions)
    rows, sections = [], []
    shutil.rmtree(HERE / "results", ignore_errors=True)
    (HERE / "results").mkdir()
    for x, folder in found:
        script, title = x["script"], x["title"]
        label, _, _ = title.partition(":")
        for claim in x["claims"]:
            cells = [label, claim["paper"], claim["here"], x["scale"], VERDICT[claim["agrees"]]]
            rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        where = f"`{x['command']}`"
        took = f", {x['runs']} runs of {x['run_seconds']:,.0f} s in all" if x["runs"] else ""
        part = [f"## {title} ({x['scale']})", "", f"{where}{took}.", ""]
        figure = folder / f"{script}.png"
        if figure.is_file():
            name = f"{script}-{x['scale']}.png"
            shutil.copyfile(figure, HERE / "results" / name)
            part += [f"![{title}](results/{name})", ""]
        table = folder / f"{script}.md"
        if table.is_file():
            part += [table.read_text().rstrip(), ""]
        sections.append("\n".join(part))
    agree = [claim["agrees"] for x, _ in found for claim in x["claims"]]
    count = f"\n{agree.count(True)} claims agree, {agree.count(False)} disagree, {agree.count(None)} not tested.\n"
    page = INTRODUCTION.format(machines=f"{machines} ({said})") + "\n".join(rows) + "\n" + count
    (HERE / "RESULTS.md").write_text(page + "\n" + "\n".join(sections))
    print(f"{HERE / 'RESULTS.md'}:{count}", end="")


if __name__ == "__main__":
    main()
