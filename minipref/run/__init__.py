"""What makes a run trustworthy: state on disk, resume, signals, several processes, logs and the final report.

    state.py         save and restore everything that the next step depends on
    folder.py        the run's folder: its lock, its manifest, its logs
    signals.py       stop on SIGINT or SIGTERM where the state can be saved
    distributed.py   several processes that take the same steps
    log.py           what a run prints
    report.py        the page and the model card at the end
"""
