"""Drop-in faces of other libraries: their names, arguments and random draws, on mtlfast's kernels."""
