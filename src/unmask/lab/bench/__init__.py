"""`unmask bench`: a step's time, memory and size on disk, against what a user would pick instead."""
