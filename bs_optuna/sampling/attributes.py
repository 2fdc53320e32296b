"""Every key that bs_optuna stores in a study or a trial; written and read under these names only.

All values are plain JSON (float, int, str, list): optuna-dashboard offers the numeric ones on
its axes. The names carry no prefix because a person reads them there.
"""

from __future__ import annotations


# Of a trial: what really ran.
LEARNING_RATE = "learning_rate"  # float, peak learning rate of the schedule
WARMUP = "warmup"  # float, part of the run in which the learning rate rises
EFFECTIVE_BATCH_SIZE = "effective_batch_size"  # int, samples per optimizer step
MICROBATCH_SIZE = "microbatch_size"  # int, the last one used (it only shrinks)
ACCUMULATION_STEPS = "accumulation_steps"  # int, microbatches per step at that size
BACKOFFS = "backoffs"  # int, how often the microbatch was halved
PEAK_MEMORY_BYTES = "peak_memory_bytes"  # int, of the trial, where the device tells
SECONDS = "seconds"  # float, of training and evaluation
SAMPLES = "samples"  # int, training samples seen
STEPS = "steps"  # int, optimizer steps
DEVICE = "device"  # str, as torch writes it
PRUNE_REASON = "prune_reason"  # str, why the trial was pruned
DIVERGED = "diverged"  # how that begins where training diverged
VALID_PREFIX = "valid_"  # float each, mean loss and metrics on the validation data
NOISE_SCALE = "gradient_noise_scale"  # float, measured B_simple in samples

# Of a trial: what it learned about memory, for the trials after it.
MEMORY_KEY = "memory_key"  # str, what the two below depend on
MICROBATCH_FITS = "microbatch_fits"  # int, largest microbatch that ran a full step
MICROBATCH_FAILS = "microbatch_fails"  # int, smallest microbatch that ran out of memory

# Of a study.
CONFIG = "config"  # dict, the StudyConfig that made it
EXPERIMENT = "experiment"  # dict, what its trials must share: task, optimizer, budget
RECOMMENDATION = "recommendation"  # dict, the summary's figures
