"""What a run will cost, before it starts: memory of each GPU, images, operations, disk."""
