"""From a checkpoint to images on disk or in memory."""
