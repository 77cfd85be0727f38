"""Images on disk: where they lie, what they were made from, and whether a set is whole."""
