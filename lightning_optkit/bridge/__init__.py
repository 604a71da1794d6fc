"""The only shared knowledge of Lightning: loss, batches, cadence, ranks and loggers."""
