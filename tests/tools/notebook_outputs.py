"""Runs notebooks and stores their outputs, with a hash of the code that made them.

    python tests/tools/notebook_outputs.py notebooks/*.ipynb

The tests compare the hash with the code (was it edited since?), and the words of the outputs with those of a new run
(does the package still say this?).
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parents[2]
#: Where a notebook keeps the hash of the code that made its outputs.
HASH = "outputs_of"
_NUMBER = re.compile(r"[-+]?\d[\d,]*(\.\d+)?(e[-+]?\d+)?%?")
_TEMPORARY = re.compile(r"/\S*?/xsum_study_\w+")


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def source_hash(notebook: NotebookNode) -> str:
    """A hash of all code, in order."""
    return hashlib.sha256("\0".join(cell.source for cell in code_cells(notebook)).encode()).hexdigest()


def execute(path: Path, folder: Path, timeout: int = 300) -> NotebookNode:
    """A notebook, run from start to end in a folder; `timeout` is in seconds, for each cell."""
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(folder)}}
    client = NotebookClient(
        notebook,
        kernel_name="python3",
        timeout=timeout,
        resources=resources,
        record_timing=False,
        coalesce_streams=True,
    )
    return client.execute()


def texts(cell: NotebookNode) -> list[str]:
    """The text of a cell's outputs, without what goes to stderr; a picture is its kind."""
    found = []
    for output in cell.outputs:
        if output.output_type == "stream":
            if output.name == "stdout":
                found.append(output.text)
        elif "image/png" in output.data:
            found.append("picture")
        else:
            found.append(output.data.get("text/markdown", output.data.get("text/plain", "")))
    return found


def words(cell: NotebookNode) -> list[str]:
    """What outputs say beside numbers, paths and the space around them, which vary between machines."""
    found = (_NUMBER.sub("#", _TEMPORARY.sub("PATH", text.replace(str(ROOT), "PATH"))) for text in texts(cell))
    return [re.sub(r"# (h|min) (?=#)", "", re.sub(r"[ -]+", " ", text)).strip() for text in found]


def _shown(cell: NotebookNode) -> list[NotebookNode]:
    """The outputs without stderr and without paths; lines of a console, rich's too, are one stream."""
    found = []
    for output in cell.outputs:
        is_line = output.output_type == "display_data" and set(output.data) == {"text/html", "text/plain"}
        if output.output_type != "stream" and not is_line:
            found.append(output)
        elif is_line or output.name == "stdout":
            text = output.data["text/plain"] if is_line else output.text
            text = _TEMPORARY.sub("OUT", text.replace(str(ROOT), "."))
            if found and found[-1].output_type == "stream":
                found[-1].text += text
            else:
                found.append(nbformat.v4.new_output("stream", name="stdout", text=text))
    return found


def store(path: Path) -> None:
    """Runs a notebook and writes it with its outputs, without paths of this machine."""
    notebook = execute(path, path.parent, timeout=3600)
    for cell in code_cells(notebook):
        cell.metadata.clear()
        cell.outputs = _shown(cell)
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
        HASH: source_hash(notebook),
    }
    nbformat.write(notebook, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="+", type=Path)
    os.environ |= {"PYTHONPATH": str(ROOT), "XSUM_RUNS": str(ROOT / "runs" / "none" / "*")}
    for path in parser.parse_args().notebooks:
        store(path)


if __name__ == "__main__":
    main()
