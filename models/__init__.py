"""The decoder, and one file per model family in `families/`."""
