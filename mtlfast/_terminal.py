"""Plain text that fits the terminal."""

import shutil
import textwrap


def width() -> int:
    """The characters of a line: $COLUMNS, or the terminal's, or 160 where the output goes elsewhere."""
    return shutil.get_terminal_size(fallback=(160, 24)).columns


def hanging(head: str, text: str) -> str:
    """`text` after `head`, wrapped at spaces, with later lines below its beginning."""
    return textwrap.fill(
        text,
        width(),
        initial_indent=head,
        subsequent_indent=" " * len(head),
        break_long_words=False,
        break_on_hyphens=False,
    )
