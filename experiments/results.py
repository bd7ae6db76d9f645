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

`make paper-laptop` runs every script and writes this page (`python experiments/results.py`). Each row is a claim of the
paper, what its script measured, at which scale, and whether the two agree by the threshold in the script. "laptop" is
{device}: models of 30 thousand to a million parameters on data that packages ship. It can refute what is said of all
models, and cannot confirm what is said of large ones; `--scale=paper` runs the paper's own settings, on data and
devices that have to be there. A disagreement is a result.

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
    devices = {x["device"] for x, _ in found if x["device"]}
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
        trained = f", {x['runs']} runs of {x['run_seconds']:,.0f} s in all on {x['device']}" if x["runs"] else ""
        part = [f"## {title}", "", f"{where}{trained}.", ""]
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
    page = INTRODUCTION.format(device=" and ".join(sorted(devices))) + "\n".join(rows) + "\n" + count
    (HERE / "RESULTS.md").write_text(page + "\n" + "\n".join(sections))
    print(f"{HERE / 'RESULTS.md'}:{count}", end="")


if __name__ == "__main__":
    main()
