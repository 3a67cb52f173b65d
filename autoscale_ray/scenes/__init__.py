"""What a driving scene is: Arrow schema, pools on disk, flat batches, neighbour tables, readers."""
