"""How a KV cache is kept smaller, or read in part: codecs of pages, eviction, selection, and when each applies."""
