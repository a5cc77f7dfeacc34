"""Images in tar shards, in a folder or in an object store: an index says where each lies."""
