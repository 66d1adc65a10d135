"""Run one of several training processes: `torchrun --nproc-per-node 4 -m medcot_utils.training.worker RUN_DIR`; also runs alone.

Each process holds a whole model on its own GPU and trains on its share of every batch. The first process writes checkpoints and
progress. It leaves the checkpoint of the last step, from which notebook 05 resumes."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from torch.distributed.elastic.multiprocessing.errors import record


@record
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--skip-plans", type=int, default=0, help="batch plans that ran out of memory before")
    options = parser.parse_args()

    from medcot_utils.machine.guarded_streams import guard_streams
    from medcot_utils.models.engine import get_engine
    from medcot_utils.run.directory import Run
    from medcot_utils.run.lock import keep

    guard_streams()
    run = Run.open(options.run_dir)
    if os.environ.get("RANK") in (None, "", "0"):  # one lock serves all processes; the notebook that starts them may hold it
        keep(run.path, "training worker")
    config = run.config
    engine = get_engine(config.model)  # before trl, transformers and peft
    import torch
    from accelerate import PartialState

    # This joins the process group, in which the processes agree on the free memory for the plan.
    PartialState(cpu=not torch.cuda.is_available())
    from medcot_utils.training.tracking import make_tracking_callbacks
    from medcot_utils.training.trainer import TrainingError, make_sft_trainer, plan_training, train

    model, tokenizer = engine.load(config.model)
    model = engine.add_lora(model, config.lora)
    train_rows, held_out_rows = run.read("train_rows"), run.read("held_out_rows")
    plans = plan_training(engine, model, config, train_rows, int(os.environ.get("WORLD_SIZE") or 1))
    if options.skip_plans >= len(plans):
        raise TrainingError(f"memory ran out with each of the {len(plans)} batch plans: use a larger GPU or shorter rows")
    output_dir = run.checkpoint_dir("adapter")

    def make_trainer(plan):
        return make_sft_trainer(engine, model, tokenizer, config, plan, train_rows, held_out_rows, output_dir)

    train(make_trainer, plans[options.skip_plans :], config, make_tracking_callbacks(run))


if __name__ == "__main__":
    main()
