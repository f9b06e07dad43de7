"""From a collection of adapters to a pack: by components, or by an error bound or a size; refits and verification."""
