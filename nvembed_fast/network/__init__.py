"""The network on packed tokens: backbone, pooling heads, and both together."""
