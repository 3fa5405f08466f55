"""Jobs of a Slurm cluster: their script, their submission, what follows their attempts, and a look at them.

A job is a bash script: a head that `script` makes of the configuration, and a body, launch/job.sh, the same
for all. The body starts attempts, one after the other, in one allocation or in several (a job that requeues
itself keeps its number). What comes after each attempt, `judge` decides from what its ranks left in the
attempt's folder. All is kept below the run's folder:

    <run>/slurm/job_<id>.sh, .log      the script as it was submitted, and what it says
    <run>/slurm/job_<id>/attempts.jsonl
    <run>/slurm/job_<id>/attempt_0/    rank_00000.log, outcome_00003.json, srun.log, nodes.txt, roll_call.json
"""
