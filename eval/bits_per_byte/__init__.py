"""Loss and bits per byte of any text or shards. Bits per byte can be compared between tokenizers."""
