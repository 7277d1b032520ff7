"""Groups of ranks: how they find each other, agree on their steps, and share a layer's experts."""
