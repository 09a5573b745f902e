"""`xkv text`: a file's text as it is compressed."""

from __future__ import annotations

import sys
from pathlib import Path

import click


@click.command()
@click.argument("file", type=click.Path(exists=True, path_type=Path))
def text(file: Path) -> int:
    """Print the text of a FILE with one document, exactly as `xkv precompute` compresses it.

    A prompt is served from the artifact if it begins with this text. Of txt, md and rst that is the file
    itself without a byte order mark; of html and pdf it is what can be read of them.

    \b
    Example:
      xkv text handbook.pdf > handbook.txt

    Exit status: 0 printed, 1 it cannot be read, 2 wrong usage.
    """
    from xkv_workers.on_demand import read_document

    sys.stdout.buffer.write(read_document(file).text.encode())
    sys.stdout.buffer.flush()
    return 0
