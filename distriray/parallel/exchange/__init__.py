"""The asynchronous swap of activations between the ranks of a gang."""
