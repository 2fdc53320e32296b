"""Every user attribute that bs_optuna stores, written and read under these names only.

All values are plain JSON (float, int, str, list): optuna-dashboard offers the numeric ones on
its axes. The names carry no prefix because a person reads them there.
"""

from __future__ import annotations


# Of a trial: what really ran.
LEARNING_RATE = "learning_rate"  # float, peak learning rate of the schedule
WARMUP = "warmup"  # float, part of the run in which the learning rate rises
EFFECTIVE_BATCH_SIZE = "effective_batch_size"  # int, samples per optimizer step
MICROBATCH_SIZE = "microbatch_size"  # int, the last one used
ACCUMULATION_STEPS = "accumulation_steps"  # int, microbatches per step at that size
BACKOFFS = "backoffs"  # int, how often the microbatch was halved
OOM_ATTEMPTS = "oom_attempts"  # int, attempts that ran out of memory, where there were any
OOM_SECONDS = "oom_seconds"  # float, what they took
PEAK_MEMORY_BYTES = "peak_memory_bytes"  # int, of the trial, where the device tells
SECONDS = "seconds"  # float, of training and evaluation
SAMPLES = "samples"  # int, training samples seen
STEPS = "steps"  # int, optimizer steps
DEVICE = "device"  # str, as torch writes it
PRUNE_REASON = "prune_reason"  # str, why the trial was pruned or failed
DIVERGED = "diverged"  # how that begins where training diverged
VALID_PREFIX = "valid_"  # float each, mean loss and metrics on the validation data
THROUGHPUT = "microbatch_samples_per_second"  # list of [size, float], how "fastest" was chosen
NOISE_SCALE = "gradient_noise_scale"  # float, measured B_simple in samples

# Of a trial: what it learned about memory, for the trials after it.
MEMORY_KEY = "memory_key"  # str, what the four below depend on
MICROBATCH_FITS = "microbatch_fits"  # int, largest microbatch that ran a full step
MICROBATCH_FAILS = "microbatch_fails"  # int, smallest microbatch that ran out of memory
MICROBATCH_TRIED = "microbatch_tried"  # int, tried by a running trial, not yet known to fit or fail
EVALUATION_FITS = "evaluation_fits"  # int, piece of an evaluation that fitted after larger failed

# Of a trial in a worker process: what is needed to try it again should that die.
FIRST_ATTEMPT = "first_attempt"  # int, number of the trial that was the first attempt
ATTEMPT = "attempt"  # int, 1 more for each death of a worker
KILLED_BY = "killed_by"  # str, name of the signal that ended the attempt before
KILLED_MICROBATCH = "killed_microbatch"  # int, its microbatch size, if that was in training
EVALUATION_TRIED = "evaluation_tried"  # int, piece of the evaluation it is at; 0 between them
KILLED_EVALUATION = "killed_evaluation"  # int, piece of the evaluation that one died in
KILLED_EARLY = "killed_early"  # bool, whether one died before it trained, by looking ahead maybe
CHECKPOINT = "checkpoint"  # str, name of the file that all attempts share

# Of a study.
CONFIG = "config"  # dict, the StudyConfig that made it
EXPERIMENT = "experiment"  # dict, what its trials must share: task, objective, optimizer, budget
TARGET = "target"  # int, finished trials that the last command was to end with
RECOMMENDATION = "recommendation"  # dict, the summary's figures
SUGGESTED = "suggested_"  # dict each, what a process was given that it has not stored yet
