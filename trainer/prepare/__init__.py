"""What a run needs before there are processes: backbone, head, parts, footprint."""
