"""Everything around the training loop: saved state, resume, signals, several processes, logs, the final report.

    state.py         save and restore the complete training state
    folder.py        the run's folder: its lock, its manifest, its logs
    setup.py         hyperparameters, split, and the manifest
    signals.py       stop on SIGINT or SIGTERM after a complete step
    distributed.py   data-parallel training in several processes
    log.py           the messages of a run
    report.py        the report page and the model card
"""
