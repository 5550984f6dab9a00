"""``python -m unmask.lab.study``: a worker process; see `unmask.lab.study.worker`."""

from unmask.lab.study.worker import main

if __name__ == "__main__":
    main()
