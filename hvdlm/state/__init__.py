"""The state of a training: taken in memory, kept, sent to workers that lack it, written to a store, gone on from."""
