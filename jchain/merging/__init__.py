"""Banks made from other banks: joined, cut, or with layers that are mixed from others."""
