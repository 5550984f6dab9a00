"""``python -m unmask.sweeps``: a worker process; see `unmask.sweeps.worker`."""

from unmask.sweeps.worker import main

if __name__ == "__main__":
    main()
