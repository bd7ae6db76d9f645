"""Where workers of a sweep run: processes of this machine, jobs of Slurm, tasks of Ray.

All of them run ``cdl worker FOLDER``, which takes runs from the sweep's folder until none is left; the folder says who
trains what (`cdl.sweep.claims`). So a backend only starts workers and says which have ended, and how (`Backend`), and
`supervise` replaces them.
"""
