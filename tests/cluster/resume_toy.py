"""resume_jobs.py with the toy job in place of training."""

import sys
from pathlib import Path

import jmt_dist.cluster.submit as submit
from jmt_dist.cluster import resume, sweep, tracking

tracking.prepare = lambda *_: None
submit.submit.__defaults__ = ("toyjob:run_fold", "jmt_dist.cluster.compare:compare")
resume.RUN_FOLD, sweep.COMPARE = "toyjob:run_fold", "toyjob:compare_sweep"
sys.exit(resume.resume(Path(sys.argv[1])))
