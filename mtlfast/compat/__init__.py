"""Drop-in replacements for other libraries, with their names, arguments and random draws, on mtlfast's kernels."""
