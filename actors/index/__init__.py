"""Search indexes: Chroma and BM25, both projections of the document store."""
