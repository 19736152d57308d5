"""From files to micro-batches: sources of rows, images, chat text and labels, the plan of a run and its pipeline."""
