"""Search among the adapters of a pack: by words, and by the similarity of updates. `train` searches by loss on rows."""
