import os

# Before torch is imported anywhere: two cores are shared by up to four ranks.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["WANDB_MODE"] = "offline"
