#!/bin/bash
# One bank by a SLURM job array, a GPU a task:
#
#     sbatch examples/slurm.sh folder IMAGES --out BANK --device cuda
#     sbatch examples/slurm.sh hicodet --root EZ-HOI --model ViT-B/16
#
# What follows the script's name is what follows `patchbank extract`. Every task takes the part of the images that its
# number says, and all of them write into one bank. Any of them may be killed and started again.
#
# To submit some tasks again, say which part each is: SLURM counts only the tasks of its own array.
#
#     sbatch --array=5 --export=ALL,PART=5/16 examples/slurm.sh folder IMAGES --out BANK --device cuda
#
# To adapt: the number of tasks, what a task gets, the time, your cluster's --partition and --account, and the line that
# finds patchbank. A part is whole shards (256 MB each): more tasks than shards leaves some with nothing to do.

#SBATCH --job-name=patchbank
#SBATCH --array=0-15
#SBATCH --ntasks=1
#SBATCH --gpus-per-task=1
#SBATCH --cpus-per-task=12
#SBATCH --mem=32G
#SBATCH --time=12:00:00
#SBATCH --output=patchbank-%A_%a.log
#SBATCH --requeue
# Two minutes before the time is up: patchbank then commits what it has, and exits with 143.
#SBATCH --signal=B:TERM@120

set -euo pipefail

# source ~/venvs/patchbank/bin/activate

# The checkpoint should be there before the array starts (--weights FILE, or ROOT/checkpoints/pretrained_CLIP): nodes
# often reach no network. `exec`, so that SLURM's signal reaches patchbank and not this shell.
exec patchbank extract "$@" --partition "${PART:-auto}"
