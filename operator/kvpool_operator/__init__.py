"""The kvpool operator: turns a `KVCachePool` object into a running pool on Kubernetes."""
