"""The workbench: tasks, training runs, studies, figures, reports and benchmarks. Only the command line imports it."""
